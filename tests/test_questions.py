"""A chat model's own questions: how its template opens a user's turn, what is kept, resumption, bad input."""

import json

import pytest
import tiny
from ml_collections import ConfigDict

from specjax import api, questions
from specjax.hub.tokenizer import Tokenizer, train_byte_bpe
from specjax.runtime import stopping
from specjax.runtime.errors import UserError

TEMPLATE = "<s>{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small model, with the chat template or, in `plain`, without."""
    home = tmp_path_factory.mktemp("chat")
    tokenizer = train_byte_bpe(["user: what is it?\nassistant: it is what it is\n" * 20], 280)
    decoder, params = tiny.decoder(3, layers=1, vocab_size=tokenizer.vocab_size)
    for name in ("chat", "plain"):
        api.save(api.Model(decoder, params, tokenizer), home / name)
    settings = json.loads((home / "chat/tokenizer_config.json").read_text())
    (home / "chat/tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return home


def config(target, **changes) -> ConfigDict:
    generation = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 24}
    section = {"binary": "questions", "target": str(target), "count": 96, "batch_size": 8, "seed": 0}
    section |= {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}, "param_dtype": "float32", "compute_dtype": "float32"}
    return ConfigDict(section | {"generation": generation | changes.pop("generation", {})} | changes)


def prompts(workdir) -> list[str]:
    lines = [(workdir / f"export/{name}.jsonl").read_text().splitlines() for name in ("train", "test")]
    assert all(lines)
    return [json.loads(line)["prompt"] for split in lines for line in split]


def written(workdir) -> list[str]:
    """The text of each question that was begun."""
    return [text for path in sorted((workdir / "parts").iterdir()) for text in json.loads(path.read_text())]


def test_the_opening_ends_where_the_users_text_begins(home):
    tokenizer = Tokenizer.load(home / "chat")
    assert tokenizer.user_opening() == tokenizer.encode("<s>user: ")


def test_a_template_that_changes_the_users_text_is_refused(home, tmp_path):
    settings = json.loads((home / "chat/tokenizer_config.json").read_text())
    api.save(api.load(home / "plain"), tmp_path)
    changed = {"chat_template": TEMPLATE.replace("message['content']", "message['content'] | upper")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | changed))
    with pytest.raises(UserError, match="does not write the user's text as it is"):
        questions.run(config(tmp_path), tmp_path / "run")


@pytest.mark.slow
def test_questions_that_ended_are_kept_once_each(home, tmp_path):
    record = questions.run(config(home / "chat"), tmp_path)
    (row,), texts = record["rows"], prompts(tmp_path)
    assert row["questions"] == len(texts) == len(set(texts)) and 2 <= len(texts) < row["begun"] == 96
    assert all(text == text.strip() != "" for text in texts)
    parts = written(tmp_path)
    assert len(parts) == 96 and set(parts) - {""} == set(texts)
    # With twice the tokens, those that had ended are the same, and some of the others end.
    questions.run(config(home / "chat", generation={"max_new_tokens": 48}), tmp_path / "longer")
    longer = written(tmp_path / "longer")
    assert all(short in ("", long) for short, long in zip(parts, longer, strict=True)) and longer != parts
    # The text of a question does not depend on the others of its batch.
    other = questions.run(config(home / "chat", batch_size=4), tmp_path / "other")
    assert other["rows"][0]["questions"] == len(texts) and set(prompts(tmp_path / "other")) == set(texts)


def test_a_stopped_run_reads_its_complete_parts(home, tmp_path, monkeypatch):
    whole = questions.run(config(home / "chat"), tmp_path / "whole")
    asked = iter([False, True])

    def stop_if_asked():
        if next(asked):
            raise stopping.Stopped

    with monkeypatch.context() as patch:
        patch.setattr(questions.stopping, "stop_if_asked", stop_if_asked)
        with pytest.raises(stopping.Stopped):
            questions.run(config(home / "chat"), tmp_path / "again")
    (part,) = (tmp_path / "again/parts").iterdir()
    before = part.stat().st_mtime_ns
    again = questions.run(config(home / "chat"), tmp_path / "again")
    assert part.stat().st_mtime_ns == before
    assert again["rows"] == whole["rows"] and prompts(tmp_path / "again") == prompts(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"count": 0}, "count is 0; begin at least one question"),
        ({"count": 2, "generation": {"max_new_tokens": 1}}, "of 2 questions ended within generation.max_new_tokens 1"),
    ],
)
def test_bad_settings_are_refused(home, tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        questions.run(config(home / "chat", **changes), tmp_path)


def test_a_model_without_a_template_is_refused(home, tmp_path):
    with pytest.raises(UserError, match="has no chat template"):
        questions.run(config(home / "plain"), tmp_path)
