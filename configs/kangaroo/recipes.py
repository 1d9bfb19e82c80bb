"""How an adapter learns best: the paper's recipe against on-policy text and other divergences, over three seeds.

    python -m specjax.main --config=configs/kangaroo/recipes.py --workdir=runs/kangaroo_recipes

The target is that of configs/kangaroo/tiny.py (run its stage `target` first), or another: `--config.target=DIR`.
For each seed, one adapter per recipe, from the same random start and for equal steps: `paper` (soft labels on the
corpus: forward KL up to a constant, arXiv 2404.18911); on text that the draft writes itself (DistillSpec, arXiv
2310.08461) `on_policy` (forward KL), `reverse_kl`, `jsd` and `tv` (total variation); and `paper_clock`, the paper's
recipe for at least as long by the clock as `on_policy`. The stage `evaluation` decodes with all of them.

`configs/kangaroo/recipes.py:continued` (`--workdir=runs/kangaroo_recipes_continued`) starts from the adapters `paper`
of that run, as DistillSpec starts from trained drafts: a draft that cannot write yet learns little from its own text.
There `paper` is the paper's recipe for as many steps again, and `mixed` takes half of its text from the draft.

Hardware: 2 CPU cores. Time: about 25 minutes, `continued` about 15. Expect the tables in configs/kangaroo/README.md.
`configs/kangaroo/recipes.py:smoke` trains a tiny target of its own and one seed.
"""

from ml_collections import ConfigDict

from configs import common
from configs.kangaroo import kangaroo_parts as parts

STEPS = 60
SEEDS = (0, 1, 2)
EXIT_LAYER = 2
RECIPES = {
    "paper": {},
    "on_policy": {"on_policy": 1.0},
    "paper_clock": {},
    "reverse_kl": {"divergence": "reverse_kl", "on_policy": 1.0},
    "jsd": {"divergence": "jsd", "on_policy": 1.0},
    "tv": {"divergence": "total_variation", "on_policy": 1.0},
}
CONTINUED = {
    "paper": {},
    "on_policy": {"on_policy": 1.0},
    "paper_clock": {},
    "mixed": {"on_policy": 0.5},
    "tv": {"divergence": "total_variation", "on_policy": 1.0},
}
OF_VARIANT = {
    "": RECIPES,
    "continued": CONTINUED,
    "smoke": {name: RECIPES[name] for name in ("paper", "on_policy", "paper_clock")},
}


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("kangaroo/recipes", variant, ("continued", "smoke"))
    smoke = "smoke" if variant == "smoke" else ""
    config = ConfigDict()
    config.seed = 0
    stages, target = parts.given_target(config, smoke)
    recipes = OF_VARIANT[variant]
    if variant == "continued":
        config.begun = "runs/kangaroo_recipes"  # workdir of the run whose adapters `paper` are trained further
    names, pairs = [], []
    for seed in SEEDS[:1] if smoke else SEEDS:
        for recipe, how in recipes.items():
            name = f"{recipe}_{seed}"
            exit_layer = 1 if smoke else EXIT_LAYER
            config[name] = parts.adapter(smoke, target, exit_layer=exit_layer, steps=STEPS, seed=seed, **how)
            if variant == "continued":
                config[name].model.init = config.get_ref("begun") + f"/paper_{seed}/export"
                config[name].seed = seed + len(SEEDS)  # other text than before
            if recipe == "paper_clock":
                config[name].train.min_seconds_of = f"workdir:on_policy_{seed}"
            names.append(name)
        pairs += [(f"{recipe}_{seed}", f"paper_{seed}") for recipe in recipes if recipe != "paper"]
    drafters = {name: parts.kangaroo(f"stage:{name}", (4,), 0.0) for name in names}
    section = parts.evaluation(smoke, target, drafters, temperatures=(0.0, 1.0), compare=tuple(pairs))
    section.selection.count = 3 if smoke else 24
    config.evaluation = section
    config.stages = (*stages, *names, "evaluation")
    return config
