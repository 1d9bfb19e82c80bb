"""Drafts with a reduced vocabulary: exact as any other, trained with the map, exported with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_trainer
import tiny
from enumeration import EMITTED, Tables, block_distribution, composed_distribution, emitted_distribution
from jax.extend.core import jaxprs_in_params
from test_lossy import distribution_of_one_position, leeway
from test_vocabularies import Table

from specjax import api
from specjax.decoding.rules import RULES, Lossless
from specjax.distillation import cached_text, divergences, objective
from specjax.draft_design import vocabulary
from specjax.hub import model as hub_model
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.attachment import AttachedDraft, runtime_params
from specjax.models.table import make_attachment
from specjax.models.vocabulary import draft_vocabulary, most_written_ids
from specjax.reporting import records
from specjax.runtime.errors import UserError

# --- the ids -------------------------------------------------------------------------------------------------------


def test_the_most_written_ids_hold_those_that_end_a_text():
    counts = np.asarray([5, 0, 9, 9, 1, 0])
    assert most_written_ids(counts, 3, [5]).ids.tolist() == [2, 3, 5]
    assert most_written_ids(counts, 4, [2]).ids.tolist() == [0, 2, 3, 4]
    assert most_written_ids(counts, 6, [2]).ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert most_written_ids(counts, 2, [2, 5]).including([1, 5]).ids.tolist() == [1, 2, 5]


def test_the_share_of_held_out_tokens_is_counted_on_every_tenth_text():
    texts = [[1, 2], *[[3, 3, 300]] * 9, [3, 301]]
    assert vocabulary.count_ids(texts, 512)[[1, 2, 3, 300, 301]].tolist() == [1, 1, 19, 9, 1]
    # Texts 0 and 10 are held out. Among the 256 ids are 0, 3, 300, and the lowest of those that never occur.
    assert vocabulary.coverage(texts, 512, [0]) == [(256, 0.75)]


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_size_that_cannot_be_is_refused(size):
    with pytest.raises(UserError, match=f"size of a draft vocabulary is {size}; it must lie in 2 .. 6"):
        most_written_ids(np.arange(6), size, [0, 5])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 3, 3], "each id once in ascending order, and 3 is repeated"),
        ([1, 3, 2], "each id once in ascending order, and 2 follows 3"),
        ([-1, 3], "has id -1, which no tokenizer has"),
        ([0, 2**31], "has id 2147483648"),
        ([0.5, 1.0], "must be a list of token ids"),
        ({"a": 1}, "must be a list of token ids"),
        (7, "must be a list of token ids"),
    ],
)
def test_ids_that_make_no_vocabulary_are_refused(ids, message):
    with pytest.raises(UserError, match=message):
        draft_vocabulary(ids)


def test_a_file_or_a_folder_names_the_ids(tmp_path):
    vocabulary = draft_vocabulary([0, 2, 5])
    vocabulary.save(tmp_path / "draft_vocabulary.json")
    assert draft_vocabulary(str(tmp_path)) == draft_vocabulary(tmp_path / "draft_vocabulary.json") == vocabulary
    assert hash(draft_vocabulary((0, 2, 5))) == hash(vocabulary) and repr(vocabulary) == "DraftVocabulary(3 ids)"
    assert draft_vocabulary("") is draft_vocabulary(()) is draft_vocabulary(None) is None
    with pytest.raises(UserError, match=r"draft vocabulary in .*absent.json cannot be read"):
        draft_vocabulary(tmp_path / "absent.json")
    (tmp_path / "damaged.json").write_text("[1, 2")
    with pytest.raises(UserError, match=r"draft vocabulary in .*damaged.json is damaged"):
        draft_vocabulary(str(tmp_path / "damaged.json"))
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(UserError, match=r"empty.json must be a list of token ids"):
        draft_vocabulary(str(tmp_path / "empty.json"))


def test_columns_and_ids_map_to_each_other():
    vocabulary = draft_vocabulary([1, 4, 6])
    columns, inside = vocabulary.columns(jnp.asarray([[6, 4], [0, 7]]))
    assert columns[0].tolist() == [2, 1] and inside.tolist() == [[True, True], [False, False]]
    np.testing.assert_array_equal(vocabulary.spread(jnp.float32([[1, 2, 3]]), 8, -1.0), [[-1, 1, -1, -1, 2, -1, 3, -1]])
    with pytest.raises(UserError, match="has id 6, and the target has only the ids 0 .. 5"):
        vocabulary.check(6)


# --- rules ---------------------------------------------------------------------------------------------------------


class Reduced(Tables):
    """A draft whose head has three of four ids."""

    VOCABULARY = draft_vocabulary([0, 1, 3])

    def _draw(self):
        target, _, argmax, count = super()._draw()
        columns = self.random.permutation([(4, 2, 2), (4, 4, 0)][self.random.integers(2)])
        draft = np.insert(columns, 2, 0) / 8
        return target, draft, argmax if argmax != 2 else 0, count


@pytest.mark.parametrize("one_hot", [False, True], ids=["sampled", "one_hot"])
@pytest.mark.parametrize("mixed", [False, True])
def test_with_a_reduced_vocabulary_lossless_emits_exactly_the_targets_joint_distribution(mixed, one_hot):
    without = 0.0
    for seed in range(2):
        tables = Reduced(seed, 4, 2, mixed)
        blocks = block_distribution(Lossless(), tables, one_hot, vocabulary=tables.VOCABULARY)
        joint = emitted_distribution(blocks, 4)
        without += joint[:, 2].sum()
        np.testing.assert_allclose(joint, tables.target_distribution((), EMITTED), atol=1e-6)
    assert without > 0.1  # the text has the token that the draft lacks


@pytest.mark.parametrize("name", ["lenient_linear", "typical"])
def test_with_a_reduced_vocabulary_a_lossy_rule_has_the_distribution_that_it_states(name):
    tables, how = Reduced(1, 4, 2, True), {"depth": 2, "leeway": leeway(0.5), "vocabulary": Reduced.VOCABULARY}
    joint = emitted_distribution(block_distribution(RULES[name], tables, False, **how), 4, 2)
    np.testing.assert_allclose(
        joint, composed_distribution(tables, *distribution_of_one_position(name, 0.5), 2), atol=1e-6
    )


# --- training ------------------------------------------------------------------------------------------------------


class ReducedTable(Table):
    """A `Table` with logits of some ids alone."""

    @property
    def vocabulary(self):
        return draft_vocabulary([0, 2, 3, 6])


class TargetTable(Table):
    """A `Table` whose head can be reduced."""

    def reduced(self, vocabulary):
        return ColumnsOfTable(None)

    def head_kernel(self, params, vocabulary):
        return params["table"].T[vocabulary.ids]


class ColumnsOfTable(Table):
    """A reduced `TargetTable`."""

    def column_logits(self, params, hidden):
        return hidden[..., ReducedTable(None).vocabulary.ids]


TOKENS = jnp.asarray([[0, 2, 4, 6, 3, 1], [3, 3, 5, 0, 0, 0]], jnp.int32)
BATCH = {"tokens": TOKENS, "lengths": jnp.asarray([6, 3]), "loss_start": jnp.asarray([1, 2])}
READ, LABELS = [0, 2, 4, 6, 3, 3], [2, 4, 6, 3, 1, 5]


@pytest.fixture(scope="module")
def logits():
    """Logits after each of 7 tokens: the target's over 7 ids, and the draft's over 4 of them."""
    return tuple(2 * jax.random.normal(jax.random.key(seed), (7, columns)) for seed, columns in enumerate((7, 4)))


def sums_of(logits, name, temperature=0.5):
    target, draft = logits
    compare = divergences.of_config({"divergence": name, "beta": 0.3})
    loss = objective.Loss(ReducedTable(None), TargetTable(None, logits_size=7), compare, temperature, chunk=4)
    value = lambda draft: loss({"table": draft}, {"table": target}, BATCH)
    gradient, sums = jax.jit(jax.grad(lambda draft: (value(draft).loss, value(draft)), has_aux=True))(draft)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    return sums


@pytest.mark.parametrize("name", divergences.FINITE)
def test_a_divergence_that_is_finite_compares_all_ids(logits, name):
    target, draft = (table[np.asarray(READ)][None] / 0.5 for table in logits)
    wide = ReducedTable(None).vocabulary.spread(draft, 7, -jnp.inf)
    expected = divergences.divergence(name, **({"beta": 0.3} if name == "jsd" else {}))(target, wide)
    np.testing.assert_allclose(sums_of(logits, name).loss, expected.sum(), rtol=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "lk_hybrid", "cross_entropy"])
def test_another_divergence_compares_the_ids_that_the_draft_has(logits, name):
    ids = ReducedTable(None).vocabulary.ids
    target, draft = (table[np.asarray(READ)][None] / 0.5 for table in logits)
    if name == "cross_entropy":
        known = [(row, ids.tolist().index(label)) for row, label in enumerate(LABELS) if label in ids]
        expected = -sum(jax.nn.log_softmax(draft)[0, row, column] for row, column in known)
        assert len(known) == 3
    else:
        mass = jax.nn.softmax(target)[..., ids].sum(-1)
        expected = (mass * divergences.divergence(name)(target[..., ids], draft)).sum()
    np.testing.assert_allclose(sums_of(logits, name).loss, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "cross_entropy"])
def test_what_the_draft_lacks_counts_as_rejected(logits, name):
    ids = ReducedTable(None).vocabulary.ids
    target, draft = (np.asarray(jax.nn.softmax(table))[READ] for table in logits)
    sums = sums_of(logits, name)
    assert float(sums.tokens) == len(READ)
    np.testing.assert_allclose(sums.outside, np.delete(target, ids, axis=1).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.acceptance, np.minimum(target[:, ids], draft).sum(), rtol=1e-5)
    assert sums.acceptance + sums.outside < len(READ)


def test_the_gradient_of_the_forward_kl_is_that_of_its_finite_terms(logits):
    ids, (target, draft) = ReducedTable(None).vocabulary.ids, (jnp.asarray(table) for table in logits)
    compare = divergences.divergence("forward_kl")
    loss = objective.Loss(ReducedTable(None), TargetTable(None, logits_size=7), compare, 1.0, 4)
    probs = jax.nn.softmax(target)[:, ids]
    finite = lambda draft: -(probs * jax.nn.log_softmax(draft))[np.asarray(READ)].sum()
    ours = jax.jit(jax.grad(lambda draft: loss({"table": draft}, {"table": target}, BATCH).loss))(draft)
    np.testing.assert_allclose(ours, jax.jit(jax.grad(finite))(draft), atol=1e-5)


def products(jaxpr):
    """The shapes of all matrix products, also in loops and functions that are called."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


def reduced_pair(temperature):
    """The loss of a reduced draft, and the parameters of draft and target."""
    target, target_params = tiny.decoder(0)
    ids = draft_vocabulary(range(0, target.vocab_size, 3))
    whole, whole_params = tiny.decoder(1)
    draft = whole.reduced(ids)
    params = draft.reduced_params(whole_params, whole.head_kernel(whole_params, ids))
    loss = objective.Loss(draft, target, divergences.divergence("total_variation"), temperature, chunk=4)
    return loss, params, target_params


def logit_products(loss, params, target_params, batch):
    """How many products in a step give logits of the target's whole vocabulary, and of the draft's."""
    gradient = jax.grad(lambda params: loss(params, target_params, batch).loss)
    shapes = list(products(jax.make_jaxpr(gradient)(params).jaxpr))
    columns = loss.target.vocab_size, len(loss.draft.vocabulary.ids)
    return [shapes.count((count, loss.chunk)) for count in columns]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logits_are_computed_once_and_not_again_in_the_backward_pass(temperature):
    batch = {**BATCH, "tokens": TOKENS}
    assert logit_products(*reduced_pair(temperature), batch) == [1, 2]  # the latter of both models


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_stored_normalisers_replace_the_targets_whole_head_at_temperature_1(temperature):
    loss, params, target_params = reduced_pair(temperature)
    states = loss.target.training_states(target_params, None, TOKENS).astype(jnp.float16)
    logits = loss.target.head(target_params, states.astype(jnp.float32))
    batch = {**BATCH, "tokens": TOKENS, cached_text.states_name(loss.target.layers): states}
    stored = batch | {cached_text.NORMALISERS: jax.nn.logsumexp(logits, axis=-1)}
    run = jax.jit(jax.value_and_grad(lambda params, batch: loss(params, target_params, batch).loss))
    for got, expected in zip(jax.tree.leaves(run(params, stored)), jax.tree.leaves(run(params, batch)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    sums, expected = (loss(params, target_params, each) for each in (stored, batch))
    np.testing.assert_allclose(sums.outside, expected.outside, rtol=1e-5)
    np.testing.assert_allclose(sums.acceptance, expected.acceptance, rtol=1e-5)
    assert logit_products(loss, params, target_params, stored) == [int(temperature != 1), 2]


def test_a_vocabulary_that_the_target_lacks_is_refused():
    with pytest.raises(UserError, match="has id 6, and the target has only the ids 0 .. 4"):
        objective.Loss(ReducedTable(None), Table(None, logits_size=5), None, 1.0, 4)


# --- a draft cut from a full one, and its files --------------------------------------------------------------------


@pytest.fixture(scope="module")
def target():
    tokenizer = train_byte_bpe(["a text of words, a text of lines"], 270)
    return api.Model(*tiny.decoder(1, sharpness=2.0, vocab_size=tokenizer.vocab_size), tokenizer)


IDS = (*range(97, 120), 258)


@pytest.mark.slow
def test_an_option_cuts_the_head_of_a_draft_and_the_end_of_a_text_is_always_in_it(target):
    how = {"temperature": 0.0, "max_new_tokens": 12}
    plain = api.generate(target, ["a text", "words"], **how)
    draft = api.Draft(target, vocabulary=IDS)
    assert api.generate(target, ["a text", "words"], drafter=draft, **how).tokens == plain.tokens
    cut, options = draft.cut(target)
    assert draft.cut(target)[0] is cut, "the head is cut once"
    ids = sorted({*IDS, *target.tokenizer.eos_ids})
    assert options.vocabulary.ids.tolist() == cut.decoder.vocabulary.ids.tolist() == ids
    np.testing.assert_array_equal(cut.params["unembedding"]["kernel"], target.params["embedding"][np.asarray(ids)])
    logits, full = cut.logits([[97, 98]]), target.logits([[97, 98]])
    np.testing.assert_allclose(logits[..., ids], full[..., ids], atol=1e-5)
    assert np.isneginf(np.delete(logits, ids, axis=-1)).all()
    with pytest.raises(UserError, match="the head has only .* ids, and id 1 of the draft vocabulary is not one"):
        hub_model.reduced(cut, draft_vocabulary([1, 97]))


def test_a_reduced_draft_is_saved_with_its_ids_and_loads_again(target, tmp_path):
    cut = hub_model.reduced(target, draft_vocabulary(IDS))
    api.save(cut, tmp_path / "draft")
    again = api.load(tmp_path / "draft", compute_dtype="float32")
    assert again.decoder == cut.decoder
    jax.tree.map(np.testing.assert_array_equal, again.params, cut.params)
    assert draft_vocabulary(tmp_path / "draft") == cut.decoder.vocabulary
    # Other programs read the directory with a full head. That of a draft cut from a tied head is the head before.
    api.save(cut, tmp_path / "full", full_head=True)
    full = api.load(tmp_path / "full", compute_dtype="float32")
    assert full.decoder.vocabulary is None and not (tmp_path / "full" / "draft_vocabulary.json").exists()
    np.testing.assert_allclose(full.logits([[97, 98]]), target.logits([[97, 98]]), atol=1e-5)
    draft_vocabulary([1, 2]).save(tmp_path / "draft" / "draft_vocabulary.json")
    with pytest.raises(UserError, match=r'config.json: "draft_vocab_size" is 24, and draft_vocabulary.json has 2 ids'):
        api.load(tmp_path / "draft")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("adapter", marks=pytest.mark.slow), "medusa"])
@pytest.mark.parametrize("own_head", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_attachments_draft_from_a_reduced_vocabulary(target, tmp_path, kind, own_head):
    options = {"exit_layer": 1, "kind": "none"} if kind == "adapter" else {"heads": 2}
    options |= {"own_head": own_head, "vocabulary": IDS}
    network = make_attachment(kind, target.decoder.config, options)
    params = network.init_on(jax.random.key(0), target.decoder, target.params)
    loaded = api.LoadedAttachment(network, params, target.fingerprint)
    api.save_adapter(tmp_path / "adapter", loaded)
    again = api.load_adapter(tmp_path / "adapter", target)
    assert again.network == network
    how = {"gamma": 2, "temperature": 0.0, "max_new_tokens": 8}
    plain = api.generate(target, ["a text", "words"], temperature=0.0, max_new_tokens=8)
    assert api.generate(target, ["a text", "words"], drafter=again, **how).tokens == plain.tokens
    # A full one, cut by the option, drafts from the same logits.
    full = make_attachment(kind, target.decoder.config, options | {"vocabulary": ""})
    whole = full.init_on(jax.random.key(0), target.decoder, target.params)
    cut, left = full.reduced(whole, network.vocabulary)
    assert cut == network and jax.tree.map(jnp.shape, left) == jax.tree.map(jnp.shape, params)
    hidden = jax.random.normal(jax.random.key(0), (2, 3, target.decoder.config.width))
    both = [
        AttachedDraft.of(each).head(runtime_params(AttachedDraft.of(each), values, target.params), hidden)
        for each, values in ((full, whole), (cut, left))
    ]
    ids = np.asarray(IDS)
    np.testing.assert_allclose(both[0][..., ids], both[1][..., ids], atol=1e-5)
    with pytest.raises(UserError, match="trained with a draft vocabulary; leave vocabulary out"):
        hub_model.reduced(again, draft_vocabulary([97]))


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_a_reduced_draft_learns_on_its_own_text_which_has_no_other_ids(tmp_path):
    steps = {"train.steps": 30, "train.eval_every": 30, "train.checkpoint_every": 30}
    sources = {"data.fixed": 0.0, "data.draft": 1.0, "optimizer.accumulation": 2}
    config = test_trainer.make_config(**steps, **sources)
    inputs = test_trainer.make_inputs(config)
    vocabulary = draft_vocabulary(range(0, inputs.target.vocab_size, 2))
    draft = inputs.draft.reduced(vocabulary)
    params = inputs.draft.reduced_params(inputs.params, inputs.draft.head_kernel(inputs.params, vocabulary))
    inputs = dataclasses.replace(inputs, draft=draft, params=params)
    run = test_trainer.make_trainer(config, tmp_path, inputs=inputs)
    result = run.run()
    batch, _ = run._text("draft", next(test_trainer.Rows()), step=0)
    rows = zip(*(np.asarray(batch[name]) for name in ("tokens", "loss_start", "lengths")), strict=True)
    written = np.concatenate([tokens[start:end] for tokens, start, end in rows])
    assert len(written) and np.isin(written, vocabulary.ids).all()
    first, last = result.validation[0], result.validation[-1]
    assert last["validation_acceptance"] > first["validation_acceptance"]
    assert 0.1 < last["validation_outside"] == pytest.approx(first["validation_outside"])
    assert last["validation_acceptance"] < 1 - last["validation_outside"]
    logged = [line for line in records.read_metrics(tmp_path / "metrics.jsonl") if "outside" in line]
    assert logged and all(0 < line["outside"] < 1 - line["acceptance"] for line in logged)
