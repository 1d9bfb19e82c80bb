"""Acceptance without decoding: equal to the counts of decoding at temperature 0, and their expectation above it."""

import itertools

import jax
import numpy as np
import pytest
import tiny

from specjax import api
from specjax.draft_design import acceptance
from specjax.hub.adapter import LoadedAttachment
from specjax.hub.model import reduced
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.vocabulary import draft_vocabulary
from specjax.runtime.errors import UserError

VOCAB, NEW, GAMMA = 24, 14, 3


@pytest.fixture(autouse=True)
def several_chunks_of_a_window(monkeypatch):
    monkeypatch.setattr(acceptance, "_CHUNK", 24)
    monkeypatch.setattr(acceptance, "_WINDOW", 5)


@pytest.fixture(scope="module")
def target():
    tokenizer = train_byte_bpe(["a text"], 260)  # of which only the ids that end a text are used
    tokenizer.eos_ids = (0,)
    return api.Model(*tiny.decoder(0), tokenizer)


def draft_of(target, kind):
    """A draft of this kind that agrees with the target at times."""
    if kind in ("model", "reduced"):
        other = tiny.decoder(5)[1]
        blurred = jax.tree.map(lambda mine, theirs: mine + 0.1 * theirs, target.params, other)
        draft = api.Model(target.decoder, blurred, target.tokenizer)
        return draft if kind == "model" else reduced(draft, draft_vocabulary(range(0, VOCAB, 2)))
    if kind == "medusa":
        network, params = tiny.heads(target.decoder, 3), tiny.heads_params(target.decoder, target.params, 3)
    elif kind == "adapter":
        network, params = tiny.adapter(target.decoder)
    else:
        options = {"eagle3": {"steps": 1, "states_after": (1, 2)}, "block_parallel": {"block_size": 5}}[kind]
        network, params = getattr(tiny, kind)(target.decoder, target.params, **options)
    return LoadedAttachment(network, params, "")


def scorer_of(target, temperature, count=6):
    """A scorer whose texts are prompts alone, so that `decode` writes texts to score."""
    tokens, lengths = map(np.asarray, tiny.prompts(0, count, 6, VOCAB))
    rows = {"tokens": tokens, "lengths": lengths + 1, "loss_start": lengths}
    rows["tokens"] = np.pad(tokens, ((0, 0), (0, 1)))
    return acceptance.Scorer(target, rows, (temperature, 0, 1.0), count)


def calls(target, draft, rule, gamma, temperature, count=6):
    """Target calls of decoding, and those expected for its texts."""
    scorer = scorer_of(target, temperature, count)
    counts, rows = acceptance.decode(scorer, draft, rule, gamma, count, NEW, 0)
    again = acceptance.Scorer(target, rows, scorer.temperature, scorer.batch_size)
    chances = acceptance.survival(again.ratios(draft, gamma), rule)
    return counts.target_calls, acceptance.expected_calls(chances, again.emitted), again.emitted


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("eagle3", "reduced", "adapter", "medusa")]


@pytest.mark.parametrize("kind", ["model", *SLOW])
def test_greedy_calls_are_those_of_decoding_text_by_text(target, kind):
    decoded, expected, emitted = calls(target, draft_of(target, kind), "lossless", GAMMA, 0.0)
    np.testing.assert_array_equal(decoded, expected)
    assert (decoded < emitted).any() and (decoded > emitted / (GAMMA + 1)).any()


CASES = [("eagle3", "block"), ("model", "lossless"), ("block_parallel", "block"), ("medusa", "lossless")]
CASES[1:] = [pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:]]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rule"), CASES)
def test_sampled_calls_are_those_of_decoding_on_average(target, kind, rule):
    decoded, expected, emitted = calls(target, draft_of(target, kind), rule, GAMMA, 1.0, count=256)
    differences = decoded - expected
    error = np.std(differences) / len(differences) ** 0.5
    assert abs(np.mean(differences)) < 3.5 * error and error < 0.02 * expected.mean() < 0.018 * emitted.mean()


def test_by_hand():
    """With q / p of 0.5, 1.5 and 0.5 block verification keeps what the second token has to spare."""
    ratios = np.asarray([0.5, 1.5, 0.5])
    np.testing.assert_allclose(acceptance.survival(ratios, "lossless"), [1, 0.5, 0.5, 0.25])
    # w: 1, then 1, 2/3, and 1 again.
    np.testing.assert_allclose(acceptance.survival(ratios, "block"), [1, 0.5, 0.5, 0.375])
    # Half of the blocks emit one token and half two; texts of 1, 2 and 3 tokens.
    chances = np.broadcast_to(np.asarray([1.0, 0.5]), (3, 3, 2))
    np.testing.assert_allclose(acceptance.expected_calls(chances, np.asarray([1, 2, 3])), [1, 1.5, 2.25])


@pytest.mark.parametrize("rule", acceptance.RULES)
def test_chances_are_those_of_all_drafts_enumerated(rule):
    """For every text of three tokens over two ids, by drawing every draft and accepting it as the rule says."""
    rng = np.random.default_rng(0)
    law = lambda: rng.dirichlet([1, 1])
    contexts = [text for size in range(3) for text in itertools.product(range(2), repeat=size)]
    p, q = ({text: law() for text in contexts} for _ in range(2))
    product = lambda of, text: np.prod([of[text[:i]][text[i]] for i in range(len(text))])

    def accepted(text):
        """The probability that the draft starts with the text and that all of it is accepted."""
        chance = weight = 1.0
        for i, token in enumerate(text):
            ratio = p[text[:i]][token] / q[text[:i]][token]
            weight, chance = min(weight * ratio, 1), chance * min(ratio, 1)
        return product(q, text) * (weight if rule == "block" else chance)

    for text in itertools.product(range(2), repeat=3):
        ratios = np.asarray([q[text[:i]][text[i]] / p[text[:i]][text[i]] for i in range(3)])
        expected = [accepted(text[:i]) / product(p, text[:i]) for i in range(4)]
        np.testing.assert_allclose(acceptance.survival(ratios, rule), expected, rtol=1e-6)


def test_the_gain_of_the_block_rule_is_paired_by_text(target):
    _, rows = acceptance.decode(scorer_of(target, 1.0, 12), draft_of(target, "model"), "lossless", GAMMA, 12, NEW, 0)
    scorer, draft = acceptance.Scorer(target, rows, (1.0, 0, 1.0), 12), draft_of(target, "model")
    how = {"decoded": 0, "max_new_tokens": NEW, "seed": 0}
    block, lossless = acceptance.score(scorer, draft, {"block": (GAMMA,), "lossless": (GAMMA,)}, **how)
    assert lossless["over_lossless"] is None
    assert block["over_lossless"] == pytest.approx(block["block_efficiency"] / lossless["block_efficiency"])
    low, high = block["over_lossless_ci"]
    assert 1 < low < block["over_lossless"] < high
    unpaired = block["block_efficiency_ci"][1] - block["block_efficiency_ci"][0]
    assert high - low < unpaired / 2, "an interval of the difference, where the texts that both share cancel"
    (alone,) = acceptance.score(scorer, draft, {"block": (GAMMA,)}, **how)
    assert alone == block


def test_what_cannot_be_scored_is_refused(target):
    scorer = scorer_of(target, 0.0)
    with pytest.raises(UserError, match='known for the rules lossless and block, not for "coupled"'):
        acceptance.survival(np.ones(3), "coupled")
    with pytest.raises(UserError, match="the draft drafts at most 4 tokens, not 5; take smaller gammas"):
        scorer.ratios(draft_of(target, "block_parallel"), 5)
    how = {"decoded": 0, "max_new_tokens": NEW, "seed": 0}
    with pytest.raises(UserError, match="drafts at most 4 tokens, and every gamma in rules is larger"):
        next(acceptance.score(scorer, draft_of(target, "block_parallel"), {"lossless": (5,), "block": (8,)}, **how))


def test_gammas_that_a_draft_cannot_draft_are_left_out(target):
    how = {"decoded": 0, "max_new_tokens": NEW, "seed": 0}
    for kind, gammas in (("block_parallel", [2, 4]), ("eagle3", [2, 4, 8])):
        rows = acceptance.score(scorer_of(target, 0.0), draft_of(target, kind), {"lossless": (2, 4, 8)}, **how)
        assert [row["gamma"] for row in rows] == gammas


def test_a_draft_of_one_token_from_the_targets_states_is_not_scored_at_two(target):
    network, params = tiny.block_parallel(target.decoder, target.params, block_size=2)
    how = {"decoded": 0, "max_new_tokens": NEW, "seed": 0}
    draft = LoadedAttachment(network, params, "")
    (row,) = acceptance.score(scorer_of(target, 0.0), draft, {"lossless": (1, 2)}, **how)
    assert row["gamma"] == 1
