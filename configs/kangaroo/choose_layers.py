"""Chooses the layers of your target that the drafter "skip_layers" leaves out (arXiv 2309.08168, simplified).

    python -m specjax.main --config=configs/kangaroo/choose_layers.py --workdir=runs/layers --config.target=DIR

A drafter of kind skip_layers takes the choice with `"skipped": "runs/layers"`, or `"skipped": "workdir:STAGE"` if this
is an earlier stage of the same config.

Hardware: whatever holds the target. Time: not timed; the target reads the texts about layers^2 / 2 times. Expect one
row per number of layers left out: acceptance falls with each, and so does cost. The row with the largest predicted
speed-up is `chosen`; it is below 1 if no layer can be spared. `:smoke` uses two prompts and leaves out one layer.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("kangaroo/choose_layers", variant)
    config = ConfigDict()
    config.binary = "choose_layers"
    config.seed = 7  # other prompts than those of an evaluation
    # Devices along each axis; 1, 1, 1 is one device.
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    config.target = ""  # directory of the target
    config.task = common.task()
    config.param_dtype = "float32"
    config.compute_dtype = "auto"
    # The prompts that the target continues: how many, their tokens, whether each is a user's turn of a chat.
    config.selection = ConfigDict({"count": 8, "length_min": 16, "length_max": 32, "chat": False})
    config.max_new_tokens = 80
    config.temperature = 0.0  # at which the text is written and acceptance judged
    config.most_skipped = 8  # layers left out at most
    config.longest_gamma = 8  # tokens drafted a block at most
    # Seconds of verifying a block over those of a plain step: 1 where memory is what costs; configs/benchmark/cpu.py
    # measures it.
    config.verify_cost = 1.3
    if variant == "smoke":
        config.task.size = 60_000
        config.selection.update({"count": 2, "length_min": 4, "length_max": 8})
        config.max_new_tokens = 8
        config.most_skipped = 1
    return config
