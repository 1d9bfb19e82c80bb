"""Distillation recipes by name: which text a draft learns on, and which divergence it minimises.

They are the methods that DistillSpec (arXiv 2310.08461, section 4 and appendix) compares. `expand` writes the settings
of a recipe into the config; everything else reads those settings and never the name.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from specjax.distillation.data_sources import SOURCES
from specjax.distillation.divergences import CROSS_ENTROPY
from specjax.runtime.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings of a recipe.

    Attributes:
      fixed: fraction of steps on the corpus.
      draft: fraction of steps on text that the draft writes.
      target: fraction of steps on text that the target writes.
      divergence: a key of `divergences.DIVERGENCES`, or "cross_entropy" (hard labels).
      parameters: of the divergence, pairs of name and value.
    """

    fixed: float
    draft: float
    target: float
    divergence: str
    parameters: tuple[tuple[str, float], ...] = ()


RECIPES = {
    # Sequence-level distillation (arXiv 1606.07947): the negative log-likelihood of the target's own text.
    "seqkd": Recipe(fixed=0.0, draft=0.0, target=1.0, divergence=CROSS_ENTROPY),
    # Supervised distillation: soft labels on the corpus.
    "supervised_kd": Recipe(fixed=1.0, draft=0.0, target=0.0, divergence="forward_kl"),
    # ImitKD (arXiv 2009.07253): soft labels on the corpus and on the draft's text.
    "imitkd": Recipe(fixed=0.5, draft=0.5, target=0.0, divergence="forward_kl"),
    # f-Distill (arXiv 2307.15190) with total variation, on text of both models.
    "f_distill": Recipe(fixed=0.0, draft=0.5, target=0.5, divergence="total_variation"),
    # On-policy GKD (arXiv 2306.13649).
    "gkd": Recipe(fixed=0.0, draft=1.0, target=0.0, divergence="jsd", parameters=(("beta", 0.5),)),
    # DistillSpec's first recommendation; it advises to validate the divergence for the task and the decoding.
    "distillspec": Recipe(fixed=0.0, draft=1.0, target=0.0, divergence="forward_kl"),
}


def expand(config: Any) -> ConfigDict:
    """A copy of a training stage's config with the settings of its `recipe`; unchanged if that is "".

    Settings that the config leaves open (all three fractions 0, `loss.divergence` "") are set. Others must agree with
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
    data, loss = expanded.data, expanded.loss
    if any(data[name] for name in SOURCES):
        _agree(config.recipe, {f"data.{name}": (data[name], getattr(recipe, name)) for name in SOURCES}, 0.0)
    if loss.divergence:
        _agree(config.recipe, {"loss.divergence": (loss.divergence, recipe.divergence)}, "")
    for name, value in recipe.parameters:
        _agree(config.recipe, {f"loss.{name}": (loss[name], value)}, value)
    data.update({name: getattr(recipe, name) for name in SOURCES})
    loss.divergence = recipe.divergence
    return expanded


def _agree(name: str, settings: dict[str, tuple[Any, Any]], left_open: Any) -> None:
    """Raises UserError for the first of `settings` (key -> (config's, recipe's)) that differs from the recipe's.

    `left_open` is the value with which the config leaves the setting to the recipe.
    """
    for key, (stated, expected) in settings.items():
        if stated != expected:
            raise UserError(
                f'the recipe "{name}" means {key} {expected!r} and the config says {stated!r}; set that to '
                f'{left_open!r}, or recipe to ""'
            )
