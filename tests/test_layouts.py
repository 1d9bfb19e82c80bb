"""Files that users bring: every layout, encoding and compression is read as meant, or refused with one sentence."""

import bz2
import csv
import dataclasses
import gzip
import json
import lzma

import pytest
import toy_tokenizers
from absl import logging as absl_logging
from ml_collections import ConfigDict

from configs import common
from specjax import distill
from specjax.data.batches import RowLayout, evaluation_prompts, training_batches, validation_batches
from specjax.data.files import read
from specjax.data.layouts import Example
from specjax.data.spec_bench import read_questions
from specjax.data.tasks import Task, load_task
from specjax.hub.tokenizer import Tokenizer, train_byte_bpe
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}[/tools]{% endif %}{% for message in messages %}<|{{ message.role }}|>"
    "{{ message.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def load(name, path, size=0):
    return load_task(ConfigDict({"name": name, "path": str(path), "seed": 0, "size": size}))


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def asked(i):
    return f"What is {i}?"


def said(i):
    return f"It is {i}."


def share_gpt(i):
    return [{"from": "human", "value": asked(i)}, {"from": "gpt", "value": said(i)}]


def chat(i):
    return [{"role": "user", "content": asked(i)}, {"role": "assistant", "content": said(i)}]


def parquet(path, records):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path)


def table(path, records, delimiter=","):
    with open(path, "w", newline="") as file:
        rows = csv.DictWriter(file, records[0], delimiter=delimiter)
        rows.writeheader()
        rows.writerows(records)


def numbers(count=20):
    return range(count)


# name of the file -> (how it is written from a path, the prompt and the completion of number i without a chat template)
LAYOUTS = {
    "share_gpt.json": (
        lambda path: path.write_text(json.dumps([{"id": i, "conversations": share_gpt(i)} for i in numbers()])),
        lambda i: (asked(i), f"\n\n{said(i)}"),
    ),
    "messages.jsonl": (
        lambda path: path.write_text(lines({"messages": chat(i)} for i in numbers())),
        lambda i: (asked(i), f"\n\n{said(i)}"),
    ),
    "messages_of_parts.jsonl": (
        lambda path: path.write_text(
            lines(
                {
                    "messages": [
                        {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in chat(i)
                    ]
                }
                for i in numbers()
            )
        ),
        lambda i: (asked(i), f"\n\n{said(i)}"),
    ),
    "prompt_of_messages.parquet": (
        lambda path: parquet(path, [{"prompt": chat(i)[:1], "completion": chat(i)[1:]} for i in numbers()]),
        lambda i: (asked(i), f"\n\n{said(i)}"),
    ),
    "alpaca.json": (
        lambda path: path.write_text(
            json.dumps([{"instruction": "Answer.", "input": asked(i), "output": said(i)} for i in numbers()], indent=1)
        ),
        lambda i: (f"Answer.\n\n{asked(i)}", f"\n\n{said(i)}"),
    ),
    "dolly.jsonl.gz": (
        lambda path: path.write_bytes(
            gzip.compress(
                lines({"instruction": asked(i), "context": "", "response": said(i)} for i in numbers()).encode()
            )
        ),
        lambda i: (asked(i), f"\n\n{said(i)}"),
    ),
    "PAIRS.JSONL": (
        lambda path: path.write_bytes(
            b"\xef\xbb\xbf"
            + lines({"prompt": asked(i), "completion": said(i)} for i in numbers()).replace("\n", "\r\n").encode()
        ),
        lambda i: (asked(i), said(i)),
    ),
    "pairs.csv": (
        lambda path: table(path, [{"prompt": asked(i), "completion": said(i)} for i in numbers()]),
        lambda i: (asked(i), said(i)),
    ),
    "questions.json.gz": (
        lambda path: path.write_bytes(
            gzip.compress(json.dumps([{"question": asked(i), "answer": said(i)} for i in numbers()]).encode())
        ),
        lambda i: (f"Question: {asked(i)}\nAnswer:", f" {said(i)}"),
    ),
    "questions_alone.jsonl": (
        lambda path: path.write_text(lines({"question": asked(i)} for i in numbers())),
        lambda i: (f"Question: {asked(i)}\nAnswer:", ""),
    ),
    "nulls.parquet": (
        lambda path: parquet(path, [{"prompt": asked(i), "completion": None, "system": None} for i in numbers()]),
        lambda i: (asked(i), ""),
    ),
    "lines.TXT": (
        lambda path: path.write_bytes("".join(f"{asked(i)}\r\n" for i in numbers()).encode("utf-16")),
        lambda i: (asked(i), ""),
    ),
    "mt_bench.jsonl": (
        lambda path: path.write_text(
            lines({"question_id": i, "category": "math", "turns": [asked(i)]} for i in numbers())
        ),
        lambda i: (asked(i), ""),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_its_prompts_and_completions_to_evaluation_and_training(tmp_path, name):
    write, expected = LAYOUTS[name]
    write(tmp_path / name)
    pairs = [expected(i) for i in numbers()]
    assert [(e.prompt, e.completion) for e in load("prompts", tmp_path / name).validation] == pairs
    task = load("prompt_completion", tmp_path / name)
    assert sorted((e.prompt, e.completion) for e in task.train + task.validation) == sorted(pairs)
    assert task.train and task.validation
    folder = tmp_path / "splits"
    folder.mkdir()
    for split in ("train", "test"):
        write(folder / f"{split}.{name.partition('.')[2]}")
    if name != "lines.TXT":
        assert [(e.prompt, e.completion) for e in load("prompts", folder).validation] == pairs
        assert len(load("prompt_completion", folder).train) == len(pairs)


def test_a_conversation_gives_an_example_for_each_answer_and_stays_in_one_split(tmp_path):
    path = tmp_path / "data.jsonl"
    system = {"from": "system", "value": "Be brief."}
    late = {"from": "gpt", "value": "an answer to nothing"}
    path.write_text(
        lines({"conversations": [system, late, *share_gpt(i), *share_gpt(i + 100), share_gpt(7)[0]]} for i in numbers())
    )
    examples = load("prompts", path).validation
    assert len(examples) == 60 and [e.completion for e in examples[:3]] == ["\n\nIt is 0.", "\n\nIt is 100.", ""]
    assert [message["role"] for message in examples[2].messages] == ["system", *("user", "assistant") * 2, "user"]
    assert examples[1].prompt == "Be brief.\n\nWhat is 0?\n\nIt is 0.\n\nWhat is 100?"
    task = load("prompt_completion", path)
    first = [{e.messages[1]["content"] for e in split} for split in (task.train, task.validation)]
    assert not first[0] & first[1] and len(task.train) % 3 == 0


def test_what_comes_before_a_question_is_in_its_prompt(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        lines(
            [
                {"question": asked(1), "context": "Of numbers.", "answer": said(1)},
                {"instruction": asked(2), "output": said(2), "history": [[asked(1), said(1)]]},
                {"instruction": asked(2), "output": said(2), "history": []},
                {"instruction": asked(2), "history": [[asked(1), said(1)]], "system": "Be brief."},
            ]
        )
    )
    first, second, third, fourth = load("prompts", path).validation
    assert first.prompt == f"Of numbers.\n\nQuestion: {asked(1)}\nAnswer:" and first.completion == f" {said(1)}"
    assert second.prompt == f"{asked(1)}\n\n{said(1)}\n\n{asked(2)}" and second.completion == f"\n\n{said(2)}"
    assert list(second.messages) == [*chat(1), chat(2)[0]] and third.prompt == asked(2)
    assert fourth.prompt == f"Be brief.\n\n{second.prompt}" and not fourth.completion


def test_messages_without_text_leave_no_trace_in_a_prompt(tmp_path):
    empty = lambda role: {"role": role, "content": ""}
    (tmp_path / "a.jsonl").write_text(lines([{"messages": [empty("system"), *chat(1), empty("assistant"), *chat(2)]}]))
    assert load("prompts", tmp_path / "a.jsonl").validation[-1].prompt == "\n\n".join([asked(1), said(1), asked(2)])


def test_an_answer_that_calls_tools_is_context_and_gives_a_prompt_alone(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    result = {"role": "tool", "content": "3"}
    (tmp_path / "a.jsonl").write_text(lines([{"messages": [*chat(1)[:1], call, result, chat(1)[1]]}]))
    first, second = load("prompts", tmp_path / "a.jsonl").validation
    assert (first.prompt, first.completion) == (asked(1), "") and second.completion == f"\n\n{said(1)}"
    assert second.messages[1]["tool_calls"] == call["tool_calls"] and '"add"' in second.prompt


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"foo": "a", "bar": "b"},
            "line 2 has the fields 'foo', 'bar', which is no known layout; rename one to messages",
        ),
        ({"text": "a"}, r'line 2 is a document \(its field is "text"\), not a prompt; use the task `text`'),
        ({"prompt": None}, "line 2 has the fields none"),
        ({"messages": []}, "line 2: the conversation is no list of messages"),
        ({"messages": "hello"}, "line 2: the conversation is no list of messages"),
        ({"messages": ["hello"]}, "line 2, message 1 is str, not an object"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "line 2, message 1 has the role 'wizard'; it must be one"),
        ({"messages": [{"role": "user"}]}, "line 2, message 1 has no content"),
        ({"conversations": [{"from": "human", "value": " "}]}, "line 2, message 1, of the user, is empty"),
        ({"messages": [{"role": "user", "content": 5}]}, 'line 2, message 1: the field "content" is int, not text'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "message 1 has a part that is not text"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "line 2: the conversation has no message of the user"),
        ({"messages": chat(1), "tools": "{"}, 'line 2: the field "tools" is no list of tools'),
        ({"instruction": " ", "output": "a"}, 'line 2: the field "instruction" is empty'),
        ({"instruction": "a", "history": ["b"]}, 'line 2: the field "history" is no list of pairs of texts'),
        ({"prompt": "a", "completion": {"text": "b"}}, 'line 2: the field "completion" is dict, not text'),
        ({"turns": "a"}, 'line 2 lacks the field "turns", a list of texts'),
    ],
)
def test_a_record_of_no_known_layout_is_refused_by_its_line(tmp_path, record, message):
    path = tmp_path / "data.jsonl"
    path.write_text(lines([{"prompt": "a"}, record]))
    for task in ("prompts", "prompt_completion"):
        with pytest.raises(UserError, match=message):
            load(task, path)


# Text files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends_of_a_text_are_no_part_of_it(tmp_path, encoding, end):
    text = "".join(f"Zeile {i}: größer{end}" for i in range(40))
    for name, content in {"a.txt": text.encode(encoding), "b.TXT": text.encode(encoding)}.items():
        (tmp_path / name).write_bytes(content)
    clean = text.replace("\r\n", "\n").replace("\r", "\n")
    for task in (load("text", tmp_path / "a.txt"), load("text", tmp_path / "b.TXT")):
        assert task.train[0].completion + task.validation[0].completion == clean
    assert {e.completion for e in load("text", tmp_path).train} == {clean}
    assert [e.prompt for e in load("prompts", tmp_path / "a.txt").validation] == clean.splitlines()
    (tmp_path / "joined.txt").write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n")
    assert read(tmp_path / "joined.txt") == "one\ntwo\n"


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_files_are_read_and_damaged_ones_refused(tmp_path, compress):
    data = compress(lines({"prompt": asked(i)} for i in numbers(200)).encode())
    (tmp_path / "good.jsonl.gz").write_bytes(data)
    assert len(load("prompts", tmp_path / "good.jsonl.gz").validation) == 200
    (tmp_path / "cut.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz cannot be read"):
        load("prompts", tmp_path / "cut.jsonl.gz")


@pytest.mark.parametrize(
    "name", ["data.jsonl", "data.JSONL", "data.json", "data.txt", "data", "data.csv", "data.CSV", "data.parquet"]
)
def test_records_given_to_the_task_text_are_refused_by_naming_the_task_that_fits_and_documents_are_read(tmp_path, name):
    def write(records):
        path = tmp_path / name
        if name.endswith("parquet"):
            parquet(path, records)
        elif name.lower().endswith("csv"):
            table(path, records)
        else:
            path.write_text(lines(records))
        return path

    path = write([{"prompt": asked(i), "completion": said(i)} for i in numbers()])
    with pytest.raises(UserError, match="has the fields 'prompt', 'completion', and no \"text\".*`prompt_completion`"):
        load("text", path)
    documents = [{"text": f"Document {i}"} for i in numbers()]
    task = load("text", write(documents))
    assert task.is_language_modelling and task.validation
    assert {e.completion for e in task.train + task.validation} == {record["text"] for record in documents}


def test_a_folder_of_sources_may_hold_json_and_a_folder_of_splits_keeps_them(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "package.json").write_text('{\n "name": "a"\n}\n')
    task = load("text", tmp_path)
    assert {e.completion for e in task.train + task.validation} == {"x = 1\n", '{\n "name": "a"\n}\n'}
    (tmp_path / "b.csv").write_text("name,size\na,5\n")
    with pytest.raises(UserError, match="b.csv, line 2 has the fields 'name', 'size', and no \"text\""):
        load("text", tmp_path)
    splits = tmp_path / "splits"
    splits.mkdir()
    for part in (0, 1):
        parquet(splits / f"train-0000{part}-of-00002.parquet", [{"text": f"train {part}"}])
    parquet(splits / "validation-00000-of-00001.parquet", [{"text": "held out"}])
    task = load("text", splits)
    assert [e.completion for e in task.train] == ["train 0", "train 1"]
    assert [e.completion for e in task.validation] == ["held out"]
    parquet(splits / "train-00000-of-00002.parquet", [{"prompt": "a"}])
    with pytest.raises(UserError, match="row 1 has the fields 'prompt', and no \"text\".*`prompt_completion`"):
        load("text", splits)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "é".encode("latin-1"), r"a\.txt is not UTF-8 text \(byte 0\); convert it or leave it out"),
        ("a.txt", b"\xff\xfea", r"a\.txt is not UTF-16 text"),
        ("a.txt", "text".encode("utf-16-le"), r"a\.txt has zero bytes, so it is binary, or UTF-16"),
        ("a.txt", b"\xef\xbb\xbf \r\n", r"a\.txt is empty"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet cannot be read as Parquet"),
        ("a.csv", b"prompt,completion\na,b,c\n", r"a\.csv, line 2 has 3 columns and the header 2"),
        ("a.csv", b'prompt\n"a\n', r"a\.csv, line \d is not a row of a table"),
        ("a.csv", b"prompt\n", r"a\.csv holds no records"),
        ("a.json", b"[]", r"a\.json, line 1 is not a JSON object"),
        ("a.json", b'[{"prompt": "a"},', r"a\.json, line 1 is not JSON"),
        ("a.jsonl", b'"prompt"', r"a\.jsonl, line 1 is not a JSON object"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        load("prompts", tmp_path / name)
    assert "\n" not in str(raised.value)


def test_the_questions_of_spec_bench_are_read_through_the_same_door(tmp_path):
    records = [{"question_id": i, "category": "qa", "turns": [asked(i)]} for i in numbers()]
    (tmp_path / "a.JSONL").write_bytes(("\ufeff" + lines(records)).replace("\n", "\r\n").encode("utf-16"))
    for name in ("b.json", "c.jsonl"):
        (tmp_path / name).write_text(json.dumps(records))
    assert read_questions(tmp_path / "a.JSONL") == read_questions(tmp_path / "b.json")
    assert read_questions(tmp_path / "b.json") == read_questions(tmp_path / "c.jsonl")


# Chat templates and prompts alone


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A byte-level tokenizer without a chat template, and one with a template and three end tokens."""
    plain = train_byte_bpe([asked(1) + said(2)], 280)
    directory = tmp_path_factory.mktemp("chat")
    plain.save(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"chat_template": TEMPLATE, "split_special_tokens": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, *plain.eos_ids]}))
    return plain, Tokenizer.load(directory)


LAYOUT = RowLayout(batch_size=1, sequence_length=200, prompt_length=(1, 9), seed=0)


def row_of(task, tokenizer, **how):
    """The prompt and the text that the loss includes of the first training row, with special tokens visible."""
    batch = next(training_batches(task, tokenizer, dataclasses.replace(LAYOUT, **how)))
    ids, start, end = batch["tokens"][0].tolist(), int(batch["loss_start"][0]), int(batch["lengths"][0])
    pieces = ["<end>" if token in tokenizer.eos_ids else tokenizer.decode([token]) for token in ids[:end]]
    return "".join(pieces[:start]), "".join(pieces[start:])


def task_of(*examples):
    return Task("mine", examples, examples)


def test_conversations_are_trained_in_the_chat_template_and_end_with_the_turns_end(tokenizers, tmp_path):
    plain, template = tokenizers
    path = tmp_path / "data.jsonl"
    tools = [{"type": "function", "function": {"name": "add"}}]
    path.write_text(lines([{"messages": chat(1)}, {"messages": chat(1), "tools": tools}]))
    first, second = load("prompts", path).validation
    assert row_of(task_of(first), template) == ("<|user|>What is 1?<end>\n<|assistant|>", "It is 1.<end>")
    assert row_of(task_of(second), template)[0].startswith('[tools][{"type": "function"')
    assert row_of(task_of(first), plain) == ("What is 1?", "\n\nIt is 1.<end>")
    ids = next(training_batches(task_of(first), template, LAYOUT))["tokens"][0].tolist()
    assert 5 not in ids and template.end_id == plain.eos_ids[0] != template.eos_ids[0]
    (prompt,) = evaluation_prompts(task_of(first), template, count=1, prompt_length=(1, 99), seed=0)
    assert list(prompt.tokens) == template.apply_chat(first.messages)


def test_a_text_that_has_the_begin_token_gets_no_second_one(tmp_path):
    toy_tokenizers.llama(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    for prompt in ("<s>[INST] hi [/INST]", "[INST] hi [/INST]"):
        for chosen in (dict(prompts_alone=True), {}):
            batch = next(training_batches(task_of(Example(prompt, " yes")), tokenizer, LAYOUT, **chosen))
            assert batch["tokens"][0].tolist().count(tokenizer.bos_id) == 1


def test_other_layouts_are_trained_in_the_template_on_request_without_the_gap_before_an_answer(tokenizers):
    plain, template = tokenizers
    pair = Example("What is 1?", "\n\nIt is 1.", gap="\n\n")
    code = Example("def f():\n", "    return 1")
    assert row_of(task_of(pair), template) == ("What is 1?", "\n\nIt is 1.<end>")
    assert row_of(task_of(pair), template, chat=True) == ("<|user|>What is 1?<end>\n<|assistant|>", "It is 1.<end>")
    assert row_of(task_of(code), template, chat=True)[1] == "    return 1<end>"
    with pytest.raises(UserError, match="has no chat template"):
        row_of(task_of(pair), plain, chat=True)
    with pytest.raises(UserError, match='data.chat is set, and task "mine" has documents'):
        row_of(task_of(Example("", "text")), template, chat=True)


def test_prompts_alone_are_enough_where_models_write_the_text(tokenizers, monkeypatch):
    logged = []
    monkeypatch.setattr(absl_logging, "warning", lambda message, *values: logged.append(message % values))
    plain, template = tokenizers
    bare, pair = Example("What is 1?", ""), Example("What is 2?", " 2.")
    batch = next(training_batches(task_of(bare), plain, LAYOUT, prompts_alone=True))
    assert batch["lengths"] == batch["prompt_lengths"] == len(plain.encode(bare.prompt))
    in_chat = dataclasses.replace(LAYOUT, chat=True)
    chatting = next(training_batches(task_of(bare), template, in_chat, prompts_alone=True))
    assert int(chatting["lengths"][0]) == len(template.apply_chat([{"role": "user", "content": bare.prompt}]))
    (held_out,) = validation_batches(task_of(bare), plain, LAYOUT, count=1)
    assert held_out["loss_start"] == 1 and held_out["lengths"] == batch["lengths"]
    with pytest.raises(UserError, match='"mine" has no completions, only prompts; set data.fixed to 0'):
        training_batches(task_of(bare), plain, LAYOUT)
    with pytest.raises(UserError, match='"mine" has no completions to validate an encoder-decoder on'):
        validation_batches(task_of(bare), plain, dataclasses.replace(LAYOUT, start_token=0), count=1)
    assert row_of(task_of(bare, pair), plain) == ("What is 2?", " 2.<end>")
    assert logged == ["mine: 1 of 2 examples dropped, they have no completion"]


def test_a_stage_whose_models_write_the_text_needs_no_completions(tokenizers):
    config = common.training(1, 1e-3)
    config.model.update(common.TINY_MODEL)
    config.data.update({"batch_size": 1, "sequence_length": 64, "fixed": 0.0, "draft": 1.0})
    task, mesh = task_of(Example("What is 1?", "")), meshes.make_mesh(config.mesh)
    inputs = distill._inputs(config, task, tokenizers[0], mesh)
    assert next(inputs.batches)["lengths"] == len(tokenizers[0].encode("What is 1?"))
    config.data.update({"fixed": 0.5, "draft": 0.5})
    with pytest.raises(UserError, match="set data.fixed to 0"):
        distill._inputs(config, task, tokenizers[0], mesh)


def test_a_conversation_that_the_template_refuses_names_the_task(tokenizers, tmp_path):
    directory = tmp_path / "strict"
    tokenizers[1].save(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('no system role') }}"
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match='task "mine": the chat template refuses this conversation: no system role'):
        row_of(task_of(Example("a", "b", messages=tuple(chat(1)[:1]))), Tokenizer.load(directory))
