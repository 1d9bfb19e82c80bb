"""The Spec-Bench harness on a made-up file: turns, subtasks, counts, and what is refused."""

import json
import types

import pytest
import tiny
from absl import logging as absl_logging
from ml_collections import ConfigDict

from specjax import api, spec_bench
from specjax.data.spec_bench import Question, prompt_ids, read_questions
from specjax.hub.adapter import LoadedAttachment
from specjax.hub.tokenizer import train_byte_bpe
from specjax.reporting.records import read_results
from specjax.runtime.errors import InexactText, UserError

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["the cat sat", "and the dog"]},
    {"question_id": 2, "category": "coding", "turns": ["on the mat", "on the log, on the mat"]},
    {"question_id": "q", "category": "qa", "turns": ["the dog sat on the log and the cat"]},
    {"question_id": 4, "category": "qa", "turns": ["the"]},
]


def written(folder, questions):
    path = folder / "question.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a target, an adapter of it, and a file of questions."""
    home = tmp_path_factory.mktemp("spec_bench")
    tokenizer = train_byte_bpe(["the cat sat on the mat and the dog sat on the log\n" * 40], 270)
    decoder, params = tiny.decoder(1, sharpness=2.0, vocab_size=tokenizer.vocab_size)
    api.save(api.Model(decoder, params, tokenizer), home / "target")
    target = api.load(home / "target")
    adapter, params = tiny.adapter(target.decoder)
    api.save_adapter(home / "adapter", LoadedAttachment(adapter, params, target.fingerprint))
    written(home, QUESTIONS)
    return home


def config_of(home, **changes):
    config = {
        "binary": "spec_bench",
        "seed": 0,
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        "task": {"name": "spec_bench", "path": str(home / "question.jsonl"), "seed": 0, "size": 0},
        "target": str(home / "target"),
        "param_dtype": "float32",
        "compute_dtype": "auto",
        "selection": {"per_category": 0, "chat": False},
        "max_new_tokens": 6,
        "batch_sizes": (1,),
        "temperatures": (0.0,),
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "stop": (),
        "drafters": {
            "kangaroo": {
                "kind": "kangaroo",
                "path": str(home / "adapter"),
                "threshold": 0.3,
                "adjusted": False,
                "rules": {"lossless": (2,)},
            }
        },
        "leniences": (),
    }
    return ConfigDict({**config, **changes})


@pytest.mark.slow
def test_every_subtask_and_all_questions_have_a_row_and_a_second_turn_reads_the_first_answer(
    home, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        spec_bench.spec_bench,
        "prompt_ids",
        lambda tokenizer, turns, answers, **how: (
            seen.append((turns, answers)) or prompt_ids(tokenizer, turns, answers, **how)
        ),
    )
    rows = spec_bench.run(config_of(home), tmp_path)["rows"]
    assert [(row["subtask"], row["drafter"]) for row in rows] == [
        (subtask, drafter) for subtask in ("mt_bench", "qa", "overall") for drafter in ("none", "kangaroo")
    ]
    by = {(row["subtask"], row["drafter"]): row for row in rows}
    assert [(by[s, "none"]["questions"], by[s, "none"]["prompts"]) for s in ("mt_bench", "qa", "overall")] == [
        (2, 4),
        (2, 2),
        (4, 6),
    ]
    for row in rows:
        assert row["block_efficiency"] == pytest.approx(1 + sum(row["ctar"]), abs=1e-12)
        assert row["emitted_tokens"] == by[row["subtask"], "none"]["emitted_tokens"], "like for like"
        assert row["iterations"] == row["target_calls"]
        assert row["target_layers_per_token"] == row["target_layers_per_token_once"], "one row, no end inside a block"
    for key in ("emitted_tokens", "target_calls", "drafted_tokens", "accepted_tokens"):
        assert by["overall", "kangaroo"][key] == by["mt_bench", "kangaroo"][key] + by["qa", "kangaroo"][key] > 0
    assert by["overall", "none"]["identical_to_baseline"] is None
    assert by["overall", "kangaroo"]["identical_to_baseline"] == {"equal": 6, "of": 6, "differences": []}
    # The second turn reads what plain decoding answered to the first.
    target = api.load(home / "target")
    plain = api.generate(target, ["the cat sat"], temperature=0.0, max_new_tokens=6)
    assert (("the cat sat", "and the dog"), plain.texts) in seen
    assert (tmp_path / "report.html").stat().st_size > 0 and (tmp_path / "figures" / "spec_bench.png").exists()


def test_a_prompt_holds_the_turns_before_it_with_their_answers():
    tokenizer = train_byte_bpe(["the cat sat on the mat\n" * 20], 265)
    asked = ("the cat", "the mat")
    assert tokenizer.decode(prompt_ids(tokenizer, asked, [], chat=False)) == "the cat"
    assert tokenizer.decode(prompt_ids(tokenizer, asked, [" sat on"], chat=False)) == "the cat\n\n sat on\n\nthe mat"
    with pytest.raises(UserError, match="no chat template"):
        prompt_ids(tokenizer, asked, [], chat=True)


def test_questions_are_read_from_the_file_or_its_folder(home):
    questions = read_questions(home)
    assert questions == read_questions(home / "question.jsonl")
    assert questions[0] == Question(1, "writing", ("the cat sat", "and the dog"))
    assert [question.subtask for question in questions] == ["mt_bench", "mt_bench", "qa", "qa"]


def test_a_question_of_mt_bench_may_have_one_turn_and_is_counted(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(absl_logging, "warning", lambda message, *values: logged.append(message % values))
    questions = read_questions(written(tmp_path, [{**QUESTIONS[0], "turns": ["only one"]}, *QUESTIONS[1:]]))
    assert [len(question.turns) for question in questions] == [1, 2, 1, 1]
    assert [line.split(": ")[1] for line in logged] == [
        "1 questions of MT-bench's categories have one turn instead of two"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": ["one", " "]}, "line 1: turn 2 is empty"),
        ({"turns": []}, 'line 1 lacks the field "turns", a list of texts'),
        ({"turns": ["one", 2]}, 'line 1: the field "turns" is int, not text'),
    ],
)
def test_a_question_whose_turns_hold_no_text_is_named(tmp_path, changes, message):
    path = written(tmp_path, [{**QUESTIONS[0], **changes}, *QUESTIONS[1:]])
    with pytest.raises(UserError, match=message):
        read_questions(path)


def test_a_true_difference_ends_the_run_with_an_error_after_its_records_are_written(home, tmp_path, monkeypatch):
    difference = {"prompt": "1", "position": 0, "top2_gap": 1.0, "tie_bound": 1e-3, "tie": False}
    identical = {"equal": 5, "of": 6, "differences": [difference]}
    row = {"drafter": "mine", "rule": "lossless", "gamma": 2, "temperature": 0.0, "subtask": "overall"}
    monkeypatch.setattr(spec_bench, "load_job", lambda config: types.SimpleNamespace(batches_folder=lambda _: tmp_path))
    monkeypatch.setattr(spec_bench, "make_cases", lambda job, setting: [])
    monkeypatch.setattr(spec_bench, "_answers", lambda *arguments: None)
    monkeypatch.setattr(spec_bench, "_rows", lambda *arguments: [row | {"identical_to_baseline": identical}])
    monkeypatch.setattr(spec_bench.tables, "summary_table", lambda rows: "")
    monkeypatch.setattr(spec_bench.spec_bench_page, "write", lambda *arguments: None)
    with pytest.raises(InexactText, match=r"1 of 6 texts of mine \(rule lossless, gamma 2, temperature 0\) differ"):
        spec_bench.run(config_of(home), tmp_path)
    assert read_results(tmp_path / "results.json")["rows"][0]["identical_to_baseline"] == identical


def test_what_cannot_be_run_is_refused(home, tmp_path):
    with pytest.raises(UserError, match=r"set batch_sizes to \(1,\)"):
        spec_bench.run(config_of(home, batch_sizes=(1, 4)), tmp_path)
    with pytest.raises(UserError, match="selection.per_category is -1"):
        spec_bench.run(config_of(home, selection={"per_category": -1, "chat": False}), tmp_path)
    with pytest.raises(UserError, match="question 1, turn 1: .* exceed the model's 512 positions"):
        spec_bench.run(config_of(home, max_new_tokens=600), tmp_path)
