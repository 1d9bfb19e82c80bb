"""What decoding and on-policy training reach on one GPU or TPU: bandwidth, blocks, pauses of the device, other systems.

    make accelerator

runs the tests of exactness on the device, then this config part by part, each with a time limit and a record of its own
in runs/accelerator/. One part alone:

    python -m specjax.main --config=configs/benchmark/accelerator.py --workdir=DIR --config.tables="('large_plain',)"

Weights are random. Shapes are those of Llama 3.2 1B and Llama 3.1 8B with drafts of a tenth of their size, in bfloat16.

Hardware: one GPU of 80 GB. Time: at most 8 minutes. `make accelerator SMOKE=1` runs tiny shapes on CPU.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("benchmark/accelerator", variant)
    config = ConfigDict()
    config.binary = "configs.benchmark.measure"
    config.seed = 0
    # Devices along each axis; the benchmarks are of one device.
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    # The benchmarks to run, a table each.
    config.tables = ("bandwidth", "large_plain", "large_speculative", "greedy_identity", "on_policy_step", "profile")
    config.repeats = 3  # measurements of which the median is taken
    config.steps = 32  # calls of the target in one measurement of verification
    # Tokens of every prompt, and tokens written after it: fewer than 256 together, so that one program decodes all.
    config.prompt, config.new_tokens = 128, 96
    config.models = ConfigDict(
        {
            "8B": _model(layers=32, width=4096, heads=32, head_size=128, mlp_width=14336, tied_head=False),
            "1B": _model(layers=16, width=2048, heads=32, head_size=64, mlp_width=8192),
            "750M": _model(layers=16, width=1536, heads=24, head_size=64, mlp_width=6144),
            "30M": _model(layers=2, width=512, heads=8, head_size=64, mlp_width=2048),
            "100M": _model(layers=8, width=512, heads=8, head_size=64, mlp_width=2048),
        }
    )
    config.bandwidth = ConfigDict({"megabytes": 2048})
    config.large_plain = ConfigDict({"models": ("8B", "1B"), "batch_sizes": (1, 32)})
    speculative = {"pairs": (("8B", "750M"),), "gamma": 4, "batch_sizes": (1,), "temperatures": (1.0,)}
    config.large_speculative = ConfigDict(speculative)
    identity = {"dtypes": ("float32", "bfloat16"), "target": "100M", "draft": "30M", "gamma": 4, "batch_size": 8}
    config.greedy_identity = ConfigDict(identity)
    config.on_policy_step = ConfigDict({"target": "1B", "draft": "100M", "batch_size": 16})
    config.profile = ConfigDict({"target": "1B", "draft": "100M", "gamma": 4, "batch_sizes": (1,)})
    config.transformers_decoding = ConfigDict({"models": ("1B",), "drafts": ("100M",), "batch_sizes": (1,), "gamma": 4})
    return _smoke(config) if variant else config


def _model(layers: int, width: int, heads: int, head_size: int, mlp_width: int, tied_head: bool = True) -> dict:
    return {
        "vocab_size": 128256,
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": 8,
        "head_size": head_size,
        "mlp_width": mlp_width,
        "max_positions": 8192,
        "rope_theta": 500000.0,
        "norm_epsilon": 1e-5,
        "tied_head": tied_head,
        "param_dtype": "bfloat16",
        "compute_dtype": "bfloat16",
    }


def _smoke(config: ConfigDict) -> ConfigDict:
    """Every part on tiny models."""
    config.repeats, config.steps, config.prompt, config.new_tokens = 1, 2, 8, 8
    for model in config.models.values():
        model.update({"vocab_size": 64, "width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_size": 16})
        model.update({"mlp_width": 64, "param_dtype": "float32", "compute_dtype": "float32"})
    config.bandwidth.megabytes = 4
    config.large_plain.update({"models": ("1B",), "batch_sizes": (1, 2)})
    config.large_speculative.update(
        {"pairs": (("1B", "100M"),), "gamma": 2, "batch_sizes": (2,), "temperatures": (1.0,)}
    )
    config.greedy_identity.update({"dtypes": ("float32",), "gamma": 2, "batch_size": 2})
    config.on_policy_step.batch_size = 2
    config.profile.update({"gamma": 2, "batch_sizes": (1,)})
    config.transformers_decoding.update({"batch_sizes": (1,), "gamma": 2})
    return config
