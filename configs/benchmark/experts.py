"""What a verification by a sparse target costs: measured at 1 to 9 tokens, against `specjax.evaluation.expert_use`.

    python -m specjax.main --config=configs/benchmark/experts.py --workdir=runs/benchmark_experts

The target is random: 8 of 64 experts compute each token, so that a block of 9 tokens uses 45 of them. Three numbers of
tokens are timed for the model, which predicts the others. All are timed in turns, on other tokens in each round.

Hardware: 2 CPU cores, 2 GB of free memory, otherwise idle. Time: one minute. Expect ratios of measured to predicted
seconds within 10% of 1. `configs/benchmark/experts.py:smoke` runs in seconds.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("benchmark/experts", variant)
    config = ConfigDict()
    config.binary = "configs.benchmark.measure"
    config.seed = 0
    config.mesh = common.mesh()
    # The benchmarks to run, a table each.
    config.tables = ("experts",)
    config.models = ConfigDict({"sparse": _sparse()})
    config.experts = ConfigDict(
        {
            "context": 128,  # tokens in the cache
            "tokens": (1, 2, 3, 4, 5, 6, 7, 8, 9),  # tokens of a verification
            "timed": (1, 2, 9),  # those from which the model predicts the others; one token alone has another kernel
            "rounds": 40,  # of all of them in turns; a row is the median
        }
    )
    if variant == "smoke":
        config.models.sparse.update({"width": 32, "layers": 1, "heads": 2, "head_size": 16, "expert_width": 16})
        config.experts.update({"tokens": (1, 2, 3), "timed": (1, 3), "rounds": 2})
    return config


def _sparse() -> dict:
    return {
        "vocab_size": 4096,
        "width": 512,
        "layers": 4,
        "heads": 8,
        "kv_heads": 2,
        "head_size": 64,
        "mlp_width": 512,
        "experts": 64,
        "experts_per_token": 8,
        "expert_width": 512,
        "max_positions": 1024,
        "rope_theta": 10000.0,
        "norm_epsilon": 1e-5,
        "tied_head": True,
        "param_dtype": "float32",
        "compute_dtype": "float32",
    }
