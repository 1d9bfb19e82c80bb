"""Corpora, tasks and batches: splits do not leak, each token is in its place, bad input is named."""

import json
import random
import re
import subprocess
import sys
import sysconfig
import time

import numpy as np
import pytest
from absl import logging as absl_logging
from helpers import write_jsonl
from ml_collections import ConfigDict

from specjax.data import corpora, word_problems
from specjax.data.batches import RowLayout, evaluation_prompts, training_batches, validation_batches
from specjax.data.quality import final_number
from specjax.data.tasks import Example, Task, load_task, quality
from specjax.hub.tokenizer import train_byte_bpe
from specjax.runtime.errors import UserError

DOCUMENTS = tuple(
    Example("", f"# file {i}\n\n" + "".join(f"def f{i}_{j}(x):\n    return x * {j}\n\n" for j in range(20)))
    for i in range(30)
)
LANGUAGE = Task("documents", DOCUMENTS[:24], DOCUMENTS[24:], None)
PAIRS = tuple(Example(f"What is {i} plus {i}?", f" It is {2 * i}.\n#### {2 * i}", "sums") for i in range(40))
PAIRED = Task("pairs", PAIRS[:30], PAIRS[30:], "exact_match")


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe([example.prompt + example.completion for example in DOCUMENTS + PAIRS], 330)


def config(name, path="", seed=0, size=0):
    return ConfigDict({"name": name, "path": str(path), "seed": seed, "size": size})


def batches(task, tokenizer, own_rows=None, **changed):
    settings = dict(batch_size=4, sequence_length=32, prompt_length=(3, 9), seed=0)
    return training_batches(task, tokenizer, RowLayout(**{**settings, **changed}), own_rows=own_rows)


def loss_batches(task, tokenizer, count, **changed):
    settings = dict(batch_size=2, sequence_length=16, prompt_length=(3, 9), seed=0)
    return validation_batches(task, tokenizer, RowLayout(**{**settings, **changed}), count=count)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


# Corpora


def test_the_standard_library_is_found_without_its_tests_and_split_by_file():
    training, validation = corpora.stdlib_files()
    names = [name for name, _ in training + validation]
    assert len(names) == len(set(names))
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    share = sum(len(text) for _, text in validation) / sum(len(text) for _, text in training + validation)
    assert 0.04 < share < 0.14


def test_the_standard_library_leaves_out_what_is_no_source(tmp_path, monkeypatch):
    sources = {f"module_{i}.py": f"x = {i}\n" for i in range(40)}
    left_out = {
        "test/test_x.py": b"x",
        "idlelib/idle_test/test_y.py": b"x",
        "site-packages/z.py": b"x",
        "pkg/__pycache__/a.py": b"x",
        "latin.py": b"# \xe9\n",
        "empty.py": b" \n",
        "table.py": b'""" Codec generated from a table. """\n',
        "notes.txt": b"x",
    }
    for name, content in {**{name: text.encode() for name, text in sources.items()}, **left_out}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    training, validation = corpora.stdlib_files()
    assert dict(training + validation) == sources
    assert [name for name, _ in training] == sorted(name for name, _ in training)
    assert validation


def test_a_python_without_sources_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="no Python sources in"):
        corpora.stdlib_files()


def test_a_key_keeps_its_side_as_others_come_and_go():
    keys = [f"key {i}" for i in range(2000)]
    mask = corpora.validation_mask(keys)
    assert 0.07 < np.mean(mask) < 0.13
    assert corpora.validation_mask(keys[500:] + ["new"])[:-1] == mask[500:]


@pytest.mark.parametrize("number", range(2, 12))
def test_both_sides_of_a_split_have_something_and_equal_keys_stay_together(number):
    for salt in range(500):
        keys = [f"{salt} {i}" for i in range(number)]
        mask = corpora.validation_mask(keys + keys)
        assert any(mask) and not all(mask)
        assert mask[:number] == mask[number:]


def test_limiting_bytes_keeps_a_stable_subset_that_fits():
    files = tuple((f"{i}.py", f"é = {i}\n" * 20) for i in range(30))
    assert corpora.limit_bytes(files, 0) == files
    smaller, larger = corpora.limit_bytes(files, 1000), corpora.limit_bytes(files, 2000)
    for limited, size in ((smaller, 1000), (larger, 2000)):
        total = sum(len(text.encode()) for _, text in limited)
        assert size - 20 < total <= size
        assert all(text == dict(files)[name][: len(text)] and text.endswith("\n") for name, text in limited)
    assert {name for name, _ in smaller} <= {name for name, _ in larger}
    with pytest.raises(UserError, match="`size` of 3 bytes"):
        corpora.limit_bytes(files, 3)


def test_a_single_text_file_gives_its_last_lines_to_validation(tmp_path):
    text = "".join(f"line {i}\r\n" for i in range(100))
    (tmp_path / "a.txt").write_bytes(text.encode())
    task = load_task(config("text", tmp_path / "a.txt"))
    (train,), (validation,) = task.train, task.validation
    assert train.completion + validation.completion == text.replace("\r\n", "\n")
    assert validation.completion.startswith("line ")
    assert 0.05 < len(validation.completion) / len(text) < 0.15
    (short,) = load_task(config("text", tmp_path / "a.txt", size=50)).train
    assert train.completion.startswith(short.completion) and 40 < len(short.completion) <= 50


def test_a_directory_of_texts_is_split_by_file(tmp_path):
    (tmp_path / "sub").mkdir()
    for i in range(12):
        (tmp_path / ("sub" if i % 2 else ".") / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    task = load_task(config("text", tmp_path))
    assert task.is_language_modelling and task.metric is None
    assert sorted(e.completion for e in task.train + task.validation) == sorted(f"text {i}" for i in range(12))


def test_bad_text_files_are_named(tmp_path):
    for name, content in {"empty": b"", "blank": b" \n\n", "binary": b"ab\xff", "short": b"x"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    for name, message in {
        "missing": "there is no file .*missing",
        "empty": "empty is empty",
        "blank": "blank is empty",
        "binary": r"binary is not UTF-8 text \(byte 2\)",
        "short": "short is too short",
        "folder": "folder holds 0 text files",
    }.items():
        with pytest.raises(UserError, match=message):
            load_task(config("text", tmp_path / name))


# Tasks


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match='there is no task "arithmetics"; did you mean "arithmetic"'):
        load_task(config("arithmetics"))


def test_settings_that_a_task_cannot_use_are_refused():
    for bad, message in [
        (config("prompt_completion"), "set task.path"),
        (config("arithmetic", path="somewhere", size=5), 'set task.path to ""'),
        (config("arithmetic", size=0), "task.size is 0"),
        (config("stdlib_code", size=-1), "task.size is -1"),
    ]:
        with pytest.raises(UserError, match=message):
            load_task(bad)


@pytest.mark.parametrize("kind", word_problems.GENERATORS)
def test_word_problems_are_worked_correctly(kind):
    draw = random.Random(0)
    for _ in range(500):
        question, answer = word_problems.GENERATORS[kind](draw)
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) (?:=|is) (\d+)", answer)
        assert 2 <= len(steps) <= 9
        for left, operator, right, result in steps:
            exact = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}[operator]
            assert exact(int(left), int(right)) == int(result)
            assert operator != "/" or int(left) % int(right) == 0
        assert answer.endswith(f"\n#### {steps[-1][3]}")
        assert int(steps[-1][3]) > 0
        assert question.endswith("?")


def test_arithmetic_never_shows_a_validation_problem_in_training_of_any_seed(monkeypatch):
    # Few enough problems that seeds meet the same ones.
    few = {"arithmetic": lambda draw: (f"{draw.randrange(3000)}?", "#### 1")}
    monkeypatch.setattr(word_problems, "GENERATORS", few)
    monkeypatch.setattr(word_problems, "VALIDATION_PROBLEMS", 60)
    tasks = [load_task(config("arithmetic", seed=seed, size=600)) for seed in (0, 1, 2)]
    train = {example.prompt for task in tasks for example in task.train}
    validation = {example.prompt for task in tasks for example in task.validation}
    assert len(tasks[0].train) == 600 and len({e.prompt for e in tasks[0].train}) == 600
    assert len(tasks[0].validation) == word_problems.VALIDATION_PROBLEMS
    assert not train & validation


@pytest.mark.slow
def test_arithmetic_is_a_function_of_its_seed_and_more_of_it_begins_the_same():
    first, again, longer, other = (
        load_task(config("arithmetic", seed=seed, size=size)) for seed, size in ((3, 50), (3, 50), (3, 80), (4, 50))
    )
    assert first == again
    assert longer.train[:50] == first.train and longer.validation == first.validation
    assert other.train != first.train


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", 7),
        ("#### 1,234,567", 1234567),
        ("#### $18.00.", 18),
        ("#### -5", -5),
        ("the answer is 12, not 11.", 11),
        ("5-3", 3),
        ("#### 8\n\nQuestion: 99\n#### 4", 8),
        ("#### .5", 0.5),
        ("7 came before\n#### nothing", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_final_number_of_a_text(text, number):
    assert final_number(text) == number


def test_exact_match_compares_values_and_other_tasks_have_no_metric():
    reference = " 600 * 2 = 1,200\n#### 1,200"
    predictions = ["#### 1200.0", "it is 1200", "#### 1201", ""]
    for prediction, score in zip(predictions, (1.0, 1.0, 0.0, 0.0), strict=True):
        assert quality(PAIRED, [prediction], [reference]).values() == {"exact_match": score}
    assert quality(PAIRED, predictions, [reference] * 4).values() == {"exact_match": 0.5}
    assert quality(LANGUAGE, ["#### 1200"], [reference]).values() == {}


def test_prompt_completion_files_are_split_by_prompt(tmp_path):
    records = [{"prompt": f"p{i % 50}", "completion": f"c{i}\u2028"} for i in range(100)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    task = load_task(config("prompt_completion", path))
    assert sorted(e.completion for e in task.train + task.validation) == sorted(r["completion"] for r in records)
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.validation}
    assert load_task(config("prompt_completion", path, size=7)).train == task.train[:7]


def test_gsm8k_reads_a_directory_or_a_file(tmp_path):
    def record(i):
        return {"question": f"What is {i}?", "answer": f"It is <<{i}={i}>>{i}.\n#### {i:,}"}

    write_jsonl(tmp_path / "train.jsonl", [record(i) for i in range(20)])
    write_jsonl(tmp_path / "test.jsonl", [record(i) for i in range(1000, 1005)])
    task = load_task(config("gsm8k", tmp_path, size=12))
    assert (len(task.train), len(task.validation), task.metric) == (12, 5, "exact_match")
    example = task.validation[2]
    assert example.prompt == "Question: What is 1002?\nAnswer:"
    assert example.completion == " It is <<1002=1002>>1002.\n#### 1,002"
    assert quality(task, ["#### 1002"], [example.completion]).values() == {"exact_match": 1.0}
    single = load_task(config("gsm8k", tmp_path / "train.jsonl"))
    assert len(single.train) + len(single.validation) == 20 and single.validation
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(UserError, match="there is no file .*test.jsonl"):
        load_task(config("gsm8k", tmp_path))
    (tmp_path / "test.jsonl").mkdir()
    with pytest.raises(UserError, match="test.jsonl cannot be read"):
        load_task(config("gsm8k", tmp_path))


def test_spec_bench_is_for_evaluation_and_keeps_categories(tmp_path, tokenizer):
    records = [{"question_id": i, "category": f"kind {i % 3}", "turns": [f"first {i}", "second"]} for i in range(6)]
    write_jsonl(tmp_path / "question.jsonl", records)
    task = load_task(config("spec_bench", tmp_path / "question.jsonl"))
    assert task == load_task(config("spec_bench", tmp_path))
    assert task.train == () and task.validation[4] == Example("first 4", "", "kind 1")
    prompts = evaluation_prompts(task, tokenizer, count=6, prompt_length=(1, 99), seed=0)
    assert [prompt.category for prompt in prompts] == ["kind 0", "kind 1", "kind 2"] * 2
    with pytest.raises(UserError, match='"spec_bench" is for evaluation only'):
        batches(task, tokenizer)


GOOD = {
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "gsm8k": {"question": "a", "answer": "#### 1"},
    "spec_bench": {"question_id": 1, "category": "c", "turns": ["a"]},
}


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("prompt_completion", '{"prompt": "a", ', "is not JSON"),
        ("prompt_completion", "[" * 100_000, "is not JSON"),
        ("prompt_completion", "[1]", "is not a JSON object"),
        ("prompt_completion", '{"prompt": 5, "completion": "b"}', '"prompt" is int, not text'),
        ("prompt_completion", '{"prompt": "", "completion": "b"}', '"prompt" is empty'),
        ("prompt_completion", '{"prompt": "\\ud800", "completion": "b"}', "surrogate"),
        ("gsm8k", '{"answer": "#### 1"}', 'lacks the field "question"'),
        ("gsm8k", '{"question": "a", "answer": "one"}', "does not end in"),
        ("gsm8k", '{"question": "a", "answer": "1 ####"}', "does not end in"),
        ("spec_bench", '{"category": "c", "turns": ["a"]}', 'lacks the field "question_id"'),
        ("spec_bench", '{"question_id": 1, "turns": ["a"]}', 'lacks the field "category"'),
        ("spec_bench", '{"question_id": 1, "category": "c", "turns": []}', 'lacks the field "turns"'),
        ("spec_bench", '{"question_id": 1, "category": "c", "turns": [1]}', '"turns" is int, not text'),
        ("spec_bench", '{"question_id": 1, "category": "c", "turns": [""]}', "turn 1 is empty"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, task, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(GOOD[task])}\n\n{line}\n")
    with pytest.raises(UserError, match=rf"data\.jsonl, line 3.*{re.escape(message)}"):
        load_task(config(task, path))


def test_a_file_with_one_example_cannot_be_split(tmp_path):
    write_jsonl(tmp_path / "one.jsonl", [GOOD["prompt_completion"]] * 3)
    with pytest.raises(UserError, match="cannot be split"):
        load_task(config("prompt_completion", tmp_path / "one.jsonl"))


# Batches


def epoch(task, tokenizer, rows, **changed):
    """The first `rows` rows of training, in order."""
    iterator = batches(task, tokenizer, batch_size=1, **changed)
    return [next(iterator) for _ in range(rows)]


def packed_stream(task, tokenizer):
    ids = []
    for example in task.train:
        ids += [*tokenizer.encode(example.completion), *tokenizer.eos_ids]
    return np.asarray(ids)


def test_packing_holds_every_token_of_every_document_once(tokenizer):
    stream = packed_stream(LANGUAGE, tokenizer)
    number = len(stream) // 32
    rows = epoch(LANGUAGE, tokenizer, number)
    outcome = sorted(tuple(row["tokens"][0].tolist()) for row in rows)
    assert outcome == sorted(tuple(row) for row in stream[: number * 32].reshape(number, 32).tolist())


def test_batches_have_the_promised_names_shapes_and_types(tokenizer):
    for task in (LANGUAGE, PAIRED):
        batch = next(batches(task, tokenizer))
        assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
            "tokens": ((4, 32), "int32"),
            "lengths": ((4,), "int32"),
            "loss_start": ((4,), "int32"),
            "prompt_lengths": ((4,), "int32"),
        }


def test_language_modelling_draws_prompt_lengths_by_row_over_the_whole_range(tokenizer):
    number = len(packed_stream(LANGUAGE, tokenizer)) // 32
    rows = epoch(LANGUAGE, tokenizer, 2 * number)
    drawn = {}
    for row in rows:
        assert row["lengths"] == 32 and row["loss_start"] == 1
        drawn.setdefault(row["tokens"].tobytes(), set()).add(int(row["prompt_lengths"][0]))
    assert {length for lengths in drawn.values() for length in lengths} == set(range(3, 10))
    assert all(len(lengths) == 1 for lengths in drawn.values())


def test_every_epoch_visits_every_row_in_a_new_order(tokenizer):
    rows = [row["tokens"].tobytes() for row in epoch(PAIRED, tokenizer, 90)]
    first, second, third = rows[:30], rows[30:60], rows[60:]
    assert sorted(first) == sorted(second) == sorted(third) and len(set(first)) == 30
    assert first != second != third != first


def test_a_row_of_prompt_and_completion_has_each_token_in_its_place(tokenizer):
    by_prompt = {tuple(tokenizer.encode(example.prompt)): example for example in PAIRED.train}
    for row in epoch(PAIRED, tokenizer, 30, sequence_length=48):
        tokens, length, start = row["tokens"][0], int(row["lengths"][0]), int(row["loss_start"][0])
        assert start == row["prompt_lengths"][0]
        example = by_prompt[tuple(tokens[:start].tolist())]
        assert tokens[start:length].tolist() == [*tokenizer.encode(example.completion), *tokenizer.eos_ids]
        assert (tokens[length:] == tokenizer.pad_id).all() and length < 48


def test_long_rows_are_cut_and_prompts_without_room_are_dropped_and_counted(tokenizer, monkeypatch):
    lines = []
    monkeypatch.setattr(absl_logging, "warning", lambda message, *values: lines.append(message % values))
    limit = len(tokenizer.encode("abcdefgh" * 3))
    examples = (Example("abcdefgh", "z" * 200), Example("abcdefgh" * 3, "z"), Example("abcdefgh" * 4, "z"))
    task = Task("long", examples, examples, None)
    rows = epoch(task, tokenizer, 3, sequence_length=limit)
    assert {int(row["lengths"][0]) for row in rows} == {limit}
    assert len({row["tokens"].tobytes() for row in rows}) == 1
    assert lines == [
        f"long: 2 of 3 examples dropped, their prompts have {limit} tokens or more",
        f"long: 1 of 1 completions cut to fit rows of {limit} tokens; raise sequence_length to keep them whole",
    ]
    epoch(task, tokenizer, 1, sequence_length=limit + 1)
    assert lines[2].startswith("long: 1 of 3") and lines[3].startswith("long: 2 of 2 completions cut")
    with pytest.raises(UserError, match='every prompt of task "long"'):
        batches(task, tokenizer, sequence_length=4)


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(tokenizer):
    for task in (LANGUAGE, PAIRED):
        first, again, other = (
            batches(task, tokenizer),
            batches(task, tokenizer),
            batches(task, tokenizer, seed=1),
        )
        differs = False
        for _ in range(20):
            batch = next(first)
            assert_same(batch, next(again))
            differs |= not np.array_equal(batch["tokens"], next(other)["tokens"])
        assert differs


@pytest.mark.parametrize("start_token", [None, 0])
def test_processes_make_their_own_rows_of_one_batch_and_resume_in_any_number(tokenizer, start_token):
    for task in (LANGUAGE, PAIRED):
        how = dict(batch_size=4, start_token=start_token)
        whole = batches(task, tokenizer, **how)
        halves = [batches(task, tokenizer, own_rows=own, **how) for own in ((0, 1), (2, 3))]
        for _ in range(7):
            batch, parts = next(whole), [next(half) for half in halves]
            for name, array in batch.items():
                assert all(part[name].dtype == np.int32 for part in parts)
                if array.ndim == 1:
                    np.testing.assert_array_equal([part[name] for part in parts], [array, array])
                else:
                    np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
        assert whole.get_state() == halves[0].get_state() == halves[1].get_state()
        alone = batches(task, tokenizer, **how)
        alone.set_state(halves[1].get_state())
        assert_same(next(alone), next(whole))


@pytest.mark.parametrize("steps", [0, 1, 5, 13, 40])
def test_a_restored_iterator_continues_exactly_where_the_state_was_taken(tokenizer, steps):
    for task in (LANGUAGE, PAIRED):
        original = batches(task, tokenizer)
        for _ in range(steps):
            next(original)
        state = json.loads(json.dumps(original.get_state()))
        restored = batches(task, tokenizer)
        next(restored)
        restored.set_state(state)
        for _ in range(15):
            assert_same(next(original), next(restored))


def test_validation_batches_come_from_validation_alone_and_cycle(tokenizer):
    settings = dict(batch_size=4, sequence_length=48)
    result = loss_batches(PAIRED, tokenizer, count=5, **settings)
    assert len(result) == 5
    rows = [tuple(row.tolist()) for batch in result for row in batch["tokens"]]
    expected = {tuple(tokenizer.encode(example.prompt)) for example in PAIRED.validation}
    starts = [int(start) for batch in result for start in batch["loss_start"]]
    assert {row[:start] for row, start in zip(rows, starts, strict=True)} == expected
    assert rows[:10] == rows[10:] and len(set(rows[:10])) == 10
    for left, right in zip(result, loss_batches(PAIRED, tokenizer, count=5, **settings), strict=True):
        assert_same(left, right)
    language = loss_batches(LANGUAGE, tokenizer, count=2, **settings)
    train = {row["tokens"].tobytes() for row in epoch(LANGUAGE, tokenizer, 300, sequence_length=48)}
    assert not any(row.tobytes() in train for batch in language for row in batch["tokens"])


def test_windows_begin_at_a_line_of_a_validation_file_and_more_begin_with_the_same(tokenizer):
    prompts = evaluation_prompts(LANGUAGE, tokenizer, count=60, prompt_length=(4, 12), seed=0)
    assert [prompt.index for prompt in prompts] == list(range(60))
    assert {len(prompt.tokens) for prompt in prompts} == set(range(4, 13))
    sources = ["\n" + example.completion for example in LANGUAGE.validation]
    for prompt in prompts:
        assert tokenizer.decode(prompt.tokens) == prompt.text and prompt.reference == prompt.category == ""
        assert any("\n" + prompt.text in source for source in sources)
        assert not prompt.text.startswith("\n")
    assert prompts[:20] == evaluation_prompts(LANGUAGE, tokenizer, count=20, prompt_length=(4, 12), seed=0)
    assert prompts[:20] != evaluation_prompts(LANGUAGE, tokenizer, count=20, prompt_length=(4, 12), seed=1)
    with pytest.raises(UserError, match="fewer than the 100000 asked for"):
        evaluation_prompts(LANGUAGE, tokenizer, count=100_000, prompt_length=(4, 12), seed=0)


def test_prompts_of_a_prompt_task_are_its_first_examples_or_an_error_that_names_the_long_one(tokenizer):
    prompts = evaluation_prompts(PAIRED, tokenizer, count=3, prompt_length=(1, 64), seed=0)
    for prompt, example in zip(prompts, PAIRED.validation, strict=False):
        assert prompt.tokens == tuple(tokenizer.encode(example.prompt)) and prompt.category == "sums"
        assert (prompt.text, prompt.reference) == (example.prompt, example.completion)
    length = max(len(prompt.tokens) for prompt in prompts)
    evaluation_prompts(PAIRED, tokenizer, count=3, prompt_length=(1, length), seed=0)
    with pytest.raises(UserError, match=rf'prompt 0 of task "pairs" .* more than the limit of {length - 1}'):
        evaluation_prompts(PAIRED, tokenizer, count=3, prompt_length=(1, length - 1), seed=0)
    with pytest.raises(UserError, match="has 10 prompts, fewer than the 11"):
        evaluation_prompts(PAIRED, tokenizer, count=11, prompt_length=(1, 64), seed=0)


def test_sizes_that_make_no_sense_are_refused(tokenizer):
    for changed, message in [
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(sequence_length=1), "sequence_length must be at least 2, got 1"),
        (dict(sequence_length=100_000), "not enough for one row of 100000"),
        (dict(prompt_length=(0, 4)), "1 <= min <= max, got 0 and 4"),
        (dict(prompt_length=(5, 4)), "1 <= min <= max, got 5 and 4"),
        (dict(prompt_length=(5, 32)), "leave nothing to continue in rows of 32"),
        (dict(seed=-1), "seed must lie in 0"),
    ]:
        with pytest.raises(UserError, match=message):
            batches(LANGUAGE, tokenizer, **changed)
    for changed, message in [
        (dict(count=0), "evaluation prompts must be at least 1, got 0"),
        (dict(seed=-1), "seed must lie in 0"),
    ]:
        with pytest.raises(UserError, match=message):
            evaluation_prompts(LANGUAGE, tokenizer, **{**dict(count=1, prompt_length=(1, 2), seed=0), **changed})
    with pytest.raises(UserError, match="validation batches must be at least 1, got 0"):
        loss_batches(LANGUAGE, tokenizer, count=0)


def test_tokenisation_in_chunks_keeps_every_text(tokenizer, monkeypatch):
    whole = loss_batches(LANGUAGE, tokenizer, count=9)
    monkeypatch.setattr("specjax.data.batches._CHARACTERS_AT_ONCE", 1000)
    chunked = loss_batches(LANGUAGE, tokenizer, count=9)
    for left, right in zip(whole, chunked, strict=True):
        assert_same(left, right)


def test_importing_the_data_room_leaves_heavy_libraries_alone():
    heavy = {"grain", "tokenizers", "tensorflow", "tensorflow_datasets", "nltk", "sacrebleu"}
    code = f"import sys, specjax.data.batches; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_batch_takes_less_than_two_milliseconds(tokenizer):
    # A thousand rows: grain's shuffle is slower the fewer there are (0.5 ms a row for 30 of them).
    task = Task("many", DOCUMENTS * 150, DOCUMENTS, None)
    iterator = batches(task, tokenizer, batch_size=16, sequence_length=256)
    next(iterator)
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        next(iterator)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 2e-3
