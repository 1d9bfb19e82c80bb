"""The models of a config as shapes with shardings, from `config.json` files or from earlier stages of the plan."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from specjax import distill
from specjax.hub import adapter as hub_adapter
from specjax.hub import load as hub_load
from specjax.hub import model as hub_model
from specjax.models.attachment import AttachedDraft, Attachment
from specjax.models.language_model import LanguageModel, Network, Params
from specjax.models.vocabulary import draft_vocabulary
from specjax.runtime import dtypes
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError, nearest
from specjax.runtime.mesh import AnyMesh

_STAGE = "stage:"


def placed(model: Network, mesh: AnyMesh, *, replicate: bool = False) -> Params:
    """A model's parameters as ShapeDtypeStructs with their shardings on the mesh.

    Args:
      replicate: every device of the tensor axis holds all parameters.

    Raises:
      UserError: if the mesh's axis `fsdp` does not divide the width.
    """
    shapes = model.abstract_params()
    return meshes.abstract(shapes, meshes.shardings(model.axes(replicate=replicate), mesh, shapes=shapes))


@dataclasses.dataclass
class ModelCatalog:
    """Finds models by their names in a config: a directory, or "stage:NAME" for the export of an earlier stage.

    Attributes:
      made: the model that each earlier stage would export, by stage.
    """

    made: dict[str, LanguageModel] = dataclasses.field(default_factory=dict)

    def model(self, name: str, param_dtype: str, compute_dtype: str) -> LanguageModel:
        """The model called `name` in these dtypes; "auto" and "fastest" are bfloat16, on every platform."""
        param_dtype, compute_dtype = ("bfloat16" if d in dtypes.CHOICES else d for d in (param_dtype, compute_dtype))
        dtypes.check_param_dtype(param_dtype), dtypes.dtype_named(compute_dtype)
        if not name.startswith(_STAGE):
            return hub_load.describe(name, param_dtype=param_dtype, compute_dtype=compute_dtype)
        model = self._of_stage(name)
        config = dataclasses.replace(model.config, param_dtype=param_dtype, compute_dtype=compute_dtype)
        return dataclasses.replace(model, config=config)

    def attachment(self, name: str, target: LanguageModel, states_after: Sequence[int] = ()) -> Attachment:
        """The attachment called `name`, for this target; `states_after` as in `hub.adapter.load`."""
        if not name.startswith(_STAGE):
            return hub_adapter.describe(name, target, states_after)[0]
        draft = self._of_stage(name)
        if not isinstance(draft, AttachedDraft):
            raise UserError(f'"{name}" trains a separate model, not an adapter; set its model.init to "adapter"')
        config = dataclasses.replace(draft.attachment.config, target=target.config)
        return dataclasses.replace(draft.attachment, config=config)

    def trained(self, config: Any) -> tuple[LanguageModel, LanguageModel | None]:
        """The model that a training stage trains, and its target."""
        dtype_names = (config.model.param_dtype, config.model.compute_dtype)
        dtypes.check_trained("model.param_dtype", dtype_names[0])
        target = None
        if config.target:
            target = self.model(config.target, config.target_param_dtype or dtype_names[0], dtype_names[1])
        ids = config.model.vocabulary
        if str(ids).startswith(_STAGE):
            raise UserError(
                f'model.vocabulary is "{ids}", whose ids are not counted yet; run that stage first and name its export'
            )
        init, ids = config.model.init, draft_vocabulary(ids)
        if distill.is_attachment(init):
            return distill.new_attached_draft(config, target, ids), target
        if init != distill.RANDOM:
            return distill.trained_for_blocks(config, self.model(init, *dtype_names).reduced(ids)), target
        section = config.model.copy_and_resolve_references()
        section.compute_dtype = "bfloat16" if section.compute_dtype in dtypes.CHOICES else section.compute_dtype
        model = distill.random_model(section, self._vocabulary(config.tokenizer), 0).reduced(ids)
        return distill.trained_for_blocks(config, model), target

    def _vocabulary(self, tokenizer: Any) -> int:
        if not tokenizer.path:
            return tokenizer.vocab_size
        return self.model(tokenizer.path, "float32", "float32").config.vocab_size

    def _of_stage(self, name: str) -> LanguageModel:
        stage = name.removeprefix(_STAGE)
        if stage not in self.made:
            raise UserError(f'"{name}" names no stage planned before this one{nearest(stage, self.made)}')
        return self.made[stage]

    def loaded(
        self, name: str, config: Any, mesh: AnyMesh, *, replicate: bool = False, param_dtype: str = ""
    ) -> hub_model.Model:
        """A model as an evaluation loads it, with shapes in place of parameters; `param_dtype` "" is the config's."""
        model = self.model(name, param_dtype or config.param_dtype, config.compute_dtype)
        return hub_model.Model(model, placed(model, mesh, replicate=replicate), None, mesh)

    def attached(
        self, name: str, target: hub_model.Model, states_after: Sequence[int] = ()
    ) -> hub_adapter.LoadedAttachment:
        """An adapter as an evaluation loads it, with shapes in place of parameters."""
        attachment = self.attachment(name, target.decoder, states_after)
        return hub_adapter.LoadedAttachment(attachment, placed(attachment, target.mesh), "")


def replicated(tree: Any, mesh: AnyMesh) -> Any:
    """The shapes of a tree with a sharding that replicates each on every device."""
    replicated_sharding = jax.NamedSharding(mesh, jax.P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated_sharding), tree)


def rows(mesh: AnyMesh, *shape: int) -> jax.ShapeDtypeStruct:
    """An int32 ShapeDtypeStruct, sharded by rows over the mesh's batch axes. Raises UserError if they do not divide."""
    x = jax.ShapeDtypeStruct(shape, jax.numpy.int32)
    return meshes.abstract(x, meshes.shardings(("batch", *[None] * (len(shape) - 1)), mesh, shapes=x))
