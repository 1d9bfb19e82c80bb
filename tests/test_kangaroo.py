"""Kangaroo and the confidence stop: the adapter, its caches, losslessness, training, files and refusals."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import lossless
import numpy as np
import pytest
import test_trainer
import tiny
from lossless import COUPLED, EOS, GREEDY, VOCAB, Pair, blocks, compare_with_plain, one_block, p_value, row_limits

from specjax import api
from specjax.decoding import loop
from specjax.decoding.drafters.base import Context
from specjax.decoding.drafters.drafting import draft
from specjax.decoding.drafters.model import ModelDrafter
from specjax.decoding.drafters.table import make_options
from specjax.decoding.prefill import compiled_prefill
from specjax.decoding.sampling import Noise, Sampling, row_keys
from specjax.distillation import cached_text, divergences, objective, settings, trainer
from specjax.hub.adapter import LoadedAttachment
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.adapters import Adapter, AdapterConfig
from specjax.models.attachment import AttachedDraft, runtime_params
from specjax.models.config import DecoderConfig
from specjax.models.encoder_decoder import EncoderDecoderConfig
from specjax.models.language_model import consecutive
from specjax.runtime.errors import UserError

SLOTS, MAX_NEW, BATCH = 6, 20, 16


@pytest.fixture(scope="module")
def models():
    """A target whose upper layers change little, so that its adapter agrees with it often, not always."""
    target, params = tiny.decoder(1, sharpness=2.0)
    params["blocks"] = {
        i: block if i == 0 else jax.tree.map(lambda x: 0.5 * x if x.ndim == 2 else x, block)
        for i, block in params["blocks"].items()
    }
    adapter, adapter_params = tiny.adapter(target)
    adapter_params["norm"] = params["norm"]
    adapter_params["attention"]["output"]["kernel"] *= 0.3
    return target, params, adapter, adapter_params


# --- the adapter ---------------------------------------------------------------------------------------------------

VICUNA = DecoderConfig.llama(
    rope_theta=1e4,
    vocab_size=32000,
    width=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    head_size=128,
    mlp_width=11008,
    max_positions=4096,
    norm_epsilon=1e-6,
    tied_head=False,
    param_dtype="float32",
    compute_dtype="float32",
)


@pytest.mark.parametrize(
    ("changes", "millions"),
    [
        ({}, 67.117056),  # the paper's own numbers, to their digits, for Vicuna-7B
        ({"own_head": True}, 198),
        ({"kind": "layer"}, 202),
        ({"kind": "mlp", "own_head": True}, 165),
        ({"kind": "none"}, 0.004096),
    ],
)
def test_an_adapter_has_as_many_parameters_as_the_papers(changes, millions):
    size = Adapter(AdapterConfig(VICUNA, 2, **changes)).num_params / 1e6
    assert size == millions if isinstance(millions, float) else round(size) == millions
    if not changes:
        assert size * 1e6 == 4 * 4096**2 + 2 * 4096


def test_the_adapter_is_what_the_paper_writes(models):
    target, params, adapter, adapter_params = models
    hidden = np.asarray(jax.random.normal(jax.random.key(0), (1, 7, 16)))
    weights = jax.tree.map(np.asarray, adapter_params)
    norm = lambda x, gain: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain
    project = lambda x, name: x @ weights["attention"][name]["kernel"].T
    turn = np.arange(7)[:, None] / 1e4 ** (np.arange(0, 8, 2) / 8)[None]

    def rotated(x):  # [T, H]
        a, b = x[:, :4], x[:, 4:]
        return np.concatenate([a * np.cos(turn) - b * np.sin(turn), b * np.cos(turn) + a * np.sin(turn)], axis=1)

    inputs = norm(hidden[0], weights["attention_norm"]["scale"])
    key, value = rotated(project(inputs, "key")), project(inputs, "value")  # one key head for both query heads
    heads = []
    for head in range(2):
        query = rotated(project(inputs, "query")[:, 8 * head : 8 * head + 8])
        scores = np.where(np.tri(7, dtype=bool), query @ key.T / np.sqrt(8), -np.inf)
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(chances / chances.sum(-1, keepdims=True) @ value)
    mixed = hidden[0] + project(np.concatenate(heads, axis=1), "output")
    logits = norm(mixed, weights["norm"]["scale"]) @ np.asarray(params["embedding"]).T
    positions = consecutive(jnp.zeros((1, 7), jnp.int32))

    @jax.jit
    def ours(own, params, hidden):
        return adapter.head(own, target, params, adapter.extend(own, None, (hidden,), positions)[0])

    ours = ours(adapter_params, params, jnp.asarray(hidden))
    np.testing.assert_allclose(np.asarray(ours)[0], logits, atol=1e-4)


@functools.partial(jax.jit, static_argnums=(0, 1))
def full_draft_logits(target, adapter, params, adapter_params, tokens):
    """The adapter's logits over whole rows, without any cache."""
    positions = consecutive(tokens)
    hidden, _ = target.extend(params, None, tokens, positions, layers=(0, adapter.config.exit_layer))
    hidden, _ = adapter.extend(adapter_params, None, (hidden,), positions)
    return adapter.head(adapter_params, target, params, hidden)


def plan_of(models, threshold, gamma=3, **how):
    target, _, adapter, _ = models
    how = {"slots": SLOTS, "max_new": MAX_NEW, **how}
    return tiny.plan(target, "kangaroo", {"adapter": adapter, "threshold": threshold}, gamma=gamma, **how)


def expected_counts(confidence, threshold):
    """How many tokens count: up to and including the first drawn at a confidence below the threshold."""
    unsure = confidence < threshold
    return np.where(unsure.any(1), unsure.argmax(1) + 1, confidence.shape[1])


def test_after_every_block_cached_logits_equal_those_of_the_uncached_forward(models):
    target, params, adapter, adapter_params = models
    gamma, threshold, rows = 3, 0.6, np.arange(BATCH)[:, None]
    accepted, drafted, prompts = set(), set(), tiny.prompts(3, BATCH, SLOTS, VOCAB)
    how = plan_of(models, threshold), params, adapter_params, prompts, MAX_NEW, Sampling.of(threshold=threshold)
    for before, state, logits, proposal in blocks(*how):
        live, at = ~np.asarray(before.done), np.asarray(before.lengths)[:, None] - 1 + np.arange(gamma + 1)
        text = np.asarray(before.tokens).copy()  # the committed text and the draft
        text[rows, at[:, 1:]] = np.asarray(proposal.tokens)
        counts = np.asarray(proposal.num_drafted)
        wanted = live[:, None] & (np.arange(gamma + 1)[None] <= counts[:, None])
        full = np.asarray(tiny.full_logits(target, params, jnp.asarray(text)))[rows, at]
        np.testing.assert_allclose(np.asarray(logits)[wanted], full[wanted], atol=1e-4)
        draft_logits = full_draft_logits(target, adapter, params, adapter_params, jnp.asarray(text))
        draft_probs = np.asarray(jax.nn.softmax(draft_logits, axis=-1))[rows, at[:, :-1]]
        inside = live[:, None] & (np.arange(gamma)[None] < counts[:, None])
        np.testing.assert_allclose(np.asarray(proposal.probs)[inside], draft_probs[inside], atol=1e-4)
        confidence = np.where(inside, draft_probs.max(-1), 1.0)  # after the stop, text is not what was drafted
        np.testing.assert_array_equal(counts[live & inside.all(1)], gamma)
        np.testing.assert_array_equal(counts[live], expected_counts(confidence, threshold)[live])
        drafted |= {tuple(sorted(set(counts[live].tolist())))}
        accepted |= set((np.asarray(state.lengths) - at[:, 0] - 2)[live].tolist())
    assert accepted == set(range(gamma + 1)), "every number of accepted tokens has to occur"
    assert any(len(counts) > 1 for counts in drafted), "rows have to stop at different places"


# --- the stop ------------------------------------------------------------------------------------------------------


def scripted(confidence, live, threshold, gamma, stops=True):
    """`draft` where the i-th distribution of row b has the largest probability confidence[b][i], of token i."""
    table = jnp.asarray(confidence, jnp.float32)  # [B, gamma]
    batch = table.shape[0]

    def logits_at(offset):
        top = jax.lax.dynamic_index_in_dim(table, offset, 1, keepdims=False)
        others = (1 - top) / 9
        return jnp.log(jnp.where(jnp.arange(10)[None] == offset, top[:, None], others[:, None]))

    noise = Noise(row_keys(0, jnp.arange(batch)), jnp.full((batch,), 5, jnp.int32), True, False)
    adjust = Sampling.of(0.0, threshold=threshold)
    context = Context(jnp.zeros((batch, 2), jnp.int32), noise.lengths, jnp.asarray(live), noise, adjust)
    first = lambda fed: (logits_at(0), fed)
    step = lambda tokens, offset, fed: (logits_at(offset), fed)
    after = lambda tokens, offset, fed: fed + jnp.sum(tokens + 1 == offset)  # the i-th token is i
    proposal, fed = draft(context, gamma, jnp.int32(0), first, step, after, stops=stops)
    return np.asarray(proposal.num_drafted).tolist(), int(fed) // batch, np.asarray(proposal.tokens)


def test_each_row_stops_after_its_own_first_unsure_token_and_drafting_ends_with_the_last_row():
    confidence = [[0.9, 0.5, 0.9, 0.9], [0.5, 0.9, 0.9, 0.9], [0.9, 0.9, 0.5, 0.5], [0.9] * 4]
    live = [True, True, True, False]
    counts, steps, tokens = scripted(confidence, live, 0.6, 4)
    assert (counts, steps) == ([2, 1, 3, 0], 3)
    assert [tokens[row, :count].tolist() for row, count in enumerate(counts)] == [[0, 1], [0], [0, 1, 2], []]
    assert scripted(confidence, live, 0.4, 4)[:2] == ([4, 4, 4, 0], 4)
    assert scripted(confidence, [True] * 4, 0.6, 4)[:2] == ([2, 1, 3, 4], 4)
    assert scripted(confidence, live, 0.6, 4, stops=False)[:2] == ([4, 4, 4, 4], 4)


def test_the_stop_reads_confidence_at_temperature_1_whatever_the_sampling(models):
    target, params, adapter, adapter_params = models
    texts, lengths = tiny.prompts(3, BATCH, SLOTS, VOCAB)
    raw = np.asarray(full_draft_logits(target, adapter, params, adapter_params, texts))
    raw = raw[np.arange(BATCH), np.asarray(lengths) - 1]
    confidence = np.asarray(jax.nn.softmax(raw, axis=-1)).max(-1)
    threshold = float(np.median(confidence)) + 1e-4
    plan = plan_of(models, threshold)
    for adjust in (Sampling.of(0.2, threshold=threshold), Sampling.of(2.0, top_k=1, threshold=threshold)):
        state = loop.prefill(plan, params, adapter_params, texts, lengths, row_keys(4, jnp.arange(BATCH)))
        _, _, proposal = one_block(plan, params, adapter_params, state, tiny.limits(BATCH, MAX_NEW), adjust)
        np.testing.assert_array_equal(np.asarray(proposal.num_drafted) == 1, confidence < threshold)


# --- losslessness --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(models):
    return Pair.of(*models[:2])


def check_against_plain(models, pair, drafts, settings, rule):
    """`compare_with_plain` with each (kind, gamma, threshold), whose stops must shorten some drafts."""
    _, _, adapter, adapter_params = models
    entries = []
    for kind, gamma, threshold in drafts:
        options = {"threshold": threshold, **({"adapter": adapter} if kind == "kangaroo" else {})}
        plan = pair.plan(kind, gamma, rule, rule == "lossless", **options)
        draft_params = adapter_params if kind == "kangaroo" else pair.draft_params
        entries.append((plan, draft_params, {"threshold": jnp.float32(threshold)}))
    outcomes = compare_with_plain(pair, settings, entries, rule)
    for (plan, state), (_, _, threshold) in zip(outcomes, drafts * len(settings), strict=True):
        drafted, calls = int(state.statistics.drafted.sum()), int(state.statistics.target_calls.sum())
        assert not threshold or drafted < 0.9 * plan.gamma * calls, "no draft stopped early"


def test_greedy_decoding_with_stops_equals_greedy_plain(models, pair):
    check_against_plain(models, pair, [("kangaroo", 3, 0.6)], GREEDY, "lossless")


def test_one_compile_serves_every_threshold(models, pair):
    target, params, adapter, adapter_params = models
    drafted, sizes = [], set()
    for threshold in (0.05, 0.5, 0.9, 1.0):
        options = {"adapter": adapter, "threshold": threshold}
        plan = tiny.plan(target, "kangaroo", options, gamma=3, slots=12, max_new=24, greedy=True)
        adjust, limits = Sampling.of(0.0, threshold=threshold), row_limits(lossless.BATCH, 24)
        state = tiny.decode(plan, params, adapter_params, pair.texts, pair.lengths, limits, eos=EOS, adjust=adjust)
        drafted.append(int(state.statistics.drafted.sum()))
        sizes.add((compiled_prefill._cache_size(), loop.compiled_run._cache_size()))
    assert len(sizes) == 1
    assert drafted[0] > drafted[1] > drafted[2] >= drafted[3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "settings", "drafts"),
    [
        ("coupled", COUPLED[:2], [("kangaroo", 4, 0.6), ("model", 4, 0.6)]),
        ("lossless", GREEDY, [("kangaroo", 6, 0.0), ("model", 4, 0.6), ("early_exit", 3, 0.5)]),
    ],
)
def test_with_stops_every_drafter_equals_plain_decoding(models, pair, rule, settings, drafts):
    check_against_plain(models, pair, drafts, settings, rule)


@pytest.mark.slow
def test_another_kind_of_adapter_at_another_layer_equals_plain_decoding(pair):
    target, params = tiny.decoder(1, sharpness=2.0, layers=3)
    deeper = dataclasses.replace(pair, target=target, params=params)
    made = tiny.adapter(target, exit_layer=2, kind="layer", own_head=True)
    check_against_plain((target, params, *made), deeper, [("kangaroo", 3, 0.5)], COUPLED[:1], "coupled")


# About the median confidence of both drafts, so that stops are common and not the rule.
SMALL_THRESHOLD = 0.5


@pytest.mark.slow
def test_with_stops_the_loop_samples_the_targets_distribution():
    target, params = lossless.small_target()
    adapter, adapter_params = tiny.adapter(target)
    plan = lossless.small_plan(target, "kangaroo", {"adapter": adapter, "threshold": SMALL_THRESHOLD})
    assert p_value(plan, params, adapter_params, Sampling.of(1.0, threshold=SMALL_THRESHOLD)) > 1e-4
    adjusted = Sampling.of(0.7, top_k=4, top_p=0.85, threshold=SMALL_THRESHOLD)
    assert p_value(plan, params, adapter_params, adjusted, seed=1) > 1e-4


@dataclasses.dataclass(frozen=True)
class Peeking(ModelDrafter):
    """Stops at tokens that were improbable themselves, which biases the output."""

    def propose(self, params, target_params, state, target_cache, context):
        proposal, state, cache = super().propose(params, target_params, state, target_cache, context)
        chances = jnp.take_along_axis(proposal.probs, proposal.tokens[..., None], axis=2)[..., 0]
        count = jnp.cumprod((chances >= SMALL_THRESHOLD).astype(jnp.int32), axis=1).sum(1)
        return dataclasses.replace(proposal, num_drafted=count.astype(jnp.int32)), state, cache


@pytest.mark.slow
def test_the_chi_square_test_rejects_a_stop_that_looks_at_the_token_it_drops():
    (target, params), (draft, draft_params) = lossless.small_target(), lossless.small_draft()
    plan = lossless.small_plan(target, "model", {"model": draft})
    plan = dataclasses.replace(plan, drafter=Peeking(draft, lossless.SMALL_GAMMA))
    assert p_value(plan, params, draft_params, Sampling.of(1.0)) < 1e-6


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_attached_draft_generates_the_adapters_text_and_its_loss_moves_only_the_adapter(models):
    target, params, adapter, adapter_params = models
    draft_model, texts = AttachedDraft.of(adapter), jax.random.randint(jax.random.key(0), (4, 8), 0, VOCAB)
    lengths, starts = jnp.full((4,), 8, jnp.int32), jnp.ones((4,), jnp.int32)
    logits = full_draft_logits(target, adapter, params, adapter_params, texts)
    taught = jax.nn.log_softmax(tiny.full_logits(target, params, texts), axis=-1)
    expected = jnp.sum(jnp.exp(taught) * (taught - jax.nn.log_softmax(logits, axis=-1)), axis=-1)[:, :-1]
    loss = objective.Loss(draft_model, target, divergences.divergence("forward_kl"), temperature=1.0, chunk=8)
    batch = {"tokens": texts, "lengths": lengths, "loss_start": starts}
    sums = jax.jit(loss)(adapter_params, params, batch)
    np.testing.assert_allclose(float(sums.loss), float(expected.sum()), rtol=1e-4)
    gradient = jax.jit(jax.grad(lambda own: loss(own, params, batch).loss))(adapter_params)
    # The same from the target's stored states, also with the heads on the counted positions only.
    taps, states = (*adapter.taps, target.layers), {}
    for layer in taps:
        hidden, _ = target.extend(params, None, texts, consecutive(texts), layers=(0, layer))
        states[cached_text.states_name(layer)] = hidden
    late = {**batch, "loss_start": jnp.asarray([4, 5, 6, 7], jnp.int32)}
    assert float(loss(adapter_params, params, late, 4).loss) == pytest.approx(
        float(loss(adapter_params, params, late).loss), rel=1e-5
    )
    headless = {**params, "blocks": jax.tree.map(jnp.zeros_like, params["blocks"])}  # no layer of the target may run
    assert float(loss(adapter_params, headless, batch | states).loss) == pytest.approx(float(sums.loss), rel=1e-5)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapter_params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    # Its own text, through its caches, is what the uncached forward finds most probable.
    own = runtime_params(draft_model, adapter_params, params)
    how = dict(sampling=Sampling.of(0.0), greedy=True, max_new_tokens=5, eos_ids=())
    written, ends = loop.sample(draft_model, own, texts, lengths - 2, row_keys(0, jnp.arange(4)), **how)
    assert np.all(np.asarray(ends) == 11)
    argmax = np.asarray(full_draft_logits(target, adapter, params, adapter_params, written)).argmax(-1)
    np.testing.assert_array_equal(argmax[:, 5:10], np.asarray(written)[:, 6:11])


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_an_adapter_learns_from_its_target_on_text_of_every_source(tmp_path):
    changes = {"loss.divergence": "reverse_kl", "train.steps": 60, "train.eval_every": 20, "train.checkpoint_every": 60}
    config = test_trainer.make_config(**test_trainer.MIXTURE, **changes)
    inputs = test_trainer.make_inputs(config)
    before = jax.tree.map(np.array, inputs.target_params)
    draft_model = AttachedDraft.of(Adapter(AdapterConfig(inputs.target.config, 1)))
    params = draft_model.init(jax.random.key(0))
    inputs = dataclasses.replace(inputs, draft=draft_model, params=params)
    outcome = test_trainer.make_trainer(config, tmp_path, inputs=inputs).run()
    assert outcome.validation[-1]["validation_acceptance"] > outcome.validation[0]["validation_acceptance"] + 0.02
    assert jax.tree.structure(outcome.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, inputs.target_params))


def test_an_adapter_without_a_target_or_with_hard_labels_is_refused(models):
    target, _, adapter, _ = models
    for changes, given in (({}, None), ({"loss.divergence": "cross_entropy"}, target)):
        inputs = trainer.TrainingInputs(AttachedDraft.of(adapter), {}, given, {}, iter(()), [], (0,), 4)
        with pytest.raises(UserError, match="an adapter learns from the target that it is attached to"):
            settings.check(test_trainer.make_config(**changes), inputs)


# --- bad input -----------------------------------------------------------------------------------------------------


def test_impossible_layers_kinds_and_thresholds_are_refused_in_one_sentence(models):
    target = models[0]
    for exit_layer in (0, 2):
        with pytest.raises(UserError, match=rf"exit_layer must lie in 1 \.\. 1 for this target, not {exit_layer}"):
            AdapterConfig(target.config, exit_layer)
    with pytest.raises(UserError, match="no adapter of kind 'atention'; did you mean \"attention\""):
        AdapterConfig(target.config, 1, "atention")
    for threshold in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=rf"threshold must lie in \[0, 1\] .*, not {threshold}"):
            Sampling.of(threshold=threshold)
    with pytest.raises(UserError, match='vocabulary is an option of "model", .*, not of "ngram"; leave it out'):
        make_options("ngram", {"shortest": 1, "longest": 2, "vocabulary": (1, 2)})


# --- files and the Python interface ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with `target`, `twin` (its shape, other weights), and `adapter` (of the target)."""
    home = tmp_path_factory.mktemp("kangaroo")
    tokenizer = train_byte_bpe(["the cat sat on the mat and the dog sat on the log\n" * 40], 270)
    for name, seed in (("target", 0), ("twin", 1)):
        decoder, params = tiny.decoder(seed, layers=3, vocab_size=tokenizer.vocab_size)
        api.save(api.Model(decoder, params, tokenizer), home / name)
    target = api.load(home / "target")
    adapter, params = tiny.adapter(target.decoder, own_head=True)
    api.save_adapter(home / "adapter", LoadedAttachment(adapter, params, target.fingerprint))
    return home


def test_an_adapter_comes_back_from_its_small_directory_bit_for_bit(home):
    target = api.load(home / "target")
    loaded = api.load_adapter(home / "adapter", target)
    adapter, params = tiny.adapter(target.decoder, own_head=True)
    assert loaded.network == adapter
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, params))
    assert sorted(path.name for path in (home / "adapter").iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    assert (home / "adapter" / "adapter.safetensors").stat().st_size < 4 * adapter.num_params + 2000


def test_a_target_has_one_fingerprint_in_float32_and_bfloat16_and_shares_it_with_no_other(home):
    prints = {api.load(home / "target", param_dtype=dtype).fingerprint for dtype in ("float32", "bfloat16")}
    assert len(prints) == 1
    target = api.load(home / "target")
    changed = jax.tree.map(lambda x: x, target.params)
    changed["blocks"][1]["mlp"]["down"]["kernel"] *= 1.01
    others = {api.load(home / "twin").fingerprint, dataclasses.replace(target, params=changed).fingerprint}
    assert len(others | prints) == 3


@pytest.mark.slow
def test_generate_takes_an_adapter_and_keeps_the_text(home):
    target = api.load(home / "target")
    settings = dict(temperature=0.0, max_new_tokens=12, eos_ids=())
    plain = api.generate(target, ["the cat", "the"], **settings)
    adapter = api.load_adapter(home / "adapter", target)
    out = api.generate(target, ["the cat", "the"], drafter=api.Draft(adapter, threshold=0.5), gamma=3, **settings)
    assert out.tokens == plain.tokens
    assert 0 < out.stats.counts.drafted.sum() < 3 * out.stats.target_calls
    drafter = api.SkipLayers(skipped=(1,), adaptive=True, costs=(0.3, 0.1))
    out = api.generate(target, ["the cat", "the"], drafter=drafter, gamma=3, **settings)
    assert out.tokens == plain.tokens
    assert 0 < out.stats.counts.drafted.sum() < 3 * out.stats.target_calls


def test_an_adapter_of_another_target_is_refused(home):
    target, twin = api.load(home / "target"), api.load(home / "twin")
    with pytest.raises(UserError, match="belongs to another target"):
        api.load_adapter(home / "adapter", twin)
    with pytest.raises(UserError, match="belongs to another target"):
        api.generate(twin, ["the"], drafter=api.load_adapter(home / "adapter", target))
    with pytest.raises(UserError, match=r"Kangaroo drafts with a trained attachment; write .*api.load_adapter\("):
        api.generate(target, ["the"], drafter="kangaroo")
    with pytest.raises(UserError, match="drafts for another model; load that model"):
        api.load(home / "adapter")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter.safetensors").unlink(), "adapter.safetensors is missing; copy it again"),
        (lambda folder: (folder / "adapter.safetensors").write_bytes(b"x" * 20), "is damaged or cut short"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), 'has no "format"'),
        (lambda folder: edit(folder, lambda fields: fields.pop("kind")), "needs kind; give it a value"),
        (
            lambda folder: edit(folder, lambda fields: fields.update(kind="layer")),
            "take the complete directory of the draft",
        ),
        (lambda folder: edit(folder, lambda fields: fields.update(exit_layer=9)), r"in 1 \.\. 2 .* not 9"),
    ],
)
def test_a_damaged_adapter_is_named(home, tmp_path, damage, message):
    folder = shutil.copytree(home / "adapter", tmp_path / "copy")
    damage(folder)
    with pytest.raises(UserError, match=message):
        api.load_adapter(folder, api.load(home / "target"))


def edit(folder, change):
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def test_saving_over_other_files_is_refused(home, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    loaded = api.load_adapter(home / "adapter", api.load(home / "target"))
    with pytest.raises(UserError, match=r"holds files of another kind \(notes.txt\)"):
        api.save_adapter(tmp_path, loaded)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(UserError, match="attaches to a decoder-only model"):
        AdapterConfig(EncoderDecoderConfig.__new__(EncoderDecoderConfig), 1)
