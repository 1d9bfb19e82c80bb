"""The encoder-decoder: its own arithmetic, and the same loop, drafters, trainer and evaluation as any model's."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specjax import api, distill, evaluate
from specjax.decoding.drafters.base import Context, Prompts
from specjax.decoding.sampling import Noise, Sampling, row_keys
from specjax.distillation import divergences, objective
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.encoder_decoder import bucket_table
from specjax.models.language_model import consecutive
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError

TEXT = "the cat sat on the mat. the dog sat on the log. " * 40


def model(seed=0, **changes):
    """A random model whose layers matter, and its parameters."""
    made, params = tiny.encoder_decoder(seed, **changes)
    params = dict(params)
    for stack in ("blocks", "encoder_blocks"):
        params[stack] = jax.tree.map(lambda x: 2 * x if x.ndim == 2 else x, params[stack])
    return made, params


@functools.partial(jax.jit, static_argnums=0)
def plain_logits(made, params, prompts, lengths, texts):
    """Of the plain forward, nothing cached."""
    start = made.start(params, prompts, lengths, 0)
    return made.head(params, made.extend(params, start, texts, consecutive(texts))[0])


@functools.partial(jax.jit, static_argnums=0)
def steps(made, params, prompts, lengths, first, at, again):
    """Logits of `again` at the positions `at`, after the cached `first`."""
    cache = made.start(params, prompts, lengths, 40)
    _, cache = made.extend(params, cache, first, consecutive(first))
    return made.head(params, made.extend(params, cache, again, at)[0])


def test_buckets_are_those_of_the_paper():
    # 8 buckets both ways: 4 a direction, of which distances 0 and 1 have their own, then 2..6 and 7.. up to 20.
    both = bucket_table(8, 20, both_ways=True)
    assert both[:21].tolist() == [0, 1, *[2] * 5, *[3] * 14]
    assert both[21:].tolist() == [5, *[6] * 5, *[7] * 14]
    backwards = bucket_table(8, 20, both_ways=False)
    assert backwards.tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6, *[7] * 7]


def test_cached_steps_at_uneven_places_are_the_plain_forward():
    made, params = model()
    prompts, lengths = tiny.prompts(0, 3, 9, 24)
    texts = jax.random.randint(jax.random.key(1), (3, 12), 0, 24)
    whole = plain_logits(made, params, prompts, lengths, texts)
    at = jnp.asarray([3, 7, 5])[:, None] + jnp.arange(4)[None]  # each row goes back by another step
    again = steps(made, params, prompts, lengths, texts[:, :8], at, jnp.take_along_axis(texts, at, axis=1))
    np.testing.assert_allclose(again, jnp.take_along_axis(whole, at[..., None], axis=1), atol=2e-5)


def test_neither_padding_nor_the_other_rows_reach_a_row():
    made, params = model()
    prompts, lengths = tiny.prompts(0, 3, 9, 24)
    texts = jax.random.randint(jax.random.key(1), (3, 6), 0, 24)
    logits = functools.partial(plain_logits, made, params)
    batch = logits(prompts, lengths, texts)
    for row in (0, 1):  # shorter than the batch's columns
        length = int(lengths[row])
        alone = logits(prompts[row : row + 1, :length], lengths[row : row + 1], texts[row : row + 1])
        np.testing.assert_allclose(batch[row], alone[0], atol=2e-5)
    other = prompts.at[0, 0].add(1) % 24
    assert float(jnp.abs(logits(other, lengths, texts)[0] - batch[0]).max()) > 1e-2


@pytest.mark.parametrize(
    ("drafter", "rule", "greedy"),
    [
        ("model", "lossless", True),
        pytest.param("ngram", "coupled", False, marks=pytest.mark.slow),
        pytest.param("early_exit", "coupled", False, marks=pytest.mark.slow),
        pytest.param("model", "coupled", False, marks=pytest.mark.slow),
        pytest.param("ngram", "lossless", True, marks=pytest.mark.slow),
        pytest.param("early_exit", "lossless", True, marks=pytest.mark.slow),
    ],
)
def test_speculative_texts_are_the_plain_ones(drafter, rule, greedy):
    target, params = model(0)
    draft, draft_params = model(0, layers=1, encoder_layers=1)
    options = {"model": draft, "shortest": 1, "longest": 2, "exit_layer": 1}
    prompts, lengths = tiny.prompts(3, 12, 9, 24)
    made = lambda gamma: tiny.plan(target, drafter, options, gamma=gamma, slots=1, max_new=16, rule=rule, greedy=greedy)
    plain = tiny.decode(made(0), params, None, prompts, lengths, 16, eos=(5,))
    fast = tiny.decode(made(3), params, draft_params if drafter == "model" else None, prompts, lengths, 16, eos=(5,))
    assert tiny.texts_of(fast) == tiny.texts_of(plain)
    assert {text[0] for text in tiny.texts_of(plain)} == {0}
    assert int(fast.statistics.accepted_at.sum()) > 0


def test_the_prompt_is_drafted_from_by_lookup():
    """A text that copies its prompt is drafted from it, though the prompt is not part of the text."""
    target, _ = model(0)
    prompts, lengths = tiny.prompts(3, 12, 9, 24)
    plan = tiny.plan(target, "ngram", {"shortest": 1, "longest": 2}, gamma=2, slots=1, max_new=8, greedy=True)
    state = plan.drafter.start(None, None, Prompts(prompts, lengths, plan.capacity))
    rows = np.arange(12)
    pending, last = jnp.zeros_like(lengths), prompts[rows, lengths - 1]
    tokens = jnp.zeros((12, plan.capacity), jnp.int32).at[:, 0].set(last)  # the text repeats the prompt's last token
    noise = Noise(row_keys(0, rows), pending + 1, True, False)
    context = Context(tokens[:, :2], pending + 1, pending == 0, noise, Sampling.of(0.0), tokens=tokens)
    drafted = np.asarray(plan.drafter.propose(None, None, state, None, context)[0].num_drafted)
    assert drafted.tolist() == [2] * 12


@pytest.mark.slow
def test_sampled_first_tokens_follow_the_distribution():
    """Chi-square of the first two tokens over many rows, n-gram drafts included, against the model's own joint law."""
    target, params = model(1, vocab_size=4)
    rows = 4096
    prompts, lengths = jnp.tile(jnp.asarray([[1, 2, 3, 1]]), (rows, 1)), jnp.full((rows,), 4)
    plan = tiny.plan(target, "ngram", {"shortest": 1, "longest": 2}, gamma=2, slots=1, max_new=2)
    texts = np.asarray(tiny.texts_of(tiny.decode(plan, params, None, prompts, lengths, 2)))
    openings = jnp.asarray([[0, token] for token in range(4)])
    logits = plain_logits(target, params, prompts[:4], lengths[:4], openings)
    probs = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)))
    joint = probs[0, 0][:, None] * probs[:, 1]
    counts = np.zeros((4, 4))
    np.add.at(counts, (texts[:, 1], texts[:, 2]), 1)
    statistic = ((counts - rows * joint) ** 2 / (rows * joint)).sum()
    assert statistic < 37.7  # 15 degrees of freedom, p = 0.001


@pytest.mark.slow
def test_no_gradient_comes_from_the_prompt_or_the_padding_and_the_target_is_a_constant():
    target, target_params = model(1)
    draft, params = model(2, layers=1)
    prompts, lengths = tiny.prompts(0, 3, 9, 24)
    texts = jax.random.randint(jax.random.key(1), (3, 6), 0, 24)
    ends = jnp.asarray([6, 4, 5])

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, prompts, texts):
        batch = {"tokens": texts, "lengths": ends, "loss_start": jnp.ones_like(ends)}
        batch |= {"sources": prompts, "prompt_lengths": lengths}
        of = objective.Loss(draft, target, divergences.divergence("forward_kl"), temperature=1.0, chunk=4)
        sums = of(params, target_params, batch)
        return sums.loss, sums.tokens

    loss = jax.jit(loss)
    (value, tokens), gradient = loss(params, prompts, texts)
    assert float(tokens) == 5 + 3 + 4
    junk = jnp.where(jnp.arange(9)[None] < lengths[:, None], prompts, 7)
    again = loss(params, junk, jnp.where(jnp.arange(6)[None] < ends[:, None], texts, 9))
    np.testing.assert_allclose(again[0][0], value, rtol=1e-5)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient["encoder_blocks"])) > 1e-4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Exports of a target and a draft with one tokenizer, and a file of prompts."""
    home = tmp_path_factory.mktemp("t5")
    tokenizer = train_byte_bpe([TEXT], 280)
    for name, layers in (("target", 2), ("draft", 1)):
        made, params = model(layers, layers=layers, vocab_size=tokenizer.vocab_size)
        api.save(api.Model(made, params, tokenizer), home / name)
    lines = [{"prompt": f"the cat {i}", "completion": " sat on the mat"} for i in range(40)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


@pytest.mark.slow
def test_an_evaluation_reports_identical_text_and_consistent_counts(home, tmp_path):
    config = configs.load("configs/evaluate.py:smoke")
    config.target, config.drafter.path = str(home / "target"), str(home / "draft")
    config.prompts, config.measure_parts = str(home / "pairs.jsonl"), True
    config.drafters.draft.rules.coupled, config.temperatures = (), (0.0,)
    rows = evaluate.run(config, tmp_path)["rows"]
    assert [row["drafter"] for row in rows] == ["none", "draft", "ngram"]
    assert rows[0]["target_calls"] == rows[0]["emitted_tokens"]
    for row in rows[1:]:
        assert row["identical_to_baseline"]["equal"] == row["identical_to_baseline"]["of"] == 4
        assert row["block_efficiency"] == pytest.approx(1 + sum(row["ctar"]))
        assert row["predicted_speedup"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("sources", [("fixed",), ("draft",), ("target",), ("fixed", "draft")], ids="-".join)
def test_a_draft_is_distilled_on_text_of_any_source_and_exported(home, tmp_path, sources):
    config = configs.load("configs/quickstart.py:smoke").distilled
    config.task.update({"name": "prompt_completion", "path": str(home / "pairs.jsonl"), "size": 0})
    config.tokenizer.path = config.model.init = str(home / "draft")
    config.target = str(home / "target")
    config.data.update({"fixed": 0.0, "draft": 0.0, "target": 0.0} | dict.fromkeys(sources, 1 / len(sources)))
    # As wide as the rows of the corpus, with narrower prompts: other programs all the same.
    config.data.generation.max_new_tokens = config.data.sequence_length - 1
    config.data.prompt_length_max = 24
    config.speculative_eval.every = 0
    config.train.update({"steps": 2 if len(sources) == 1 else 6, "best_metric": "validation_loss"})
    config.optimizer.warmup_steps = 1
    row = distill.run(config, tmp_path)["rows"][0]
    assert np.isfinite(row["validation_loss"])
    before, after = api.load(home / "draft"), api.load(tmp_path / "export")
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before.params, after.params)
    assert max(jax.tree.leaves(moved["encoder_blocks"])) > 0


@pytest.mark.slow
def test_two_kinds_of_model_do_not_draft_for_each_other():
    tokenizer = train_byte_bpe([TEXT], 280)
    target = api.Model(*model(2, vocab_size=tokenizer.vocab_size), tokenizer)
    llama = api.Model(*tiny.decoder(0, vocab_size=tokenizer.vocab_size), tokenizer)
    with pytest.raises(UserError, match="take two of a kind"):
        api.generate(target, ["the cat"], drafter=llama)
    with pytest.raises(UserError, match="this is a t5 model"):
        target.logits([[1, 2]])
    with pytest.raises(UserError, match="this is a llama model"):
        llama.logits([[1, 2]], [[0]])
