"""What Kangaroo's parts are worth: exit layer, draft length and threshold, the adapter's architecture, confidence.

    python -m specjax.main --config=configs/kangaroo/ablations.py --workdir=runs/kangaroo_ablations

The target is that of configs/kangaroo/tiny.py (run its stage `target` first), or another: `--config.target=DIR`.
Stages: `exit_1` to `exit_8` (adapters after that many layers); `own_head`, `layer`, `mlp`, `none` (other architectures,
at the same exit as `exit_2`); and four evaluations, each with plain decoding: `exits`, `grid` (threshold x gamma),
`kinds`, `temperatures` (confidence at temperature 1 against confidence at the sampling temperature). Every row of a
self-draft has the histogram of its confidence, for accepted and for rejected tokens.

Adapters are trained for a quarter of the steps of tiny.py: they are compared with one another, at equal steps.

Hardware: 2 CPU cores. Time and numbers to expect: configs/kangaroo/README.md.
`configs/kangaroo/ablations.py:smoke` trains a tiny target of its own.
"""

from ml_collections import ConfigDict

from configs import common
from configs.kangaroo import kangaroo_parts as parts

STEPS = 80
EXIT_LAYERS = (1, 2, 3, 4, 6, 8)
# The exit at which the other questions are asked.
EXIT_LAYER = 2
KINDS = {
    "own_head": {"own_head": True},
    "layer": {"kind": "layer"},
    "mlp": {"kind": "mlp", "own_head": True},
    "none": {"kind": "none"},
}
# A small target is unsure of most tokens: thresholds lie lower than the paper's.
GAMMA, THRESHOLD = 6, 0.2
GAMMAS, THRESHOLDS = (2, 4, 6, 8), (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)
TEMPERATURES = (0.2, 0.5, 1.0)


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("kangaroo/ablations", variant)
    config = ConfigDict()
    config.seed = 0
    stages, target = parts.given_target(config, variant)
    exits, middle = (EXIT_LAYERS, EXIT_LAYER) if not variant else ((1,), 1)
    kinds = KINDS if not variant else {"none": KINDS["none"]}
    recipes = {f"exit_{layer}": {"exit_layer": layer} for layer in exits}
    recipes |= {name: {"exit_layer": middle, **kind} for name, kind in kinds.items()}
    for name, recipe in recipes.items():
        config[name] = parts.adapter(variant, target, steps=STEPS, **recipe)
    evaluations = _evaluations(variant, target, exits, f"exit_{middle}", kinds)
    for name, section in evaluations.items():
        config[name] = section
    config.stages = (*stages, *recipes, *evaluations)
    return config


def _evaluations(variant: str, target, exits: tuple[int, ...], middle: str, others) -> dict[str, ConfigDict]:
    gammas, thresholds = (GAMMAS, THRESHOLDS) if not variant else ((2,), (0.0, 0.5))
    temperatures = TEMPERATURES if not variant else TEMPERATURES[-1:]
    gamma = (GAMMA,) if not variant else (2,)
    own = lambda name, threshold, gammas=gamma, **how: parts.kangaroo(f"stage:{name}", gammas, threshold, **how)
    of_exits = {}
    for layer in exits:
        of_exits |= {f"exit_{layer}": own(f"exit_{layer}", THRESHOLD), f"exit_{layer}_fixed": own(f"exit_{layer}", 0.0)}
    grid = {f"threshold_{round(100 * threshold)}": own(middle, threshold, gammas) for threshold in thresholds}
    by_kind = {"attention": own(middle, THRESHOLD), **{name: own(name, THRESHOLD) for name in others}}
    confidence = {"raw": own(middle, THRESHOLD), "adjusted": own(middle, THRESHOLD, adjusted=True)}
    confidence["fixed"] = own(middle, 0.0)
    sections = {
        "exits": parts.evaluation(variant, target, of_exits),
        "grid": parts.evaluation(variant, target, grid),
        "kinds": parts.evaluation(variant, target, by_kind),
        "temperatures": parts.evaluation(variant, target, confidence, temperatures=temperatures),
    }
    for section in sections.values():
        section.selection.count = 3 if variant else 16
    return sections
