"""Kangaroo on a laptop: the target's own first layers with an adapter as its draft, and the paper's alternatives.

    python -m specjax.main --config=configs/kangaroo/tiny.py --workdir=runs/kangaroo

Stages: `target` (16 layers, trained on the Python standard library, with its tokenizer; the other configs of this
folder use it); `adapter` and `adapter_1` (after 2 layers and after 1; soft labels on the corpus, arXiv 2404.18911);
`no_adapter` (only a norm before the head); `medusa` (Medusa-1's heads on the target's last state, hard labels, no
tree); `layers` (chooses layers to skip, so that the others draft); `evaluation` (all of them and plain decoding at
batch size 1, temperatures 0 and 1); `batches` (several prompts at once).

Hardware: 2 CPU cores. Time and numbers to expect: configs/kangaroo/README.md, written from the records.
`configs/kangaroo/tiny.py:smoke` runs every stage in a minute or two.
"""

from ml_collections import ConfigDict

from configs import common
from configs.kangaroo import kangaroo_parts as parts

STEPS = 300
# 1 and 2 layers of 16: the paper's exits lie between 1/16 and 1/10.
ADAPTERS = {
    "adapter": {"exit_layer": 2},
    "adapter_1": {"exit_layer": 1},
    "no_adapter": {"exit_layer": 2, "kind": "none", "steps": 40},
}


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("kangaroo/tiny", variant)
    config = ConfigDict()
    adapters = _adapters(variant)
    config.stages = ("target", *adapters, "medusa", "layers", "evaluation", "batches")
    config.seed = 0
    config.target = parts.target(variant)
    for name, recipe in adapters.items():
        config[name] = parts.adapter(variant, "stage:target", **{"steps": STEPS, **recipe})
    config.medusa = parts.medusa(variant, "stage:target", steps=STEPS)
    config.layers = parts.layers(variant, "stage:target")
    config.evaluation = _evaluation(variant)
    config.batches = _batches(variant)
    return config


def _adapters(variant: str) -> dict[str, dict]:
    """A smoke run's target has two layers, and one exit."""
    if not variant:
        return ADAPTERS
    return {name: {**recipe, "exit_layer": 1} for name, recipe in ADAPTERS.items() if name != "adapter_1"}


def _evaluation(variant: str) -> ConfigDict:
    few, some, many = (2, 4, 6) if not variant else (1, 2, 2)
    fixed = lambda *gammas: {"rules": {"lossless": gammas}}
    early_exit = {"kind": "early_exit", "exit_layer": 1 if variant else 2}
    drafters = {
        "ngram": {"kind": "ngram", "shortest": 2, "longest": 4, **fixed(some)},
        "early_exit": {**early_exit, **fixed(few)},
        "early_exit_stop": {**early_exit, **fixed(some), "threshold": 0.2},
        "medusa": {"kind": "medusa", "path": "stage:medusa", **fixed(few, some)},
        "skip_layers": {"kind": "skip_layers", "skipped": "workdir:layers", **fixed(few)},
        "no_adapter": parts.kangaroo("stage:no_adapter", (some,), 0.2),
        "adapter_adaptive": {**parts.kangaroo("stage:adapter", (many,), 0.0), "adaptive": True, "costs": ()},
    }
    exits = [name for name in _adapters(variant) if name != "no_adapter"]
    for stage in exits:
        drafters[f"{stage}_fixed"] = parts.kangaroo(f"stage:{stage}", (few, some), 0.0)
        drafters[f"{stage}_20"] = parts.kangaroo(f"stage:{stage}", (some, many), 0.2)
        drafters[f"{stage}_40"] = parts.kangaroo(f"stage:{stage}", (some,), 0.4)
    compare = (("adapter_20", "no_adapter"), *(("adapter_20", f"{stage}_20") for stage in exits[1:]))
    temperatures = (0.0,) if variant else (0.0, 1.0)
    section = parts.evaluation(variant, "stage:target", drafters, temperatures=temperatures, compare=compare)
    section.selection.count = 3 if variant else 20
    section.measure_parts = not variant
    return section


def _batches(variant: str) -> ConfigDict:
    """Each row of a batch stops by itself; the block ends when all have stopped."""
    gamma = 2 if variant else 4
    drafters = {"adapter_20": parts.kangaroo("stage:adapter", (gamma,), 0.2)}
    drafters["adapter_fixed"] = parts.kangaroo("stage:adapter", (gamma,), 0.0)
    section = parts.evaluation(variant, "stage:target", drafters)
    section.selection.count = 3 if variant else 32
    section.batch_sizes = (1, 2) if variant else (1, 4, 16)
    return section
