"""Assisted rollouts: what the loop drafted and refused, the weights of their positions, and the selection of tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_trainer
import tiny

from specjax.decoding import loop
from specjax.decoding.sampling import Sampling
from specjax.distillation import data_sources, divergences, objective, rollouts, settings
from specjax.models.attachment import AttachedDraft
from specjax.models.language_model import Prediction
from specjax.models.vocabulary import draft_vocabulary
from specjax.runtime.errors import UserError

BATCH, SLOTS, NEW, GAMMA, REPLAYS, VOCAB = 4, 5, 14, 3, 2, 24
SECTION = test_trainer.make_config(**{"rollouts.gamma": GAMMA, "rollouts.replays": REPLAYS}).rollouts


@functools.cache
def rolled(temperature, kind="model"):
    """A batch of rollouts of tiny models, with numpy arrays, and its models."""
    target, params, draft_params = tiny.target_and_draft()
    draft = target
    if kind == "eagle3":
        network, draft_params = tiny.eagle3(target, params, states_after=(1, 2), steps=GAMMA)
        draft = AttachedDraft.of(network)
    generation = data_sources.Generation(temperature, 0, 1.0, NEW, (0,), seed=3)
    decode = rollouts.Rollouts.of_config(SECTION, generation, draft, target, False)
    prompts, lengths = tiny.prompts(4, BATCH, SLOTS, VOCAB)
    batch = jax.jit(decode)(draft_params, params, prompts, lengths, np.int32(2))
    return {name: np.asarray(array) for name, array in batch.items()}, (target, params, draft_params, prompts, lengths)


def greedy(target, params, tokens):
    """The most probable token at each position after the first one, of whole texts."""
    return np.pad(np.asarray(tiny.full_logits(target, params, jnp.asarray(tokens))).argmax(-1), ((0, 0), (1, 0)))


@pytest.mark.slow
def test_greedy_texts_are_the_targets_and_replays_what_the_draft_writes():
    batch, (target, params, draft_params, prompts, lengths) = rolled(0.0)
    rows = {name: array.reshape(BATCH, 1 + REPLAYS, *array.shape[1:]) for name, array in batch.items()}
    how = dict(sampling=Sampling.of(0.0), greedy=True, max_new_tokens=NEW, eos_ids=(0,))
    keys = jax.random.split(jax.random.key(0), BATCH)
    plain, ends = jax.jit(lambda *x: loop.sample(target, params, *x, keys, **how))(prompts, lengths)
    np.testing.assert_array_equal(rows["tokens"][:, 0], plain)
    np.testing.assert_array_equal(rows["lengths"][:, 0], ends)
    np.testing.assert_array_equal(rows["loss_start"][:, 0], lengths)
    of_draft = greedy(target, draft_params, plain)
    texts, replayed = np.asarray(plain), 0
    for row in range(BATCH):
        refusals, start, end = rows["refusals"][row], int(lengths[row]), int(ends[row])
        for place in np.flatnonzero(refusals[0]):  # blocks are also refused where the draft agrees by chance: never
            assert start <= place < end and texts[row, place] != of_draft[row, place]
        blocks = set()
        for replay in range(1, 1 + REPLAYS):
            tokens, weights = rows["tokens"][row, replay], refusals[replay]
            counted = np.arange(rows["loss_start"][row, replay], rows["lengths"][row, replay])
            if not len(counted):
                continue
            refused, anchor = counted[0] - 1, rows["anchors"][row, replay]
            assert refusals[0, refused] == 1 and start - 1 <= anchor < refused and len(counted) < GAMMA
            np.testing.assert_array_equal(tokens[:refused], texts[row, :refused])
            written = greedy(target, draft_params, tokens[None])[0]
            np.testing.assert_array_equal(tokens[refused : counted[-1] + 1], written[refused : counted[-1] + 1])
            np.testing.assert_allclose(weights[counted], weights[counted[0]] * 0.8 ** (counted - counted[0]), rtol=1e-6)
            assert weights[counted[0]] >= 0.8 and np.count_nonzero(weights) == len(counted)
            assert anchor not in blocks
            blocks.add(anchor)
            replayed += 1
    assert replayed >= 4 and set(batch["anchors"].reshape(BATCH, -1)[:, 0]) == {-1}


SAMPLED = [pytest.param(1.0, kind, marks=pytest.mark.slow) for kind in ("model", "eagle3")]


@pytest.mark.parametrize(("temperature", "kind"), [(0.0, "model"), *SAMPLED])
def test_replays_count_as_much_as_all_refused_blocks_of_their_text(temperature, kind):
    """The weight of the first token after a refusal, over all replays of a text, is 0.8 times the number of blocks."""
    batch, _ = rolled(temperature, kind)
    rows = {name: array.reshape(BATCH, 1 + REPLAYS, *array.shape[1:]) for name, array in batch.items()}
    whole = 0
    for row in range(BATCH):
        firsts = [
            rows["refusals"][row, replay, rows["loss_start"][row, replay]]
            for replay in range(1, 1 + REPLAYS)
            if rows["loss_start"][row, replay] < rows["tokens"].shape[2]
        ]
        blocks = sum(firsts) / 0.8
        assert abs(blocks - round(blocks)) < 1e-5 and blocks <= np.count_nonzero(rows["refusals"][row, 0])
        whole += blocks
    assert whole > 2 * REPLAYS


@pytest.mark.parametrize(
    ("offsets", "from_blocks", "places"),
    [
        ((0, 0, 0), True, {(4, 2)}),  # EAGLE-3: step 3 reads the second drafted token
        ((0,), True, set()),  # EAGLE-3 that learns one token: it would read states of refused tokens
        ((0, 1, 2), True, {(2, 2)}),  # block-parallel: all from the anchor
        ((1, 2, 3), True, {(1, 2)}),  # Medusa: all from the token before the anchor
        ((0,), False, {(4, 0)}),  # a model: the next token
    ],
)
def test_a_replay_counts_the_predictions_that_drafted_it(offsets, from_blocks, places):
    """The anchor is at 2, tokens 3, 4 and 5 were drafted and 4 was refused, so 5 counts, with weight 0.5."""
    refusals = np.zeros((1, 8), np.float32)
    refusals[0, 5] = 0.5
    batch = {"refusals": jnp.asarray(refusals), "anchors": jnp.asarray([2])}
    batch |= {"lengths": jnp.asarray([6]), "loss_start": jnp.asarray([5])}
    ahead = [Prediction(offset, 1.0) for offset in offsets]
    counted = objective._ahead(objective.counted(batch["lengths"], batch["loss_start"], 8), ahead)
    weights, refused = rollouts.weights_in_blocks(counted, batch, offsets, from_blocks)
    assert set(zip(*map(np.ndarray.tolist, np.nonzero(np.asarray(weights[0]))), strict=True)) == places
    assert float(weights.max()) == 0.5 * bool(places) and all(bool(refused[0][place]) for place in places)


def test_positions_that_are_drawn_leave_the_weight_of_texts_and_replays():
    """A replay has one position to predict from and keeps it; a text of 40 keeps 8, which then count 5 times."""
    target, params = tiny.decoder(0)
    draft, own = tiny.block_parallel(target, params, block_size=4)
    draft = AttachedDraft.of(draft)
    tokens = jax.random.randint(jax.random.key(0), (2, 48), 0, target.vocab_size)
    refusals = jnp.zeros((2, 48)).at[1, 12].set(3.0)
    batch = {"tokens": tokens, "lengths": jnp.asarray([48, 13]), "loss_start": jnp.asarray([8, 12])}
    batch |= {"refusals": refusals, "anchors": jnp.asarray([-1, 10])}
    loss = lambda anchors: objective.Loss(draft, target, divergences.divergence("reverse_kl"), 1.0, 64, anchors=anchors)
    every, drawn = (jax.jit(loss(anchors))(own, params, batch) for anchors in (0, 8))
    np.testing.assert_allclose(drawn.tokens, every.tokens, rtol=1e-5)


def test_a_replay_ends_after_its_first_end_token_and_an_underflowing_decay_is_no_acceptance():
    target = tiny.decoder(0)[0]
    generation = data_sources.Generation(0.0, 0, 1.0, NEW, (3,), seed=3)
    made = dataclasses.replace(rollouts.Rollouts.of_config(SECTION, generation, target, target, False), decay=1e-25)
    blocks = rollouts.Blocks(
        jnp.zeros((1, 12), bool).at[0, 5].set(True),
        jnp.full((1, 12), 4),
        jnp.full((1, 12), 4),
        jnp.tile(jnp.asarray([7, 8, 9, 3, 6, 5]), (1, 12, 1)),
    )
    rows = made._replay(jnp.full((1, 12), 1), blocks, jnp.asarray([5]), jnp.asarray([2.0]))
    assert rows["tokens"].tolist() == [[1, 1, 1, 1, 7, 8, 9, 3, 0, 0, 0, 0]] and rows["lengths"].tolist() == [8]
    assert np.flatnonzero(np.asarray(rows["refusals"][0])).tolist() == [6, 7]


def distances(batch, target, params, draft_params, name):
    """A divergence at each position of whole texts, shifted to the token that it predicts."""
    tokens = jnp.asarray(batch["tokens"])
    logits = [tiny.full_logits(target, of, tokens) for of in (params, draft_params)]
    return np.pad(np.asarray(divergences.divergence(name)(*logits)), ((0, 0), (1, 0)))[:, :-1]


@pytest.mark.parametrize("refused", ["reverse_kl", pytest.param("total_variation", marks=pytest.mark.slow)])
def test_refused_positions_have_their_own_divergence_and_weight(refused):
    batch, (target, params, draft_params, *_) = rolled(0.0)
    loss = objective.Loss(
        target, target, divergences.divergence("forward_kl"), 1.0, 40, divergences.divergence(refused)
    )
    sums = jax.jit(loss, static_argnums=3)(draft_params, params, batch, 0)
    accepted, other = (distances(batch, target, params, draft_params, name) for name in ("forward_kl", refused))
    index, weights = np.arange(batch["tokens"].shape[1])[None], batch["refusals"]
    counted = (index >= batch["loss_start"][:, None]) & (index < batch["lengths"][:, None])
    expected = np.where(counted, np.where(weights > 0, weights * other, accepted), 0).sum()
    total = np.where(counted, np.where(weights > 0, weights, 1), 0).sum()
    np.testing.assert_allclose([sums.loss, sums.tokens], [expected, total], rtol=1e-4)
    windowed = jax.jit(loss, static_argnums=3)(draft_params, params, batch, NEW)
    np.testing.assert_allclose(windowed.loss, sums.loss, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("selected", [0.4, pytest.param(0.15, marks=pytest.mark.slow)])
def test_the_tokens_with_the_largest_gap_to_the_reference_are_selected(selected):
    """AdaSPEC: against a direct computation over all counted positions of the batch."""
    target, params, draft_params = tiny.target_and_draft()
    reference = jax.tree.map(lambda a, b: 0.5 * (a + b), params, draft_params)
    batch = jax.tree.map(jnp.asarray, next(test_trainer.Rows()))
    loss = objective.Loss(
        target, target, divergences.divergence("forward_kl"), 1.0, 9, selected=selected, reference=target
    )
    frozen = {"target": params, "reference": reference}

    def total(own):
        sums = loss(own, frozen, batch)
        return sums.loss, sums

    gradient, sums = jax.jit(jax.grad(total, has_aux=True))(draft_params)
    own, its = (distances(batch, target, params, of, "forward_kl") for of in (draft_params, reference))
    index = np.arange(batch["tokens"].shape[1])[None]
    counted = np.asarray((index >= batch["loss_start"][:, None]) & (index < batch["lengths"][:, None]))
    order = np.argsort(-(own - its)[counted])
    number = int(np.ceil(selected * counted.sum()))
    np.testing.assert_allclose([sums.loss, sums.tokens], [own[counted][order[:number]].sum(), number], rtol=1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    everything = jax.jit(loss.on_all())(draft_params, params, batch)
    np.testing.assert_allclose([everything.loss, everything.tokens], [own[counted].sum(), counted.sum()], rtol=1e-4)


def test_a_reference_of_another_kind_or_vocabulary_is_refused():
    target, params = tiny.decoder(0)
    first, second = (target.reduced(draft_vocabulary(range(start, 24, 2))) for start in (0, 1))
    with pytest.raises(UserError, match="have different vocabularies, whose losses do not compare"):
        objective.Loss(first, target, divergences.divergence("forward_kl"), 1.0, 4, None, 0.4, second)
    draft = AttachedDraft.of(tiny.eagle3(target, params, steps=2)[0])
    with pytest.raises(UserError, match="makes 2 predictions at a position and the one in loss.reference 1"):
        objective.Loss(draft, target, divergences.divergence("jsd", beta=0.5), 1.0, 4, None, 0.4, target)


ALL_ASSISTED = {"data.fixed": 0.0, "data.assisted": 1.0, "train.steps": 3, "train.eval_every": 2}


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("adapter", "eagle3", "block_parallel")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", *SLOW])
def test_every_kind_of_draft_trains_on_assisted_rollouts(kind, tmp_path):
    config = test_trainer.make_config(**ALL_ASSISTED, **{"train.checkpoint_every": 2})
    inputs = test_trainer.make_inputs(config)
    if kind != "model":
        options = {"adapter": {}, "eagle3": {"steps": 3}, "block_parallel": {"block_size": 4, "layers": 1}}[kind]
        network, own = getattr(tiny, kind)(inputs.target, **options)
        inputs = test_trainer.dataclasses.replace(inputs, draft=AttachedDraft.of(network), params=own)
    made = test_trainer.make_trainer(config, tmp_path, inputs=inputs)
    result = made.run()
    assert result.steps == 3 and np.isfinite(result.validation[-1]["validation_loss"]) and result.tokens > 0
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (result.params, inputs.params)), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.divergence": "cross_entropy"}, 'data.assisted is 1.0, and "cross_entropy" does not learn from refused'),
        ({"rollouts.gamma": 0}, "rollouts.gamma is 0; it must be 1 or more"),
        ({"rollouts.replays": 0}, "rollouts.replays is 0; it must be 1 or more"),
        ({"rollouts.decay": 0.0}, "rollouts.decay is 0.0; it must be above 0"),
        ({"loss.refused": "cross_entropy"}, 'loss.refused is "cross_entropy", and a refused token has no label'),
        ({"rollouts.rule": "losless"}, 'did you mean "lossless"'),
        ({"rollouts.lenience": 2.0}, "lenience must lie in"),
    ],
)
def test_senseless_rollouts_are_refused(changes, message, tmp_path):
    config = test_trainer.make_config(**{**ALL_ASSISTED, **changes})
    with pytest.raises(UserError, match=message):
        settings.check(config, test_trainer.make_inputs(config))
        test_trainer.make_trainer(config, tmp_path)


def test_a_gamma_beyond_what_the_draft_learns_of_a_block_is_refused():
    target, params = tiny.decoder(0)
    draft = AttachedDraft.of(tiny.eagle3(target, params, steps=2)[0])
    generation = data_sources.Generation(0.0, 0, 1.0, NEW, (3,), seed=3)
    with pytest.raises(UserError, match="rollouts.gamma is 3, and the draft learns 2 tokens of a block; set .* to 2"):
        rollouts.Rollouts.of_config(SECTION, generation, draft, target, False)


def test_labels_are_learned_where_they_surprise_more_than_a_reference(tmp_path):
    config = test_trainer.make_config(**{"loss.divergence": "cross_entropy", "loss.selected": 0.5, "train.steps": 4})
    inputs = test_trainer.make_inputs(config)
    inputs = dataclasses.replace(inputs, reference=inputs.draft, reference_params=inputs.params)
    result = test_trainer.make_trainer(config, tmp_path, inputs=inputs).run()
    assert np.isfinite(result.loss) and result.validation[-1]["validation_acceptance"] > 0
