"""Trains a draft of a chosen shape for your target, with the target's probabilities on the task's text.

    python -m specjax.main --config=configs/draft_design/train.py --workdir=runs/draft \\
        --config.target=DIR --config.tokenizer.path=DIR --config.model.layers=1 --config.model.width=640

configs/advise.py prints such a command for the shape it recommends. The draft starts from random weights and minimises
forward KL on the corpus. configs/distill.py:new trains on your own text and evaluates the draft as well.

Hardware: whatever holds both models. Time: not timed. `configs/draft_design/train.py:smoke` takes a few steps.
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
