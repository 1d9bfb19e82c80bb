"""Prompts and conversations in the terminal: what is printed while it is decoded is what is decoded."""

import io
import itertools
import json
import os
import re
import signal
import sys

import pytest
import tiny

from specjax import api, generate
from specjax.decoding import scheduler
from specjax.hub.tokenizer import train_byte_bpe
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError

TEXT = "the cat sat on the mat; the dög sat on the løg. " * 40
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] | trim + '. ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("pair")
    tokenizer = train_byte_bpe([TEXT], 290)
    for name, layers in (("target", 2), ("draft", 1)):
        decoder, params = tiny.decoder(layers, layers=layers, vocab_size=tokenizer.vocab_size)
        api.save(api.Model(decoder, params, tokenizer), home / name)
        # A template that drops spaces, so that the text of a turn is not always encoded as it was emitted.
        settings = json.loads((home / name / "tokenizer_config.json").read_text())
        (home / name / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return home


@pytest.fixture
def config(home):
    config = configs.load("configs/generate.py:smoke")
    config.target, config.drafter.path, config.prompt = str(home / "target"), str(home / "draft"), "the dög"
    config.max_new_tokens = 40
    return config


def plain(printed: str) -> str:
    return re.sub("\033\\[[0-9]*m", "", printed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["none", *(pytest.param(k, marks=pytest.mark.slow) for k in ("model", "ngram", "early_exit"))]
)
def test_what_is_printed_bit_by_bit_is_the_text(config, tmp_path, capsys, kind):
    config.drafter.kind, config.colours, config.blocks_at_once = kind, "always", 1
    row = generate.run(config, tmp_path)["rows"][0]
    printed, message = capsys.readouterr()
    assert plain(printed) == "".join(piece for piece, _ in row["tokens"]) + "\n"
    assert f"{row['emitted_tokens']} tokens in {row['target_calls']} target calls" in message
    assert row == json.loads((tmp_path / "results.json").read_text())["rows"][0]
    colours = set(re.findall("\033\\[(3[0-9])m", printed))
    assert colours <= {"31", "32", "34"} and bool(colours) == (kind != "none")


@pytest.mark.slow
def test_stopping_after_every_block_changes_nothing(home):
    target, draft = api.load(home / "target"), api.load(home / "draft")
    settings = dict(drafter=draft, gamma=3, max_new_tokens=40, seed=4)
    seen = []
    whole = api.generate(target, ["the cat", "the"], **settings)
    bits = api.generate(target, ["the cat", "the"], **settings, blocks_at_once=1, on_text=seen.append)
    assert bits.tokens == whole.tokens and bits.origins == whole.origins
    assert len(seen) == bits.stats.iterations > 3
    for earlier, later in itertools.pairwise(seen):
        for before, after in zip(earlier.tokens, later.tokens, strict=True):
            assert after[: len(before)] == before
    assert seen[-1].tokens == whole.tokens


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("target", "", "config.target is empty"),
        ("prompt", "", "config.prompt is empty"),
        ("drafter.path", "", "config.drafter.path is empty"),
        ("drafter.kind", "modle", 'there is no drafter "modle"'),
        ("colours", "blue", 'config.colours is "blue"'),
        ("blocks_at_once", 0, "blocks_at_once must be 1 or more"),
        ("system", "Be brief.", "config.system is for a chat; add --config.chat=true"),
    ],
)
def test_what_is_missing_or_wrong_is_named(config, tmp_path, key, value, message):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        generate.run(config, tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_a_drafter_that_cannot_be_is_refused_before_the_target_is_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setattr(generate.hub_model, "loader", lambda *args: pytest.fail("it loads"))
    for changes, message in (({"path": ""}, "drafter.path is empty"), ({"kind": "modle"}, "there is no drafter")):
        config.drafter.update(changes)
        with pytest.raises(UserError, match=message):
            generate.run(config, tmp_path)


def test_a_prompt_can_be_compared_with_plain_decoding(config, tmp_path, capsys):
    config.drafter.kind, config.compare = "ngram", True
    config.gamma = 5  # no other test drafts as many tokens, so this run compiles
    row = generate.run(config, tmp_path)["rows"][0]
    assert row["speedup"] == pytest.approx(row["tokens_per_second"] / row["plain_tokens_per_second"])
    message = capsys.readouterr().err
    assert f"{row['tokens_per_second']:.1f} tokens/s, {row['speedup']:.2f} times the plain" in message
    assert re.search(r"[0-9.]+ s of compiling before", message) and row["compile_seconds"] > 0


def converse(config, tmp_path, monkeypatch, lines):
    config.prompt, config.chat, config.temperature = "", True, 0.0
    config.max_new_tokens, config.blocks_at_once = 12, 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    return generate.run(config, tmp_path)["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ngram", pytest.param("model", marks=pytest.mark.slow)])
def test_every_turn_of_a_conversation_is_the_text_of_the_whole_conversation(
    config, tmp_path, monkeypatch, capsys, kind
):
    config.system, config.drafter.kind, extended = "the mat", kind, []
    extend = scheduler.extend
    monkeypatch.setattr(scheduler, "extend", lambda *args: extended.append(args[5:]) or extend(*args))
    rows = converse(config, tmp_path, monkeypatch, ["the cat", "", " the dög ", "/reset", "sat on"])
    printed, message = capsys.readouterr()
    assert [row["prompt"] for row in rows] == ["the cat", "the dög", "sat on"]
    assert rows == json.loads((tmp_path / "results.json").read_text())["rows"]
    assert printed == "".join("".join(piece for piece, _ in row["tokens"]) + "\n" for row in rows)
    assert len(message.splitlines()) == 3
    target = api.load(config.target)
    drafter = api.load(config.drafter.path) if kind == "model" else kind
    system, earlier = {"role": "system", "content": "the mat"}, []
    for number, row in enumerate(rows):
        earlier = [] if number == 2 else earlier
        messages = [system, *earlier, {"role": "user", "content": row["prompt"]}]
        ids = target.tokenizer.apply_chat(messages)
        out = api.generate(target, [ids], drafter=drafter, temperature=0.0, max_new_tokens=12)
        assert (row["text"], row["prompt_tokens"]) == (out.texts[0], len(ids))
        earlier = [*messages[1:], {"role": "assistant", "content": row["text"]}]
    # Later turns extend the caches from the first token that differs: after a reset, the one after the system message.
    cached = [row["cached_tokens"] for row in rows]
    assert cached[0] == 0 and cached[1] > cached[2] > 0
    assert [(int(lengths[0]), int(starts[0])) for lengths, starts in extended] == [
        (row["prompt_tokens"], row["cached_tokens"]) for row in rows[1:]
    ]


def test_a_conversation_that_fills_the_positions_says_so_and_goes_on(config, tmp_path, monkeypatch, capsys):
    config.drafter.kind = "none"
    long = "xyzq" * 300
    rows = converse(config, tmp_path, monkeypatch, [long, "the cat"])
    assert [row["prompt"] for row in rows] == ["the cat"]
    assert re.search(
        "the conversation has [0-9]+ tokens and the model 512 positions; write /reset", capsys.readouterr().err
    )


@pytest.mark.parametrize(("key", "value"), [("samples", 2), ("logprobs", True), ("compare", True)])
def test_a_conversation_refuses_what_is_for_one_prompt(config, tmp_path, monkeypatch, key, value):
    config[key] = value
    with pytest.raises(UserError, match=f"config.{key} is for one prompt"):
        converse(config, tmp_path, monkeypatch, [])


def test_an_answer_ends_where_the_listener_says(home):
    target = api.load(home / "target")
    how = dict(temperature=0.0, max_new_tokens=12, blocks_at_once=2)
    seen = []
    ended = api.generate(target, ["the cat"], **how, on_text=lambda text: seen.append(text) or len(seen) == 2)
    whole = api.generate(target, ["the cat"], **how, on_text=lambda text: None)
    assert len(seen) == 2 and len(ended.tokens[0]) == 4 and ended.tokens[0] == whole.tokens[0][:4]


def test_the_first_interrupt_is_noted_and_the_second_ends_the_turn():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), generate._interruptible() as received:
        assert not received
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
