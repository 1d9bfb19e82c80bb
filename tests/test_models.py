"""The decoder: its forward against a plain writing of it, and every cached way through it against the forward."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specjax.models import attention, kv_cache, language_model, layers
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.runtime import dtypes
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

TIGHT = {"atol": 1e-4, "rtol": 1e-4}


@functools.partial(jax.jit, static_argnames=("model", "layers"))
def extend(model, params, cache, inputs, positions, mask=None, layers=None):
    return model.extend(params, cache, inputs, positions, mask, layers=layers)


@functools.partial(jax.jit, static_argnums=0)
def head(model, params, hidden):
    return model.head(params, hidden)


def positions_from(start, steps):
    return jnp.asarray(np.asarray(start)[:, None] + np.arange(steps)[None], jnp.int32)


@pytest.fixture(scope="module")
def grouped():
    model, params = tiny.decoder(3, heads=4, kv_heads=2, width=24, tied_head=False, attention_sinks=True)
    return model, with_sinks(params)


def with_sinks(params):
    """The parameters with sinks, if there are any, from -1 to 2, so each changes its head's weights differently."""
    spread = lambda path, x: jnp.linspace(-1, 2, len(x)) if path[-1].key == "sinks" else x
    return jax.tree_util.tree_map_with_path(spread, params)


# --- the forward ---------------------------------------------------------------------------------------------------


def plain_forward(config: DecoderConfig, params, tokens):
    """One text through the architecture in float64 numpy, one head and one query at a time."""
    array = lambda x: np.asarray(x, np.float64)
    norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * array(scale)
    half = config.head_size // 2
    frequencies = config.rotary.theta ** (-np.arange(half) / half)

    def rotate(head):
        angles = np.arange(len(head))[:, None] * frequencies
        turned = (head[:, :half] + 1j * head[:, half:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=1)

    hidden = array(params["embedding"])[tokens]
    for layer in range(config.layers):
        block = params["blocks"][layer]
        attention, mlp = block["attention"], block["mlp"]
        normed = norm(hidden, block["attention_norm"]["scale"])
        split = lambda name, n: np.split(normed @ array(attention[name]["kernel"]).T, n, axis=1)  # noqa: B023
        keys = [rotate(head) for head in split("key", config.kv_heads)]
        values = split("value", config.kv_heads)
        mixed = []
        for i, query in enumerate(rotate(head) for head in split("query", config.heads)):
            group = i // (config.heads // config.kv_heads)
            scores = query @ keys[group].T / np.sqrt(config.head_size)
            weights = np.exp(np.where(np.tri(len(tokens)) > 0, scores, -np.inf))
            sink = np.exp(array(attention["sinks"])[i]) if config.attention_sinks else 0
            mixed.append(weights / (weights.sum(-1, keepdims=True) + sink) @ values[group])
        hidden = hidden + np.concatenate(mixed, axis=1) @ array(attention["output"]["kernel"]).T
        normed = norm(hidden, block["mlp_norm"]["scale"])
        gate = normed @ array(mlp["gate"]["kernel"]).T
        hidden = (
            hidden
            + (gate / (1 + np.exp(-gate)) * (normed @ array(mlp["up"]["kernel"]).T)) @ array(mlp["down"]["kernel"]).T
        )
    normed = norm(hidden, params["norm"]["scale"])
    return normed @ array(params["embedding"] if config.tied_head else params["unembedding"]["kernel"]).T


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"heads": 4, "kv_heads": 2, "width": 24, "tied_head": False, "attention_sinks": True},
        {"heads": 2, "kv_heads": 2, "rope_theta": 100.0},
    ],
    ids=["tied", "grouped_untied_sinks", "one_head_each"],
)
def test_the_forward_is_the_plain_writing_of_it(shape):
    model, params = tiny.decoder(3, **shape)
    params = with_sinks(params)
    texts, _ = tiny.prompts(0, 2, 9, model.vocab_size)
    ours = np.asarray(tiny.full_logits(model, params, texts))
    for row in range(2):
        np.testing.assert_allclose(ours[row], plain_forward(model.config, params, np.asarray(texts[row])), **TIGHT)


def test_grouped_heads_are_shared_heads(grouped):
    model, params = grouped
    repeat = lambda kernel: jnp.repeat(kernel.reshape(2, 1, 8, 24), 2, axis=1).reshape(32, 24)
    wide = jax.tree.map_with_path(
        lambda path, x: repeat(x) if {"key", "value"} & {getattr(entry, "key", None) for entry in path} else x,
        params,
    )
    whole = Decoder(tiny.config(heads=4, kv_heads=4, width=24, tied_head=False, attention_sinks=True))
    texts, _ = tiny.prompts(0, 3, 9, model.vocab_size)
    ours, shared = tiny.full_logits(model, params, texts), tiny.full_logits(whole, wide, texts)
    np.testing.assert_allclose(np.asarray(ours), np.asarray(shared), **TIGHT)


def test_no_position_sees_a_later_token(grouped):
    model, params = grouped
    texts, _ = tiny.prompts(0, 1, 9, model.vocab_size)
    texts = jnp.broadcast_to(texts, (9, 9))
    changed = texts.at[jnp.arange(9), jnp.arange(9)].add(1) % model.vocab_size  # row i differs at position i
    ours, other = (np.asarray(tiny.full_logits(model, params, x)) for x in (texts, changed))
    for row in range(9):
        np.testing.assert_array_equal(ours[row, :row], other[row, :row])
        assert np.all(np.abs(ours[row, row:] - other[row, row:]).max(-1) > 1e-4)


# --- the cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[1] * 11, [5, 1, 4, 1], [3, 8]], ids=str)
def test_cached_logits_equal_the_full_forward_at_every_chunking(grouped, chunks):
    model, params = grouped
    texts, lengths = tiny.prompts(0, 3, 11, model.vocab_size)
    full = np.asarray(tiny.full_logits(model, params, texts))
    cache, start, pieces = model.start(params, texts, lengths, 16), 0, []
    for steps in chunks:
        positions = positions_from(np.full(3, start), steps)
        hidden, cache = extend(model, params, cache, texts[:, start : start + steps], positions)
        pieces.append(hidden)
        start += steps
    cached = np.asarray(head(model, params, jnp.concatenate(pieces, axis=1)))
    np.testing.assert_allclose(cached, full, **TIGHT)


def test_rows_at_different_positions_cross_the_cache_prefixes(grouped):
    """Rows start at different positions, and their slots cross one prefix or another while other rows stay below."""
    model, params = grouped
    short, steps, batch = 128, 20, 4
    slots = 4 * short + 3
    assert kv_cache.prefixes(slots) == [short, 2 * short + 1, slots]
    texts = jnp.asarray(np.random.default_rng(0).integers(0, model.vocab_size, (batch, slots)), jnp.int32)
    full = np.asarray(tiny.full_logits(model, params, texts))
    edge = short - steps  # the last start that stays inside the first prefix
    last = slots - steps
    between = 2 * short + 1 - steps  # the last start that stays inside the second prefix
    starts_of = [0, 3, 17, edge], [0, 30, 45, edge + 1], [5, short - 1, short, between], [3, 0, 40, between + 1]
    for starts in (*starts_of, [9, 0, 1, last]):
        # The prompt is written up to the row's start (and, stale, beyond it), then extended from there.
        cache = model.start(params, texts, jnp.full((batch,), slots, jnp.int32), slots)
        garbage = jnp.where(np.arange(slots)[None] < np.asarray(starts)[:, None], texts, 7)
        _, cache = extend(model, params, cache, garbage, positions_from(np.zeros(batch), slots))
        positions = positions_from(starts, steps)
        tokens = jnp.take_along_axis(texts, positions, axis=1)
        hidden, _ = extend(model, params, cache, tokens, positions)
        logits = np.asarray(head(model, params, hidden))
        np.testing.assert_allclose(logits, full[np.arange(batch)[:, None], np.asarray(positions)], **TIGHT)


def test_prefixes_are_quarters_of_quarters_of_the_capacity_and_on_a_cpu_halves_of_halves(monkeypatch):
    assert kv_cache.prefixes(512) == [128, 256, 512] and kv_cache.prefixes(255) == [255]
    assert kv_cache.prefixes(2048) == [128, 256, 512, 1024, 2048] and kv_cache.prefixes(5) == [5]
    for platform in ("gpu", "tpu"):
        monkeypatch.setattr(meshes, "platform", lambda platform=platform: platform)
        assert kv_cache.prefixes(512) == [128, 512] and kv_cache.prefixes(1024) == [256, 1024]
        assert kv_cache.prefixes(8192) == [128, 512, 2048, 8192] and kv_cache.prefixes(511) == [511]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("shape", [(1, 2, 9, 4), (3, 2, 9, 4), (40, 2, 9, 4), (3, 9)])
def test_write_touches_only_the_named_slots_of_each_row(monkeypatch, platform, shape):
    monkeypatch.setattr(meshes, "platform", lambda: platform)
    axis = min(len(shape) - 1, 2)
    slots = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)
    new = -1 - jnp.arange(math.prod(shape) // 3, dtype=jnp.float32).reshape(*shape[:axis], 3, *shape[axis + 1 :])
    start = jnp.arange(6, 6 * shape[0] + 6, 6, dtype=jnp.int32) % 7  # 6, 5, .., 0, 6, ..
    expected = np.asarray(slots).copy()
    for row in range(shape[0]):
        np.moveaxis(expected[row], axis - 1, 0)[start[row] : start[row] + 3] = np.moveaxis(new[row], axis - 1, 0)
    write = jax.jit(lambda *arrays: kv_cache.write_rows(*arrays, axis=axis))  # for each platform traced anew
    np.testing.assert_array_equal(write(slots, new, start), expected)


def test_a_single_row_on_a_tpu_is_multiplied_together_with_others_that_change_nothing(monkeypatch):
    """A single row of the batch, and of queries for each key head."""
    draw = lambda *shape: jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    results = []
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(meshes, "platform", lambda platform=platform: platform)
        more = {"scale": 0.5, "bias": draw(1, 2, 1, 8), "sinks": draw(2)}
        attend = jax.jit(lambda *inputs, more=more: attention.attend(*inputs, **more))
        mixed = attend(draw(3, 2, 1, 4), draw(3, 2, 8, 4), draw(3, 2, 8, 4), jnp.arange(8)[None, None] < 5)
        multiply = jax.jit(lambda *inputs: layers.product(*inputs, jnp.float32))
        results.append((mixed, multiply(draw(1, 1, 8), draw(5, 8))))
    for on_cpu, on_tpu in zip(*results, strict=True):
        np.testing.assert_allclose(on_tpu, on_cpu, **TIGHT)


def test_a_mask_hides_slots_with_and_without_a_cache(grouped):
    model, params = grouped
    texts, lengths = tiny.prompts(0, 2, 8, model.vocab_size)
    positions = positions_from(np.zeros(2), 8)
    mask = jnp.asarray(np.random.default_rng(2).random((2, 8, 8)) < 0.6) | jnp.eye(8, dtype=bool)[None]
    bare, _ = extend(model, params, None, texts, positions, mask)
    cache = model.start(params, texts, lengths, 12)
    padded = jnp.pad(mask, ((0, 0), (0, 0), (0, 4)), constant_values=True)
    cached, _ = extend(model, params, cache, texts, positions, padded)
    np.testing.assert_allclose(np.asarray(cached), np.asarray(bare), **TIGHT)
    unmasked, _ = extend(model, params, None, texts, positions)
    assert np.abs(np.asarray(bare) - np.asarray(unmasked)).max() > 1e-2
    # A token that sees itself alone is a text of one token.
    alone, _ = extend(model, params, None, texts, positions, jnp.broadcast_to(jnp.eye(8, dtype=bool)[None], (2, 8, 8)))
    single, _ = extend(model, params, None, texts[:, 4:5], positions[:, :1])
    np.testing.assert_allclose(np.asarray(alone)[:, 4], np.asarray(single)[:, 0], **TIGHT)


@pytest.mark.parametrize("cached, cuts", [(False, (2,)), (True, (1, 2))])
def test_any_range_of_layers_resumes_from_hidden_states(cached, cuts):
    model, params = tiny.decoder(3, layers=3)
    texts, lengths = tiny.prompts(0, 2, 7, model.vocab_size)
    positions = positions_from(np.zeros(2), 7)
    start = lambda: model.start(params, texts, lengths, 9) if cached else None
    whole, whole_cache = extend(model, params, start(), texts, positions)
    hidden, cache = texts, start()
    for lo, hi in zip((0, *cuts), (*cuts, 3), strict=True):
        before = cache
        hidden, cache = extend(model, params, cache, hidden, positions, layers=(lo, hi))
        if cached:
            changed = [bool((a != b).any()) for a, b in zip(before.keys, cache.keys, strict=True)]
            assert changed == [lo <= layer < hi for layer in range(3)]
    np.testing.assert_allclose(np.asarray(hidden), np.asarray(whole), **TIGHT)
    for ours, expected in zip(jax.tree.leaves(cache), jax.tree.leaves(whole_cache), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(expected), **TIGHT)


# --- parameters ----------------------------------------------------------------------------------------------------

SHAPES = [{}, {"tied_head": False, "heads": 4, "kv_heads": 2}, {"layers": 3, "head_size": 4, "mlp_width": 40}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_num_params_counts_the_arrays(shape):
    config = tiny.config(**shape)
    model = Decoder(config)
    leaves = jax.tree.leaves(model.abstract_params())
    assert model.num_params == sum(x.size for x in leaves)
    looked_up = 0 if config.tied_head else config.vocab_size * config.width
    assert model.num_step_params == model.num_params - looked_up


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_every_parameter_has_one_axis_name_a_dimension(shape):
    model = Decoder(tiny.config(**shape))
    params, axes = model.abstract_params(), model.axes()
    is_axes = lambda x: isinstance(x, tuple)
    assert jax.tree.structure(params) == jax.tree.structure(axes, is_leaf=is_axes)
    ranks = jax.tree.map(lambda names: len(names), axes, is_leaf=is_axes)
    assert jax.tree.map(lambda x: x.ndim, params) == ranks
    names = {name for leaf in jax.tree.leaves(axes, is_leaf=is_axes) for name in leaf}
    assert names == {"vocab", "embed", "heads", "kv_heads", "mlp", "norm"}
    cache = kv_cache.zeros(model.config, 2, 8)
    assert {x.ndim for x in (*cache.keys, *cache.values)} == {len(kv_cache.AXES)}


def test_init_matches_its_abstract_tree_and_depends_on_the_key():
    model = Decoder(tiny.config(param_dtype="bfloat16"))
    first, second = model.init(jax.random.key(0)), model.init(jax.random.key(1))
    described = jax.tree.map(lambda x: (x.shape, x.dtype), first)
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype), model.abstract_params())
    differ = jax.tree.map_with_path(lambda path, a, b: bool((a != b).any()) or path[-1].key == "scale", first, second)
    assert all(jax.tree.leaves(differ))


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits():
    model, params = tiny.decoder(3)
    low = Decoder(tiny.config(compute_dtype="bfloat16"))
    texts, lengths = tiny.prompts(0, 2, 7, model.vocab_size)
    cache = low.start(params, texts, lengths, 9)
    hidden, cache = extend(low, params, cache, texts, positions_from(np.zeros(2), 7))
    logits = head(low, params, hidden)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    # On CPU; see the next test.
    assert {x.dtype for x in (*cache.keys, *cache.values)} == {jnp.dtype(jnp.float32)}
    exact = np.asarray(tiny.full_logits(model, params, texts))
    error = np.abs(np.asarray(logits) - exact)
    assert 0 < error.max() < 0.15 * exact.std() + 0.1


def test_a_decoding_step_in_bfloat16_does_not_convert_the_cache():
    model, rows, slots = Decoder(tiny.config(compute_dtype="bfloat16", layers=1)), 3, 40
    cache, tokens = kv_cache.zeros(model.config, rows, slots), jnp.zeros((rows, 1), jnp.int32)

    def step(params, keys, values):
        hidden, extended = extend(model, params, dataclasses.replace(cache, keys=keys, values=values), tokens, tokens)
        return hidden, extended.keys, extended.values

    lowered = jax.jit(step, donate_argnums=(1, 2)).lower(model.init(jax.random.key(0)), cache.keys, cache.values)
    program = lowered.compile().as_text()
    shape = f"[{rows},{model.config.kv_heads},{slots},{model.config.head_size}]"
    assert f"f32{shape}" in program and f"bf16{shape}" not in program


def test_fastest_computes_in_bfloat16_on_a_cpu_with_instructions_for_its_products(monkeypatch):
    for has_amx, chosen in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(dtypes, "cpu_has_amx", lambda has_amx=has_amx: has_amx)
        assert dtypes.compute_dtype("fastest") == chosen
        assert dtypes.compute_dtype("auto") == "float32"
    with pytest.raises(UserError, match='there is no dtype "fast"; did you mean "fastest"'):
        dtypes.compute_dtype("fast")


def test_products_in_bfloat16_and_their_gradients_are_summed_in_float32():
    rows, kernel = jnp.ones((1, 70, 8), jnp.bfloat16), jnp.ones((6, 8), jnp.float32)
    loss = lambda rows, kernel: jnp.sum(layers.product(rows, kernel, jnp.bfloat16).astype(jnp.float32) ** 2)
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(rows, kernel).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all("bf16>, tensor" in line and line.rstrip().endswith("xf32>") for line in products)


def test_gradients_reach_every_parameter():
    model, params = tiny.decoder(3, tied_head=False, layers=1, attention_sinks=True)
    texts, _ = tiny.prompts(0, 4, 9, model.vocab_size)
    loss = lambda params: jnp.mean(jax.nn.log_softmax(tiny.full_logits(model, params, texts))[..., 0])
    gradients = jax.jit(jax.grad(loss))(params)
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"heads": 3, "kv_heads": 2}, "multiple of kv_heads"),
        ({"head_size": 7}, "even"),
        ({"layers": 0}, "layers must be at least 1"),
    ],
)
def test_impossible_shapes_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        tiny.config(**changes)


def test_an_unknown_dtype_is_named_with_its_nearest():
    with pytest.raises(UserError, match='bfloat61.*"bfloat16"'):
        tiny.config(compute_dtype="bfloat61")


def test_a_projections_gradient_is_that_of_the_plain_product():
    keys = jax.random.split(jax.random.key(0), 3)
    inputs, kernel, outer = (jax.random.normal(k, s) for k, s in zip(keys, [(2, 5, 3), (4, 3), (2, 5, 4)], strict=True))
    pulled = lambda product: jax.vjp(product, inputs, kernel)[1](outer)
    for ours, plain in zip(
        pulled(lambda *factors: layers.product(*factors, jnp.float32)), pulled(lambda x, w: x @ w.T), strict=True
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 5, 32, 70])
def test_a_product_with_a_16_bit_kernel_is_that_with_the_same_values_in_float32(rows, amx, dtype, monkeypatch):
    monkeypatch.setattr(layers, "cpu_has_amx", lambda: amx)
    monkeypatch.setattr(layers, "_BLOCK_BYTES", 4 * 48 * 8)  # blocks of 8 outputs, the last of which overlaps
    inputs, kernel = jax.random.normal(jax.random.key(0), (1, rows, 48)), jax.random.normal(jax.random.key(1), (37, 48))
    kernel = kernel.astype(dtype)
    expected = np.asarray(inputs, np.float64) @ np.asarray(kernel, np.float64).T
    np.testing.assert_allclose(layers.product(inputs, kernel, jnp.float32), expected, rtol=1e-5, atol=1e-5)
    rounded = inputs.astype(dtype)
    expected = np.asarray(rounded, np.float64) @ np.asarray(kernel, np.float64).T
    np.testing.assert_allclose(layers.product(rounded, kernel, jnp.float32), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_loop_converts_the_rows_that_it_looks_up_and_not_the_table(dtype):
    table = jax.random.normal(jax.random.key(0), (911, 24)).astype(dtype)

    def run(look_up, table, tokens):
        def step(_, carry):
            tokens, total = carry
            rows = look_up(table, tokens).astype(jnp.float32)
            return (tokens + 1 + jnp.abs(jnp.sum(rows)).astype(jnp.int32)) % 950, total + rows

        return jax.lax.fori_loop(0, 4, step, (tokens, jnp.zeros((1, 2, 24))))[1]

    tokens = jnp.asarray([[3, 700]])
    compiled = jax.jit(functools.partial(run, language_model.look_up)).lower(table, tokens).compile()
    plain = jax.jit(functools.partial(run, lambda table, tokens: table.at[tokens].get(mode="clip")))
    np.testing.assert_array_equal(compiled(table, tokens), plain(table, tokens))
    # Only what runs by itself before the loop is in ENTRY; what is fused with the lookup is in another computation.
    whole = r" = f32\[911,24\]\S* (fusion|convert|call)\("
    texts = [program.as_text().partition("ENTRY")[2] for program in (compiled, plain.lower(table, tokens).compile())]
    assert not re.search(whole, texts[0])
    assert re.search(whole, texts[1]) or dtype != "bfloat16", "XLA converts the table no longer: remove the barrier"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_dot_products_of_any_number_of_queries_are_exact(batch, rows):
    queries = jax.random.normal(jax.random.key(0), (batch, 2, rows, 16))
    keys = jax.random.normal(jax.random.key(1), (batch, 2, 24, 16))
    exact = np.einsum("bkrh,bksh->bkrs", np.asarray(queries, np.float64), np.asarray(keys, np.float64))
    np.testing.assert_allclose(jax.jit(attention._products)(queries, keys), exact, atol=3e-6)
