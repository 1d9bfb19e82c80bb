"""Loading a checkpoint of 3.2 billion parameters onto eight devices: time, bytes read per rank, memory of the host.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
    python -m specjax.main --config=configs/benchmark/loading.py --workdir=runs/benchmark_loading

The weights are random, the shape is that of Llama 3.2 3B.

Hardware: 2 CPU cores, 10 GB of free memory, 7 GB of disk. Time: a few minutes. Expect each rank to read an eighth, and
a peak of memory that exceeds the loaded arrays by less than the largest one. `configs/benchmark/loading.py:smoke` runs
in seconds, on one device.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("benchmark/loading", variant)
    config = ConfigDict()
    config.binary = "configs.benchmark.measure"
    config.seed = 0
    # Devices along each axis. Kernels are split over fsdp and tensor, so that ranks read both rows and columns.
    config.mesh = ConfigDict({"data": 1, "fsdp": 2, "tensor": 4})
    # The benchmarks to run, a table each.
    config.tables = ("loading",)
    config.models = ConfigDict({"large": _large()})
    config.loading = ConfigDict(
        {
            "model": "large",
            "param_dtype": "bfloat16",  # to load into; the files are in the model's
            "max_shard_bytes": 2_000_000_000,  # of a file
            "directory": "",  # where the checkpoint is written, and removed afterwards; "" is the system's place
        }
    )
    if variant == "smoke":
        config.mesh.update({"fsdp": 1, "tensor": 1})
        config.models.large.update({"vocab_size": 512, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2})
        config.models.large.update({"head_size": 16, "mlp_width": 128})
        config.loading.max_shard_bytes = 100_000
    return config


def _large() -> dict:
    return {
        "vocab_size": 128256,
        "width": 3072,
        "layers": 28,
        "heads": 24,
        "kv_heads": 8,
        "head_size": 128,
        "mlp_width": 8192,
        "max_positions": 4096,
        "rope_theta": 500000.0,
        "norm_epsilon": 1e-5,
        "tied_head": True,
        "param_dtype": "bfloat16",
        "compute_dtype": "float32",
    }
