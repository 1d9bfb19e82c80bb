"""What a user adds in a file of their own, outside the package, works from a config and from Python."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from specjax import main
from specjax.data import tasks
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

TASK = '''
from specjax.data import quality
from specjax.data.tasks import Example, Task


def length(predictions, references):
    """The share of predictions that are shorter than their reference."""
    return quality.mean({"shorter": [len(p) < len(r) for p, r in zip(predictions, references, strict=True)]})


def spelling(config):
    """Words, and their letters one by one; `size` words to train on."""
    word = lambda number: "".join(chr(97 + number // 26**place % 26) for place in range(3))
    examples = [Example(word(number), "-".join(word(number)) * 20) for number in range(config.size + 20)]
    return Task("spelling", examples[20:], examples[:20], length)


FEW = Task("few", (), (Example("a", "b"),), "exact_match")
UNKNOWN_METRIC = Task("few", (), (Example("a", "b"),), "exact")
PAIRS = Task("few", (), (Example("a", "b"),))
vars(PAIRS)["validation"] = (("a", "b"),)  # past the type checker of the tests
NOTHING = 3
'''


@pytest.fixture
def task_file(tmp_path):
    path = tmp_path / "my_tasks.py"
    path.write_text(TASK)
    return path


def load_task(path, name, **keys):
    return tasks.load_task(ConfigDict({"name": f"{path}:{name}", "path": "", "size": 0, "seed": 0, **keys}))


def test_a_users_task_is_loaded_by_its_place(task_file):
    task = load_task(task_file, "spelling", size=30)
    assert (len(task.train), len(task.validation)) == (30, 20)
    assert tasks.quality(task, ["x", "x" * 99], ["ab", "a"]).values() == {"shorter": 0.5}
    few = load_task(task_file, "FEW")
    assert few.train == () and tasks.quality(few, ["7"], ["#### 7"]).values() == {"exact_match": 1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("speling", 'has no task "speling"; did you mean "spelling"'),
        ("NOTHING", "is int, not a specjax.data.tasks.Task"),
        ("PAIRS", "has an example of type tuple; make it an Example"),
        ("UNKNOWN_METRIC", 'has the metric "exact"; did you mean "exact_match"'),
    ],
)
def test_a_users_task_that_is_none_is_refused(task_file, name, message):
    with pytest.raises(UserError, match=message):
        load_task(task_file, name)


def test_a_users_task_trains_and_evaluates_a_model_from_a_config(task_file, tmp_path):
    config = configs.load(f"{ROOT}/configs/quickstart.py:smoke")
    config.stages = ("target", "evaluation")
    for section in (config.target, config.evaluation):
        section.task.update({"name": f"{task_file}:spelling", "size": 200})
    config.evaluation.drafters = {"ngram": config.evaluation.drafters.ngram}
    config.evaluation.compare = ()
    main.run(config, tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())["rows"]
    assert rows and all(set(row["quality"]) == {"shorter"} for row in rows)
