"""Kangaroo on a laptop: a target's own first layers and an adapter as its draft, beside what the paper compares with.

    python -m specjax.main --config=configs/kangaroo/tiny.py --workdir=runs/kangaroo

Stages: `target` (16 layers on the Python standard library, and its tokenizer; the other configs of this folder take
it from here), `adapter` (soft labels on the corpus, arXiv 2404.18911), `on_policy` (the same loss and steps on text
that the draft writes itself, as DistillSpec would), `no_adapter` (a norm before the head alone), `medusa` (Medusa-1's
heads on the target's last state, hard labels, no tree), `layers` (which layers to skip, for drafting by the others),
`evaluation` (batch 1: all of them at temperatures 0 and 1, beside plain decoding), `batches` (several prompts at once).

Hardware: 2 CPU cores. What to expect: the tables in configs/kangaroo/README.md, which are written from the records.
`configs/kangaroo/tiny.py:smoke` runs every stage in a minute or two.
"""

import kangaroo_parts as parts
from ml_collections import ConfigDict

# Layers of the target that draft and verification share: 2 of 16, the upper end of the paper's 1/16 to 1/10.
EXIT_LAYER = 2
STEPS = 480

ADAPTERS = {
    "adapter": {},
    "on_policy": {"on_policy": 1.0},
    "no_adapter": {"kind": "none", "steps": 80},
}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/kangaroo/tiny.py has one variant, smoke; not {variant!r}.")
    config = ConfigDict()
    config.stages = ("target", *ADAPTERS, "medusa", "layers", "evaluation", "batches")
    config.seed = 0
    config.target = parts.target(variant)
    exit_layer = 1 if variant else EXIT_LAYER
    for name, recipe in ADAPTERS.items():
        config[name] = parts.adapter(variant, "stage:target", **{"exit_layer": exit_layer, "steps": STEPS, **recipe})
    config.medusa = parts.medusa(variant, "stage:target", steps=STEPS)
    config.layers = parts.layers(variant, "stage:target")
    config.evaluation = _evaluation(variant, exit_layer)
    config.batches = _batches(variant)
    return config


def _evaluation(variant: str, exit_layer: int) -> ConfigDict:
    gammas = (3,) if variant else (4, 6)
    baseline = {"threshold": 0.0, "lossless": gammas[:1], "coupled": ()}
    drafters = {
        "ngram": {"kind": "ngram", "shortest": 2, "longest": 4, **baseline},
        "early_exit": {"kind": "early_exit", "exit_layer": exit_layer, **baseline},
        "early_exit_stop": {"kind": "early_exit", "exit_layer": exit_layer, **baseline, "threshold": 0.6},
        "medusa": {"kind": "medusa", "path": "stage:medusa", **baseline},
        "skip_layers": {"kind": "skip_layers", "skipped": "workdir:layers", **baseline},
    }
    for stage in ADAPTERS:
        drafters[stage] = parts.kangaroo(f"stage:{stage}", gammas, 0.6)
        drafters[f"{stage}_fixed"] = parts.kangaroo(f"stage:{stage}", gammas[:1], 0.0)
    compare = (("adapter", "no_adapter"), ("on_policy", "adapter"))
    section = parts.evaluation(variant, "stage:target", drafters, temperatures=(0.0, 1.0), compare=compare)
    section.measure_parts = not variant
    return section


def _batches(variant: str) -> ConfigDict:
    """Rows of a batch stop by themselves; the block ends when all have."""
    gamma = 3 if variant else 4
    drafters = {"adapter": parts.kangaroo("stage:adapter", (gamma,), 0.6)}
    drafters["adapter_fixed"] = parts.kangaroo("stage:adapter", (gamma,), 0.0)
    section = parts.evaluation(variant, "stage:target", drafters)
    section.selection.count = 3 if variant else 32
    section.batch_sizes = (1, 2) if variant else (1, 4, 16)
    return section
