"""Shapes of a draft for your target at a budget, timed on this device, and the command that trains the chosen one.

    python -m specjax.main --config=configs/draft_design/build.py --workdir=runs/build --config.target=DIR \\
        --config.parameters=2000000

With a budget of parameters, every depth of `layers` is scaled to it in the target's proportions, and the fastest is
chosen. With `--config.milliseconds` (and `parameters` 0), every depth is built at every size of `sizes`, and the
largest that is fast enough is chosen. The acceptance of such a shape is unknown until it is trained.

Hardware: any. Time: not timed. `configs/draft_design/build.py:smoke` times one small shape.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("draft_design/build", variant)
    config = ConfigDict()
    config.binary = "configs.draft_design.budget"
    config.seed = 0
    config.target = ""  # directory of the target, of which config.json alone is read
    config.layers = (1, 2, 4, 8)  # depths to consider
    config.parameters = 2_000_000  # the budget, or 0
    config.milliseconds = 0.0  # the budget of a decoding step, or 0
    config.sizes = (500_000, 1_000_000, 2_000_000, 4_000_000)  # parameters to try under a budget of milliseconds
    config.context = 64  # tokens of a row when it is timed
    config.batch_size = 1
    config.repeats = 9
    config.profile = ""  # file of measured points; "" is profile.json in the workdir
    # What the draft would learn on.
    config.task = common.task()
    config.param_dtype = "float32"
    config.compute_dtype = "auto"  # float32 on CPU, bfloat16 on accelerators
    if variant == "smoke":
        config.layers, config.parameters, config.repeats = (1,), 12_000, 2
    return config
