"""How much of the quickstart's gain is the target's probabilities, and how much is on-policy text? Three seeds.

    python -m specjax.main --config=configs/quickstart_controls.py --workdir=runs/controls

Hardware: 2 CPU cores, 25 to 45 minutes. One target, larger than the quickstart's (which has ten minutes for it all),
and for each seed one draft trained plainly to its plateau, from which four drafts go on: `distilled` (on-policy),
`fixed` (the same divergence and steps on the corpus), `control_steps` (plainly, equal steps) and `control_clock`
(plainly, at least as long by the clock as `distilled`). The results are committed as configs/records/study.json;
README.md says what they show.
"""

from ml_collections import ConfigDict

from configs import quickstart

SEEDS = (0, 1, 2)
RECIPES = ("distilled", "fixed", "control_steps", "control_clock")


def get_config(variant: str = "") -> ConfigDict:
    base = quickstart.get_config(variant)
    if not variant:
        _enlarge(base)
    config = ConfigDict()
    config.seed = base.seed
    config.target = base.target
    stages, drafters, pairs = ["target"], {}, []
    for seed in SEEDS[:1] if variant else SEEDS:
        for recipe in ("supervised", *RECIPES):
            name = f"{recipe}_{seed}"
            config[name] = _stage(base, recipe, seed)
            stages.append(name)
            drafters[name] = {"kind": "model", "path": f"stage:{name}", "lossless": (4,), "coupled": ()}
        pairs += [(f"distilled_{seed}", f"{other}_{seed}") for other in ("supervised", *RECIPES[1:])]
        pairs.append((f"fixed_{seed}", f"control_clock_{seed}"))
    config.evaluation = base.evaluation
    config.evaluation.drafters = ConfigDict(drafters)
    config.evaluation.compare = tuple(pairs)
    config.evaluation.selection.count = 3 if variant else 40
    config.evaluation.measure_parts = False
    config.stages = (*stages, "evaluation")
    return config


def _enlarge(base: ConfigDict) -> None:
    """Wider and deeper models, and longer training of everything, than the quickstart has time for."""
    base.target.model.update({"layers": 4, "width": 640, "heads": 10, "kv_heads": 5, "mlp_width": 1792})
    base.target.train.update({"steps": 300, "eval_every": 100, "checkpoint_every": 100})
    for stage in ("supervised", "distilled", "control"):
        base[stage].model.mlp_width = 704
    base.supervised.train.steps = 480
    base.distilled.train.update({"steps": 90, "eval_every": 45, "checkpoint_every": 45})
    base.evaluation.max_new_tokens = 80


def _stage(base: ConfigDict, recipe: str, seed: int) -> ConfigDict:
    """One training stage: the quickstart's, with this recipe's text and this seed."""
    plain = recipe.startswith("control")
    section = base[
        recipe if recipe == "supervised" else "control" if plain else "distilled"
    ].copy_and_resolve_references()
    section.seed = seed
    if recipe != "supervised":
        section.model.init = f"stage:supervised_{seed}"
        section.train.steps = base.distilled.train.steps
    if plain:
        section.train.min_seconds_of = f"workdir:distilled_{seed}" if recipe == "control_clock" else ""
        section.data.batch_size = base.distilled.data.batch_size
    else:
        sources = {"fixed": "fixed", "distilled": "draft"}
        for source in ("fixed", "draft", "target"):
            section.data[source] = float(source == sources.get(recipe, "fixed"))
    section.speculative_eval.every = 0
    return section
