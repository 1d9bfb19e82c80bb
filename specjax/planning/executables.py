"""The executables of a stage: the functions that a run compiles, traced for a mesh without any arrays."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Lowered

from specjax.decoding import loop, prefill
from specjax.decoding.plan import Plan
from specjax.distillation import data_sources, recipes, settings, trainer, update
from specjax.distillation.steps import TrainingFunctions, make_functions
from specjax.evaluation import cases, expert_use
from specjax.models import experts
from specjax.models.attachment import runtime_params
from specjax.models.language_model import LanguageModel, Network
from specjax.planning import hlo
from specjax.planning.models import ModelCatalog, placed, replicated, rows
from specjax.runtime import checks
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError
from specjax.runtime.mesh import AnyMesh

# EOS ids for planning; their values do not change the cost.
_EOS = (0,)
# Names of executables, usually in descending order of compile time.
LONGEST_FIRST = ("decode block", "update", "prefill", "draft text")
# The source of a loop over tiles of tokens that use the same expert, and of the loop over the chunks of prompts.
_EXPERT_LOOP = re.compile(r"/experts\b.*while$")
_PREFILL_LOOP = re.compile(r"compiled_prefill\)/while$")


@dataclasses.dataclass(frozen=True)
class Executable:
    """A function to compile for planning.

    Attributes:
      name: its name, one of LONGEST_FIRST.
      lower: traces and lowers it; must be called under the mesh.
      resident: bytes on one chip of arrays that exist while it runs, by what they are.
      weights: unsharded shapes of the weight matrices that are sharded over the mesh.
      trip_counts: trip counts of its loops that the compiler does not know.
      loop: op_name of the loop of which one iteration is the work that is reported; "" for the work of a call.
      creates: keys of `resident` whose arrays do not exist before it runs.
    """

    name: str
    lower: Callable[[], Lowered]
    resident: dict[str, int]
    weights: frozenset[tuple[int, ...]]
    trip_counts: hlo.TripCounts = hlo.unknown
    loop: str = ""
    creates: tuple[str, ...] = ()


def matrices(*trees: Any) -> frozenset[tuple[int, ...]]:
    """Unsharded shapes of the matrices in these trees that are sharded over the mesh."""
    leaves = [x for x in jax.tree.leaves(trees) if x.ndim > 1]
    return frozenset(x.shape for x in leaves if x.sharding.shard_shape(x.shape) != x.shape)


def expert_trips(model: LanguageModel, tokens: int | float, num_shards: int) -> int:
    """Trip count of a device's loop over experts: the expected number of its experts that these tokens use.

    Every expert is assumed to be equally probable, and those used to have one tile each unless that is full on average.

    Args:
      tokens: number of tokens of a call that one device computes.
      num_shards: number of parts into which the mesh splits the experts.
    """
    use = expert_use.uniform(model)
    if use is None:
        return 1
    count, per_token = model.config.experts // num_shards, model.config.experts_per_token
    size = experts.tile_size(max(round(tokens), 1), per_token, count)
    tiles = math.ceil(tokens * per_token / model.config.experts / size)
    return max(round(use.touched(tokens) / num_shards), 1) * tiles


def with_experts(model: LanguageModel, mesh: AnyMesh, tokens: Callable[[str], float], others: hlo.TripCounts):
    """Trip counts of the loops over a model's experts, and `others` for other loops.

    Args:
      tokens: function from the op_name of a loop to the number of tokens of one call, over all devices.
    """
    split = mesh.shape["tensor"]

    def trip_counts(source: str) -> int | None:
        if not _EXPERT_LOOP.search(source):
            return others(source)
        return expert_trips(model, tokens(source) / mesh.shape["data"], split)

    return trip_counts


# --- training


@dataclasses.dataclass(frozen=True)
class TrainingStage:
    """A training stage with shapes in place of arrays.

    Attributes:
      state: shapes of parameters and optimiser state, with shardings.
      teacher: shapes of the target's parameters, with shardings; None without a target.
    """

    config: Any
    draft: LanguageModel
    target: LanguageModel | None
    mesh: AnyMesh
    state: update.TrainState
    teacher: Any
    steps: TrainingFunctions

    @property
    def prompt_slots(self) -> int:
        """Maximum number of tokens of a prompt from which training generates text."""
        data = self.config.data
        return data.sequence_length - 1 if self.draft.is_encoder_decoder else data.prompt_length_max

    @functools.cached_property
    def resident(self) -> dict[str, int]:
        """Bytes on one chip throughout the stage."""
        return {
            "parameters": meshes.local_bytes(self.state.params),
            "optimizer": meshes.local_bytes(self.state.optimizer_state),
            "target parameters": 0 if self.teacher is None else meshes.local_bytes(self.teacher),
        }


def training(config: Any, catalog: ModelCatalog, mesh: AnyMesh) -> TrainingStage:
    """Describes a training stage on a mesh.

    Raises:
      UserError: for inconsistent settings, and if a model or batch does not divide over the mesh.
    """
    config = recipes.expand(config)
    if config.loss.reference:
        raise UserError(
            'a plan does not include the draft in loss.reference; set loss.reference to "" and loss.selected to 1 for '
            "the plan, and add that draft's parameters and a forward of it"
        )
    checks.instance("model.remat", config.model.remat, bool)
    draft, target = catalog.trained(config)
    draft = draft.with_remat(config.model.remat)
    params = draft.abstract_params()
    optimizer = update.make_optimizer(config.optimizer, config.train.steps)
    state = update.abstract_state(params, draft.axes(replicate=config.model.replicate), optimizer, mesh)
    teacher = None if target is None else placed(target, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    how = {"replicate": config.model.replicate}
    steps = make_functions(config, draft, target, _EOS, optimizer, shardings, mesh, **how)
    stage = TrainingStage(config, draft, target, mesh, state, teacher, steps)
    inputs = trainer.TrainingInputs(draft, state.params, target, teacher, iter(()), (), _EOS, stage.prompt_slots)
    settings.check(config, inputs)
    return stage


def training_executables(stage: TrainingStage) -> Iterator[Executable]:
    """Text generation, if a model generates training text, and then the update on texts of maximum length."""
    data, mesh, batch_size = stage.config.data, stage.mesh, stage.config.data.batch_size
    shared = dict(resident=stage.resident, weights=matrices(stage.state.params, stage.teacher))
    fractions, width = data_sources.fractions_of(data), data.sequence_length
    prompts = rows(mesh, batch_size, stage.prompt_slots), rows(mesh, batch_size), jax.ShapeDtypeStruct((), jnp.int32)
    how = dict(max_new_tokens=data.generation.max_new_tokens, greedy=True, round_up=False)
    with meshes.use(mesh):
        chunks = _chunks(stage.prompt_slots, Plan.for_prompts(stage.draft, stage.prompt_slots, **how))

    def trip_counts(source: str) -> int | None:
        if _PREFILL_LOOP.search(source):
            return chunks
        return data.generation.max_new_tokens if source.count("/while") == 1 else None

    writers = {"draft": (stage.steps.author, runtime_params(stage.draft, stage.state.params, stage.teacher))}
    if not data.target_path:
        writers["target"] = (stage.target, stage.teacher)
    for source, (author, params) in writers.items():
        if not fractions[source]:
            continue
        slots = author.text_slots(stage.prompt_slots) + data.generation.max_new_tokens
        width = max(width, slots) if fractions[data_sources.FIXED] else slots
        lower = functools.partial(stage.steps.generate.lower, params, *prompts, author)
        counts = with_experts(author, mesh, lambda _: batch_size, trip_counts)
        yield Executable(f"{source} text", lower, trip_counts=counts, **shared)
    if fractions[data_sources.ASSISTED]:
        slots = stage.target.text_slots(stage.prompt_slots) + data.generation.max_new_tokens
        width, batch_size = max(width, slots), batch_size * (1 + stage.config.rollouts.replays)
        lower = functools.partial(stage.steps.rollouts.lower, stage.state.params, stage.teacher, *prompts)
        yield Executable("assisted text", lower, trip_counts=trip_counts, **shared)
    text = {name: rows(mesh, batch_size) for name in update.BATCH_AXES} | {"tokens": rows(mesh, batch_size, width)}
    if fractions[data_sources.ASSISTED]:
        floats = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
        text |= {"anchors": text["lengths"], "refusals": floats(text["tokens"])}
    if stage.draft.is_encoder_decoder:
        text["sources"] = rows(mesh, batch_size, stage.prompt_slots)
    teacher = stage.teacher if stage.steps.needs_teacher else None
    sparse = stage.draft if stage.target is None or stage.draft.is_sparse else stage.target
    counts = with_experts(sparse, mesh, lambda _: batch_size * width / mesh.shape["fsdp"], hlo.unknown)
    lower = functools.partial(stage.steps.update.lower, stage.state, teacher, text)
    yield Executable("update", lower, trip_counts=counts, **shared)


def _chunks(prompt: int, plan: Plan) -> int:
    """Number of chunks in which a prompt of this many tokens is prefilled; the last token stays pending."""
    return -(-(prompt - 1) // plan.chunk)


# --- evaluation


@dataclasses.dataclass(frozen=True)
class DecodingStage:
    """One drafter of an evaluation at one batch size, with shapes in place of arrays.

    Attributes:
      name: the drafter's name in the config.
      draft: the drafter's model or attachment; None if the drafter has no parameters.
      longest: number of tokens of a prompt.
    """

    name: str
    plan: Plan
    draft: Network | None
    sampling: Any
    mesh: AnyMesh
    batch: int
    longest: int

    @functools.cached_property
    def params(self) -> Any:
        """Shapes of the target's parameters."""
        return placed(self.plan.target, self.mesh)

    @functools.cached_property
    def draft_params(self) -> Any:
        """Shapes of the draft's parameters, or None."""
        return None if self.draft is None else placed(self.draft, self.mesh, replicate=self.plan.replicate_draft)

    @property
    def _arguments(self) -> tuple:
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.batch))
        keys = meshes.abstract(keys, meshes.shardings(("batch",), self.mesh, shapes=keys))
        prompts = rows(self.mesh, self.batch, self.plan.prompt_slots), rows(self.mesh, self.batch)
        return self.params, self.draft_params, *prompts, keys

    def lower_prefill(self) -> Lowered:
        """Lowers the prefill, as `loop.prefill` compiles it."""
        return prefill.compiled_prefill.lower(self.plan.for_prefill, *self._arguments)

    @functools.cached_property
    def _layout(self) -> tuple[list[jax.ShapeDtypeStruct], list[tuple[str | None, ...]], Any]:
        """Shapes and logical axes of all arrays of the DecodeState that the prefill returns, and its structure."""
        bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._arguments)
        traced = []

        def leaves(*arguments):
            state = loop.prefill(self.plan, *arguments)
            traced.append((prefill.state_axes(self.plan, state), jax.tree.structure(state)))
            return jax.tree.leaves(state)

        return jax.eval_shape(leaves, *bare), *traced[0]

    def _arrays_on(self, mesh: AnyMesh) -> list[jax.ShapeDtypeStruct]:
        """The arrays of the DecodeState as shapes with shardings."""
        place = lambda x, names: meshes.abstract(x, meshes.shardings(names, mesh, shapes=x))
        return list(map(place, *self._layout[:2]))

    def caches_on(self, mesh: AnyMesh) -> list[jax.ShapeDtypeStruct]:
        """Shapes of the keys and values of target and draft. Raises UserError if the rows do not divide over it."""
        return [x for x, axes in zip(self._arrays_on(mesh), self._layout[1], strict=True) if "slots" in axes]

    def lower_loop(self) -> Lowered:
        """Lowers the decoding loop, as `loop.run` compiles it."""
        limits = loop.Limits(rows(self.mesh, self.batch), replicated(jax.ShapeDtypeStruct((1,), jnp.int32), self.mesh))
        sampling = replicated(jax.eval_shape(lambda: self.sampling), self.mesh)
        state = jax.tree.unflatten(self._layout[2], self._arrays_on(self.mesh))
        return loop.compiled_run.lower(
            self.plan, self.params, self.draft_params, state, sampling, limits, self.plan.capacity
        )

    def resident_on(self, mesh: AnyMesh) -> dict[str, int]:
        """Bytes on one chip of a mesh while it decodes. Raises UserError if something does not divide over it."""
        replicate = self.plan.replicate_draft
        draft = 0 if self.draft is None else meshes.local_bytes(placed(self.draft, mesh, replicate=replicate))
        return {
            "parameters": draft,
            "target parameters": meshes.local_bytes(placed(self.plan.target, mesh)),
            "cache": meshes.local_bytes(self.caches_on(mesh)),
        }


def decodings(config: Any, catalog: ModelCatalog, mesh: AnyMesh) -> Iterator[DecodingStage]:
    """Describes each drafter of an evaluation at its largest gamma, at every batch size and the highest temperature.

    Prompts have `selection.length_max` tokens, or as many as the models' positions allow.

    Raises:
      UserError: for incompatible models, and if something does not divide over the mesh.
    """
    targets, drafters = cases.load_models(
        config, lambda name, **how: catalog.loaded(name, config, mesh, **how), catalog.attached
    )
    job = cases.Job(config, targets, None, [], drafters)
    room = min(model.decoder.config.max_positions for model in targets.values()) - config.max_new_tokens
    longest = min(config.selection.length_max, room)
    for size in config.batch_sizes:
        setting = cases.Setting("lossless", max(config.temperatures), size)
        largest: dict[str, cases.Case] = {}
        for case in cases.make_cases(job, setting):
            if case.rule == "lossless" and case.gamma > (largest[case.name].gamma if case.name in largest else 0):
                largest[case.name] = case
        for name, case in largest.items():
            with meshes.use(mesh):
                plan = cases.make_method(case, longest, config.max_new_tokens).plan
            sampling = case.sampling
            if cases.needs_costs(case):
                sampling = dataclasses.replace(sampling, block_costs=jnp.ones((case.gamma + 1,), jnp.float32))
            yield DecodingStage(name, plan, case.loaded and case.loaded.network, sampling, mesh, size, longest)
    if not any(section.rules.get("lossless") for section in config.drafters.values()):
        raise UserError("no drafter of this evaluation is run under the lossless rule; name a gamma of it")


def decoding_executables(decoding: DecodingStage) -> Iterator[Executable]:
    """The prefill, and the decoding loop, whose cost is that of one block with gamma drafted tokens."""
    weights = matrices(decoding.params, decoding.draft_params)
    shared = dict(resident=decoding.resident_on(decoding.mesh), weights=weights)
    chunks = lambda source: _chunks(decoding.longest, decoding.plan) if _PREFILL_LOOP.search(source) else None
    target, plan = decoding.plan.target, decoding.plan
    chunks = with_experts(target, decoding.mesh, lambda _: decoding.batch * plan.chunk, chunks)
    yield Executable("prefill", decoding.lower_prefill, trip_counts=chunks, creates=("cache",), **shared)

    def trip_counts(source: str) -> int | None:
        """Trip counts of the loops in one block: all gamma tokens are drafted, and one width of verification runs."""
        if source.endswith("/propose/while"):
            return decoding.plan.gamma - 1  # the first token is drafted before the loop
        return hlo.ONE_OF_THEM if source.endswith("/verify/while") else None

    tokens = lambda source: decoding.batch * (plan.gamma + 1 if "/verify/" in source else 1)
    counts = with_experts(target, decoding.mesh, tokens, trip_counts)
    yield Executable("decode block", decoding.lower_loop, trip_counts=counts, loop="jit(compiled_run)/while", **shared)
