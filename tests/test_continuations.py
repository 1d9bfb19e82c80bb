"""Stop strings, several samples, log-probabilities, and the sampling fields of a checkpoint."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toy_tokenizers
from test_right_numbers import ROTARY

from specjax import api, evaluate
from specjax.evaluation.continuations import Stops, note_positions
from specjax.hub.tokenizer import Tokenizer, train_byte_bpe
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError

TEXT = "the cat sat on the mat; the dog sat on the log.\n\n" * 20
PROMPTS = ["the cat", "on", "dog sat on the"]
HOW = dict(max_new_tokens=60, temperature=0.9, seed=3, rule="coupled", eos_ids=(), gamma=3)
DRAFTERS = [None, "ngram"]


@pytest.fixture(scope="module")
def target():
    tokenizer = train_byte_bpe([TEXT], 300)
    decoder, params = tiny.decoder(1, layers=2, vocab_size=tokenizer.vocab_size)
    return api.Model(decoder, params, tokenizer)


@pytest.fixture(scope="module")
def plain(target):
    return api.generate(target, PROMPTS, **HOW)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", DRAFTERS, ids=["plain", "ngram"])
def test_a_text_ends_before_the_first_stop_string_also_where_it_spans_tokens(target, plain, drafter):
    stop = [plain.texts[0][18:21], plain.texts[1][30:34], "never in the text"]
    out = api.generate(target, PROMPTS, drafter=drafter, stop=stop, **HOW)
    for text, tokens, whole, ids in zip(out.texts, out.tokens, plain.texts, plain.tokens, strict=True):
        ends = [whole.find(each) for each in stop if each in whole]
        assert text == whole[: min(ends, default=len(whole))]
        assert tokens == ids[: len(tokens)]
        if ends:  # the last token completes a stop string
            assert len(tokens) < len(ids)
            assert not any(each in target.tokenizer.decode(tokens[:-1]) for each in stop)
    assert out.stats.emitted_tokens == sum(map(len, out.tokens))
    assert list(map(len, out.origins)) == list(map(len, out.tokens))


def test_a_stop_string_of_bytes_ends_a_text_at_the_same_token_wherever_it_is_looked_for(target, tmp_path):
    toy_tokenizers.llama(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    tokens = tokenizer.encode("ab 한국" + 4 * "어")
    model = dataclasses.replace(target, tokenizer=tokenizer)
    ends = [Stops.of(model, "국").end((), tokens[:count]) for count in range(len(tokens) + 1)]
    place = len(tokenizer.encode("ab 한국"))
    assert set(ends[:place]) == {None} and set(ends[place:]) == {None, place} and ends[-1] == place


def test_a_special_token_that_ends_no_text_is_refused_as_a_stop_string(target, tmp_path):
    toy_tokenizers.byte_bpe(tmp_path)
    model = dataclasses.replace(target, tokenizer=Tokenizer.load(tmp_path))
    assert Stops.of(model, "<|im_end|>").strings == ("<|im_end|>",)  # it ends texts by its id
    with pytest.raises(UserError, match="stop has '<mask>', a special token, which no text has; give its id"):
        Stops.of(model, ["x", "<mask>"])


@pytest.mark.parametrize(
    "drafter",
    [*DRAFTERS, pytest.param(api.EarlyExit(exit_layer=1, threshold=0.1), marks=pytest.mark.slow)],
    ids=["plain", "ngram", "early_exit"],
)
def test_the_counts_until_a_stop_string_are_those_until_an_eos(target, plain, drafter):
    # The stop string is the text of one token, which is also made an EOS.
    pieces = target.tokenizer.pieces(plain.tokens[0])
    place = next(
        i for i, piece in enumerate(pieces) if i > 10 and "".join(pieces).find(piece) == len("".join(pieces[:i]))
    )
    how = {**HOW, "eos_ids": (plain.tokens[0][place],)}
    ended = api.generate(target, PROMPTS, drafter=drafter, **how)
    stopped = api.generate(target, PROMPTS, drafter=drafter, stop=pieces[place], **HOW)
    assert stopped.tokens[0] == ended.tokens[0] and stopped.origins[0] == ended.origins[0]
    for name, values in vars(ended.stats.counts).items():
        np.testing.assert_array_equal(getattr(stopped.stats.counts, name)[0], values[0])


def test_a_stopped_row_decodes_no_more_than_until_the_next_check(target, plain):
    stop = [text[5:7] for text in plain.texts]
    out = api.generate(target, PROMPTS, stop=stop, **HOW)
    assert out.stats.iterations <= max(map(len, out.tokens)) + 16 < 60


def test_the_first_sample_is_the_text_of_one_sample_and_the_others_differ(target, plain):
    out = api.generate(target, PROMPTS, samples=3, drafter="ngram", batch_size=3, **HOW)
    assert out.tokens[::3] == plain.tokens and len(out.texts) == 9
    assert len({tuple(tokens) for tokens in out.tokens}) == 9
    # A sample depends neither on the other prompts nor on their number.
    assert api.generate(target, PROMPTS[:1], samples=3, **HOW).tokens == out.tokens[:3]


@pytest.mark.slow
def test_log_probabilities_are_those_of_the_forward_pass_at_temperature_1(target):
    out = api.generate(target, PROMPTS, drafter="ngram", logprobs=True, top_k=5, **HOW)
    for prompt, tokens, scores in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        ids = target.tokenizer.encode_prompt(prompt)
        logs = jax.nn.log_softmax(target.logits([[*ids, *tokens]])[0])
        expected = [logs[len(ids) - 1 + place, token] for place, token in enumerate(tokens)]
        np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_log_probabilities_are_those_of_decoding_where_rotary_embeddings_depend_on_the_prompt(target, kind):
    decoder = dataclasses.replace(
        target.decoder, config=dataclasses.replace(target.decoder.config, rotary=ROTARY[kind])
    )
    out = api.generate(dataclasses.replace(target, decoder=decoder), PROMPTS, logprobs=True, **HOW)
    for prompt, tokens, scores in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        ids = target.tokenizer.encode_prompt(prompt)
        text = jnp.asarray([[*ids, *tokens]])
        cache = decoder.start(target.params, text[:, : len(ids)], jnp.asarray([len(ids)]), text.shape[1])
        hidden, _ = decoder.extend(target.params, cache, text, jnp.arange(text.shape[1])[None])
        logs = jax.nn.log_softmax(decoder.head(target.params, hidden)[0])
        expected = [logs[len(ids) - 1 + place, token] for place, token in enumerate(tokens)]
        np.testing.assert_allclose(scores, expected, atol=1e-4)


def with_file(target, **fields):
    files = dataclasses.replace(target.tokenizer._files, generation=fields)
    return api.Model(target.decoder, target.params, type(target.tokenizer)(target.tokenizer._backend, files))


@pytest.mark.parametrize(
    ("fields", "settings", "ignored"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_k": 4, "top_p": 0.9}, (0.6, 4, 0.9), ""),
        ({"do_sample": True, "top_k": None}, (1.0, 0, 1.0), ""),
        ({"do_sample": True}, (1.0, 50, 1.0), ""),  # transformers' default of top_k
        ({"temperature": 0.6, "repetition_penalty": 1.1}, (0.0, 0, 1.0), "repetition_penalty=1.1 of the target's"),
        ({"num_beams": 4, "bad_words_ids": []}, (0.0, 0, 1.0), "note: num_beams=4 of the target's"),
    ],
)
def test_sampling_fields_of_the_checkpoint_are_used_where_asked_for(target, capsys, fields, settings, ignored):
    model = with_file(target, **fields)
    how = {**HOW, "max_new_tokens": 12, "rule": "lossless"}
    del how["temperature"]
    asked = api.generate(model, PROMPTS[:1], sampling="checkpoint", **how)
    printed = capsys.readouterr().err
    assert ignored in printed and printed.count("is ignored") == bool(ignored)
    temperature, top_k, top_p = settings
    stated = api.generate(model, PROMPTS[:1], temperature=temperature, top_k=top_k, top_p=top_p, **how)
    assert asked.tokens == stated.tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": [""]}, "stop must be strings"),
        ({"stop": 3}, "stop must be strings"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"samples": 5000}, "samples must be at most 2047"),
        ({"sampling": "file"}, 'sampling must be "" or "checkpoint"'),
        ({"sampling": "checkpoint", "top_k": 3}, "leave them out"),
        ({"sampling": "checkpoint"}, "no generation_config.json"),
    ],
)
def test_wrong_values_are_refused(target, settings, message):
    with pytest.raises(UserError, match=message):
        inspect.unwrap(api.generate)(target, PROMPTS[:1], max_new_tokens=2, **settings)


@pytest.mark.slow
def test_a_draft_with_fewer_positions_than_the_text_is_reported(target, capsys):
    decoder, params = tiny.decoder(2, layers=1, vocab_size=target.decoder.vocab_size, max_positions=16)
    draft = api.Model(decoder, params, target.tokenizer)
    how = dict(max_new_tokens=40, temperature=0.0, eos_ids=())
    out = api.generate(target, PROMPTS[:1], drafter=draft, **how)
    assert "note: the draft has 16 positions and a text may have" in capsys.readouterr().err
    assert out.tokens == api.generate(target, PROMPTS[:1], **how).tokens


def test_an_attachment_that_was_made_for_shorter_texts_is_reported(target, capsys):
    for made in (tiny.eagle3, tiny.block_parallel):
        network, _ = made(target.decoder, target.params)
        layer = dataclasses.replace(network.config.inner, max_positions=16)
        network = dataclasses.replace(network, config=dataclasses.replace(network.config, layer=layer))
        note_positions("the draft", network, [[1, 2]], 40)
        assert "the draft has 16 positions and a text may have 42 tokens" in capsys.readouterr().err
    note_positions("the draft", tiny.heads(target.decoder), [[1, 2]], 40)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_an_evaluation_ends_texts_at_stop_strings(target, tmp_path):
    api.save(target, tmp_path / "target")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "the cat", "completion": "x"}) + "\n")
    config = configs.load("configs/evaluate.py:smoke")
    config.target, config.prompts = str(tmp_path / "target"), str(tmp_path / "prompts.jsonl")
    config.temperatures, config.selection.count, config.compare, config.max_new_tokens = (0.0,), 1, (), 40
    config.drafters = {"ngram": {"kind": "ngram", "rules": {"lossless": (2,)}}}
    loaded = api.load(config.target)
    whole = api.generate(loaded, ["the cat"], temperature=0.0, max_new_tokens=40)
    config.stop = (whole.texts[0][9:12],)
    stopped = api.generate(loaded, ["the cat"], temperature=0.0, max_new_tokens=40, stop=config.stop)
    results = evaluate.run(config, tmp_path / "run")["rows"]
    assert [row["emitted_tokens"] for row in results] == 2 * [len(stopped.tokens[0])]
    assert results[1]["identical_to_baseline"]["equal"] == 1
