"""Knowledge distillation by name: whose text a draft learns on, and by which divergence from its target.

The families are those that DistillSpec (arXiv 2310.08461, section 4 and appendix) tells apart. A name is nothing but
its parts: `expand` writes them into the config, and everything that follows reads the parts alone.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from specjax.distillation.data_sources import SOURCES
from specjax.distillation.objective import CROSS_ENTROPY
from specjax.runtime.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The parts of a recipe.

    Attributes:
      fixed: share of steps on the corpus.
      draft: share of steps on text that the draft writes.
      target: share of steps on text that the target writes.
      divergence: a name of `divergences.DIVERGENCES`, or "cross_entropy" (hard labels).
      beta: of `jsd`; None where it is not asked for.
    """

    fixed: float
    draft: float
    target: float
    divergence: str
    beta: float | None = None


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
    "gkd": Recipe(fixed=0.0, draft=1.0, target=0.0, divergence="jsd", beta=0.5),
    # What DistillSpec recommends to begin with; the divergence it would have validated for the task and the decoding.
    "distillspec": Recipe(fixed=0.0, draft=1.0, target=0.0, divergence="forward_kl"),
}


def expand(config: Any) -> ConfigDict:
    """A copy of a training stage's config in which the parts of its `recipe` stand; as it is where that is "".

    Parts that the config leaves open (all three fractions 0; `loss.divergence` "") become the recipe's; parts that it
    states must be the recipe's.

    Raises:
      UserError: for an unknown recipe, and for parts that contradict it.
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
    if recipe.beta is not None:
        _agree(config.recipe, {"loss.beta": (loss.beta, recipe.beta)}, recipe.beta)
    data.update({name: getattr(recipe, name) for name in SOURCES})
    loss.divergence = recipe.divergence
    return expanded


def _agree(name: str, parts: dict[str, tuple[Any, Any]], left_open: Any) -> None:
    """Refuses the first part that is not the recipe's; `left_open` is what would have left it to the recipe."""
    for key, (stated, meant) in parts.items():
        if stated != meant:
            raise UserError(
                f'the recipe "{name}" means {key} {meant!r} and the config says {stated!r}; set that to {left_open!r}, '
                'or recipe to ""'
            )
