"""The tokenizer loses nothing, is the same every time, and finds its end token again."""

import json

import pytest

from specjax.hub.tokenizer import END, Tokenizer, train_byte_bpe
from specjax.runtime.errors import UserError

TEXTS = [f"def function_{i}(value):\n    return value + {i}\n" for i in range(50)] + ["naïve café\n"] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe(TEXTS, 320)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  leading and trailing  ",
        "tab\tnewline\ncarriage\r\nreturn\r",
        "\x00\x01\x7f\x85\u2028",
        "naïve café 日本語 🙂 e\u0301 \ufb01 \u200b",
        f"a text that says {END} itself",
        TEXTS[3],
    ],
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merges_are_learned_and_ids_stay_below_the_vocabulary_size(tokenizer):
    ids = tokenizer.encode(TEXTS[0])
    assert len(ids) < len(TEXTS[0]) / 3
    assert tokenizer.vocab_size == 320
    assert max(ids) < tokenizer.vocab_size


def test_a_text_never_encodes_to_the_end_token(tokenizer):
    assert tokenizer.eos_ids[0] not in tokenizer.encode(f"{END}{END}")
    assert tokenizer.eos_ids[0] not in tokenizer.encode_batch([f"x{END}"])[0]


def test_the_end_token_has_no_text(tokenizer):
    ids = [*tokenizer.encode("value"), *tokenizer.eos_ids]
    assert tokenizer.decode(ids) == "value"
    assert tokenizer.pieces(ids)[-1] == ""


def test_pieces_joined_are_the_decoded_text(tokenizer):
    ids = tokenizer.encode(TEXTS[7])
    assert len(tokenizer.pieces(ids)) == len(ids)
    assert "".join(tokenizer.pieces(ids)) == tokenizer.decode(ids) == TEXTS[7]


def test_a_batch_encodes_as_each_text_alone(tokenizer):
    texts = ["", *TEXTS[:5], "日本"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_the_same_texts_give_the_same_tokenizer_and_others_another(tokenizer):
    assert train_byte_bpe(iter(TEXTS), 320).fingerprint() == tokenizer.fingerprint()
    assert train_byte_bpe(TEXTS, 319).fingerprint() != tokenizer.fingerprint()
    assert train_byte_bpe([text.upper() for text in TEXTS], 320).fingerprint() != tokenizer.fingerprint()


def test_saving_and_loading_keeps_everything(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "place")
    loaded = Tokenizer.load(tmp_path / "new" / "place")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert (loaded.vocab_size, loaded.eos_ids, loaded.pad_id) == (320, tokenizer.eos_ids, tokenizer.pad_id)
    text = f"value {END} 🙂"
    assert loaded.encode(text) == tokenizer.encode(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no .*tokenizer.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "None"}}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_a_truncated_file_is_named(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text()[:-100])
    with pytest.raises(UserError, match=r"tokenizer.json is not a valid tokenizer file"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer.json: the tokenizer has no special token"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    assert train_byte_bpe(TEXTS, 257).vocab_size == 257
    with pytest.raises(UserError, match="vocab_size 256 is too small: .* 257"):
        train_byte_bpe(TEXTS, 256)


def test_training_on_no_text_is_refused():
    with pytest.raises(UserError, match="no text"):
        train_byte_bpe(["", ""], 300)
