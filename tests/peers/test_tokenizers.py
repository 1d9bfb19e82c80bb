"""Ids and texts are those of the tokenizers of Hugging Face transformers, for every kind that a directory may hold."""

import random

import pytest
import toy_tokenizers

from specjax.hub.tokenizer import Tokenizer

pytestmark = pytest.mark.peers

TEXTS = toy_tokenizers.texts(1000)


@pytest.fixture(scope="module", params=toy_tokenizers.KINDS)
def directory(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / request.param
    toy_tokenizers.KINDS[request.param](directory)
    return directory


@pytest.fixture(scope="module")
def theirs(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def ours(directory):
    return Tokenizer.load(directory)


def differences(left, right):
    return [(text, a, b) for text, a, b in zip(TEXTS, left, right, strict=True) if a != b]


def test_the_ids_of_a_text_alone_agree(ours, theirs):
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert differences(ours.encode_batch(TEXTS), expected) == []
    assert sum(map(len, expected)) > 5000


def test_the_ids_of_a_prompt_agree_but_for_a_second_bos(ours, theirs):
    expected = [theirs(text)["input_ids"] for text in TEXTS]
    expected = [ids[1:] if ours.bos_id is not None and ids[:2] == [ours.bos_id] * 2 else ids for ids in expected]
    assert differences(list(map(ours.encode_prompt, TEXTS)), expected) == []


def test_decoded_texts_agree(ours, theirs):
    draw = random.Random(0)
    rows = list(map(ours.encode_prompt, TEXTS[:500]))
    rows += [draw.choices(range(ours.vocab_size), k=draw.randint(1, 20)) for _ in range(500)]
    decoded = [ours.decode(row) for row in rows]
    assert differences(decoded, [theirs.decode(row, skip_special_tokens=True) for row in rows]) == []


def test_special_tokens_and_sizes_agree(ours, theirs):
    assert ours.vocab_size == len(theirs)
    assert ours.bos_id == theirs.bos_token_id
    assert theirs.eos_token_id in ours.eos_ids
    assert ours.pad_id == (ours.eos_ids[0] if theirs.pad_token_id is None else theirs.pad_token_id)


def test_what_we_save_they_read_as_before(ours, theirs, tmp_path):
    from transformers import AutoTokenizer

    ours.save(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [again(text)["input_ids"] for text in TEXTS[:100]] == [theirs(text)["input_ids"] for text in TEXTS[:100]]


def test_what_they_save_we_read_as_the_same_ids(directory, ours, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    assert differences(again.encode_batch(TEXTS), ours.encode_batch(TEXTS)) == []
    assert differences(list(map(again.encode_prompt, TEXTS)), list(map(ours.encode_prompt, TEXTS))) == []


def test_where_the_file_of_a_llama_is_followed_though_they_rebuild_its_rules(tmp_path):
    from transformers import AutoTokenizer

    toy_tokenizers.llama_as_json(tmp_path, tokenizer_class="LlamaTokenizer", legacy=False)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    equal = [text for text in TEXTS if ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]]
    meant = [
        text
        for text in TEXTS
        if not text.startswith((" ", "▁")) and not any(token in text for token in ("<s>", "</s>", "<unk>"))
    ]
    assert set(meant) <= set(equal) and len(meant) > 500
    assert ours.encode("</s>a") != theirs("</s>a", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("template", toy_tokenizers.CHATS)
@pytest.mark.parametrize("kind", ["byte_bpe", "llama", "t5"])
@pytest.mark.parametrize("in_config", [True, False])
def test_conversations_agree(tmp_path, kind, template, add_generation_prompt, in_config):
    from transformers import AutoTokenizer

    text = toy_tokenizers.CHATS[template]
    maker = toy_tokenizers.KINDS[kind]
    if in_config:
        maker(tmp_path, chat_template=[{"name": "tool_use", "template": "-"}, {"name": "default", "template": text}])
    else:
        maker(tmp_path, chat_template="the file next to it counts")
        (tmp_path / "chat_template.jinja").write_text(text, encoding="utf-8")
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for messages in (toy_tokenizers.MESSAGES, toy_tokenizers.MESSAGES[1:], toy_tokenizers.MESSAGES[1:2]):
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
        )
        assert ours.apply_chat(messages, add_generation_prompt=add_generation_prompt) == expected
