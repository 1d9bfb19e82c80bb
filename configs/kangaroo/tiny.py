"""Kangaroo on a laptop: a target's own first layer and an adapter as its draft, trained as in the paper and on-policy.

    python -m specjax.main --config=configs/kangaroo/tiny.py --workdir=runs/kangaroo

Stages: `target` (and its tokenizer), `adapter` (soft labels on the corpus, arXiv 2404.18911), `on_policy` (the same
loss and steps on text that the draft writes itself, as DistillSpec would), `no_adapter` (a norm before the head
alone), `evaluation`: each of them with and without the confidence stop, beside prompt lookup.

Hardware: 2 CPU cores. Expect `identical` equal to the number of prompts, and fewer drafted tokens with a threshold than
without. It has been run as `configs/kangaroo/tiny.py:smoke` only, so its time and its speed-ups are not known yet.
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

ADAPTERS = {
    "adapter": {"kind": "attention", "on_policy": False},
    "on_policy": {"kind": "attention", "on_policy": True},
    "no_adapter": {"kind": "none", "on_policy": False},
}


def _quickstart(variant: str) -> ConfigDict:
    """The quickstart's own config, which this one varies."""
    path = pathlib.Path(__file__).parents[1] / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/kangaroo/tiny.py has one variant, smoke; not {variant!r}.")
    base = _quickstart(variant)
    config = ConfigDict()
    config.stages = ("target", *ADAPTERS, "evaluation")
    config.seed = base.seed
    config.target = base.target
    # Deep, so that one layer is little beside the others, and wide enough that verification is cheap on a CPU.
    if not variant:
        config.target.model.update({"layers": 16, "width": 384, "heads": 6, "kv_heads": 6, "mlp_width": 1024})
    for name, recipe in ADAPTERS.items():
        config[name] = _stage(base, recipe)
    config.evaluation = _evaluation(base, variant)
    return config


def _stage(base: ConfigDict, recipe: dict) -> ConfigDict:
    """Trains an adapter: the quickstart's distillation, with the adapter as what is trained."""
    section = base.distilled.copy_and_resolve_references()
    # The shape is the target's: of `model` only the dtypes are read.
    section.model.init = "adapter"
    # kind: attention (the paper's), layer, mlp or none; own_head: a trained head in place of the target's frozen one.
    section.adapter = ConfigDict({"exit_layer": 1, "kind": recipe["kind"], "own_head": False})
    section.data.update({"fixed": float(not recipe["on_policy"]), "draft": float(recipe["on_policy"])})
    return section


def _evaluation(base: ConfigDict, variant: str) -> ConfigDict:
    section = base.evaluation.copy_and_resolve_references()
    gamma = 3 if variant else 6
    drafters = {"ngram": {"kind": "ngram", "shortest": 2, "longest": 4, "lossless": (gamma,), "coupled": ()}}
    for stage in ADAPTERS:
        # A block ends behind the first token of which the draft was less sure than the threshold; 0 is off.
        for name, threshold in ((stage, 0.6), (f"{stage}_fixed", 0.0)):
            drafters[name] = {
                "kind": "kangaroo",
                "path": f"stage:{stage}",
                "threshold": threshold,
                "lossless": (gamma,),
                "coupled": (gamma,) if name == "adapter" else (),
            }
    section.drafters = ConfigDict(drafters)
    section.compare = (("adapter", "no_adapter"), ("on_policy", "adapter"))
    return section
