"""Distillation recipes by name: the sources of a draft's training text, and the divergence that it minimises.

They are the methods that DistillSpec (arXiv 2310.08461, section 4 and appendix) compares. `expand` writes the settings
of a recipe into the config; all other code reads these settings and not the recipe's name.
"""

from typing import Any

from ml_collections import ConfigDict

from specjax.distillation.data_sources import SOURCES
from specjax.distillation.divergences import CROSS_ENTROPY
from specjax.runtime.errors import UserError, nearest

# The settings of each recipe: the fractions of the sources of text, and the divergence with its parameter.
RECIPES: dict[str, dict[str, Any]] = {
    # Sequence-level distillation (arXiv 1606.07947): the negative log-likelihood of the target's own text.
    "seqkd": {"target": 1.0, "divergence": CROSS_ENTROPY},
    # Supervised distillation: soft labels on the corpus.
    "supervised_kd": {"fixed": 1.0, "divergence": "forward_kl"},
    # ImitKD (arXiv 2009.07253): soft labels on the corpus and on the draft's text.
    "imitkd": {"fixed": 0.5, "draft": 0.5, "divergence": "forward_kl"},
    # f-Distill (arXiv 2307.15190) with total variation, on text of both models.
    "f_distill": {"draft": 0.5, "target": 0.5, "divergence": "total_variation"},
    # On-policy GKD (arXiv 2306.13649).
    "gkd": {"draft": 1.0, "divergence": "jsd", "beta": 0.5},
    # DistillSpec's default recommendation; it also advises to choose the divergence by validation for each task.
    "distillspec": {"draft": 1.0, "divergence": "forward_kl"},
    # Draft-OPD (arXiv 2605.29343): text that both models decode; `loss.refused` is the divergence of refused drafts.
    "draft_opd": {"assisted": 1.0, "divergence": "forward_kl"},
}


def expand(config: Any) -> ConfigDict:
    """A copy of a training stage's config with the settings of its `recipe`; without changes if `recipe` is "".

    Sets the fractions if all are 0, and `loss.divergence` if it is "". Settings with other values must agree with
    the recipe.

    Raises:
      UserError: for an unknown recipe, and for settings that contradict it.
    """
    expanded = ConfigDict(config.to_dict())
    if not config.recipe:
        return expanded
    if config.recipe not in RECIPES:
        raise UserError(f'unknown recipe "{config.recipe}"{nearest(config.recipe, RECIPES)}')
    recipe = RECIPES[config.recipe]
    # (section, key) -> the recipe's value, and the value that leaves the setting to the recipe
    settings = {("data", name): (recipe.get(name, 0.0), 0.0) for name in SOURCES}
    settings["loss", "divergence"] = recipe["divergence"], ""
    if "beta" in recipe:
        settings["loss", "beta"] = recipe["beta"], recipe["beta"]
    has_fractions = any(config.data[name] for name in SOURCES)
    for (section, key), (value, left_open) in settings.items():
        stated = config[section][key]
        is_open = not has_fractions if section == "data" else stated == left_open
        if stated != value and not is_open:
            raise UserError(
                f'the recipe "{config.recipe}" means {section}.{key} {value!r} and the config says {stated!r}; set '
                f'that to {left_open!r}, or recipe to ""'
            )
        expanded[section][key] = value
    return expanded
