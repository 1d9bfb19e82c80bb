"""The decoding loop lowered for a GPU: where the host has to wait for the device. No GPU is needed.

For every conditional, and for every loop whose number of iterations is not constant, XLA makes the host read a
predicate from the GPU, which then idles.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxlib.mlir import ir

from specjax.decoding import loop
from specjax.decoding.sampling import Sampling, row_keys
from specjax.models import kv_cache
from specjax.runtime import mesh as meshes

BATCH, SLOTS, GAMMA, CAPACITY = 2, 6, 3, 512
GPU = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
MESH = jax.sharding.AbstractMesh(
    (1, 1, 1), meshes.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, abstract_device=GPU
)


def operations(plan, arrays, structure) -> list:
    """All operations of the program to which `loop.run` is lowered for a GPU."""
    run = jax.jit(lambda *arrays: loop.run(plan, *jax.tree.unflatten(structure, arrays)))
    with jax.sharding.use_abstract_mesh(MESH):
        traced = run.trace(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(jnp.asarray, arrays)))
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    collected = []

    def walk(operation):
        collected.append(operation)
        for region in operation.regions:
            for block in region:
                for inner in block:
                    walk(inner.operation)

    walk(module.operation)
    return collected


def waits(*arguments) -> dict[str, int]:
    """Number of conditionals and of loops with a predicate in the program."""
    counts = collections.Counter()
    for operation in operations(*arguments):
        if operation.name in ("stablehlo.case", "stablehlo.if"):
            counts["conditionals"] += 1
        elif operation.name == "stablehlo.while":
            counts["constant" if has_constant_bound(operation) else "predicates"] += 1
    return {"conditionals": counts["conditionals"], "predicates": counts["predicates"]}


def has_constant_bound(loop_operation) -> bool:
    """Whether a loop counts by a constant up to a constant, as those of `fori_loop` and `scan` do."""
    condition, body = (region.blocks[0] for region in loop_operation.regions)
    compared = condition.operations[len(condition.operations) - 1].operands[0].owner
    if compared.name != "stablehlo.compare" or not is_constant(compared.operands[1]):
        return False
    counter = list(condition.arguments).index(compared.operands[0])
    grown = body.operations[len(body.operations) - 1].operands[counter].owner
    return grown.name == "stablehlo.add" and is_constant(grown.operands[1])


def is_constant(value) -> bool:
    return not isinstance(value.owner, ir.Block) and value.owner.name == "stablehlo.constant"


def zeros_of(function, *args):
    """The result of a function with zeros in all arrays, without a compilation."""
    structures = []

    def flattened(*args):
        arrays, structure = jax.tree.flatten(function(*args))
        structures.append(structure)
        return arrays

    shapes = jax.eval_shape(flattened, *args)
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    zero = lambda x: jax.random.split(jax.random.key(0), x.shape) if is_key(x) else jnp.zeros(x.shape, x.dtype)
    return jax.tree.unflatten(structures[0], map(zero, shapes))


@functools.cache
def models():
    target, params = tiny.decoder(1)
    adapter, adapter_params = tiny.adapter(target)
    return target, params, adapter, adapter_params


def arguments(kind: str, gamma: int = GAMMA, rule: str = "lossless", greedy: bool = False, sampling=None, **options):
    """The arguments of `loop.run` as shapes; attention's switch would have two branches at this capacity."""
    target, params, adapter, adapter_params = models()
    options = {**tiny.drafter_options(kind, target, adapter=adapter), **options}
    plan = tiny.plan(
        target,
        kind,
        options,
        gamma=gamma,
        slots=SLOTS,
        max_new=CAPACITY - SLOTS - gamma - 1,
        rule=rule,
        greedy=greedy,
    )
    assert len(kv_cache.prefixes(plan.capacity)) > 1
    own = adapter_params if kind == "kangaroo" else tiny.draft_params_of(kind, target, params, params)
    texts, lengths = tiny.prompts(3, BATCH, SLOTS, target.vocab_size)
    sampling = Sampling.of(0.0 if greedy else 1.0, **(sampling or {}))
    keys = row_keys(0, jnp.arange(BATCH))
    start = lambda params, own: loop.prefill(plan, params, own, texts, lengths, keys)
    return plan, *jax.tree.flatten((params, own, zeros_of(start, params, own), sampling, tiny.limits(BATCH, 8)))


ONCE = {"conditionals": 0, "predicates": 1}
SLOW = pytest.mark.slow
FIXED = {
    "plain": dict(kind="ngram", gamma=0, sampling={"top_p": 0.9}),
    "sampled": dict(kind="model"),
    "coupled": dict(kind="model", rule="coupled", sampling={"top_k": 5, "top_p": 0.9, "min_p": 0.1}),
    "greedy": dict(kind="model", greedy=True),
    "kangaroo": dict(kind="kangaroo", greedy=True),
    "medusa": dict(kind="medusa", greedy=True),
    "eagle3": dict(kind="eagle3", greedy=True),
    "block_parallel": dict(kind="block_parallel", greedy=True),
    "ngram": dict(kind="ngram", greedy=True),
    "early_exit": dict(kind="early_exit", greedy=True),
    "skip_layers": dict(kind="skip_layers", greedy=True),
}


@pytest.mark.parametrize("case", [*list(FIXED)[:3], *(pytest.param(case, marks=SLOW) for case in list(FIXED)[3:])])
def test_a_block_of_a_fixed_draft_length_waits_once(case):
    """For the predicate of the loop over blocks."""
    assert waits(*arguments(**FIXED[case])) == ONCE


@pytest.mark.parametrize("kind", ["model", pytest.param("kangaroo", marks=SLOW)])
def test_a_draft_that_can_stop_waits_no_more_often(kind):
    assert waits(*arguments(kind, greedy=True, sampling={"threshold": 0.5}, threshold=0.5)) == ONCE


def test_an_adaptive_draft_waits_to_know_if_it_drafts_and_if_it_catches_up():
    how = {"adaptive": True, "sampling": {"block_costs": (1.0,) * (GAMMA + 1)}}
    assert waits(*arguments("model", greedy=True, **how)) == {**ONCE, "predicates": 4}


@pytest.mark.usefixtures("layers_by_themselves")
def test_a_text_that_outgrows_a_prefix_continues_in_the_next_one(monkeypatch):
    """Texts and caches are those of one loop over all slots, also in the longer row, which ends first."""
    target, params, _, _ = models()
    plan = tiny.plan(target, "model", {"model": target}, gamma=GAMMA, slots=12, max_new=40, greedy=True)
    limits = np.asarray([40, 20])  # with a draft that is always right, the row of 12 tokens ends at 32
    how = plan, params, params, *tiny.prompts(3, BATCH, 12, target.vocab_size)
    prefixes, run = [], loop.compiled_run
    monkeypatch.setattr(meshes, "platform", lambda: "gpu")
    monkeypatch.setattr(loop, "SMALLEST_CAPACITY", 16)
    whole = tiny.decode(*how, limits)
    monkeypatch.setattr(kv_cache, "prefixes", lambda capacity: [8, 32, capacity])
    monkeypatch.setattr(loop, "compiled_run", lambda *args: prefixes.append(args[-1]) or run(*args))
    by_prefix = tiny.decode(*how, limits)
    assert prefixes == [32, plan.capacity]
    assert tiny.texts_of(by_prefix) == tiny.texts_of(whole)
    np.testing.assert_array_equal(by_prefix.statistics.accepted_at, whole.statistics.accepted_at)
    for state in (by_prefix.target_cache, whole.target_cache), (by_prefix.drafter_state, whole.drafter_state):
        one, other = (np.asarray(cache.keys[1]) for cache in state)
        for row, length in enumerate(np.asarray(whole.lengths) - 2):
            np.testing.assert_allclose(one[row, :, :length], other[row, :, :length], atol=1e-3)
    assert loop.prefix_for(plan, whole) == plan.capacity
    monkeypatch.setattr(meshes, "platform", lambda: "cpu")
    assert loop.prefix_for(plan, by_prefix) == plan.capacity


@pytest.mark.parametrize("kind", ["ngram", *(pytest.param(kind, marks=SLOW) for kind in ("model", "early_exit"))])
def test_blocks_after_the_end_change_nothing(monkeypatch, kind):
    """A GPU runs several blocks before the host looks; texts, counts and the number of blocks are those of a CPU."""
    target, params, _, _ = models()
    own = tiny.decoder(2)[1] if kind == "model" else None
    states = {}
    for spare, platform in enumerate(("cpu", "gpu")):  # another capacity is another program
        monkeypatch.setattr(meshes, "platform", lambda platform=platform: platform)
        how = {"gamma": GAMMA, "slots": 6, "max_new": 21 + spare, "greedy": False}
        options = tiny.drafter_options(kind, target) | ({} if kind == "ngram" else {"threshold": 0.3})
        plan = tiny.plan(target, kind, options, **how)
        for limit in (3, 2**31 - 1):
            texts, lengths = tiny.prompts(3, BATCH, 6, target.vocab_size)
            state = loop.prefill(plan, params, own, texts, lengths, row_keys(0, jnp.arange(BATCH)))
            limits = dataclasses.replace(tiny.limits(BATCH, 21), iterations=jnp.int32(limit))
            sampling = Sampling.of(1.0, threshold=0.0 if kind == "ngram" else 0.3)
            states[platform, limit] = loop.run(plan, params, own, state, sampling, limits)
    for limit in (3, 2**31 - 1):
        on_cpu, on_gpu = (states[platform, limit] for platform in ("cpu", "gpu"))
        assert tiny.texts_of(on_gpu) == tiny.texts_of(on_cpu)
        assert int(on_gpu.iterations) == int(on_cpu.iterations)
        assert on_gpu.done.tolist() == on_cpu.done.tolist() == [limit > 3] * BATCH
        for one, other in zip(*map(jax.tree.leaves, (on_gpu.statistics, on_cpu.statistics)), strict=True):
            np.testing.assert_array_equal(one, other)
    assert int(states["gpu", 3].iterations) == 3
