"""One prompt in the terminal: what is printed while it is decoded is what is decoded."""

import itertools
import json
import re

import pytest
import tiny

from specjax import api, generate
from specjax.hub.tokenizer import train_byte_bpe
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError

TEXT = "the cat sat on the mat; the dög sat on the løg. " * 40


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("pair")
    tokenizer = train_byte_bpe([TEXT], 290)
    for name, layers in (("target", 2), ("draft", 1)):
        decoder, params = tiny.decoder(layers, layers=layers, vocab_size=tokenizer.vocab_size)
        api.save(api.Model(decoder, params, tokenizer), home / name)
    return home


@pytest.fixture
def config(home):
    config = configs.load("configs/generate.py:smoke")
    config.target, config.drafter.path, config.prompt = str(home / "target"), str(home / "draft"), "the dög"
    config.max_new_tokens = 40
    return config


def plain(printed: str) -> str:
    return re.sub("\033\\[[0-9]*m", "", printed)


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
        ("chat", True, "a chat prompt for a model without a template"),
    ],
)
def test_what_is_missing_or_wrong_is_named(config, tmp_path, key, value, message):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        generate.run(config, tmp_path)
    assert not (tmp_path / "results.json").exists()
