"""Trains a draft of a given shape for your target: on the task's text, by the target's probabilities.

    python -m specjax.main --config=configs/draft_design/train.py --workdir=runs/draft \\
        --config.target=DIR --config.tokenizer.path=DIR --config.model.layers=1 --config.model.width=640

What `configs/draft_design/advise.py` prints for a shape that nobody has trained is a call of this config. The recipe is
that of the quickstart: forward KL on the corpus, from random weights, for as many steps as its plain draft takes to its
plateau.

Hardware: whatever holds both models; not timed. `configs/draft_design/train.py:smoke` takes a few steps.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/draft_design/train.py has one variant, smoke; not {variant!r}.")
    base = quickstart.get_config(variant)
    config = base.distilled.copy_and_resolve_references()
    config.target = ""  # directory of the target
    config.tokenizer.path = ""  # the same directory: a draft speaks its target's tokens
    config.model.init = "random"
    config.data.update({"fixed": 1.0, "draft": 0.0})
    config.train.steps = base.supervised.train.steps
    config.speculative_eval.every = 0
    return config
