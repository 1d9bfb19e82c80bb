"""Trains a draft of a given shape for your target: on the task's text, by the target's probabilities.

    python -m specjax.main --config=configs/draft_design/train.py --workdir=runs/draft \\
        --config.target=DIR --config.tokenizer.path=DIR --config.model.layers=1 --config.model.width=640

What `configs/advise.py` prints for a shape that nobody has trained is a call of this config. The recipe is
that of the quickstart: forward KL on the corpus, from random weights, for as many steps as its plain draft takes to its
plateau.

Hardware: whatever holds both models; not timed. `configs/draft_design/train.py:smoke` takes a few steps.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("draft_design/train", variant)
    config = common.distillation("", "random", steps=420)
    config.target = ""  # directory of the target
    config.tokenizer.path = ""  # the same directory: a draft shares its target's tokens
    config.data.update({"fixed": 1.0, "draft": 0.0})
    return common.smoke(config) if variant == "smoke" else config
