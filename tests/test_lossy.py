"""Lossy rules: each one's law by enumeration, what lenience may change and what it may not, and how it is labelled."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny
from enumeration import EnumeratedNoise, Tables, block_distribution, composed_distribution, emitted_distribution
from lossless import chi_square

from specjax import api, evaluate
from specjax.decoding import loop
from specjax.decoding.drafters.base import Proposal
from specjax.decoding.prefill import compiled_prefill
from specjax.decoding.rules import RULES, Lossless, LossyInputs, Rule
from specjax.decoding.sampling import Noise, Sampling, row_keys
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.decoder import Decoder
from specjax.reporting import tables as reporting
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError

ALLOWANCES = {
    "lenient_linear": lambda probs, lenience: probs / lenience,
    "lenient_square": lambda probs, lenience: probs / lenience**2,
    "lenient_exp": lambda probs, lenience: probs**lenience,
}
LENIENT = sorted(ALLOWANCES)
LOSSY = [name for name, rule in RULES.items() if rule.lossy]

# --- the law -------------------------------------------------------------------------------------------------------


class Squares(Tables):
    """Targets are squares of quarters, whose roots at lenience 1/2 lie on the grid as their multiples do."""

    def _draw(self):
        target = [(9, 4, 1, 1, 1), (4, 4, 4, 4, 0), (9, 4, 1, 1, 1), (16, 0, 0, 0, 0)][self.random.integers(4)]
        draft = [(4, 2, 1, 1, 0), (4, 4, 0, 0, 0), (2, 2, 2, 2, 0), (8, 0, 0, 0, 0)][self.random.integers(4)]
        count = self.random.integers(self.gamma + 1) if self.mixed else self.gamma
        shuffled = self.random.permutation
        return shuffled(target) / 16, shuffled(draft) / 8, int(self.random.integers(self.vocab)), int(count)

    def grid(self, one_hot):
        """Halfway between the thresholds, where a root that rounds cannot tip over."""
        return (np.arange(8) + 0.5) / 8


def leeway(lenience, raw=None):
    return LossyInputs(jnp.float32(lenience), raw)


def residual(target, draft):
    left = np.maximum(target - draft, 0)
    return left / left.sum() if left.any() else target


def distribution_of_one_position(name, lenience):
    """(accepted, recovered) of a rule as its docstring states them."""
    if name in ALLOWANCES:
        return lambda target, draft: np.minimum(draft, ALLOWANCES[name](target, lenience)), residual

    def accepted(target, draft):
        entropy = -sum(p * np.log(p) for p in target if p > 0)
        return draft * (target > min(lenience, np.sqrt(lenience) * np.exp(-entropy)))

    return accepted, lambda target, draft: target


@pytest.mark.parametrize("one_hot", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sampled", "one_hot"])
@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_rule_has_the_distribution_that_it_states(name, one_hot):
    how = {"depth": 2, "leeway": leeway(0.5)}
    far = 0
    for tables in (Squares(1, 5, 2, False), Squares(2, 5, 2, True)):
        joint = emitted_distribution(block_distribution(RULES[name], tables, one_hot, **how), 5, 2)
        stated = composed_distribution(tables, *distribution_of_one_position(name, 0.5), 2, one_hot)
        np.testing.assert_allclose(joint, stated, atol=1e-6)
        assert joint.sum() == pytest.approx(1, abs=1e-6)
        far = max(far, np.abs(joint - tables.target_distribution((), 2)).max())
    assert far > 1e-2, "lossy, and not by rounding"


@pytest.mark.parametrize("lenience", [0.25, 0.5])
def test_a_position_of_the_linear_rule_has_the_closed_form(lenience):
    """Equations 10 and 11 of arXiv 2607.26627."""
    for seed in range(4):
        tables = Squares(seed, 5, 1, False)
        target, draft = tables.target(()), tables.draft(())
        accepted_mass = np.minimum(draft, target / lenience)
        missing = (draft - accepted_mass).sum() / max((target - np.minimum(target, draft)).sum(), 1e-300)
        closed = accepted_mass + missing * np.maximum(target - draft, 0)
        rule = RULES["lenient_linear"]
        law = emitted_distribution(block_distribution(rule, tables, False, depth=1, leeway=leeway(lenience)), 5, 1)
        np.testing.assert_allclose(law, closed, atol=1e-6)
        assert np.all(law <= target / lenience + 1e-6) and law.sum() == pytest.approx(1)


@pytest.mark.parametrize("name", LENIENT)
def test_at_lenience_1_the_enumerated_distribution_is_the_targets(name):
    tables = Tables(1, 3, 2, True)
    joint = emitted_distribution(block_distribution(RULES[name], tables, False, leeway=leeway(1.0)), 3)
    np.testing.assert_allclose(joint, tables.target_distribution((), 3), atol=1e-6)


# --- one block, with the noise of decoding -------------------------------------------------------------------------

ROWS, GAMMA, VOCAB = 512, 3, 7


def random_block(seed=0):
    """Noise, a proposal and target probabilities that agree about half of the time, in full and in short blocks."""
    keys = jax.random.split(jax.random.key(seed), 4)
    logits = 1.5 * jax.random.normal(keys[0], (ROWS, GAMMA + 1, VOCAB))
    target = jax.nn.softmax(logits)
    draft = jax.nn.softmax(logits[:, :GAMMA] + jax.random.normal(keys[1], (ROWS, GAMMA, VOCAB)))
    tokens = jax.random.categorical(keys[2], jnp.log(draft)).astype(jnp.int32)
    counts = jax.random.randint(keys[3], (ROWS,), 1, GAMMA + 1)
    noise = Noise(row_keys(seed, jnp.arange(ROWS)), jnp.arange(ROWS, dtype=jnp.int32), False, False)
    return noise, Proposal(tokens, draft, counts), target


@functools.partial(jax.jit, static_argnums=0)
def outcome(rule, noise, proposal, target, leeway):
    return rule(noise, proposal, target, leeway)


@pytest.mark.parametrize("name", LENIENT)
def test_at_lenience_1_a_rule_is_lossless_bit_for_bit(name):
    noise, sampled, target = random_block()
    for proposal in (sampled, dataclasses.replace(sampled, probs=None)):
        exact = outcome(Lossless(), noise, proposal, target, None)
        assert 0 < int(exact[0].sum()) < ROWS * GAMMA
        for ours, theirs in zip(outcome(RULES[name], noise, proposal, target, leeway(1.0)), exact, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", LOSSY)
def test_a_smaller_lenience_accepts_what_a_larger_one_did_and_more(name):
    noise, proposal, target = random_block()
    greedy, one_hot = Noise(noise.row_keys, noise.lengths, True, False), jax.nn.one_hot(target.argmax(-1), VOCAB)
    leniences = (1.0, 0.9, 0.6, 0.3, 0.1, 1e-3, 1e-30)
    sampled = [outcome(RULES[name], noise, proposal, target, leeway(e))[0] for e in leniences]
    draft = dataclasses.replace(proposal, probs=None)
    argmax = [outcome(RULES[name], greedy, draft, one_hot, leeway(e, target))[0] for e in leniences]
    for accepted in (sampled, argmax):
        assert all(np.all(np.asarray(less) <= np.asarray(more)) for less, more in itertools.pairwise(accepted))
        assert int(accepted[0].sum()) < int(accepted[3].sum())
        np.testing.assert_array_equal(accepted[-1], proposal.num_drafted)  # the target excludes nothing here


@pytest.mark.parametrize("lenience", [1.0, 0.25, 1e-30])
@pytest.mark.parametrize("name", LOSSY)
def test_no_lenience_accepts_a_token_that_the_target_excludes(name, lenience):
    target = jnp.asarray([[[0.0, 0.75, 0.25], [0.5, 0.5, 0.0]]])
    for probs in (None, jnp.asarray([[[0.5, 0.25, 0.25]]])):
        noise = EnumeratedNoise(jnp.zeros((1, 1)))
        proposal = Proposal(jnp.zeros((1, 1), jnp.int32), probs, jnp.ones((1,), jnp.int32))
        accepted, _ = RULES[name](noise, proposal, target, leeway(lenience))
        assert int(accepted[0]) == 0
        assert float(noise.weights[0, 0]) == 0


RAW = (0.5, 0.3, 0.15, 0.05, 0.0)
ACCEPTED = {  # of RAW, by hand, at lenience 1/2
    "lenient_linear": (0, 1),
    "lenient_square": (0, 1, 2),
    "lenient_exp": (0, 1),
    "typical": (0, 1),
}


@pytest.mark.parametrize("name", LOSSY)
def test_at_temperature_0_the_raw_probabilities_decide_and_the_argmax_follows(name):
    noise = Noise(jax.random.split(jax.random.key(0), 1), jnp.asarray([4], jnp.int32), True, False)
    raw = jnp.asarray([[RAW, RAW[::-1]]])
    for token in range(5):
        proposal = Proposal(jnp.asarray([[token]], jnp.int32), None, jnp.ones((1,), jnp.int32))
        accepted, follows = RULES[name](noise, proposal, jax.nn.one_hot(raw.argmax(-1), 5), leeway(0.5, raw))
        is_accepted = token in ACCEPTED[name]
        assert (int(accepted[0]), int(follows[0])) == (int(is_accepted), 4 if is_accepted else 0)


# --- the loop ------------------------------------------------------------------------------------------------------

SLOTS, MAX_NEW, BATCH = 6, 16, 32


@pytest.fixture(scope="module")
def models():
    return tiny.target_and_draft()


def decode(models, rule, lenience, *, greedy=False, kind="model", gamma=3, top_k=0):
    target, params, draft_params = models
    options = tiny.drafter_options(kind, target)
    plan = tiny.plan(target, kind, options, gamma=gamma, slots=SLOTS, max_new=MAX_NEW, rule=rule, greedy=greedy)
    adjust = Sampling.of(0.0 if greedy else 1.0, top_k=top_k, lenience=lenience)
    texts, lengths = tiny.prompts(0, BATCH, SLOTS, target.config.vocab_size)
    return tiny.decode(plan, params, draft_params, texts, lengths, MAX_NEW, adjust=adjust, eos=(5,))


def assert_equal_states(left, right):
    assert tiny.texts_of(left) == tiny.texts_of(right)
    for ours, theirs in zip(jax.tree.leaves(left.statistics), jax.tree.leaves(right.statistics), strict=True):
        np.testing.assert_array_equal(ours, theirs)


CASES = [(name, greedy, "model") for name in LENIENT for greedy in (False, True)] + [("lenient_exp", False, "ngram")]
QUICK = (("lenient_exp", True, "model"),)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "greedy", "kind"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_at_lenience_1_the_loop_decodes_as_lossless_and_below_it_accepts_more(models, name, greedy, kind):
    exact = decode(models, "lossless", 1.0, greedy=greedy, kind=kind)
    assert_equal_states(decode(models, name, 1.0, greedy=greedy, kind=kind), exact)
    lossy = decode(models, name, 0.3, greedy=greedy, kind=kind)
    rate = lambda state: float(state.statistics.accepted_at.sum() / state.statistics.drafted.sum())
    assert rate(lossy) > rate(exact) and tiny.texts_of(lossy) != tiny.texts_of(exact)


def test_every_greedy_lossy_token_is_the_argmax_or_drafted_and_allowed(models):
    """Against an uncached forward: the probabilities that decide are those at temperature 1."""
    target, params, _ = models
    lenience = 0.6
    state = decode(models, "lenient_exp", lenience, greedy=True)
    raw = np.asarray(jax.nn.softmax(tiny.full_logits(target, params, state.tokens)))
    origins, bent = np.asarray(state.origins), 0
    for row, text in enumerate(tiny.texts_of(state)):
        for position in range(int(state.prompt_lengths[row]), len(text)):
            probs, token = raw[row, position - 1], text[position]
            if token == probs.argmax():
                continue
            assert origins[row, position] == loop.ACCEPTED
            assert probs[token] ** lenience > probs.max() * (1 - 1e-5)
            bent += 1
    assert bent > 20


def test_one_compile_serves_every_lenience(models):
    decode(models, "lenient_exp", 0.5, greedy=True)
    compiled = compiled_prefill._cache_size(), loop.compiled_run._cache_size()
    for lenience in (1.0, 0.25, 1e-6):
        decode(models, "lenient_exp", lenience, greedy=True)
    assert (compiled_prefill._cache_size(), loop.compiled_run._cache_size()) == compiled


@dataclasses.dataclass(frozen=True)
class Watched(Rule):
    """A rule that records the extra inputs of lossy rules."""

    lossy: bool
    seen: list = dataclasses.field(default_factory=list, compare=False)

    def __call__(self, noise, proposal, target_probs, inputs):
        self.seen.append(inputs)
        return Lossless()(noise, proposal, target_probs, None)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("lossy", [False, True])
def test_only_lossy_rules_get_a_lenience_and_raw_probabilities_come_when_greedy(models, lossy, greedy):
    target, params, _ = models
    plan = tiny.plan(target, gamma=0, slots=2, max_new=2, rule=Watched(lossy, []), greedy=greedy)
    texts, lengths = tiny.prompts(0, 2, 2, VOCAB)
    adjust = Sampling.of(1.0, lenience=0.5)
    jax.eval_shape(lambda: tiny.decode(plan, params, None, texts, lengths, 2, adjust=adjust).lengths)
    assert [inputs is not None for inputs in plan.rule.seen] == [lossy]
    if lossy:
        assert (plan.rule.seen[0].raw_target_probs is not None) == greedy


@pytest.mark.slow
@pytest.mark.parametrize("greedy", [pytest.param(False, marks=pytest.mark.slow), True])
def test_ids_that_the_target_lacks_are_never_emitted(models, greedy):
    """A draft padded to a larger vocabulary likes its padding; so does a target whose own ids are cut from it."""
    target, params, _ = models
    wide, draft_params = tiny.decoder(4, vocab_size=40)
    padded = dataclasses.replace(Decoder(target.config), logits_size=40)  # ids from 24 on have probability 0
    plan = tiny.plan(
        padded, "model", {"model": wide}, gamma=3, slots=SLOTS, max_new=8, rule="lenient_exp", greedy=greedy
    )
    texts, lengths = tiny.prompts(0, BATCH, SLOTS, 24)
    adjust = Sampling.of(0.0 if greedy else 1.0, lenience=1e-6)
    state = tiny.decode(plan, params, draft_params, texts, lengths, 8, adjust=adjust)
    assert max(max(text) for text in tiny.texts_of(state)) < 24
    assert 0 < int(state.statistics.accepted_at.sum()) < int(state.statistics.drafted_at.sum())


class OfModels:
    """What `composed_distribution` asks of tables, from a target and a draft after one prompt."""

    def __init__(self, target, params, draft, draft_params, prompt, gamma):
        self.models, self.prompt, self.gamma = ((target, params), (draft, draft_params)), prompt, gamma

    def probs(self, which, context):
        model, params = self.models[which]
        text = jnp.asarray([[*self.prompt, *context]], jnp.int32)
        return np.asarray(jax.nn.softmax(tiny.full_logits(model, params, text)[0, -1]), np.float64)

    def target(self, context):
        return self.probs(0, context)

    def draft(self, context, one_hot):
        return self.probs(1, context)

    def num_drafted(self, context):
        return self.gamma


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSY)
def test_the_loop_samples_the_distribution_that_the_rule_states(name):
    vocab, count, rows, prompt, lenience = 5, 3, 6000, [1, 2, 1], 0.4
    target, params = tiny.decoder(0, vocab_size=vocab)
    draft, draft_params = tiny.decoder(9, vocab_size=vocab, layers=1)
    plan = tiny.plan(target, "model", {"model": draft}, gamma=2, slots=len(prompt), max_new=count, rule=name)
    texts, lengths = jnp.tile(jnp.asarray([prompt], jnp.int32), (rows, 1)), jnp.full((rows,), len(prompt), jnp.int32)
    adjust = Sampling.of(1.0, lenience=lenience)
    state = tiny.decode(plan, params, draft_params, texts, lengths, count, adjust=adjust)
    emitted = np.asarray(state.tokens)[:, len(prompt) : len(prompt) + count]
    counts = np.bincount(emitted @ vocab ** np.arange(count)[::-1], minlength=vocab**count)
    tables = OfModels(target, params, draft, draft_params, prompt, 2)

    def p_value(law):
        statistic, freedom = chi_square(counts, law.ravel() * rows)
        return scipy.special.chdtrc(freedom, statistic)

    assert p_value(composed_distribution(tables, *distribution_of_one_position(name, lenience), count)) > 1e-4
    exact = lambda target, draft: np.minimum(target, draft)
    assert p_value(composed_distribution(tables, exact, residual, count)) < 1e-6, "the target's distribution differs"


# --- the doors -----------------------------------------------------------------------------------------------------

TEXT = "".join(f"def add_{i}(x):\n    return x + {i}\n\n\n" for i in range(300))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a target and a draft of one tokenizer, and a file of prompts."""
    home = tmp_path_factory.mktemp("lossy")
    tokenizer = train_byte_bpe([TEXT], 280)
    for name, layers in (("target", 2), ("draft", 1)):
        decoder, params = tiny.decoder(layers, layers=layers, vocab_size=tokenizer.vocab_size)
        api.save(api.Model(decoder, params, tokenizer), home / name)
    (home / "prompts.txt").write_text("def add_1\ndef add_22(x)\nreturn x\ndef\n")
    return home


@pytest.mark.slow
def test_generate_says_what_is_lossy(home):
    target, draft = api.load(home / "target"), api.load(home / "draft")
    ask = functools.partial(api.generate, target, ["def add"], drafter=draft, gamma=2, max_new_tokens=8)
    exact = ask()
    assert not exact.lossy and not api.generate(target, ["def"], max_new_tokens=2, rule=api.Lossy("typical", 0.3)).lossy
    same, bent = (ask(rule=api.Lossy("lenient_exp", lenience)) for lenience in (1.0, 1e-6))
    assert same.tokens == exact.tokens and same.lossy and bent.lossy
    assert bent.stats.acceptance_rate == 1


@pytest.fixture
def config(home):
    config = configs.load("configs/evaluate.py:smoke")
    config.target, config.drafter.path, config.prompts = (str(home / n) for n in ("target", "draft", "prompts.txt"))
    config.drafters.draft.rules.update({"lenient_exp": (2,), "typical": (1,)})
    config.leniences, config.temperatures = (1.0, 0.2), (0.0,)
    return config


@pytest.mark.slow
def test_an_evaluation_runs_lossy_rules_next_to_exact_ones_and_labels_them(config, tmp_path):
    results = evaluate.run(config, tmp_path)
    rows = results["rows"]
    by = {(row["drafter"], row["rule"], row["lenience"], row["gamma"]): row for row in rows}
    lossy = [("draft", "lenient_exp", 1.0, 2), ("draft", "lenient_exp", 0.2, 2)]
    lossy += [("draft", "typical", 1.0, 1), ("draft", "typical", 0.2, 1)]
    exact = [("none", "lossless", None, 0), ("draft", "lossless", None, 2)]
    assert list(by) == [*exact, *lossy, ("ngram", "lossless", None, 2)]
    plain, strict, lenient = by[exact[1]], by[lossy[0]], by[lossy[1]]
    assert strict["accepted_tokens"] == plain["accepted_tokens"]
    assert lenient["acceptance_rate"] > plain["acceptance_rate"]
    assert plain["identical_to_baseline"]["equal"] == 4
    assert strict["identical_to_baseline"] is None and lenient["identical_to_baseline"] is None
    assert {"lenient_exp 0.2, lossy", "lossless"} <= {reporting.cell(row, "rule") for row in rows}
    html = (tmp_path / "report.html").read_text()
    assert "lenient_exp 0.2, lossy" in html and "Best speed-up, temperature 0, lossy" in html


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leniences": (0.5, 0.0)}, r"lenience must lie in \(0, 1\], not 0\.0"),
        ({"leniences": (1.5,)}, r"lenience must lie in \(0, 1\], not 1\.5"),
        ({"leniences": ()}, r"drafters\.draft\.rules\.lenient_exp needs leniences, and config\.leniences is empty"),
        (
            {"drafters.draft.rules": {"lenient_epx": (2,)}},
            'drafters.draft.rules.lenient_epx: there is no rule "lenient_epx"; did you mean "lenient_exp"',
        ),
    ],
)
def test_an_evaluation_of_a_rule_or_lenience_that_is_none_is_refused(config, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(evaluate, "_decode_all", lambda *_: pytest.fail("decoded"))
    for key, value in changes.items():
        if key == "drafters.draft.rules":
            config.drafters.draft.rules.update(value)
        else:
            config[key] = value
    with pytest.raises(UserError, match=message):
        evaluate.run(config, tmp_path)
