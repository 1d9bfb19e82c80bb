"""The executables of a stage: the very functions that a run compiles, traced for a mesh from shapes alone."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Lowered

from specjax.decoding import batch, loop
from specjax.distillation import data_sources, recipes, settings, trainer, update
from specjax.distillation.steps import Steps, make_steps
from specjax.evaluation import cases
from specjax.models import kv_cache
from specjax.models.language_model import LanguageModel, Network
from specjax.planning import hlo
from specjax.planning.models import ModelCatalog, placed, replicated, rows
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError
from specjax.runtime.mesh import AnyMesh

# Stands for ids that end a row: which they are changes nothing.
_EOS = (0,)


# What steps are called, from the one that mostly takes longest to compile.
LONGEST_FIRST = ("decode block", "update", "prefill", "draft text")


@dataclasses.dataclass(frozen=True)
class Step:
    """One executable.

    Attributes:
      name: of what it does, one of LONGEST_FIRST.
      lower: traces it; to be called under the mesh.
      turns: of its loops, where the compiler does not know.
      resident: bytes on one chip that are there while it runs, by what they are.
      makes: of `resident`, what is not there before it.
      weights: shapes of the parameters' matrices, whole.
    """

    name: str
    lower: Callable[[], Lowered]
    turns: hlo.Turns
    resident: dict[str, int]
    makes: tuple[str, ...]
    weights: frozenset[tuple[int, ...]]


def _unsaid(source: str) -> None:
    """Turns of loops of which their text says enough."""


def matrices(*trees: Any) -> frozenset[tuple[int, ...]]:
    """Whole shapes of the matrices in these trees that are split over the mesh."""
    leaves = [x for x in jax.tree.leaves(trees) if x.ndim > 1]
    return frozenset(x.shape for x in leaves if x.sharding.shard_shape(x.shape) != x.shape)


# --- training


@dataclasses.dataclass(frozen=True)
class Training:
    """A training stage as shapes.

    Attributes:
      state: parameters and optimiser.
      teacher: the target's parameters, or None.
    """

    config: Any
    draft: LanguageModel
    target: LanguageModel | None
    mesh: AnyMesh
    state: update.TrainState
    teacher: Any
    steps: Steps

    @property
    def prompt_slots(self) -> int:
        """The most tokens of a prompt that is continued in training: of any task, as far as the config says."""
        data = self.config.data
        return data.sequence_length - 1 if self.draft.is_encoder_decoder else data.prompt_length_max

    @functools.cached_property
    def resident(self) -> dict[str, int]:
        """Bytes on one chip throughout the stage."""
        found = {"parameters": meshes.local_bytes(self.state.params)}
        found["optimizer"] = meshes.local_bytes(self.state.optimizer_state)
        found["target parameters"] = 0 if self.teacher is None else meshes.local_bytes(self.teacher)
        return found


def training(config: Any, shelf: ModelCatalog, mesh: AnyMesh) -> Training:
    """Describes a training stage on a mesh.

    Raises:
      UserError: for settings that make no sense together, and for what does not divide over the mesh.
    """
    config = recipes.expand(config)
    draft, target = shelf.trained(config)
    for model in (None if config.model.replicate else draft, target):
        if model is not None:
            model.check_split(mesh)
    params = draft.abstract_params()
    optimizer = update.make_optimizer(config.optimizer, config.train.steps)
    state = update.abstract_state(params, draft.axes(replicate=config.model.replicate), optimizer, mesh)
    teacher = None if target is None else placed(target, mesh)
    where = jax.tree.map(lambda x: x.sharding, state)
    steps = make_steps(config, draft, target, _EOS, optimizer, where, mesh)
    found = Training(config, draft, target, mesh, state, teacher, steps)
    longest = found.prompt_slots
    material = trainer.TrainingInputs(draft, state.params, target, teacher, iter(()), (), _EOS, longest)
    settings.check(config, material)
    return found


def training_steps(stage: Training) -> Iterator[Step]:
    """The update on the widest text, and before it what writes the text, where a model does."""
    data, mesh, rows_ = stage.config.data, stage.mesh, stage.config.data.batch_size
    weights = matrices(stage.state.params, stage.teacher)
    fractions, width = data_sources.fractions_of(data), data.sequence_length
    given = rows(mesh, rows_, stage.prompt_slots), rows(mesh, rows_), jax.ShapeDtypeStruct((), jnp.int32)
    writers = {"draft": (stage.steps.author, stage.draft.joined(stage.state.params, stage.teacher))}
    if not data.target_path:
        writers["target"] = (stage.target, stage.teacher)
    for source, (author, params) in writers.items():
        if not fractions[source]:
            continue
        slots = author.text_slots(stage.prompt_slots) + data.generation.max_new_tokens
        width = max(width, slots) if fractions[data_sources.FIXED] else slots
        yield Step(
            name=f"{source} text",
            lower=lambda author=author, params=params: stage.steps.generate.lower(author, params, *given),
            turns=lambda source: data.generation.max_new_tokens if source.count("/while") == 1 else None,
            resident=stage.resident,
            makes=(),
            weights=weights,
        )
    text = {name: rows(mesh, rows_) for name in update.BATCH_AXES} | {"tokens": rows(mesh, rows_, width)}
    if stage.draft.is_encoder_decoder:
        text["sources"] = rows(mesh, rows_, stage.prompt_slots)
    teacher = stage.teacher if stage.steps.needs_teacher else None
    yield Step(
        name="update",
        lower=lambda: stage.steps.update.lower(stage.state, teacher, text),
        turns=_unsaid,
        resident=stage.resident,
        makes=(),
        weights=weights,
    )


# --- evaluation


@dataclasses.dataclass(frozen=True)
class Decoding:
    """One drafter of an evaluation at one batch size, as shapes.

    Attributes:
      draft: the model, adapter or heads that it brings along, or None.
      slots: padded length of a prompt.
    """

    name: str
    plan: loop.Plan
    draft: Network | None
    sampling: Any
    mesh: AnyMesh
    batch: int
    slots: int

    @functools.cached_property
    def params(self) -> Any:
        """The target's parameters."""
        return placed(self.plan.target, self.mesh)

    @functools.cached_property
    def draft_params(self) -> Any:
        """The draft's own, or None."""
        return None if self.draft is None else placed(self.draft, self.mesh, replicate=self.plan.replicate_draft)

    @property
    def _arguments(self) -> tuple:
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.batch))
        keys = meshes.abstract(keys, meshes.shardings(("batch",), self.mesh, shapes=keys))
        prompts = rows(self.mesh, self.batch, self.slots), rows(self.mesh, self.batch)
        return self.params, self.draft_params, *prompts, keys

    def lower_prefill(self) -> Lowered:
        """What `loop.begin` compiles."""
        return loop.prefill.lower(dataclasses.replace(self.plan, rule=None, greedy=True), *self._arguments)

    @functools.cached_property
    def _cache_shapes(self) -> tuple[list[jax.ShapeDtypeStruct], ...]:
        bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._arguments)
        return jax.eval_shape(lambda *given: _caches_of(loop.begin(self.plan, *given)), *bare)

    def _lay(self, mesh: AnyMesh, *, of_draft: bool) -> Callable[[Any], jax.ShapeDtypeStruct]:
        axes = lambda x: loop.axes_of(self.plan, x, mesh.shape["tensor"], of_draft=of_draft)
        return lambda x: meshes.abstract(x, meshes.shardings(axes(x), mesh, shapes=x))

    def caches_on(self, mesh: AnyMesh) -> list[jax.ShapeDtypeStruct]:
        """The arrays of keys and values, of target and draft. Raises UserError for what does not divide over it."""
        of_target, of_draft = self._cache_shapes
        return [*map(self._lay(mesh, of_draft=False), of_target), *map(self._lay(mesh, of_draft=True), of_draft)]

    @property
    def _state(self) -> loop.DecodeState:
        """What the loop carries, as shapes, laid out as the prefill leaves it."""
        shapes = jax.eval_shape(lambda *given: loop.begin(self.plan, *given), *self._arguments)
        laid = jax.tree.map(self._lay(self.mesh, of_draft=False), dataclasses.replace(shapes, drafter_state=()))
        of_draft = jax.tree.map(self._lay(self.mesh, of_draft=True), shapes.drafter_state)
        return dataclasses.replace(laid, drafter_state=of_draft)

    def lower_loop(self) -> Lowered:
        """What `loop.run` compiles."""
        limits = loop.Limits(rows(self.mesh, self.batch), replicated(jax.ShapeDtypeStruct((1,), jnp.int32), self.mesh))
        sampling = replicated(jax.eval_shape(lambda: self.sampling), self.mesh)
        return loop.run.lower(self.plan, self.params, self.draft_params, self._state, sampling, limits)

    @functools.cached_property
    def resident(self) -> dict[str, int]:
        """Bytes on one chip while it decodes."""
        return self.resident_on(self.mesh)

    def resident_on(self, mesh: AnyMesh) -> dict[str, int]:
        """The same on another mesh. Raises UserError for what does not divide over it."""
        on = lambda model, **how: 0 if model is None else meshes.local_bytes(placed(model, mesh, **how))
        return {
            "parameters": on(self.draft, replicate=self.plan.replicate_draft),
            "target parameters": on(self.plan.target),
            "cache": meshes.local_bytes(self.caches_on(mesh)),
        }


def _caches_of(state: loop.DecodeState) -> tuple[list[Any], ...]:
    """The arrays of keys and values: of the target, and of the draft."""
    slots = lambda tree: [x for x in jax.tree.leaves(tree) if x.ndim == len(kv_cache.AXES)]
    return slots(state.target_cache), slots(state.drafter_state)


def decodings(config: Any, shelf: ModelCatalog, mesh: AnyMesh) -> Iterator[Decoding]:
    """Each drafter of an evaluation at its largest gamma, at every batch size, at the highest temperature.

    Prompts are taken to be as long as `selection.length_max`, as far as the positions reach.

    Raises:
      UserError: for models that do not fit each other, and for what does not divide over the mesh.
    """
    targets, drafters = cases.load_models(
        config, lambda name, **how: shelf.loaded(name, config, mesh, **how), shelf.attached
    )
    job = cases.Job(config, targets, None, [], drafters)
    room = min(model.decoder.config.max_positions for model in targets.values()) - config.max_new_tokens
    slots = batch.padded_slots(min(config.selection.length_max, room))
    for size in config.batch_sizes:
        setting = cases.Setting("lossless", max(config.temperatures), size)
        largest: dict[str, cases.Case] = {}
        for case in cases.make_cases(job, setting):
            if case.rule == "lossless" and case.gamma > (largest[case.name].gamma if case.name in largest else 0):
                largest[case.name] = case
        for name, case in largest.items():
            plan = cases.make_plan(job, setting, case, slots)
            sampling = case.sampling
            if cases.needs_costs(case):
                sampling = dataclasses.replace(sampling, costs=jnp.ones((case.gamma + 1,), jnp.float32))
            brought = _brought(drafters.get(name))
            yield Decoding(name, plan, brought, sampling, mesh, size, slots)
    if not any(section.rules.get("lossless") for section in config.drafters.values()):
        raise UserError("no drafter of this evaluation is run under the lossless rule; name a gamma of it")


def _brought(drafter: Any) -> Network | None:
    """What a drafter of `cases` has parameters for."""
    return getattr(drafter, "adapter", None) or getattr(drafter, "decoder", None)


def decoding_steps(decoding: Decoding) -> Iterator[Step]:
    """Prefill, and one block of the loop: gamma tokens drafted and verified."""
    shared = dict(resident=decoding.resident, weights=matrices(decoding.params, decoding.draft_params))
    yield Step("prefill", decoding.lower_prefill, _unsaid, makes=("cache",), **shared)
    turns = block_turns(decoding.plan)
    yield Step("decode block", decoding.lower_loop, turns, makes=(), **shared)


def block_turns(plan: loop.Plan) -> hlo.Turns:
    """Turns of the loops in one block: all of gamma is drafted, and of the widths of a verification one is taken."""

    def turns(source: str) -> int | None:
        if source.endswith("/propose/while"):
            return plan.gamma - 1  # the first token is drafted before the loop
        return hlo.ONE_OF_THEM if source.endswith("/verify/while") else None

    return turns
