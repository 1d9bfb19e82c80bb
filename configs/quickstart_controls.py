"""How much of the quickstart's gain is the target's probabilities, and how much on-policy text? Three seeds.

    python -m specjax.main --config=configs/quickstart_controls.py --workdir=runs/controls

The target is larger than the quickstart's, which has ten minutes for everything. For each seed, one draft is trained
plainly to its plateau, and four drafts continue from it: `distilled` (on-policy), `fixed` (the same divergence and
steps, on the corpus), `control_steps` (plainly, for equal steps) and `control_clock` (plainly, for at least as long by
the clock as `distilled`).

Hardware: 2 CPU cores. Time: 25 to 45 minutes. Expect `distilled` and `fixed` to gain about equally, and the controls
nothing: the table of configs/distillspec/README.md, from configs/records/study.json.
"""

from ml_collections import ConfigDict

from configs import common

SEEDS = (0, 1, 2)
RECIPES = ("distilled", "fixed", "control_steps", "control_clock")
STEPS = 90  # of each recipe


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("quickstart_controls", variant)
    config = ConfigDict()
    config.seed = 0
    config.target = _target()
    stages, drafters, pairs = ["target"], {}, []
    for seed in SEEDS[:1] if variant else SEEDS:
        for recipe in ("supervised", *RECIPES):
            name = f"{recipe}_{seed}"
            config[name] = _draft(recipe, seed)
            stages.append(name)
            drafters[name] = {"kind": "model", "path": f"stage:{name}", "rules": {"lossless": (4,)}}
        pairs += [(f"distilled_{seed}", f"{other}_{seed}") for other in ("supervised", *RECIPES[1:])]
        pairs.append((f"fixed_{seed}", f"control_clock_{seed}"))
    config.evaluation = common.evaluation("stage:target", drafters)
    config.evaluation.compare = tuple(pairs)
    config.evaluation.selection.count = 40
    config.evaluation.max_new_tokens = 80
    config.evaluation.measure_parts = False
    config.stages = (*stages, "evaluation")
    if variant == "smoke":
        common.smoke(config)
        config.target.model.layers = 2
    return config


def _target() -> ConfigDict:
    """A wider and deeper model, trained longer, than the quickstart has time for."""
    section = common.training(steps=300, learning_rate=1.5e-3)
    section.tokenizer.path = ""  # train one
    section.model.update({"layers": 4, "width": 640, "heads": 10, "kv_heads": 5, "mlp_width": 1792})
    section.data.batch_size = 8
    section.train.update({"eval_every": 100, "eval_batches": 4, "checkpoint_every": 100})
    return section


def _draft(recipe: str, seed: int) -> ConfigDict:
    """The training stage of one draft: plainly to its plateau, or one of RECIPES from there."""
    init = f"stage:supervised_{seed}"
    if recipe == "supervised":
        section = common.training_to_plateau(steps=480, seed=seed)
    elif recipe.startswith("control"):
        section = common.training(STEPS, 3e-3, seed=seed)
        section.model.init = init
        section.data.batch_size = 24  # as in distillation
        section.train.min_seconds_of = f"workdir:distilled_{seed}" if recipe == "control_clock" else ""
    else:
        section = common.distillation("stage:target", init, steps=STEPS, seed=seed)
        section.data.update({"fixed": float(recipe == "fixed"), "draft": float(recipe == "distilled")})
        section.train.update({"eval_every": 45, "checkpoint_every": 45})
    section.model.mlp_width = 704
    return section
