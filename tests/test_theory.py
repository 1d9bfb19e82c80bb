"""What DistillSpec (arXiv 2310.08461) proves of acceptance, on models small enough to enumerate every text."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from enumeration import Tables, block_distribution

from specjax.decoding.rules import Lossless
from specjax.decoding.sampling import Sampling
from specjax.distillation import divergences

VOCAB, EOS = 3, 2


def texts(vocab, eos, longest):
    """Every text that ends at `eos` or at `longest` tokens."""
    for length in range(1, longest + 1):
        for text in itertools.product(range(vocab), repeat=length):
            if eos not in text[:-1] and (text[-1] == eos or length == longest):
                yield text


def total_variation(target, draft):
    """The divergence that training uses, of two distributions `[V]`."""
    with np.errstate(divide="ignore"):
        target_logits, draft_logits = (jnp.log(jnp.asarray([[law]], jnp.float32)) for law in (target, draft))
    return float(divergences.total_variation(target_logits, draft_logits)[0, 0])


class Expected:
    """By enumeration of texts: E[length] and E[sum TVD] of the target's texts, the on-policy loss of the draft's."""

    def __init__(self, target_of, draft_of, vocab, eos, longest):
        self.length = self.distance = self.loss = mass = 0.0
        distances_at = {}
        for text in texts(vocab, eos, longest):
            under_target = under_draft = 1.0
            distances = []
            for i, token in enumerate(text):
                target, draft = target_of(text[:i]), draft_of(text[:i])
                if text[:i] not in distances_at:
                    distances_at[text[:i]] = total_variation(target, draft)
                distances.append(distances_at[text[:i]])
                under_target, under_draft = under_target * target[token], under_draft * draft[token]
            self.length += under_target * len(text)
            self.distance += under_target * sum(distances)
            self.loss += under_draft * sum(distances) / len(text)  # DistillSpec's D(y|x): a mean over the text
            mass += under_target
        assert mass == pytest.approx(1)

    @property
    def acceptance(self):
        """The right side of equation 3."""
        return 1 - self.distance / self.length


def decoded(tables, longest, eos):
    """E[accepted], E[emitted] and E[sum over bonus tokens of 1 - TVD], by enumeration of what the rule does."""
    grouped = block_distribution(Lossless(), tables, False, depth=longest)

    def from_block(context):
        totals = np.zeros(3)
        for (start, accepted_tokens), chances in grouped.items():
            if start != context:
                continue
            for token, chance in enumerate(chances):
                if chance == 0:
                    continue
                block = (*accepted_tokens, token)
                ends = [i + 1 for i, t in enumerate(block) if t == eos]
                emitted = min([len(block), longest - len(context), *ends])
                accepted = min(len(accepted_tokens), emitted)
                is_bonus = emitted > accepted and len(accepted_tokens) == tables.gamma
                last = (*context, *accepted_tokens)
                overlap = np.minimum(tables.target(last), tables.draft(last)).sum() if is_bonus else 0.0
                totals += chance * np.asarray([accepted, emitted, overlap])
                text = (*context, *block[:emitted])
                if len(text) < longest and text[-1] != eos:
                    totals += chance * from_block(text)
        return totals

    return from_block(())


@pytest.mark.parametrize("eos", [EOS, -1], ids=["ends", "constant_length"])
def test_sequence_acceptance_is_one_minus_the_distance_per_token_where_no_bonus_comes(eos):
    """Equation 3, exact from gamma = T on; with smaller gamma a bonus token is not drafted and lowers it."""
    longest, rates = 3, []
    for gamma in (1, 2, 3):
        tables = Tables(5, VOCAB, gamma, False)
        expected = Expected(tables.target, tables.draft, VOCAB, eos, longest)
        accepted, emitted, bonus = decoded(tables, longest, eos)
        assert emitted == pytest.approx(expected.length, abs=1e-6)
        assert (accepted + bonus) / emitted == pytest.approx(expected.acceptance, abs=1e-6)
        assert (bonus == 0) == (gamma >= longest)
        rates.append(accepted / emitted)
    assert rates[0] < rates[1] < rates[2] == pytest.approx(expected.acceptance, abs=1e-6)


class Near(Tables):
    """A draft as in `Tables` and a target that moves at most an eighth of it."""

    def _draw(self):
        _, draft, argmax, count = super()._draw()
        source, sink = self.random.permutation(self.vocab)[:2]
        moved = np.eye(self.vocab)[sink] - np.eye(self.vocab)[source]
        close = self.random.random() < 0.5 or draft[source] == 0
        return draft if close else draft + moved / 8, draft, argmax, count


def bound(expected, longest):
    """Theorem 4.1's, of several prompts: 1 - T E[T / L] epsilon, epsilon the mean on-policy loss."""
    lengths, losses = ([getattr(one, name) for one in expected] for name in ("length", "loss"))
    return 1 - longest * np.mean([longest / length for length in lengths]) * np.mean(losses)


@pytest.mark.parametrize("eos", [EOS, pytest.param(-1, marks=pytest.mark.slow)], ids=["ends", "constant_length"])
def test_acceptance_of_decoding_is_above_the_bound_from_the_on_policy_loss(eos):
    """Theorem 4.1, where it says something: the acceptance is the rule's own, block by block."""
    longest = 3
    prompts = [Near(seed, VOCAB, longest, False) for seed in range(4)]
    expected = [Expected(one.target, one.draft, VOCAB, eos, longest) for one in prompts]
    measured = [decoded(one, longest, eos) for one in prompts]
    acceptance = np.mean([accepted / emitted for accepted, emitted, _ in measured])
    assert acceptance >= bound(expected, longest) > 0.4
    assert acceptance < 1 - np.mean([one.loss for one in expected]) / 2, "the loss is not 0"


def test_the_bound_holds_for_random_models_near_and_far():
    """Theorem 4.1 with equation 3 for the acceptance; laws from nearly equal to nearly disjoint, 1 to 4 prompts."""
    random, tightest = np.random.default_rng(0), np.inf
    for _ in range(60):
        spread, mix, longest = random.choice([0.1, 0.5, 2.0]), random.random() ** 3, int(random.integers(1, 5))
        eos, expected = int(random.choice([EOS, -1])), []
        for _ in range(random.integers(1, 5)):
            laws = {}

            def law(text, which, laws=laws, spread=spread, mix=mix):
                if text not in laws:
                    target, other = random.dirichlet(np.full(VOCAB, spread), size=2)
                    laws[text] = target, (1 - mix) * target + mix * other
                return laws[text][which]

            expected.append(Expected(lambda text: law(text, 0), lambda text: law(text, 1), VOCAB, eos, longest))
        slack = np.mean([one.acceptance for one in expected]) - bound(expected, longest)
        assert slack >= -1e-6
        tightest = min(tightest, slack)
    assert tightest < 0.05, "some model comes near the bound"


@pytest.mark.slow
def test_the_loop_accepts_what_equation_3_says():
    """Whole decoding with models and EOS: accepted over emitted, within four standard errors of the enumeration."""
    vocab, eos, longest, rows, prompt = 5, 2, 4, 6000, [3, 1]
    target, params = tiny.decoder(0, vocab_size=vocab)
    draft, draft_params = tiny.decoder(9, vocab_size=vocab, layers=1)
    plan = tiny.plan(target, "model", {"model": draft}, gamma=longest, slots=len(prompt), max_new=longest)
    batch, lengths = jnp.tile(jnp.asarray([prompt], jnp.int32), (rows, 1)), jnp.full((rows,), len(prompt), jnp.int32)
    state = tiny.decode(
        plan, params, draft_params, batch, lengths, longest, adjust=Sampling.of(1.0), eos=(eos,), seed=1
    )
    accepted, emitted = np.asarray(state.statistics.accepted_at).sum(1), np.asarray(state.num_emitted)

    prefixes = list(itertools.product(range(vocab), repeat=longest - 1))
    padded = jnp.asarray([[*prompt, *prefix] for prefix in prefixes], jnp.int32)

    def laws_of(model, params):
        probs = np.asarray(jax.nn.softmax(tiny.full_logits(model, params, padded)), np.float64)
        row = lambda text: prefixes.index((*text, *(0,) * (longest - 1 - len(text))))
        return lambda text: probs[row(text), len(prompt) - 1 + len(text)]

    expected = Expected(laws_of(target, params), laws_of(draft, draft_params), vocab, eos, longest)

    ratio = accepted.sum() / emitted.sum()
    error = np.std(accepted - ratio * emitted) / np.sqrt(rows) / emitted.mean()
    assert abs(ratio - expected.acceptance) < 4 * error < 0.03
    assert abs(emitted.mean() - expected.length) < 4 * emitted.std() / np.sqrt(rows)
