"""Tokenizers of every kind load, keep their rules through saving, and know where a sequence ends.

That ids and texts are the reference's is shown in peers/test_tokenizers.py.
"""

import json
import shutil

import gguf_files
import pytest
import toy_tokenizers

from specjax.hub.tokenizer import END, Tokenizer, check_same_tokens, train_byte_bpe
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
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"has no end-of-sequence token; name one as \"eos_token\" in tokenizer_config"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    assert train_byte_bpe(TEXTS, 257).vocab_size == 257
    with pytest.raises(UserError, match="vocab_size 256 is too small: .* 257"):
        train_byte_bpe(TEXTS, 256)


def test_training_on_no_text_is_refused():
    with pytest.raises(UserError, match="no text"):
        train_byte_bpe(["", ""], 300)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directories of every kind, by name; not to be changed."""
    home = tmp_path_factory.mktemp("made")
    for name, maker in toy_tokenizers.KINDS.items():
        maker(home / name)
    return {name: home / name for name in toy_tokenizers.KINDS}


def changed(directory, tmp_path, **files):
    """A copy whose JSON files have these fields; None takes a field away."""
    copy = shutil.copytree(directory, tmp_path / "changed")
    for stem, fields in files.items():
        path = copy / f"{stem}.json"
        content = {**(json.loads(path.read_text()) if path.exists() else {}), **fields}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return copy


@pytest.mark.parametrize("kind", toy_tokenizers.KINDS)
def test_every_kind_keeps_its_files_and_ids_through_saving(made, tmp_path, kind):
    loaded = Tokenizer.load(made[kind])
    loaded.save(tmp_path)
    tokenizer_files = {path.name for path in made[kind].iterdir()} - {"generation_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == tokenizer_files
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (made[kind] / path.name).read_bytes()
    again = Tokenizer.load(tmp_path)
    texts = toy_tokenizers.texts(50)
    assert again.fingerprint() == loaded.fingerprint()
    assert list(map(again.encode_prompt, texts)) == list(map(loaded.encode_prompt, texts))


@pytest.mark.parametrize("kind", toy_tokenizers.KINDS)
def test_ids_stay_below_the_vocabulary_size_and_pieces_join_to_the_text(made, kind):
    loaded = Tokenizer.load(made[kind])
    cleans = json.loads((made[kind] / "tokenizer_config.json").read_text()).get("clean_up_tokenization_spaces")
    for text in toy_tokenizers.texts(100):
        ids = loaded.encode_prompt(text)
        assert max(ids, default=0) < loaded.vocab_size
        pieces = loaded.pieces(ids)
        assert len(pieces) == len(ids)
        assert cleans or "".join(pieces) == loaded.decode(ids)


@pytest.mark.parametrize("text", ["a\ud800b", b"caf\xe9".decode(errors="surrogateescape")])
def test_a_text_that_is_no_unicode_is_refused(made, text):
    for encode in (Tokenizer.load(made["byte_bpe"]).encode_prompt, Tokenizer.load(made["llama"]).encode):
        with pytest.raises(UserError, match="half a surrogate pair, or bytes that are not UTF-8"):
            encode(text)


def test_the_last_token_of_a_character_carries_it(made):
    loaded = Tokenizer.load(made["llama"])
    assert loaded.pieces(loaded.encode("a 👧 b")) == ["a", " ", "", "", "", "👧", " b"]
    cut = loaded.encode("a 👧")[:-1]
    assert "".join(loaded.pieces(cut)) == loaded.decode(cut) == "a \ufffd\ufffd\ufffd"


PAIRS = [
    ("def add(a, b):\n", "    return a + b"),
    ("def add(a, b):", "\n    return a + b\n"),
    ("Q: 1 + 1? A:", " 2"),
    ("Q: 1 + 1? A: ", "it's 2"),
    ("hello wor", "ld"),
    ("naïve café 日", "本語 🙂"),
    ("한국어" * 8, "! 한국어"),  # more bytes in a row than are decoded as context
    ("", "x hello"),
    ("hello\n\n", "\nx"),
]


def json_variant(made, home, name):
    """The `tokenizer.json` of a Llama with other rules for the space at the start of a text."""
    directory = shutil.copytree(made["llama_as_json"], home / name)
    fields = json.loads((directory / "tokenizer.json").read_text())
    if name.startswith("metaspace"):
        fields["normalizer"] = None
        scheme = name.removeprefix("metaspace_")
        fields["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    for token in fields["added_tokens"] if name == "normalized" else ():
        token["normalized"] = True
    (directory / "tokenizer.json").write_text(json.dumps(fields))
    return directory


def gguf_variant(made, path, name):
    """A GGUF file with the tokenizer of a Llama, of a Phi-3 (a space before every text) or of a byte-level BPE."""
    if name == "gguf_bytes":
        metadata, kind = gguf_files.byte_level(made["byte_bpe"], "llama-bpe"), "llama"
        metadata |= {"tokenizer.ggml.bos_token_id": metadata["tokenizer.ggml.tokens"].index("<|begin|>")}
    else:
        kind = name.removeprefix("gguf_")
        metadata = gguf_files.sentencepiece((made["llama"] / "tokenizer.model").read_bytes())
    gguf_files.write(path, kind, metadata, {})
    return path


GGUF = ("gguf_llama", "gguf_phi3", "gguf_bytes")
VARIANTS = ("metaspace_first", "metaspace_always", "metaspace_never", "normalized")


LOSSY = ("t5", "t5_with_few_sentinels", "unigram")  # do not encode every text without loss


@pytest.fixture(scope="module")
def every(made, tmp_path_factory):
    """Tokenizers of every kind that encodes texts without loss, and of variants of `tokenizer.json`."""
    home = tmp_path_factory.mktemp("variants")
    directories = made | {name: json_variant(made, home, name) for name in VARIANTS}
    directories |= {name: gguf_variant(made, home / f"{name}.gguf", name) for name in GGUF}
    return {name: Tokenizer.load(path) for name, path in directories.items() if name not in LOSSY}


# In a fixed order: the workers of a run must collect the same tests.
@pytest.mark.parametrize("kind", [*(kind for kind in toy_tokenizers.KINDS if kind not in LOSSY), *VARIANTS, *GGUF])
def test_a_completion_continues_its_prompt_without_a_space_too_many(every, kind):
    loaded = every[kind]
    for prompt, completion in PAIRS:
        ((head, ids),) = loaded.encode_pairs([prompt], [completion])
        assert head == loaded.encode_prompt(prompt)
        assert ids[-1] == loaded.end_id
        assert loaded.decode(ids, after=head) == completion
        assert "".join(loaded.pieces(ids, after=head)) == completion
        written = loaded.decode([*(token for token in head if token not in loaded.eos_ids), *ids])
        assert written.lstrip(" ") == (prompt + completion).lstrip(" ")


def test_a_tokenizer_in_a_gguf_file_and_the_same_one_in_a_directory_make_a_pair(every):
    for left, right in (("gguf_llama", "llama"), ("gguf_llama", "llama_as_json"), ("gguf_bytes", "byte_bpe")):
        check_same_tokens(every[left], every[right])
        check_same_tokens(every[right], every[left])
    with pytest.raises(UserError, match="different tokenizers.*id .* means"):
        check_same_tokens(every["gguf_llama"], every["byte_bpe"])


def test_windows_line_ends_are_no_part_of_merges(made, every, tmp_path):
    directory = changed(made["gpt2_merges"], tmp_path)
    path = directory / "merges.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.load(directory).fingerprint() == every["gpt2_merges"].fingerprint()


def test_the_canonical_tokens_of_the_text_are_taken_where_they_begin_with_the_prompts(every):
    loaded = every["llama"]
    ((head, ids),) = loaded.encode_pairs(["hello"], [" world"])
    assert [*head, *ids] == [*loaded.encode_prompt("hello world"), loaded.end_id]


@pytest.mark.parametrize("kind", ["llama", "llama_with_added_tokens", "llama_as_json", "byte_bpe", "normalized", *GGUF])
def test_a_text_that_begins_with_bos_gets_no_second_one(every, kind):
    loaded = every[kind]
    bos = loaded._backend.tokens[loaded.bos_id]
    assert loaded.encode_prompt(f"{bos}hello").count(loaded.bos_id) == 1
    assert loaded.encode_prompt("hello").count(loaded.bos_id) == 1
    assert loaded.encode_pairs([f"{bos}hello"], ["x"])[0][0].count(loaded.bos_id) == 1


@pytest.mark.parametrize("kind", ["normalized", "llama_as_json", "llama", "llama_with_added_tokens", *GGUF[:2]])
def test_special_tokens_are_parsed_and_have_no_text_whatever_their_flags(made, every, tmp_path, kind):
    loaded = every[kind]
    if kind == "llama":  # as in old `special_tokens_map.json`
        end = {"content": "</s>", **dict.fromkeys(("lstrip", "rstrip", "single_word"), False), "normalized": True}
        loaded = Tokenizer.load(changed(made[kind], tmp_path, special_tokens_map={"eos_token": end}))
    ids = [*loaded.encode("hello world"), 2]
    assert loaded.decode(ids) == "".join(loaded.pieces(ids)) == "hello world"
    assert 2 in loaded.encode("x</s>y")
    assert loaded.encode("x </s>")[-1] == 2


def test_an_end_token_that_its_file_does_not_call_special_has_no_text(made, tmp_path):
    directory = json_variant(made, tmp_path, "normalized")
    fields = json.loads((directory / "tokenizer.json").read_text())
    for token in fields["added_tokens"]:
        token["special"] = False
    (directory / "tokenizer.json").write_text(json.dumps(fields))
    loaded = Tokenizer.load(directory)
    ids = [*loaded.encode_prompt("hello world"), *loaded.eos_ids]
    assert loaded.decode(ids) == "".join(loaded.pieces(ids)) == "hello world"


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_added_tokens_of_an_old_file_are_found_inside_a_text_and_keep_their_flags(made, tmp_path, normalized, flags):
    directory = json_variant(made, tmp_path, "normalized")
    fields = json.loads((directory / "tokenizer.json").read_text())
    token = dict(lstrip=False, rstrip=False, single_word=False, special=False, normalized=normalized) | flags
    token |= {"id": len(fields["model"]["vocab"]), "content": "<think>"}
    (directory / "tokenizer.json").write_text(json.dumps({**fields, "added_tokens": [*fields["added_tokens"], token]}))
    loaded = Tokenizer.load(directory)
    assert (token["id"] in loaded.encode("x<think>y")) == (not flags.get("single_word"))
    assert token["id"] in loaded.encode("x <think> y")
    bare = loaded.encode("x<think>y")
    assert (loaded.encode("x<think> y") == bare) == flags.get("rstrip", False)
    assert (loaded.encode("x <think>y") == bare) == flags.get("lstrip", False)


def test_training_appends_the_token_that_ends_a_turn(made, tmp_path):
    directory = changed(made["byte_bpe"], tmp_path / "a", tokenizer_config={"eos_token": "<|endoftext|>"})
    chat = Tokenizer.load(directory)
    assert chat.end_id == chat.encode("<|im_end|>")[0]  # in generation_config, and in the template after a turn
    named = Tokenizer.load(changed(directory, tmp_path / "b", tokenizer_config={"chat_template": None}))
    assert [named.end_id] == named.encode("<|endoftext|>") and named.eos_ids[0] != named.end_id
    ends = {"eos_token": None, "chat_template": None}
    unnamed = Tokenizer.load(changed(directory, tmp_path / "c", tokenizer_config=ends))
    assert unnamed.end_id == unnamed.eos_ids[0]
    # An old file of a chat model names only the end of a document; texts still end where their turn does.
    old = changed(made["byte_bpe"], tmp_path / "d", generation_config={"eos_token_id": named.end_id})
    assert Tokenizer.load(old).eos_ids == (named.end_id,)
    assert Tokenizer.load(old).stop_ids == (named.end_id, chat.end_id)
    assert named.stop_ids == named.eos_ids


@pytest.mark.parametrize("template", [*toy_tokenizers.CHATS, "endings"])
@pytest.mark.parametrize("kind", ["byte_bpe", "llama"])
def test_a_reply_in_a_conversation_ends_where_its_turn_ends(made, tmp_path, kind, template):
    own = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    own += "{% if add_generation_prompt %}<assistant>\n{% else %}{{ eos_token }}{% endif %}"
    text = {**toy_tokenizers.CHATS, "endings": own}[template]
    loaded = Tokenizer.load(changed(made[kind], tmp_path, tokenizer_config={"chat_template": text}))
    asked = [{"role": "user", "content": "hi"}]
    ((head, ids),) = loaded.encode_pairs([asked], ["    return <a>"])
    assert head == loaded.apply_chat(asked)
    assert ids[-1] == loaded.end_id and ids.count(loaded.end_id) == 1
    whole = loaded.apply_chat([*asked, {"role": "assistant", "content": "    return <a>"}], add_generation_prompt=False)
    assert "return <a>" in loaded.decode(ids, after=head)
    if template in ("turns", "endings") and kind == "byte_bpe":
        assert whole[: len(head) + len(ids)] == [*head, *ids]


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("trained", [], []),
        ("byte_bpe", ["<|begin|>"], []),
        ("unigram", [], ["</s>"]),
        ("gpt2_merges", ["</s>"], []),
        ("llama", ["<s>"], []),
        ("llama_with_added_tokens", ["<s>"], ["</s>"]),
        ("t5", [], ["</s>"]),
    ],
)
def test_a_prompt_has_the_tokens_around_it_that_the_model_expects_and_a_text_has_none(made, kind, before, after):
    loaded = Tokenizer.load(made[kind])
    ids = lambda tokens: [loaded._backend.token_id(token) for token in tokens]
    plain = loaded.encode("hello world")
    assert not set(ids([*before, *after])) & set(plain)
    assert loaded.encode_prompt("hello world") == [*ids(before), *plain, *ids(after)]


def test_a_llama_begins_with_bos_unless_its_config_says_no(made, tmp_path):
    silent = changed(made["llama"], tmp_path / "a", tokenizer_config={"add_bos_token": None})
    without = changed(made["llama"], tmp_path / "b", tokenizer_config={"add_bos_token": False})
    assert Tokenizer.load(silent).encode_prompt("hello")[0] == Tokenizer.load(silent).bos_id == 1
    assert Tokenizer.load(without).encode_prompt("hello") == Tokenizer.load(without).encode("hello")


def test_where_a_llama_puts_its_space(made, tmp_path):
    spelled = lambda loaded, text: [loaded._backend.tokens[index] for index in loaded.encode(text)]
    first = Tokenizer.load(made["llama"])
    assert spelled(first, "a</s>a </s>") == ["▁a", "</s>", "a", "▁", "</s>"]
    assert spelled(first, " a") == ["▁a"]
    always = Tokenizer.load(changed(made["llama"], tmp_path, tokenizer_config={"legacy": True}))
    assert spelled(always, "a</s>a") == ["▁a", "</s>", "▁a"]
    never = changed(made["llama"], tmp_path / "never", tokenizer_config={"add_prefix_space": False})
    assert spelled(Tokenizer.load(never), "a a") == ["a", "▁a"]
    assert Tokenizer.load(never).decode(first.encode("a a")) == " a a"


def test_the_sentinels_of_a_t5_count_down_from_the_last_id(made, tmp_path):
    loaded = Tokenizer.load(made["t5"])
    assert loaded.encode("<extra_id_0><extra_id_99>") == [loaded.vocab_size - 1, loaded.vocab_size - 100]
    few = changed(made["t5"], tmp_path, tokenizer_config={"extra_ids": None}, config={"extra_ids": 3})
    assert Tokenizer.load(few).vocab_size == loaded.vocab_size - 97


@pytest.mark.parametrize("kind", ["byte_bpe", "llama"])
def test_special_tokens_in_a_text_are_parsed_unless_the_config_says_that_they_are_text(made, tmp_path, kind):
    parsed = Tokenizer.load(made[kind])
    end = {"byte_bpe": "<|im_end|>", "llama": "</s>"}[kind]
    (index,) = [parsed._backend.token_id(end)]
    text = Tokenizer.load(changed(made[kind], tmp_path, tokenizer_config={"split_special_tokens": True}))
    assert index in parsed.encode(f"a{end}b") and index not in text.encode(f"a{end}b")
    assert text.decode(text.encode(f"a{end}b")) == f"a{end}b"


def test_end_ids_are_those_of_the_generation_config_then_the_config_then_the_token(made, tmp_path):
    directory = made["byte_bpe"]
    ends = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    config = {"eos_token_id": 5}
    stated = Tokenizer.load(changed(directory, tmp_path / "a", config=config))
    assert stated.eos_ids == tuple(ends) and len(ends) == 2
    generation = {"eos_token_id": None}
    assert Tokenizer.load(changed(directory, tmp_path / "b", generation_config=generation, config=config)).eos_ids == (
        5,
    )
    nested = {"text_config": {"eos_token_id": [6, 7, 6]}}
    assert Tokenizer.load(changed(directory, tmp_path / "c", generation_config=generation, config=nested)).eos_ids == (
        *(6, 7),
    )
    token = Tokenizer.load(changed(directory, tmp_path / "d", generation_config=generation))
    assert token.eos_ids == tuple(token.encode("<|im_end|>"))


@pytest.mark.parametrize("value", [True, -1, "2", 407, [3, None]])
def test_an_end_id_outside_the_vocabulary_is_refused(made, tmp_path, value):
    directory = changed(made["byte_bpe"], tmp_path, generation_config={"eos_token_id": value})
    with pytest.raises(UserError, match="generation_config.json: eos_token_id .* not within the vocabulary, 0 .. 406"):
        Tokenizer.load(directory)


def test_the_pad_id_is_the_pad_tokens_else_the_first_end(made, tmp_path):
    assert Tokenizer.load(made["t5"]).pad_id == 0
    loaded = Tokenizer.load(changed(made["byte_bpe"], tmp_path, tokenizer_config={"pad_token": None}))
    assert loaded.pad_id == loaded.eos_ids[0]
    assert loaded.bos_id == loaded.encode_prompt("")[0]
    assert Tokenizer.load(made["t5"]).bos_id is None


def test_the_fingerprint_is_of_the_content_and_not_of_names_or_settings_that_change_no_id(made, tmp_path):
    whole = json.loads((made["byte_bpe"] / "tokenizer.json").read_text())
    same = {"truncation": None, "padding": None, "post_processor": None}
    other = {
        "added_tokens": whole["added_tokens"][:-1],
        "model": {**whole["model"], "merges": whole["model"]["merges"][:-1]},
        "normalizer": {"type": "NFKC"},
    }
    fingerprint = Tokenizer.load(made["byte_bpe"]).fingerprint()
    template = changed(made["byte_bpe"], tmp_path / "template", tokenizer_config={"chat_template": "other"})
    assert Tokenizer.load(template).fingerprint() == fingerprint
    for key, value in {**same, **other}.items():
        directory = changed(made["byte_bpe"], tmp_path / key)
        (directory / "tokenizer.json").write_text(json.dumps({**whole, key: value}))
        assert (Tokenizer.load(directory).fingerprint() == fingerprint) == (key in same), key


def test_the_fingerprint_of_a_sentencepiece_model_is_of_its_content(made, tmp_path):
    fingerprint = Tokenizer.load(made["llama"]).fingerprint()
    renamed = changed(made["llama"], tmp_path / "a")
    (renamed / "tokenizer.model").rename(renamed / "spiece.model")
    around = changed(made["llama"], tmp_path / "b", tokenizer_config={"add_bos_token": False})
    assert Tokenizer.load(renamed).fingerprint() == Tokenizer.load(around).fingerprint() == fingerprint
    more = changed(made["llama"], tmp_path / "c", tokenizer_config={"additional_special_tokens": ["<new>"]})
    spaces = changed(made["llama"], tmp_path / "d", tokenizer_config={"legacy": True})
    trained = changed(made["llama"], tmp_path / "e")
    (trained / "tokenizer.model").write_bytes(toy_tokenizers.sentencepiece_model("llama", vocab_size=470))
    others = {Tokenizer.load(directory).fingerprint() for directory in (more, spaces, trained)}
    assert len(others) == 3 and fingerprint not in others


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("llama", {"model_type": "unigram"}, "another segmentation than its class"),
        ("llama", {"remove_extra_whitespaces": True}, "another treatment of whitespace than its class"),
        ("llama", {"add_dummy_prefix": False}, "another treatment of whitespace than its class"),
        ("llama", {"normalization_rule_name": "nfkc"}, "a normalisation, which a Llama does not have"),
        ("llama", {"user_defined_symbols": ["<tool>"]}, "user-defined symbols"),
        ("t5", {"byte_fallback": True, "vocab_size": 480}, "bytes for unknown characters"),
    ],
)
def test_a_sentencepiece_model_that_is_not_its_classes_is_refused_by_name(made, tmp_path, kind, changes, said):
    directory = changed(made[kind], tmp_path)
    name = {"llama": "tokenizer.model", "t5": "spiece.model"}[kind]
    (directory / name).write_bytes(toy_tokenizers.sentencepiece_model(kind, **changes))
    with pytest.raises(UserError, match=f"{said}.*save it as tokenizer.json with transformers"):
        Tokenizer.load(directory)


def test_a_class_without_rules_here_is_refused_by_name(made, tmp_path):
    for kind in ("llama", "gpt2_merges"):
        directory = changed(made[kind], tmp_path / kind, tokenizer_config={"tokenizer_class": "GemmaTokenizerFast"})
        with pytest.raises(UserError, match="of a GemmaTokenizer.*save it as tokenizer.json with transformers"):
            Tokenizer.load(directory)


def test_without_a_stated_class_the_models_type_or_the_files_name_tells_it(made, tmp_path):
    for kind, model_type in (("llama", "llama"), ("t5", "t5"), ("gpt2_merges", "opt")):
        for number, config in enumerate(({"model_type": model_type}, {})):
            where = tmp_path / f"{kind}{number}"
            directory = changed(made[kind], where, tokenizer_config={"tokenizer_class": None}, config=config)
            assert Tokenizer.load(directory).fingerprint() == Tokenizer.load(made[kind]).fingerprint()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 40])
def test_a_damaged_sentencepiece_model_is_named(made, tmp_path, content):
    directory = changed(made["t5"], tmp_path)
    (directory / "spiece.model").write_bytes(content)
    with pytest.raises(UserError, match="spiece.model is not a SentencePiece model"):
        Tokenizer.load(directory)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_config_is_named(made, tmp_path, name, content):
    directory = changed(made["llama_of_old"], tmp_path)
    (directory / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} .*copy it again"):
        Tokenizer.load(directory)


def test_added_tokens_whose_ids_contradict_the_vocabulary_are_refused(made, tmp_path):
    for kind in ("llama", "t5", "trained"):
        token = {"7": {"content": {"trained": END}.get(kind, "</s>"), "special": True}}
        directory = changed(made[kind], tmp_path / kind, tokenizer_config={"added_tokens_decoder": token})
        with pytest.raises(UserError, match="has the id 7 in the configs"):
            Tokenizer.load(directory)
    listed = {"300": {"content": "<x>", "normalized": True, "special": False}}
    directory = changed(made["t5"], tmp_path / "normalized", tokenizer_config={"added_tokens_decoder": listed})
    with pytest.raises(UserError, match="added tokens that are matched after normalisation, which is not supported"):
        Tokenizer.load(directory)


@pytest.mark.parametrize("listed", [{"x": {"content": "a"}}, {"300": {"text": "a"}}, {"300": 7}, [1], "ab"])
def test_a_damaged_list_of_added_tokens_is_named(made, tmp_path, listed):
    directory = changed(made["llama"], tmp_path, tokenizer_config={"added_tokens_decoder": listed})
    with pytest.raises(UserError, match="(added_tokens_decoder|token 300|token 1) is n.*(copy it again|correct)"):
        Tokenizer.load(directory)


def test_a_damaged_table_of_added_tokens_is_named(made, tmp_path):
    directory = changed(made["llama_of_old"], tmp_path, added_tokens={"<x>": "many"})
    with pytest.raises(UserError, match="added_tokens.json is no table of tokens with their ids"):
        Tokenizer.load(directory)


def test_a_conversation_is_written_as_the_template_says(made):
    loaded = Tokenizer.load(made["byte_bpe"])
    turn = [{"role": "user", "content": " hi "}]
    asked = loaded.encode("<|im_start|>user\nhi<|im_end|>\n")
    assert loaded.apply_chat(turn, add_generation_prompt=False) == asked
    assert loaded.apply_chat(turn) == [*asked, *loaded.encode("<|im_start|>assistant\n")]


def test_a_template_of_its_own_file_counts_before_the_configs_and_default_among_several(made, tmp_path):
    listed = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes {{ eos_token }}"}]
    directory = changed(made["llama"], tmp_path, tokenizer_config={"chat_template": listed})
    turn = [{"role": "user", "content": "hi"}]
    loaded = Tokenizer.load(directory)
    assert loaded.apply_chat(turn) == [*loaded.encode("yes "), *loaded.eos_ids]
    (directory / "chat_template.jinja").write_text("{{ strftime_now('%%') }}{{ messages | tojson }}")
    loaded = Tokenizer.load(directory)
    assert loaded.apply_chat(turn) == loaded.encode('%[{"role": "user", "content": "hi"}]')


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (None, [{"role": "user"}], "a chat prompt for a model without a template"),
        ([{"name": "tools", "template": "x"}], [{"role": "user"}], "a chat prompt for a model without a template"),
        ("{{ raise_exception('no system here') }}", [{"role": "system"}], "refuses this conversation: no system here"),
        ("{% for %}", [{"role": "user"}], "the chat template is not valid"),
        ("{{ messages[0].content + 1 }}", [{"role": "user", "content": "x"}], "refuses this conversation"),
        ("{{ ''.__class__.__mro__ }}", [{"role": "user"}], "refuses this conversation.*unsafe"),
        ("x", [], "the conversation has no message"),
        ("x", [{"role": "user", "content": object()}], "a message is not JSON-compatible"),
    ],
)
def test_conversations_that_cannot_be_written_are_refused(made, tmp_path, template, messages, said):
    directory = changed(made["llama"], tmp_path, tokenizer_config={"chat_template": template})
    with pytest.raises(UserError, match=said):
        Tokenizer.load(directory).apply_chat(messages)
