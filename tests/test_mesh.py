"""Eight devices say what one says: generated tokens, losses and gradients, on every way to split them.

Whole training runs on a mesh: test_trainer.py, and over several processes test_processes.py.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from ml_collections import ConfigDict

from specjax.decoding import batch, identity, loop, sampling, scheduler
from specjax.decoding.drafters.states import NoDrafter, StatesDrafter
from specjax.decoding.prefill import state_axes
from specjax.decoding.results import counts_of
from specjax.decoding.sampling import Sampling
from specjax.distillation import divergences, objective, update
from specjax.models import kv_cache
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (virtual) devices")

ALONE = (1, 1, 1)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
SLOTS, MAX_NEW, GAMMA, SEED = 8, 16, 3, 5
# Everything divides over every mesh here; the vocabulary is like no other size.
SHAPE = dict(heads=8, kv_heads=8, head_size=4, vocab_size=96)
VOCAB = SHAPE["vocab_size"]


@functools.cache
def models():
    return tiny.decoder(0, 2.0, **SHAPE), tiny.decoder(1, 2.0, layers=1, **SHAPE)


def mesh_of(sizes):
    return meshes.make_mesh(ConfigDict(dict(zip(meshes.AXES, sizes, strict=True))))


def texts():
    tokens, lengths = tiny.prompts(0, 8, SLOTS, VOCAB)
    rows = zip(np.asarray(tokens), np.asarray(lengths), strict=True)
    return [row[:length].tolist() for row, length in rows]


# How the tokens are drawn: the rule, greedy or not, and cuts of the law, which over devices are found by sums.
WAYS = {
    "greedy": ("lossless", True, Sampling.of(0.0)),
    "sampled": ("lossless", False, Sampling.of(1.0, top_k=40, top_p=0.95)),
    "coupled": ("coupled", False, Sampling.of(1.0)),
    "looked up": ("lossless", False, Sampling.of(1.0)),
}


@functools.cache
def plan_of(way, replicate=False):
    (target, _), (draft, _) = models()
    rule, greedy, _ = WAYS[way]
    settings = dict(gamma=GAMMA, slots=SLOTS, max_new=MAX_NEW, rule=rule, greedy=greedy)
    options = {"model": draft, "lookup": 0.15 if way == "looked up" else 0.0}
    return dataclasses.replace(tiny.plan(target, "model", options, **settings), replicate_draft=replicate)


def placed(sizes, replicate=False):
    """The mesh, and the parameters of target and draft on it."""
    (target, params), (draft, draft_params) = models()
    mesh = mesh_of(sizes)
    return (
        mesh,
        meshes.shard(params, target.axes(), mesh),
        meshes.shard(draft_params, draft.axes(replicate=replicate), mesh),
    )


@functools.cache
def generated(sizes, way, replicate=False, count=8, slots=None):
    """What a batch of the first prompts came to on the mesh."""
    mesh, params, draft_params = placed(sizes, replicate)
    with meshes.use(mesh):
        return scheduler.decode(
            plan_of(way, replicate),
            params,
            draft_params,
            (texts() * 2)[:count],
            indices=range(count),
            seed=SEED,
            sampling=WAYS[way][2],
            max_new_tokens=MAX_NEW,
            eos_ids=(3,),
            put=batch.Placer(mesh),
            slots=slots,
        )


def assert_same_tokens(alone, spread, way):
    """Token for token, but where the two best candidates are a tie; and then the same counts."""
    plan, rows = plan_of(way), len(spread.tokens)
    settings = dict(slots=plan.capacity, seed=SEED, sampling=WAYS[way][2])
    result = identity.compare(
        plan, models()[0][1], (texts() * 2)[:rows], alone.tokens[:rows], spread.tokens, **settings
    )
    assert all(difference["tie"] for difference in result["differences"]), result
    assert result["equal"] > 0 and any(len(row) > GAMMA + 1 for row in alone.tokens)
    if result["equal"] == result["of"]:
        spread_counts = counts_of(spread.rows)
        for name, counts in counts_of(alone.rows).items():
            np.testing.assert_array_equal(spread_counts[name], counts[:rows])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "way"),
    # Which token has the largest logit is a question of the tensor axis.
    [*((sizes, "sampled") for sizes in MESHES), *((sizes, "greedy") for sizes in MESHES if sizes[2] > 1)],
)
def test_a_mesh_generates_the_tokens_of_one_device(sizes, way):
    assert_same_tokens(generated(ALONE, way), generated(sizes, way), way)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["coupled", "looked up"])
def test_a_mesh_draws_with_one_devices_noise(way):
    assert_same_tokens(generated(ALONE, way), generated((2, 2, 2), way), way)


@pytest.mark.slow
def test_prompts_that_do_not_divide_over_the_mesh_are_padded_and_none_counts_twice():
    few = generated((2, 2, 2), "greedy", count=5)
    assert len(few.tokens) == len(few.origins) == 5
    assert_same_tokens(generated(ALONE, "greedy"), few, "greedy")
    assert counts_of(few.rows)["emitted"].sum() == sum(map(len, few.tokens))
    assert len(few.statistics.target_calls) == 5 and few.row_blocks == 8 * few.iterations


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "slots"), [((1, 1, 8), 3), ((2, 2, 2), 8), ((2, 2, 2), 4)])
def test_rows_on_a_mesh_take_the_next_prompts(sizes, slots):
    """As many rows are refilled at once as are sharded over devices: 1 of 3, and 4 of 8; 4 of 4 start together."""
    assert_same_tokens(
        generated(ALONE, "greedy", count=16), generated(sizes, "greedy", count=16, slots=slots), "greedy"
    )


@functools.cache
def recorded(sizes, slots):
    """The tokens of 16 prompts, and the target's states after each layer that decoding kept of them."""
    (target, _), (mesh, params, _) = models()[0], placed(sizes)
    plan = tiny.plan(target, gamma=0, slots=SLOTS, max_new=MAX_NEW, greedy=True)
    drafter, texts_of, kept = (
        StatesDrafter.of(NoDrafter(), 0, target, tuple(range(1, target.layers + 1))),
        texts() * 2,
        {},
    )

    def on_end(number, row, seconds, states):
        length = len(texts_of[number]) + len(row.tokens)
        kept[number] = row.tokens, [array[: length - 1] for array in states]

    how = {"sampling": Sampling.of(0.0), "max_new_tokens": MAX_NEW, "eos_ids": (3,), "on_end": on_end, "slots": slots}
    with meshes.use(mesh):
        plan, put = dataclasses.replace(plan, drafter=drafter), batch.Placer(mesh)
        scheduler.decode(plan, params, None, texts_of[:16], indices=range(16), seed=SEED, put=put, **how)
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8)])
def test_a_mesh_records_the_states_of_one_device(sizes):
    alone, there = recorded(ALONE, 16), recorded(sizes, 8)
    assert sorted(alone) == sorted(there) == list(range(16))
    for number, (tokens, states) in alone.items():
        assert there[number][0] == tokens
        for array, expected in zip(there[number][1], states, strict=True):
            np.testing.assert_allclose(array, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_draft_that_is_whole_on_every_device_of_the_tensor_axis_drafts_the_same():
    mesh, _, draft_params = placed((2, 2, 2), replicate=True)
    split = {axis for leaf in jax.tree.leaves(draft_params) for axis in jax.tree.leaves(tuple(leaf.sharding.spec))}
    assert mesh.shape["tensor"] == 2 and split == {"fsdp"}
    assert_same_tokens(generated(ALONE, "greedy"), generated((2, 2, 2), "greedy", replicate=True), "greedy")


def decode_step(sizes, way, replicate=False):
    """The compiled loop of decoding and the state it begins with."""
    mesh, params, draft_params = placed(sizes, replicate)
    put, plan = batch.Placer(mesh), plan_of(way, replicate)
    tokens, lengths = batch.pad(texts(), SLOTS)
    with meshes.use(mesh):
        keys = sampling.row_keys(SEED, put(np.arange(8, dtype=np.int32)))
        state = loop.prefill(plan, params, draft_params, put(tokens), put(lengths), keys)
        limits = loop.Limits(put(np.full(8, MAX_NEW, np.int32)), jnp.asarray([3], jnp.int32))
        # As leaves: lowering makes trees of things that are no arrays, which the types of ours refuse.
        leaves, tree = jax.tree.flatten((params, draft_params, state, WAYS[way][2], limits))
        run = jax.jit(lambda *leaves: jax.tree.leaves(loop.run(plan, *jax.tree.unflatten(tree, leaves))))
        return run.lower(*leaves).compile().as_text(), state


def gathered(text):
    """The shapes of what a compiled program's all-gathers give (and all-to-alls, which exchange as much)."""
    result = []
    for line in text.splitlines():
        made = re.search(r"= (.*?) (?:all-gather|all-to-all)(?:-start)?\(", line)
        if made:
            result += [tuple(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\[([\d,]*)\]", made[1])]
    return result


@pytest.mark.slow
@pytest.mark.parametrize("way", ["greedy", "sampled"])
@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 2, 2)])
def test_decoding_gathers_neither_the_vocabulary_nor_whole_parameters(sizes, way):
    text, _ = decode_step(sizes, way)
    shapes = gathered(text)
    assert "all-reduce" in text, "it is a program of several devices"
    assert not [shape for shape in shapes if VOCAB in shape], "logits, or the embedding"
    (_, params), (_, draft_params) = models()
    matrices = {leaf.shape for leaf in jax.tree.leaves((params, draft_params)) if leaf.ndim > 1}
    assert not matrices & {tuple(size for size in shape if size > 1) for shape in shapes}


def test_a_gather_of_the_vocabulary_would_be_seen():
    mesh = mesh_of((1, 1, 8))
    logits = jax.ShapeDtypeStruct((3, VOCAB), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(None, "tensor")))
    text = jax.jit(lambda x: jnp.sort(x, axis=-1)).lower(logits).compile().as_text()
    assert any(VOCAB in shape for shape in gathered(text))


@pytest.mark.slow
@pytest.mark.parametrize("replicate", [False, True])
def test_caches_lie_where_the_rules_say(replicate):
    """The caches of a replicated draft have their rows split and nothing else."""
    _, state = decode_step((2, 2, 2), "greedy", replicate)
    of_draft = jax.P(("data", "fsdp")) if replicate else meshes.spec(kv_cache.AXES)
    for cache, lies in ((state.target_cache, meshes.spec(kv_cache.AXES)), (state.drafter_state, of_draft)):
        for slots in (*cache.keys, *cache.values):
            expected = jax.NamedSharding(slots.sharding.mesh, lies)
            assert slots.sharding.is_equivalent_to(expected, slots.ndim), slots.sharding
    # All that the loop carries lies where plans for chips take it to lie.
    for x, names in zip(jax.tree.leaves(state), state_axes(plan_of("greedy", replicate), state), strict=True):
        assert x.sharding.is_equivalent_to(jax.NamedSharding(x.sharding.mesh, meshes.spec(names)), x.ndim), x


def test_on_tpus_each_device_writes_its_rows_of_a_cache_in_place(monkeypatch):
    monkeypatch.setattr(meshes, "platform", lambda: "tpu")
    # A CPU copies for it; tests/test_tpu.py finds no copy in a TPU's program.
    monkeypatch.setattr(kv_cache, "with_layout_constraint", lambda array, layout: array)
    mesh = mesh_of((2, 2, 2))
    sharding = jax.NamedSharding(mesh, meshes.spec(kv_cache.AXES))
    cache = jax.device_put(np.zeros((8, 2, 16, 4), np.float32), sharding)
    new, start = np.ones((8, 2, 3, 4), np.float32), np.arange(8, dtype=np.int32)
    write = jax.jit(functools.partial(kv_cache.write_rows, axis=2), donate_argnums=0, out_shardings=sharding)
    with meshes.use(mesh):
        compiled = write.lower(cache, new, start).compile()
        written = np.asarray(compiled(cache, new, start))
    text = compiled.as_text()
    assert not re.search("all-|permute|scatter|while|copy", text) and text.count(" dynamic-update-slice(") == 2
    expected = (np.arange(16) >= start[:, None]) & (np.arange(16) < start[:, None] + 3)
    np.testing.assert_array_equal(written, np.broadcast_to(expected[:, None, :, None], written.shape))


@functools.cache
def loss_and_gradient(sizes, replicate=False):
    """Of one batch: the sums that validation takes, and the gradient that a step clips."""
    (target, _), (draft, _) = models()
    tokens, lengths = tiny.prompts(1, 8, 16, VOCAB)
    starts = np.minimum(2, np.asarray(lengths)).astype(np.int32)
    rows = {"tokens": tokens, "lengths": lengths, "loss_start": starts, "prompt_lengths": starts}
    mesh, params, draft_params = placed(sizes, replicate)
    loss = objective.Loss(draft, target, divergences.divergence("forward_kl"), 1.0, 4)
    gradient = jax.jit(lambda *arguments: update._gradient_of_sum(loss, *arguments, 1, 0))
    with meshes.use(mesh):
        return jax.device_get(gradient(draft_params, params, update.shard(rows, mesh)))


def assert_same_loss(alone, spread):
    (sums, gradient), (spread_sums, spread_gradient) = alone, spread
    assert spread_sums.tokens == sums.tokens > 0
    np.testing.assert_allclose(spread_sums.loss, sums.loss, rtol=1e-5)
    np.testing.assert_allclose(spread_sums.acceptance, sums.acceptance, rtol=1e-5)
    difference = optax.tree.norm(optax.tree.sub(spread_gradient, gradient))
    assert difference < 1e-5 * optax.tree.norm(gradient)


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "sizes", [pytest.param(sizes, marks=[pytest.mark.slow] * (sizes != (2, 2, 2))) for sizes in MESHES]
)
def test_a_mesh_has_the_loss_and_the_gradient_of_one_device(sizes):
    assert_same_loss(loss_and_gradient(ALONE), loss_and_gradient(sizes))


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_a_draft_that_is_whole_has_the_same_gradient():
    assert_same_loss(loss_and_gradient(ALONE), loss_and_gradient((2, 2, 2), replicate=True))


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 3, 1), (4, 4, 1)])
def test_a_mesh_that_does_not_match_the_devices_is_refused_with_their_number(sizes):
    with pytest.raises(UserError, match=f"let mesh.data \\* mesh.fsdp \\* mesh.tensor be {jax.device_count()}"):
        mesh_of(sizes)


# Shapes of which the tensor axis does not divide something, and what is logged.
UNDIVIDED = {
    "one key/value head": (dict(SHAPE, kv_heads=1), "key/value heads 1"),
    "two key/value heads": (dict(SHAPE, kv_heads=2, vocab_size=97), "key/value heads 2 and vocabulary 97"),
    "few heads": (dict(SHAPE, heads=4, kv_heads=2), "heads 4 and key/value heads 2"),
}


@pytest.mark.parametrize("case", UNDIVIDED)
def test_what_the_tensor_axis_does_not_divide_is_replicated_and_logged(case, caplog):
    shape, message = UNDIVIDED[case]
    target, mesh = tiny.decoder(0, **shape)[0], mesh_of((1, 1, 8))
    attached = tiny.adapter(target)[0], tiny.heads(target, 1), tiny.eagle3(target)[0]
    for network in (target, *attached):
        caplog.clear()
        specs = jax.tree.map(lambda x: x.spec, network.shardings(mesh))
        logged = " ".join(caplog.messages)
        if network is target:
            assert f"mesh.tensor 8 does not divide {message}; every device" in logged
            attention = specs["blocks"][0]["attention"]
        elif "attention" in specs:
            assert "key/value heads" in logged
            attention = specs["attention"]
        split = {name: "tensor" in jax.tree.leaves(tuple(attention[name]["kernel"])) for name in ("query", "key")}
        assert split == {"query": shape["heads"] == 8, "key": False}
    caplog.clear()
    jax.tree.map(lambda x: x, target.shardings(mesh_of((8, 1, 1))))
    assert not caplog.messages


@pytest.fixture
def undivided(request, monkeypatch):
    """Within the test, `models` are of this case of UNDIVIDED."""
    functions = models, plan_of, generated, loss_and_gradient
    shape = UNDIVIDED[request.param][0]
    monkeypatch.setitem(globals(), "SHAPE", shape)
    monkeypatch.setitem(globals(), "VOCAB", shape["vocab_size"])
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "undivided", ["few heads", pytest.param("two key/value heads", marks=pytest.mark.thorough)], indirect=True
)
def test_a_mesh_that_replicates_what_it_does_not_divide_says_what_one_device_says(undivided):
    sizes = 1, 1, 8
    assert_same_tokens(generated(ALONE, "sampled"), generated(sizes, "sampled"), "sampled")
    assert_same_loss(loss_and_gradient(ALONE), loss_and_gradient(sizes))
    assert not gathered(decode_step(sizes, "greedy")[0])


def test_slices_cut_the_data_axis_first_and_never_the_tensor_axis():
    assert meshes.over_slices((4, 2, 8), 2) == (2, 1, 1)
    assert meshes.over_slices((2, 4, 8), 4) == (2, 2, 1)
    assert meshes.over_slices((1, 4, 1), 4) == (1, 4, 1)
    with pytest.raises(UserError, match="let mesh.data be a multiple of 2"):
        meshes.over_slices((1, 1, 8), 2)


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of one of several slices, as far as laying out a mesh asks."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def test_a_mesh_of_two_slices_crosses_between_them_along_data_alone():
    devices = [Device(number, number // 4) for number in range(8)]
    laid_out = meshes.lay_out((4, 1, 2), devices, 2)
    assert laid_out.shape == (4, 1, 2)
    assert [{device.slice_index for device in row.flat} for row in laid_out] == [{0}, {0}, {1}, {1}]


@pytest.mark.parametrize(("sizes", "rows"), [((8, 1, 1), 8), ((2, 2, 2), 4)])
def test_a_process_that_is_alone_has_all_rows(sizes, rows):
    mesh = mesh_of(sizes)
    assert meshes.own_rows(mesh, rows) == tuple(range(rows))
    array = np.arange(3 * rows).reshape(rows, 3)
    np.testing.assert_array_equal(meshes.place_rows(array, rows, mesh), array)
    with pytest.raises(UserError, match='axis "batch" of size 6'):
        meshes.own_rows(mesh_of((8, 1, 1)), 6)
