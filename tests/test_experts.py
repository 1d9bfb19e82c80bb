"""Mixtures of experts: every way to compute them, on one device and on meshes, decoding with them, their files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from lossless import COUPLED, GREEDY, MAX_NEW, SLOTS, VOCAB, Pair, compare_with_plain
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from specjax.decoding import batch, scheduler
from specjax.decoding.sampling import Sampling
from specjax.distillation import objective
from specjax.evaluation import expert_use, throughput
from specjax.hub import load as hub_load
from specjax.hub import save as hub_save
from specjax.hub.load import FAMILIES
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models import experts
from specjax.models.decoder import Decoder
from specjax.models.experts import Choice
from specjax.planning import executables, hlo
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

SPARSE = dict(experts=8, experts_per_token=3, expert_width=12)
KERNELS = ("gate", "up", "down")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def case(batch, steps, bias=False):
    """The config, inputs, the choice of experts for each token, and kernels, all random."""
    config = tiny.config(**SPARSE, mlp_bias=bias)
    choice = experts.choose(normal(1, batch * steps, 8), config)
    choice = Choice(*(x.reshape(batch, steps, 3) for x in choice))
    kernels = {}
    for seed, name in enumerate(KERNELS):
        outputs, inputs = (16, 12) if name == "down" else (12, 16)
        kernels[name] = {"kernel": 0.3 * normal(seed + 2, 8, outputs, inputs)}
        kernels[name] |= {"bias": 0.3 * normal(seed + 5, 8, outputs)} if bias else {}
    return config, normal(0, batch, steps, 16), choice, kernels


def dense(inputs, choice, kernels):
    """Every expert computes every token, and those that were not chosen have weight 0."""
    apply = lambda name, x: (
        jnp.einsum("BTEI,EOI->BTEO", x, kernels[name]["kernel"])
        + kernels[name].get("bias", jnp.zeros((8, 1)))[None, None]
    )
    x = jnp.broadcast_to(inputs[:, :, None], (*inputs.shape[:2], 8, 16))
    outputs = apply("down", jax.nn.silu(apply("gate", x)) * apply("up", x))
    weights = jnp.sum(jax.nn.one_hot(choice.experts, 8) * choice.weights[..., None], axis=2)
    return jnp.einsum("BTEO,BTE->BTO", outputs, weights)


def value_and_gradients(run, inputs, choice, kernels):
    """The output, and gradients of a sum with respect to inputs, weights of experts, and kernels."""
    loss = lambda inputs, weights, kernels: jnp.sum(jnp.sin(run(inputs, Choice(choice.experts, weights), kernels)))
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(inputs, choice.weights, kernels)
    return jax.device_get((jax.jit(run)(inputs, choice, kernels), gradients))


def assert_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


# --- the arithmetic ------------------------------------------------------------------------------------------------


def test_weights_are_the_probabilities_of_the_chosen_experts_normalised_if_the_config_says_so():
    logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3]]))
    sparse = {**SPARSE, "experts": 4, "experts_per_token": 2}
    choice = experts.choose(logits, tiny.config(**sparse, normalised_experts=False))
    assert choice.experts.tolist() == [[1, 3]]
    np.testing.assert_allclose(choice.weights, [[0.4, 0.3]], rtol=1e-6)
    choice = experts.choose(logits, tiny.config(**sparse))
    np.testing.assert_allclose(choice.weights, [[4 / 7, 3 / 7]], rtol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("batch, steps, bias", [(1, 1, False), (2, 5, True), (4, 60, False)])
def test_every_platforms_way_computes_the_chosen_experts_and_their_gradients(platform, batch, steps, bias, monkeypatch):
    config, *arrays = case(batch, steps, bias)
    monkeypatch.setattr(meshes, "platform", lambda: platform)
    assert_close(value_and_gradients(functools.partial(experts.mix, config), *arrays), reference(batch, steps, bias))


@functools.cache
def reference(batch, steps, bias):
    return value_and_gradients(dense, *case(batch, steps, bias)[1:])


SLOW_SIZES = [pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((1, 4, 2), (1, 1, 8))]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), *SLOW_SIZES])
@pytest.mark.parametrize("batch, steps, bias", [(2, 5, True), (4, 40, False)])
def test_meshes_compute_what_one_device_computes(sizes, batch, steps, bias):
    config, inputs, choice, kernels = case(batch, steps, bias)
    of = {name: {"kernel": ("expert", None, "embed"), "bias": ("expert", None)} for name in KERNELS}
    of["down"] = {"kernel": ("expert", "embed", None), "bias": ("expert", "embed")}
    axes = {name: {kind: of[name][kind] for kind in arrays} for name, arrays in kernels.items()}
    mesh = mesh_of(sizes)
    run = lambda *arrays: experts._on_mesh(functools.partial(experts.mix, config), *arrays)
    with meshes.use(mesh):
        got = value_and_gradients(run, inputs, choice, meshes.shard(kernels, axes, mesh))
    assert_close(got, reference(batch, steps, bias))


def mesh_of(sizes):
    return meshes.make_mesh(ConfigDict(dict(zip(meshes.AXES, sizes, strict=True))))


def test_the_balance_loss_is_k_for_even_use_and_grows_to_the_number_of_experts_for_one_expert():
    even = jnp.tile(jnp.asarray([[5.0, 5.0, 0.0, 0.0], [0.0, 0.0, 5.0, 5.0]]), (4, 1))
    np.testing.assert_allclose(experts.balance_loss(even[None], 2, jnp.ones((1, 8))), 2.0, rtol=1e-5)
    one = jnp.tile(jnp.asarray([[50.0, 0.0, 0.0, 0.0]]), (8, 1))
    # Padding does not count.
    mask, padded = jnp.asarray([[1.0] * 6 + [0.0] * 2]), one.at[6:].set(9 * even[:2])
    np.testing.assert_allclose(experts.balance_loss(padded[None], 1, mask), 4.0, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_balance_loss_reaches_the_router_once_for_each_counted_position(remat):
    model, params = tiny.decoder(0, **SPARSE, layers=1, remat=remat)
    batch = {
        "tokens": tiny.prompts(0, 2, 8, 24)[0],
        "lengths": jnp.asarray([5, 8], jnp.int32),
        "loss_start": jnp.asarray([2, 3], jnp.int32),
    }
    without = objective.Loss(model, None, None, 1.0, 64)
    balanced = dataclasses.replace(without, balance=0.1)
    difference = lambda params: balanced(params, None, batch).loss - without(params, None, batch).loss
    value, gradient = jax.jit(jax.value_and_grad(difference))(params)
    _, (logits,) = jax.jit(model.routed)(params, batch["tokens"])
    mask = (jnp.arange(8)[None] < batch["lengths"][:, None]).astype(jnp.float32)
    np.testing.assert_allclose(value, 0.1 * (3 + 5) * experts.balance_loss(logits, 3, mask), rtol=1e-4)
    assert np.abs(gradient["blocks"][0]["mlp"]["router"]["kernel"]).max() > 1e-4
    assert balanced.on_all() == without


@pytest.mark.parametrize("size", [7, 600])
def test_pairs_are_ordered_by_expert_and_keep_their_order_within_one(size):
    pairs = np.random.default_rng(0).integers(0, 9, size).astype(np.int32)
    order, places = experts._by_expert(jnp.asarray(pairs), 8)
    np.testing.assert_array_equal(order, np.argsort(pairs, kind="stable"))
    np.testing.assert_array_equal(np.asarray(places)[np.asarray(order)], np.arange(size))


@pytest.mark.parametrize("k", [1, 3])
def test_the_loop_for_tpus_finds_the_largest_logits_and_their_gradients(monkeypatch, k):
    logits = jnp.asarray(np.random.default_rng(0).integers(0, 5, (4, 6, 8)), jnp.float32)  # with ties
    weights = jnp.broadcast_to(jnp.arange(1.0, k + 1), (4, 6, k))
    loss = lambda logits: (experts._largest(logits, k)[0] * weights).sum()
    expected, gradient = experts._largest(logits, k), jax.grad(loss)(logits)
    monkeypatch.setattr(meshes, "platform", lambda: "tpu")
    found = experts._largest(logits, k)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(jax.grad(loss)(logits), gradient)


# --- decoding ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    return sparse_pair()


def sparse_pair():
    """A target with a dense and a sparse layer, whose kernels are three times the usual size, and its noisy copy."""
    target, params = tiny.decoder(1, sharpness=2.0, **SPARSE, dense_layers=(0,))
    params["blocks"] = jax.tree.map(lambda x: 3 * x if x.ndim == 3 else x, params["blocks"])
    noisy = jax.tree.map(lambda x: x + 0.1 * normal(x.size, *x.shape) * x.std(), params)
    return Pair(target, params, noisy, *tiny.prompts(0, 96, SLOTS, VOCAB))


def check(pair, settings, rule, *kinds):
    entries = [(pair.plan(kind, gamma, rule, rule != "coupled"), pair.draft_params, {}) for kind, gamma in kinds]
    for _ in compare_with_plain(pair, settings, entries, rule):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds", [[("model", 3)], pytest.param([("ngram", 4), ("early_exit", 2)], marks=pytest.mark.slow)]
)
def test_greedy_speculation_equals_greedy_plain_decoding(pair, kinds):
    check(pair, GREEDY, "lossless", *kinds)


@pytest.mark.slow
def test_coupled_speculation_equals_plain_decoding_with_the_same_noise(pair):
    check(pair, COUPLED[:1], "coupled", ("model", 3))


def texts_of(pair, rows, sizes, gamma):
    """The texts of these prompts as one batch on a mesh, at temperature 1; with gamma 0 plain."""
    mesh = mesh_of(sizes)
    params, draft_params = (meshes.shard(x, pair.target.axes(), mesh) for x in (pair.params, pair.draft_params))
    how = dict(indices=rows, seed=3, sampling=Sampling.of(1.0), max_new_tokens=MAX_NEW, eos_ids=())
    prompts = [np.asarray(pair.texts[row, : pair.lengths[row]]).tolist() for row in rows]
    plan = pair.plan("model", gamma, "lossless", False)
    with meshes.use(mesh):
        return scheduler.decode(plan, params, draft_params, prompts, put=batch.Placer(mesh), **how).tokens


def alone_and_together(pair, sizes=(1, 1, 1), gamma=3):
    """The texts of three prompts, each alone and in a batch of 8."""
    together, some = texts_of(pair, range(8), sizes, gamma), (0, 3, 7)
    return [texts_of(pair, [row], sizes, gamma)[0] for row in some], [together[row] for row in some]


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [pytest.param(0, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("sizes", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_a_rows_text_is_the_same_alone_and_in_a_batch_of_8_on_one_device_and_on_eight(pair, sizes, gamma):
    alone, together = alone_and_together(pair, sizes, gamma)
    assert alone == together == [texts_of(pair, [row], (1, 1, 1), gamma)[0] for row in (0, 3, 7)]


def dropping(config, inputs, choice, kernels, **split):
    """The planted fault: an expert computes at most 2 tokens of a call, the others it drops."""
    chosen = jax.nn.one_hot(choice.experts.reshape(-1), config.experts, dtype=jnp.int32)
    rank = jnp.sum((jnp.cumsum(chosen, axis=0) - 1) * chosen, axis=1).reshape(choice.experts.shape)
    kept = Choice(choice.experts, jnp.where(rank < 2, choice.weights, 0))
    return MIX(config, inputs, kept, kernels, **split)


def twice_normalised(logits, config):
    """The planted fault: the weights depend on the largest of the batch."""
    choice = CHOOSE(logits, config)
    return Choice(choice.experts, choice.weights / jnp.max(choice.weights))


MIX, CHOOSE = experts.mix, experts.choose
FAULTS = {"mix": dropping, "choose": twice_normalised}


@pytest.mark.slow
@pytest.mark.parametrize("function", FAULTS)
def test_weights_or_drops_that_depend_on_the_batch_change_a_rows_text(function, monkeypatch):
    jax.clear_caches()
    monkeypatch.setattr(experts, function, FAULTS[function])
    alone, together = alone_and_together(sparse_pair())
    jax.clear_caches()
    assert alone != together


@pytest.mark.slow
def test_dropped_tokens_break_the_equality_with_plain_decoding(monkeypatch):
    jax.clear_caches()
    monkeypatch.setattr(experts, "mix", dropping)
    with pytest.raises(AssertionError, match="row .* position"):
        check(sparse_pair(), GREEDY, "lossless", ("model", 3))
    jax.clear_caches()


# --- files and refusals --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model with four experts, one dense layer and a shared expert, its parameters, and its export."""
    sparse = {**SPARSE, "experts": 4, "shared_expert_width": 20, "dense_layers": (0,), "family": "qwen2_moe"}
    model = Decoder(tiny.config(**sparse, attention_bias=True, vocab_size=272))
    params = tiny.on_device(tiny.drawn(model, 0))
    directory = tmp_path_factory.mktemp("experts") / "model"
    tokenizer = train_byte_bpe(["some words, and some words again\n"] * 20, 270)
    hub_save.save(directory, model, params, tokenizer, max_shard_bytes=20_000)  # shards end between experts
    return model, params, directory


def test_an_export_has_a_tensor_for_each_expert_and_reads_back(exported):
    model, params, directory = exported
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    np.testing.assert_array_equal(
        load_file(directory / index[name])[name], params["blocks"][1]["mlp"]["experts"]["down"]["kernel"][3]
    )
    again, read = hub_load.load(directory, param_dtype="float32", compute_dtype="float32")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_a_device_reads_its_part_of_its_experts_alone(exported):
    model, params, directory = exported
    placed = model.shardings(mesh_of((1, 4, 2)))
    _, arriving = hub_load.stream(directory, param_dtype="float32", compute_dtype="float32", shardings=placed)
    seen = 0
    for parameter in arriving:
        np.testing.assert_array_equal(parameter.array, hub_load.at(params, parameter.path))
        if "experts" in parameter.path:
            seen += 1
            for shard in parameter.array.addressable_shards:
                assert parameter.file_bytes[shard.device] == shard.data.nbytes == parameter.array.nbytes // 8
    assert seen == 3


def test_experts_that_the_mesh_does_not_divide_are_refused_with_the_sizes_that_would_do():
    model = Decoder(tiny.config(**{**SPARSE, "experts": 6}))
    with pytest.raises(UserError, match=r'"expert" of size 6 .* mesh.tensor = 4; let that be one of 1, 2, 3, 6'):
        model.shardings(mesh_of((1, 2, 4)))


FIELDS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_window_layers": 2,
}


@pytest.mark.parametrize(
    "family, field, message",
    [
        ("mixtral", {"router_jitter_noise": 0.1}, '"router_jitter_noise" is 0.1'),
        ("mixtral", {"norm_topk_prob": False}, '"norm_topk_prob" is False'),
        ("mixtral", {"num_experts_per_tok": 9}, r"experts_per_token \(9\) must be at most experts \(8\)"),
        ("qwen3_moe", {"scoring_func": "sigmoid"}, "\"scoring_func\" is 'sigmoid'"),
        ("qwen3_moe", {"n_group": 8}, '"n_group" is 8'),
        (
            "qwen3_moe",
            {"num_experts": 8, "num_local_experts": 4},
            '"num_experts" is given also as "num_local_experts" and differently, 8 and 4',
        ),
        ("qwen3_moe", {"mlp_only_layers": ["a"]}, '"mlp_only_layers" must be a list of layer numbers'),
        ("qwen2_moe", {"num_experts": 0}, '"num_experts" must be a positive integer, not 0'),
        ("qwen2_moe", {"routed_scaling_factor": 2.5}, '"routed_scaling_factor" is 2.5'),
    ],
)
def test_router_fields_that_change_the_arithmetic_are_refused_by_name(family, field, message):
    with pytest.raises(UserError, match=message):
        FAMILIES[family].read_config({**FIELDS, **field}, param_dtype="float32", compute_dtype="float32")


def test_dense_layers_are_those_named_and_those_between_the_steps():
    read = lambda **fields: FAMILIES["qwen3_moe"].read_config(
        {**FIELDS, **fields}, param_dtype="float32", compute_dtype="float32"
    )
    assert read().dense_layers == ()
    assert read(decoder_sparse_step=2, mlp_only_layers=[1]).dense_layers == (0, 1, 2)


# --- costs ---------------------------------------------------------------------------------------------------------


def test_tokens_use_the_expected_number_of_distinct_experts():
    uniform = expert_use.uniform(Decoder(tiny.config(**{**SPARSE, "experts": 64, "experts_per_token": 8})))
    assert uniform.touched(1) == pytest.approx(8)
    assert uniform.touched(9) == pytest.approx(64 * (1 - (7 / 8) ** 9))
    skewed = expert_use.ExpertUse(((1.0, 0.5, 0.5, 0.0), (0.5, 0.5, 0.5, 0.5)))
    assert skewed.touched(2) == pytest.approx((1 + 0.75 + 0.75 + 4 * 0.75) / 2)
    assert expert_use.uniform(Decoder(tiny.config())) is None


def test_the_measured_use_is_that_of_the_texts_without_their_padding():
    model, params = tiny.decoder(0, **SPARSE, dense_layers=(0,))
    texts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    (shares,) = expert_use.measured(model, params, texts).shares
    counts = np.zeros(8)
    routed = jax.jit(model.routed)
    for text in texts:
        _, (logits,) = routed(params, jnp.asarray([text], jnp.int32))
        counts += np.bincount(np.asarray(jax.lax.top_k(logits, 3)[1]).reshape(-1), minlength=8)
    np.testing.assert_allclose(shares, counts / 8, rtol=1e-6)


def test_seconds_that_are_linear_in_experts_are_interpolated_exactly():
    use = expert_use.ExpertUse(((0.125,) * 64,))
    seconds = [1.0 + 0.1 * use.touched(drafted + 1) for drafted in range(12)]
    size = lambda drafted: use.touched(drafted + 1)
    predicted = throughput.interpolated({0: seconds[0], 4: seconds[4], 8: seconds[8]}, 11, size)
    np.testing.assert_allclose(predicted, seconds, rtol=1e-6)


def test_a_plan_counts_the_experts_of_a_device_and_the_compilers_grouped_product():
    model = Decoder(tiny.config(**{**SPARSE, "experts": 64, "experts_per_token": 8}))
    assert executables.expert_trips(model, 1, 1) == 8
    assert executables.expert_trips(model, 9, 4) == round(64 * (1 - (7 / 8) ** 9) / 4)
    assert executables.expert_trips(model, 6400, 1) == 64 * 7  # 800 tokens of each expert, in tiles of 128
    text = """ENTRY %main (rows: bf16[40,32], kernels: bf16[8,32,16]) -> bf16[40,16] {
  %rows = bf16[40,32]{1,0} parameter(0)
  %kernels = bf16[8,32,16]{2,1,0} parameter(1)
  ROOT %ragged-dot-none.1 = bf16[40,16]{1,0} custom-call(%rows, %kernels), custom_call_target="tpu_custom_call"
}"""
    assert hlo.Program(text).work().flops == 2 * 40 * 32 * 16
