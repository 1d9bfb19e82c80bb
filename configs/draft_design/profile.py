"""The time of a decoding step on this device, by depth, width, heads, batch, context, gamma and steps per dispatch.

    python -m specjax.main --config=configs/draft_design/profile.py --workdir=runs/profile

"Decoding Speculative Decoding" (arXiv 2402.01528) finds on GPUs at batch size 1 that, for a fixed number of parameters,
the time of a step is linear in depth and nearly flat in width. The table "lines" has slope and R² on this device. On a
CPU a step waits for its weights to be read: at fixed depth time follows the number of parameters, and at a fixed number
expect 24 layers to take two to three times as long as one. Weights are random. Every point is stored in profile.json of
the workdir; an interrupted profile resumes, and one of another device or jax version is refused. Shapes that need more
than four fifths of `memory` are not run: their seconds are a roofline bound, marked by `estimate`.

Hardware: 2 CPU cores. Time: two minutes. `configs/draft_design/profile.py:smoke` takes seconds.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("draft_design/profile", variant)
    config = ConfigDict()
    config.binary = "configs.draft_design.series"
    config.seed = 0
    config.profile = ""  # file of the points; "" is profile.json in the workdir
    config.memory = 700_000_000  # bytes for weights and caches; 0 asks the device
    config.repeats = 9  # measurements of which the median is taken
    config.steps = 24  # steps of a dispatch
    config.context = 64  # tokens per row, unless a series varies it
    # Whose vocabulary, head size and proportions all shapes have.
    config.base = ConfigDict(
        {
            "vocab_size": 1024,
            "width": 256,
            "layers": 4,
            "heads": 8,
            "kv_heads": 4,
            "head_size": 32,
            "mlp_width": 704,
            "max_positions": 4096,
            "rope_theta": 10000.0,
            "norm_epsilon": 1e-5,
            "tied_head": True,
            "param_dtype": "float32",
            "compute_dtype": "auto",  # float32 on CPU, bfloat16 on accelerators
        }
    )
    config.parameters = 6_000_000  # of all shapes but those of `widths`
    config.depths = (1, 2, 3, 4, 6, 8, 12, 16, 24)  # layers
    config.depth = 4  # of all other series
    config.widths = (128, 192, 256, 384, 512, 640)
    config.heads = (2, 4, 8, 16)  # of the same width together; each has to divide it
    config.batch_sizes = (1, 2, 4, 8)
    config.contexts = (64, 128, 256, 512, 1024)
    config.gammas = (0, 1, 2, 3, 4, 5, 6, 7, 8)  # verification of gamma + 1 tokens
    config.dispatches = (1, 2, 4, 8, 24)  # steps in one dispatch; 1 is a lone step
    config.published = ("noft-1.3b", "wide-1.3b", "wide-796m", "wide-543m", "wide-290m")  # shapes of the paper
    if variant == "smoke":
        _shrink(config)
    return config


def _shrink(config: ConfigDict) -> None:
    """Every series, on shapes that compile in a moment."""
    config.repeats, config.steps = 2, 2
    config.base.update({"vocab_size": 32, "width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_size": 8})
    config.base.mlp_width = 32
    config.parameters, config.depth = 12_000, 1
    config.depths, config.widths, config.heads = (1, 2, 3), (16, 32, 48), (2,)
    config.batch_sizes, config.contexts, config.gammas, config.dispatches = (1, 2), (8, 16), (0, 2), (1, 2)
    config.published = ("wide-290m",)
