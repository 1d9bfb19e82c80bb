"""Memory of a distillation step for vocabularies of 32k to 256k, with the heads applied in chunks and all at once.

    python -m specjax.main --config=configs/benchmark/distillation_memory.py --workdir=runs/distillation_memory

Models are narrow, so that the vocabulary decides the memory.

Hardware: 2 CPU cores, 8 GB of free memory. Time: two to three minutes. Expect memory to grow with the draft's head only
if the heads run in chunks, and with the logits if they run at once: the table in configs/distillspec/README.md.
`configs/benchmark/distillation_memory.py:smoke` runs in seconds.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("benchmark/distillation_memory", variant)
    config = ConfigDict()
    config.binary = "configs.benchmark.measure"
    config.seed = 0
    # Devices along each axis; this benchmark is of one device.
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    # The benchmarks to run, a table each.
    config.tables = ("distillation_memory",)
    # Their vocabulary is that of the case.
    config.models = ConfigDict({"draft": _model(layers=1, width=64), "target": _model(layers=2, width=128)})
    config.memory = ConfigDict(
        {
            "target": "target",
            "draft": "draft",
            "vocabularies": (32_768, 65_536, 131_072, 262_144),
            "batch_size": 4,
            "sequence_length": 128,
            "chunk": 64,  # predictions, of all rows, whose logits exist at one time
            "divergence": "forward_kl",
        }
    )
    if variant == "smoke":
        config.memory.update({"vocabularies": (4096,), "batch_size": 4, "sequence_length": 64, "chunk": 16})
    return config


def _model(layers: int, width: int) -> dict:
    return {
        "layers": layers,
        "width": width,
        "heads": width // 32,
        "kv_heads": width // 32,
        "head_size": 32,
        "mlp_width": width * 3,
        "max_positions": 1024,
        "rope_theta": 10000.0,
        "norm_epsilon": 1e-5,
        "tied_head": True,
        "param_dtype": "float32",
        "compute_dtype": "float32",
    }
