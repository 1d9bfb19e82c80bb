"""Replays: any draft, gamma and stop scored against stored text as live greedy decoding would count it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from specjax import api
from specjax.decoding.drafters.early_exit import EarlyExit
from specjax.decoding.drafters.model import ModelDraft
from specjax.decoding.drafters.ngram import NGram
from specjax.decoding.drafters.table import make_options
from specjax.decoding.plan import Plan
from specjax.decoding.sampling import Sampling
from specjax.draft_design import replay
from specjax.evaluation.engine import Method, decode_all
from specjax.hub.tokenizer import train_byte_bpe
from specjax.reporting import metrics
from specjax.runtime.errors import UserError

TEXT = "".join(f"def add_{i}(x):\n    return x + {i}\n\n\n" for i in range(60))
NEW = 11


@pytest.fixture(scope="module")
def models():
    """A target and a draft that is the target blurred: many of its drafted tokens are accepted, and not all."""
    tokenizer = train_byte_bpe([TEXT], 265)
    decoder, params = tiny.decoder(0, vocab_size=tokenizer.vocab_size, sharpness=2.0)
    _, other = tiny.decoder(5, vocab_size=tokenizer.vocab_size)
    blurred = jax.tree.map(lambda mine, theirs: mine + 0.1 * theirs, params, other)
    return api.Model(decoder, params, tokenizer), api.Model(decoder, blurred, tokenizer)


@pytest.fixture(scope="module")
def prompts():
    tokens, lengths = tiny.prompts(0, 5, 6, 265)
    return [tuple(row[:length].tolist()) for row, length in zip(np.asarray(tokens), lengths, strict=True)]


@pytest.fixture(scope="module")
def recorded(models, prompts):
    target, _ = models
    # What some text emits early on ends texts from here on, so that ends inside blocks are among them.
    free = replay.record(target, prompts, max_new_tokens=NEW, batch_size=2)
    target.tokenizer.eos_ids = (free.emitted[1][3],)
    outcome = replay.record(target, prompts, max_new_tokens=NEW, batch_size=2, top_k=3)
    assert len({len(text) for text in outcome.emitted}) > 1
    return outcome


def live_counts(models, prompts, kind, gamma, options, size):
    """The counts of the real thing: the target in memory, greedy."""
    target, draft = models
    options = {**options, "model": draft.decoder} if kind == "model" else options
    drafter = tiny.make_drafter(kind, target.decoder, gamma, options)
    plan = Plan.for_prompts(target.decoder, prompts, max_new_tokens=NEW, greedy=True, drafter=drafter, gamma=gamma)
    sampling = Sampling.of(0.0, threshold=options.get("threshold", 0.0))
    method = Method(plan, target.params, draft.params if kind == "model" else None, sampling)
    how = {"max_new_tokens": NEW, "eos_ids": target.tokenizer.eos_ids, "seed": 3}
    return decode_all(method, prompts, batch_size=size, **how)[1].counts()


def by_hand(target="t", tokenizer="v"):
    """One text, of which prompt lookup drafts the first two tokens and nothing afterwards."""
    nothing = np.zeros((1, 4, 0))
    prompts, emitted = ((5, 6, 7, 5, 6),), ((7, 5, 9, 4),)
    return replay.Replay(target, tokenizer, 10, 4, (0,), prompts, emitted, nothing.astype(int), nothing)


def test_a_stored_text_is_decoded_in_the_blocks_that_its_drafts_deserve():
    counts = replay.score(by_hand(), NGram(shortest=1, longest=2), 2)
    # [7 5] stand and 9 follows; nothing in the text ends like 5 9, so 4 is plain.
    assert (counts.emitted, counts.target_calls, counts.drafted, counts.accepted) == (4, 2, 2, 2)
    np.testing.assert_array_equal(counts.emitted_more_than, [[1, 1]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "gamma", "options", "size"),
    [
        ("model", 3, {"threshold": 0.3}, 2),
        ("model", 4, {}, 5),
        ("model", 5, {"threshold": 0.6}, 1),
        ("ngram", 2, {"shortest": 1, "longest": 2}, 2),
    ],
)
def test_a_replay_counts_what_the_live_run_counts(models, prompts, recorded, kind, gamma, options, size):
    live = live_counts(models, prompts, kind, gamma, options, size)
    draft = models[1] if kind == "model" else None
    scored = replay.score(recorded, make_options(kind, options), gamma, draft=draft, batch_size=size)
    for field in dataclasses.fields(metrics.Counts):
        np.testing.assert_array_equal(getattr(scored, field.name), getattr(live, field.name), err_msg=field.name)
    assert 0 < scored.accepted.sum() < scored.drafted.sum()


@pytest.mark.slow
def test_agreement_is_what_the_target_itself_would_say_of_its_text(models, recorded):
    of_itself = replay.agreement(recorded, models[0], batch_size=2)
    assert of_itself["agrees"].all() and len(of_itself["agrees"]) == sum(map(len, recorded.emitted))
    stored = np.concatenate([p[: len(t)] for p, t in zip(recorded.top_probs, recorded.emitted, strict=True)])
    np.testing.assert_allclose(of_itself["overlap"], stored.sum(-1), rtol=1e-4)
    np.testing.assert_allclose(of_itself["surprise"], -np.log(stored[:, 0]), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_replay_comes_back_from_the_disk_as_it_was(recorded, tmp_path):
    replay.save(recorded, tmp_path)
    loaded = replay.load(tmp_path)
    for field in dataclasses.fields(replay.Replay):
        np.testing.assert_array_equal(
            np.asarray(getattr(loaded, field.name), object), np.asarray(getattr(recorded, field.name), object)
        )


def test_a_replay_of_another_target_or_tokenizer_is_refused(models):
    target, draft = models
    recorded = by_hand(target.fingerprint, target.tokenizer.fingerprint())
    recorded.check_target(target)
    with pytest.raises(UserError, match="this replay is of another target"):
        recorded.check_target(draft)
    foreign = dataclasses.replace(draft, tokenizer=train_byte_bpe([TEXT.upper()], 265))
    for refused in (
        lambda: recorded.check_target(foreign),
        lambda: replay.score(recorded, ModelDraft(), 2, draft=foreign),
        lambda: replay.agreement(recorded, foreign),
    ):
        with pytest.raises(UserError, match="recorded with another tokenizer than this model's"):
            refused()


def test_what_a_replay_cannot_do_and_what_is_no_replay_is_refused(models, tmp_path):
    recorded = by_hand()
    with pytest.raises(UserError, match="it scores ModelDraft and NGram, not EarlyExit"):
        replay.score(recorded, EarlyExit(exit_layer=1), 2)
    with pytest.raises(UserError, match="top_k must lie in 0 .. 265, the vocabulary, not 266"):
        replay.record(models[0], [(1,)], max_new_tokens=2, batch_size=1, top_k=266)
    with pytest.raises(UserError, match="holds no replay.json"):
        replay.load(tmp_path)
    replay.save(recorded, tmp_path)
    fields = json.loads((tmp_path / replay.FILE).read_text())
    (tmp_path / replay.FILE).write_text(json.dumps({**fields, "schema": 0}))
    with pytest.raises(UserError, match="has schema 0, this version reads 1"):
        replay.load(tmp_path)
    whole = (tmp_path / replay.ARRAYS).read_bytes()
    for damaged in (b"nothing", b"", whole[: len(whole) // 2]):
        (tmp_path / replay.ARRAYS).write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged .*; record it again"):
            replay.load(tmp_path)
