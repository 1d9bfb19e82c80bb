"""What decoding costs on this machine: the decoding loop against a minimal one, verification, blocks, context.

    python -m specjax.main --config=configs/benchmark/cpu.py --workdir=runs/benchmark_cpu

Weights are random: nothing here depends on what a model writes.

Hardware: 2 CPU cores, otherwise idle. Time: about 4 minutes, most of it compilation. Expect plain decoding within 3% of
the minimal loop. `configs/benchmark/cpu.py:smoke` runs in seconds.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("benchmark/cpu", variant)
    config = ConfigDict()
    config.binary = "configs.benchmark.measure"
    config.seed = 0
    # Devices along each axis; the benchmarks are of one device.
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    # The benchmarks to run, a table each.
    config.tables = ("plain_decoding", "verification", "blocks", "context")
    config.repeats = 7  # measurements of which the median is taken
    config.steps = 24  # steps of a loop on the device in one measurement of a step
    config.models = ConfigDict(
        {
            "draft": _model(layers=1, width=256, heads=4),
            "narrow": _model(layers=6, width=256, heads=4),
            "medium": _model(layers=6, width=384, heads=6),
            "wide": _model(layers=4, width=640, heads=10),
        }
    )
    # Plain decoding: prompt tokens, tokens emitted, batch 1.
    config.plain = ConfigDict({"models": ("narrow", "medium", "wide"), "prompt": 32, "new_tokens": 96})
    # Verification of gamma + 1 tokens, relative to one step.
    config.verification = ConfigDict(
        {
            "models": ("narrow", "medium", "wide"),
            "gammas": (1, 2, 3, 4, 5, 6, 7),
            "context": 96,
            "capacity": 256,
        }
    )
    # Seconds of a whole block; gamma 0 is plain decoding.
    config.blocks = ConfigDict(
        {
            "target": "wide",
            "draft": "draft",
            "gammas": (0, 1, 2, 4, 6),
            "batch_sizes": (1, 4, 8),
            "prompt": 32,
            "new_tokens": 48,
            "temperature": 1.0,
        }
    )
    # One step against the length of the text at one capacity, and against the capacity for one short text.
    config.context = ConfigDict(
        {
            "model": "wide",
            "contexts": (64, 128, 256, 512, 1024),
            "capacity": 1088,
            "short_context": 64,
            "capacities": (256, 512, 1024, 2048),
        }
    )
    if variant == "smoke":
        _shrink(config)
    return config


def _model(layers: int, width: int, heads: int) -> dict:
    return {
        "vocab_size": 1024,
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": heads // 2,
        "head_size": width // heads,
        "mlp_width": width * 11 // 4,
        "max_positions": 4096,
        "rope_theta": 10000.0,
        "norm_epsilon": 1e-5,
        "tied_head": True,
        "param_dtype": "float32",
        "compute_dtype": "float32",
    }


def _shrink(config: ConfigDict) -> None:
    """Every benchmark once, on models that compile in a moment."""
    config.repeats, config.steps = 2, 2
    config.models = ConfigDict({"draft": _model(1, 16, 2), "wide": _model(2, 32, 2)})
    for model in config.models.values():
        model.vocab_size = 32
    config.plain.update({"models": ("wide",), "prompt": 4, "new_tokens": 4})
    config.verification.update({"models": ("wide",), "gammas": (1, 2), "context": 8, "capacity": 16})
    config.blocks.update({"gammas": (0, 2), "batch_sizes": (1, 2), "prompt": 4, "new_tokens": 4})
    config.context.update({"contexts": (8, 16), "capacity": 32, "short_context": 8, "capacities": (16, 256)})
