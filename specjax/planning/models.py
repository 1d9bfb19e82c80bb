"""The models of a config without their weights: shapes with shardings, from `config.json` or from an earlier stage."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from specjax import distill
from specjax.hub import adapter as hub_adapter
from specjax.hub import load as hub_load
from specjax.hub import model as hub_model
from specjax.models.language_model import LanguageModel, Network, Params
from specjax.models.self_draft import SelfDraft
from specjax.runtime import dtypes
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError, nearest
from specjax.runtime.mesh import AnyMesh

_STAGE = "stage:"


def placed(model: Network, mesh: AnyMesh, *, replicate: bool = False) -> Params:
    """The parameters as shapes, laid out as the rules say. Raises UserError for what does not divide.

    Args:
      replicate: every device of the tensor axis holds all of it.
    """
    shapes = model.abstract_params()
    return meshes.abstract(shapes, meshes.shardings(model.axes(replicate=replicate), mesh, shapes=shapes))


@dataclasses.dataclass
class ModelCatalog:
    """Models by what a config calls them: directories, and "stage:NAME" of stages described before.

    Attributes:
      made: of the stages so far, what each would export.
    """

    made: dict[str, LanguageModel] = dataclasses.field(default_factory=dict)

    def model(self, name: str, param_dtype: str, compute_dtype: str) -> LanguageModel:
        """The model called `name`, in these dtypes ("auto" is bfloat16, whatever there is here)."""
        compute_dtype = "bfloat16" if compute_dtype == "auto" else compute_dtype
        for dtype in (param_dtype, compute_dtype):
            dtypes.dtype_named(dtype)
        if not name.startswith(_STAGE):
            return hub_load.describe(name, param_dtype=param_dtype, compute_dtype=compute_dtype)
        model = self._of_stage(name)
        config = dataclasses.replace(model.config, param_dtype=param_dtype, compute_dtype=compute_dtype)
        return dataclasses.replace(model, config=config)

    def adapter(self, name: str, target: LanguageModel) -> Any:
        """The adapter, or the heads, called `name`, on this target."""
        if not name.startswith(_STAGE):
            return hub_adapter.describe(Path(name), target)[0]
        made = self._of_stage(name)
        if not isinstance(made, SelfDraft):
            raise UserError(f'"{name}" trains a model of its own, not an adapter; let its model.init be "adapter"')
        return type(made.adapter)(dataclasses.replace(made.adapter.config, target=target.config))

    def trained(self, config: Any) -> tuple[LanguageModel, LanguageModel | None]:
        """What a training stage trains, and its target."""
        how = (config.model.param_dtype, config.model.compute_dtype)
        target = self.model(config.target, *how) if config.target else None
        init = config.model.init
        if init in (distill.ADAPTER, distill.MEDUSA):
            if target is None:
                raise UserError(f'model.init is "{init}", which attaches to a target: set `target`')
            return distill.attachment(config, target), target
        if init != distill.RANDOM:
            return self.model(init, *how), target
        section = config.model.copy_and_resolve_references()
        section.compute_dtype = "bfloat16" if section.compute_dtype == "auto" else section.compute_dtype
        return distill.random_model(section, self._vocabulary(config.tokenizer), 0), target

    def _vocabulary(self, tokenizer: Any) -> int:
        if not tokenizer.path:
            return tokenizer.vocab_size
        return self.model(tokenizer.path, "float32", "float32").config.vocab_size

    def _of_stage(self, name: str) -> LanguageModel:
        stage = name.removeprefix(_STAGE)
        if stage not in self.made:
            raise UserError(f'"{name}" is of no stage that is planned before this one{nearest(stage, self.made)}')
        return self.made[stage]

    def loaded(self, name: str, config: Any, mesh: AnyMesh, *, replicate: bool = False) -> hub_model.Model:
        """A model as an evaluation holds it, its parameters laid out on the mesh."""
        model = self.model(name, config.param_dtype, config.compute_dtype)
        if not replicate:
            model.check_split(mesh)
        return hub_model.Model(model, placed(model, mesh, replicate=replicate), None, mesh)

    def attached(self, name: str, target: hub_model.Model) -> hub_adapter.LoadedAdapter:
        """An adapter as an evaluation holds it."""
        adapter = self.adapter(name, target.decoder)
        return hub_adapter.LoadedAdapter(adapter, placed(adapter, target.mesh), "")


def replicated(tree: Any, mesh: AnyMesh) -> Any:
    """Shapes of which every device has a whole copy."""
    everywhere = jax.NamedSharding(mesh, jax.P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)


def rows(mesh: AnyMesh, *shape: int) -> jax.ShapeDtypeStruct:
    """Whole numbers of a batch, its rows over the mesh's batch axes. Raises UserError where they do not divide."""
    x = jax.ShapeDtypeStruct(shape, jax.numpy.int32)
    return meshes.abstract(x, meshes.shardings(("batch", *[None] * (len(shape) - 1)), mesh, shapes=x))
