"""PARD: what a draft with mask tokens computes in training and in decoding, its exactness, its files, its refusals."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import lossless
import numpy as np
import optax
import pytest
import tiny
from enumeration import EMITTED, Tables, block_distribution, emitted_distribution
from lossless import COUPLED, GREEDY, Pair, blocks, compare_with_plain

from specjax import api
from specjax.decoding import loop
from specjax.decoding.drafters.base import Context
from specjax.decoding.drafters.pard import Pard, PardDrafter
from specjax.decoding.drafters.table import build_drafter
from specjax.decoding.rules import Block, Lossless, rule_named
from specjax.decoding.sampling import Noise, Sampling, row_keys
from specjax.distillation import data_sources, divergences, objective, update
from specjax.hub import adapter as hub_adapter
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.decoder import Decoder
from specjax.models.pard import ParallelDraft
from specjax.runtime.errors import UserError

VOCAB, SLOTS, MAX_NEW, BATCH = 24, 6, 20, 8


@pytest.fixture(scope="module")
def target():
    return tiny.decoder(1, sharpness=2.0)


@pytest.fixture(scope="module")
def draft(target):
    """A draft that agrees with the target now and then, with the target's last id as mask."""
    network = ParallelDraft.of(target[0], drafted=4, mask_id=-1)
    return network, jax.tree.map(lambda a, b: a + 0.1 * b, target[1], tiny.decoder(2)[1])


def in_one_forward(model, params, text, count):
    """The draft's logits `[count, V]` of the tokens after a text: one forward, and nothing but the definition."""
    masks = [model.config.mask_id] * (count - 1)
    padded = np.pad([*text, *masks], (0, 16 - len(text) - len(masks)))[None]
    return tiny.full_logits(Decoder(model.config), params, jnp.asarray(padded, jnp.int32))[0, len(text) - 1 :][:count]


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "anchors",
    [pytest.param(None, marks=pytest.mark.slow), [[0, 3, 8], [2, 5, 7]]],
    ids=["all", "some"],
)
def test_training_drafts_from_every_anchor_as_one_forward_on_the_text_up_to_it_does(anchors):
    model, params = tiny.decoder(3, windows=(3, 0), mask_id=5)
    draft = ParallelDraft.of(model, drafted=4, mask_id=-1)
    assert draft.config.mask_id == 5, "a draft keeps the mask token that it was trained with"
    texts = jax.random.randint(jax.random.key(0), (2, 9), 0, VOCAB)

    @jax.jit
    def trained(texts):
        places = None if anchors is None else jnp.asarray(anchors)
        return draft.column_logits(params, draft.training_states(params, None, texts, places))

    logits = np.asarray(trained(texts)).reshape(2, -1, 4, VOCAB)
    for row, places in enumerate(anchors or [range(9)] * 2):
        for index, anchor in enumerate(places):
            inside = min(4, 8 - anchor)  # later tokens are not in the text, and do not count
            expected = in_one_forward(draft, params, texts[row, : anchor + 1].tolist(), 4)
            np.testing.assert_allclose(logits[row, index, :inside], expected[:inside], atol=1e-4)


@pytest.mark.slow
def test_a_loss_with_anchors_is_the_mean_over_drawn_positions_that_count(target, draft):
    network, own = draft
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, VOCAB)
    batch = {"tokens": tokens, "lengths": jnp.asarray([12, 8]), "loss_start": jnp.asarray([6, 5])}
    make = lambda anchors: objective.Loss(
        network, target[0], divergences.divergence("forward_kl"), 1.0, 8, anchors=anchors
    )
    taught = np.asarray(jax.nn.softmax(tiny.full_logits(*target, tokens), axis=-1))
    sums = jax.jit(make(3))(own, target[1], batch)
    assert jax.tree.all(jax.tree.map(np.array_equal, sums, jax.jit(make(3))(own, target[1], batch)))
    counts = objective.counted(batch["lengths"], batch["loss_start"], 12)
    eligible = jnp.any(objective._ahead(counts, network.predicts) > 0, axis=2)
    anchors = np.asarray(data_sources.drawn_positions(tokens, eligible, 3))
    assert np.take_along_axis(np.asarray(eligible), anchors, 1).all() and (np.diff(anchors) > 0).all()
    of_step = lambda step: data_sources.drawn_positions(tokens, eligible, 3, jnp.full(2, step))
    drawn = [np.asarray(of_step(step)) for step in range(8)]
    assert any((other != anchors).any() for other in drawn), "a text that is seen again has other positions"
    assert set(np.concatenate(drawn, axis=1)[0].tolist()) == set(np.flatnonzero(eligible[0]).tolist())
    loss = weights = accepted = 0.0
    for row, anchor in zip([0, 0, 0, 1, 1, 1], anchors.reshape(-1), strict=True):
        guessed = jax.nn.log_softmax(in_one_forward(network, own, tokens[row, : anchor + 1].tolist(), 4))
        for k in range(4):
            if batch["loss_start"][row] <= anchor + 1 + k < batch["lengths"][row]:
                weight, law, log_draft = np.exp(-k / 4), taught[row, anchor + k], np.asarray(guessed[k])
                loss += weight * float((law * (np.log(law) - log_draft)).sum())
                accepted += weight * float(np.minimum(law, np.exp(log_draft)).sum())
                weights += weight
    np.testing.assert_allclose([sums.loss, sums.acceptance, sums.tokens], [loss, accepted, weights], rtol=1e-4)
    # The program computes nothing else than the number of tokens.
    tokens_of = jax.jit(lambda own: [make(anchors)(own, target[1], batch).tokens for anchors in (0, 12)])
    every, twelve = map(float, tokens_of(own))
    assert every == pytest.approx(twelve) and every > float(sums.tokens)


# --- decoding ------------------------------------------------------------------------------------------------------


class LateMasks(PardDrafter):
    """The planted fault: masks stand one position late."""

    def window(self, context):
        tokens, positions = super().window(context)
        return tokens, jnp.where(positions < context.lengths[:, None], positions, positions + 1)


class StaleKeys(PardDrafter):
    """The planted fault: the keys of the last block's masks stay, because the forward starts at the last two tokens."""

    @property
    def lag(self):
        return 2


@pytest.mark.parametrize("fault", [None, pytest.param(LateMasks, marks=pytest.mark.slow), StaleKeys])
def test_every_block_is_drafted_as_one_forward_on_its_text_does(target, draft, fault):
    network, own = draft
    gamma = 3
    plan = tiny.plan(target[0], "pard", {"model": network}, gamma=gamma, slots=SLOTS, max_new=MAX_NEW)
    if fault:
        plan = dataclasses.replace(plan, drafter=fault(plan.drafter.model, gamma))
    accepted, errors, prompts = set(), [], tiny.prompts(3, BATCH, SLOTS, VOCAB)
    for before, state, _, proposal in blocks(plan, target[1], own, prompts, MAX_NEW, Sampling.of(1.0)):
        text, lengths = np.asarray(before.tokens).copy(), np.asarray(before.lengths)
        rows, at = np.arange(BATCH)[:, None], lengths[:, None] + np.arange(gamma)
        text[rows, at[:, :-1]] = network.config.mask_id
        expected = jax.nn.softmax(tiny.full_logits(network, own, jnp.asarray(text)), axis=-1)[rows, at - 1]
        live = ~np.asarray(before.done)
        errors.append(np.abs(np.asarray(proposal.probs) - expected)[live].max())
        accepted |= set((np.asarray(state.lengths) - lengths - 1)[live].tolist())
    assert {0, 1} <= accepted
    assert (max(errors) > 0.01) if fault else max(errors) < 2e-4


SMALL, GAMMA = 3, 2


class OneForward(Tables):
    """The target, and what a PARD drafter proposes after every context: tokens that are independent of each other."""

    PROMPT = (1,)

    def __init__(self, seed: int, *, threshold: float = 0.0, one_hot: bool = False):
        super().__init__(seed, SMALL, GAMMA, False)
        target, params = tiny.decoder(seed, vocab_size=SMALL)
        model = tiny.masked(tiny.decoder(0, vocab_size=SMALL, layers=1)[0])
        own = tiny.decoder(seed + 1, vocab_size=SMALL, layers=1)[1]
        depth = EMITTED + GAMMA
        contexts = [c for n in range(depth) for c in itertools.product(range(SMALL), repeat=n)]
        texts = np.zeros((len(contexts), depth), np.int32)
        for row, context in zip(texts, contexts, strict=True):
            row[: 1 + len(context)] = (*self.PROMPT, *context)
        lengths = jnp.asarray([1 + len(context) for context in contexts])
        how = {"threshold": threshold, "draft_sample_method": "greedy" if one_hot else "probabilistic"}
        plan = tiny.plan(target, "pard", {"model": model, **how}, gamma=GAMMA, slots=depth, max_new=4)
        state = loop.prefill(plan, params, own, jnp.asarray(texts), lengths, row_keys(0, jnp.arange(len(contexts))))
        sampling = Sampling.of(1.0, threshold=threshold)
        proposal, _ = jax.jit(lambda state: loop.propose(plan, params, own, state, sampling))(state)
        rows = np.asarray(jax.nn.softmax(tiny.full_logits(target, params, jnp.asarray(texts)), axis=-1), np.float64)
        probs = np.eye(SMALL)[np.asarray(proposal.tokens)] if one_hot else np.asarray(proposal.probs, np.float64)
        self.rows = {c: row[len(c)] / row[len(c)].sum() for c, row in zip(contexts, rows, strict=True)}
        self.blocks = dict(zip(contexts, probs, strict=True))
        self.counts = dict(zip(contexts, np.asarray(proposal.num_drafted).tolist(), strict=True))

    def target(self, context):
        return self.rows[context]

    def block_probs(self, context, tokens):
        return self.blocks[context]

    def paths(self, context, one_hot):
        for draft in itertools.product(range(SMALL), repeat=self.counts[context]):
            chance = np.prod([row[token] for row, token in zip(self.blocks[context], draft, strict=False)])
            if chance > 0:
                yield draft, float(chance), len(draft)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["lossless", pytest.param("block", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "how",
    [{"threshold": 0.5}, *(pytest.param(how, marks=pytest.mark.slow) for how in ({}, {"one_hot": True}))],
    ids=["stopping", "sampled", "one_hot"],
)
def test_blocks_of_one_forward_have_the_targets_joint_distribution(rule, how):
    tables = OneForward(0, **how)
    assert set(tables.counts.values()) == ({1, 2} if "threshold" in how else {2})
    grouped = block_distribution(rule_named(rule), tables, "one_hot" in how, thresholds=True)
    joint = emitted_distribution(grouped, SMALL)
    np.testing.assert_allclose(joint, tables.target_distribution((), EMITTED), atol=1e-6)


@pytest.mark.parametrize("rule", [Lossless(), pytest.param(Block(), marks=pytest.mark.slow)])
def test_the_enumeration_catches_distributions_of_the_wrong_position(rule):
    tables = OneForward(0)
    tables.block_probs = lambda context, tokens: tables.blocks[context][::-1]
    joint = emitted_distribution(block_distribution(rule, tables, False, thresholds=True), SMALL)
    assert np.abs(joint - tables.target_distribution((), EMITTED)).max() > 1e-3


@pytest.mark.slow
def test_the_loop_samples_the_targets_distribution():
    (target, params), (model, own) = lossless.small_target(), lossless.small_draft()
    plan = lossless.small_plan(target, "pard", {"model": tiny.masked(model)})
    assert lossless.p_value(plan, params, own, Sampling.of(0.7, top_k=4, top_p=0.85), seed=1) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "settings"), [("lossless", GREEDY), ("coupled", COUPLED[:1])])
def test_tokens_are_those_of_plain_decoding(target, rule, settings):
    pair = Pair.of(*target)
    plan = pair.plan("pard", 4, rule, rule == "lossless", threshold=0.3)
    for _, state in compare_with_plain(
        pair, settings, [(plan, pair.draft_params, {"threshold": jnp.float32(0.3)})], rule
    ):
        drafted = np.asarray(state.statistics.drafted).sum() / np.asarray(state.statistics.target_calls).sum()
        assert 1 < drafted < 4, "no block stopped early"


@pytest.mark.parametrize("capacity", [4, 7, 14])
def test_the_window_holds_the_last_tokens_and_the_masks_at_every_length(draft, capacity):
    drafter, gamma = PardDrafter(draft[0], 4), 4
    for length in range(1, capacity - gamma + 2):
        texts, lengths = jnp.arange(capacity)[None] % 20, jnp.asarray([length])
        noise = Noise(row_keys(0, jnp.arange(1)), lengths, False, False)
        context = Context(texts[:, :2], lengths, lengths > 0, noise, Sampling.of(1.0), tokens=texts)
        tokens, positions = map(np.asarray, drafter.window(context))
        at = dict(zip(positions[0].tolist(), tokens[0].tolist(), strict=True))
        assert max(at) < capacity
        for place in range(max(length - gamma - 1, 0), length + gamma - 1):
            assert at[place] == (place % 20 if place < length else 23)


# --- files and refusals --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_export_names_the_mask_token_and_the_block_for_vllm_and_drafts_in_blocks(target, draft, tmp_path):
    tokenizer = train_byte_bpe(["x = 1\n" * 30], 258)
    target, params = tiny.decoder(1, vocab_size=tokenizer.vocab_size)
    network = ParallelDraft.of(target, drafted=3, mask_id=7)
    api.save(api.Model(network, params, tokenizer), tmp_path / "draft")
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["pard_token"] == 7
    engine = json.loads((tmp_path / "draft" / "speculative_config.json").read_text())
    assert engine == {
        "method": "draft_model",
        "model": str(tmp_path / "draft"),
        "num_speculative_tokens": 3,
        "parallel_drafting": True,
    }
    loaded = api.load(tmp_path / "draft")
    assert loaded.decoder.config == network.config
    assert isinstance(api.Draft(loaded).options, Pard)
    target = api.Model(target, params, tokenizer)
    how = {"temperature": 0.0, "max_new_tokens": 6, "eos_ids": (), "gamma": 4}
    assert api.generate(target, [[5, 6, 7]], drafter=loaded, **how).tokens == (
        api.generate(target, [[5, 6, 7]], **how).tokens
    )


def test_a_mask_token_that_the_draft_does_not_have_is_refused(tmp_path):
    tokenizer = train_byte_bpe(["x = 1\n" * 30], 258)
    model, params = tiny.decoder(1, vocab_size=tokenizer.vocab_size)
    api.save(api.Model(model, params, tokenizer), tmp_path / "draft")
    path = tmp_path / "draft" / "config.json"
    for mask in (258, -1, "x"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pard_token": mask}))
        with pytest.raises(
            UserError, match='"pard_token" is .*, and the model has the ids 0 .. 257; take the complete'
        ):
            api.load(tmp_path / "draft")


def test_a_draft_without_a_mask_token_is_refused(target):
    with pytest.raises(UserError, match=r'needs a draft with a mask token \("pard_token".*set kind to "model", or'):
        build_drafter(Pard(), target[0], 3, target[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafted": 1, "mask_id": -1}, "pard.drafted is 1; a block of masks drafts 2 tokens or more"),
        ({"drafted": 4, "mask_id": 24}, "pard.mask_id is 24; give an id below the draft's 24, or -1 for its last"),
    ],
)
def test_values_that_cannot_be_are_refused(target, options, message):
    with pytest.raises(UserError, match=message):
        ParallelDraft.of(target[0], **options)
    with pytest.raises(UserError, match="pard trains a decoder-only draft model"):
        ParallelDraft.of(tiny.encoder_decoder()[0], drafted=4, mask_id=-1)


def test_fields_that_configs_got_later_leave_the_fingerprint_of_a_target_as_it_was():
    model = Decoder(tiny.config())
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), model.abstract_params())
    assert hub_adapter.fingerprint(model, ones) == "235cb666a471ee23674dd6ffa9a92287"
    assert hub_adapter.fingerprint(tiny.masked(model), ones) != hub_adapter.fingerprint(model, ones)


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_a_text_that_is_seen_again_is_learned_at_other_positions(target, draft):
    network, own = draft
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, VOCAB)
    batch = {"tokens": tokens, "lengths": jnp.asarray([24, 24]), "loss_start": jnp.asarray([3, 3])}
    loss = objective.Loss(network, target[0], divergences.divergence("forward_kl"), 1.0, 8, anchors=3)
    step = jax.jit(update.make_step(loss, optax.sgd(0.0), lambda step: 0.0, 1))  # nothing is learned between the steps
    losses, state = [], update.TrainState(own, optax.sgd(0.0).init(own), jnp.int32(0))
    for _ in range(3):
        state, metrics = step(state, target[1], batch)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3
