"""README and pages agree with the records and with the repository: tables, numbers, links, commands."""

import functools
import json
import re
from pathlib import Path

import pytest

from configs.records import sync
from specjax.hub import load as hub_load
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RECORDS = ROOT / "configs" / "records"
PAGES = (README, *sorted((ROOT / "configs").glob("*/README.md")))

ENVIRONMENT = {"jax": "0.1", "python": "3.12", "device_kind": "cpu", "git_commit": "0123456789abcdef"}
RESULT = {
    "drafter": "distilled",
    "rule": "lossless",
    "temperature": 1.0,
    "gamma": 4,
    "block_efficiency": 2.5,
    "acceptance_rate": 0.5,
    "tokens_per_second": 100.0,
    "speedup": 1.5,
    "predicted_speedup": 1.5,
    "identical_to_baseline": None,
}
COMPARED = {
    "drafter": "distilled",
    "against": "control",
    "rule": "lossless",
    "temperature": 1.0,
    "gamma": 4,
    "block_efficiency_ratio": 1.2,
    "block_efficiency_ratio_ci": [1.1, 1.3],
}


def study_rows(recipe, seed, value):
    """What a training stage and the evaluation of its draft leave in a results.json."""
    name = f"{recipe}_{seed}"
    trained = {"stage": name, "steps": 120, "train_seconds": 60.0}
    settings = {"temperature": 1.0, "gamma": 4, "block_efficiency": value}
    return [trained, {"stage": "evaluation", "drafter": name, **settings}]


MADE_UP = {
    "quickstart": {
        "rows": [{"stage": "target", "loss": 2.0}, RESULT],
        "comparisons": [COMPARED],
        "environment": ENVIRONMENT,
    },
    "study": {
        "rows": [
            *(row for seed in (0, 1) for row in study_rows("distilled", seed, 2.4 + 0.2 * seed)),
            *(row for seed in (0, 1) for row in study_rows("control_clock", seed, 2.0)),
            {"stage": "evaluation", "drafter": "none", "temperature": 1.0, "gamma": 0, "block_efficiency": 1.0},
        ]
    },
    "benchmark": {
        "rows": [
            {"benchmark": "plain_decoding", "width": 64, "gigabytes": 3.5, "all": [1, 2]},
            {"benchmark": "context", "context": 128, "milliseconds": 7.25},
        ]
    },
    "peers": {
        "prompts": 2,
        "prompt_tokens": 32,
        "max_new_tokens": 16,
        "cpus": 2,
        "trained": True,
        "rows": [{"system": "transformers plain", "setting": {"threads": 1}, "tokens_per_second": 123.0}],
    },
    "peers_distillation": {
        "pairs": {"small": [[4, 256], [1, 128]]},
        "vocabulary": 512,
        "prompt_tokens": 8,
        "new_tokens": 16,
        "cpus": 2,
        "rows": [
            {
                "pair": "small",
                "batch_size": 2,
                "system": "specjax",
                "setting": {},
                "tokens_per_second": 2000.0,
                "step_seconds": 0.25,
                "generation_seconds": 0.1,
                "ratio": 4.0,
            }
        ],
    },
}


def written(directory, **records):
    directory.mkdir(exist_ok=True)
    for name, record in records.items():
        (directory / f"{name}.json").write_text(json.dumps(record))
    return directory


def all_pages():
    return "".join(page.read_text(encoding="utf-8") for page in PAGES)


def body(text, name):
    return text.split(f"<!-- table:{name} -->")[1].split("<!-- /table -->")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_page_is_what_the_records_give(page):
    text = page.read_text(encoding="utf-8")
    assert sync.synced(text, RECORDS) == text, "run `make tables`"


def test_the_pages_have_one_place_for_every_table_and_none_for_another():
    text = all_pages()
    assert sorted(re.findall("<!-- table:(.*) -->", text)) == sorted([*sync.TABLES, *sync.CLAIMS, *sync.GENERATED])


def test_each_record_fills_its_table_and_a_changed_number_is_drift(tmp_path):
    text = all_pages()
    filled = sync.synced(text, written(tmp_path / "records", **MADE_UP))
    assert sync.synced(filled, tmp_path / "records") == filled
    assert "| distilled | 1 | 4 | 2.50 |" in body(filled, "quickstart")
    assert "1.200 [1.100, 1.300]" in body(filled, "quickstart")
    assert "commit 0123456789ab\n" in body(filled, "quickstart")
    assert "2.400 2.600 | +25.0% (+20.0 to +30.0) |" in body(filled, "study")
    assert "plain decoding\n\n| width | gigabytes |" in body(filled, "benchmark")
    assert "| 64 | 3.5 |" in body(filled, "benchmark") and "| 128 | 7.25 |" in body(filled, "benchmark")
    assert "| transformers plain | threads 1 | 123 |" in body(filled, "peers")
    assert "| small | 2 | specjax | – | 2000 | 0.25 | 0.1 | 4 |" in body(filled, "peers_distillation")
    changed = {"rows": [{**MADE_UP["peers"]["rows"][0], "tokens_per_second": 124.0}]}
    written(tmp_path / "records", peers={**MADE_UP["peers"], **changed})
    assert sync.synced(filled, tmp_path / "records") != filled


def test_a_record_that_is_not_there_leaves_its_table_alone(tmp_path):
    text = (ROOT / "configs/benchmark/README.md").read_text(encoding="utf-8")
    filled = sync.synced(text, written(tmp_path, **MADE_UP))
    (tmp_path / "peers.json").unlink()
    assert sync.synced(filled, tmp_path) == filled
    assert sync.synced(text, tmp_path / "nowhere") == text


def test_a_bad_record_is_named(tmp_path, capsys):
    text = "<!-- table:peers -->\n<!-- /table -->\n"
    with pytest.raises(UserError, match="peers.json lacks 'cpus', which its table shows"):
        record = {key: value for key, value in MADE_UP["peers"].items() if key != "cpus"}
        sync.synced(text, written(tmp_path, peers=record))
    (tmp_path / "peers.json").write_text("{")
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert sync.main([str(readme), str(tmp_path)]) == 2
    assert "peers.json is damaged" in capsys.readouterr().err
    assert sync.main([str(readme)]) == 2
    assert sync.main([str(tmp_path / "nowhere.md"), str(tmp_path)]) == 2
    assert "nowhere.md cannot be rewritten" in capsys.readouterr().err


def test_the_command_writes_the_file(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table:peers -->\n<!-- /table -->\nafter\n")
    assert sync.main([str(readme), str(written(tmp_path / "records", peers=MADE_UP["peers"]))]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "transformers plain" in text


def test_the_readme_is_short_and_says_how_to_install_near_the_top():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    assert len(text.encode()) <= 16 * 1024
    assert text[: text.index("make quickstart")].count("\n") < 60


def test_the_readmes_one_number_is_that_of_the_record():
    rows = json.loads((RECORDS / "quickstart.json").read_text())["rows"]
    wanted = {"drafter": "distilled", "rule": "lossless", "temperature": 1.0, "gamma": 3}
    (row,) = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    sentence = re.search(
        r"\*\*(\S+) times\*\*[^(]*\(95%\s+interval (\S+) to (\S+)\)", README.read_text(encoding="utf-8")
    )
    assert sentence.groups() == tuple(f"{value:.2f}" for value in (row["speedup"], *row["speedup_ci"]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_what_a_page_names_exists(page):
    """Links, paths of the repository in backquotes, the config of every command, and every make target."""
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]*)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    folders = "specjax|configs|tests|launch|colabs"
    paths = re.findall(rf"`((?:{folders})/[\w./-]*?)(?::[\w-]+)?`", text) + re.findall(r"--config=([\w./]+\.py)", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= set(targets)


def test_every_override_in_the_readme_is_a_key_of_its_config():
    for line in README.read_text(encoding="utf-8").splitlines():
        for name, rest in re.findall(r"`--config=(configs/\S+?)[ `](.*?)`", line):
            config = configs.load(str(ROOT / name))
            for key in re.findall(r"--config\.([\w.]+)=", rest):
                functools.reduce(lambda section, part: section[part], key.split("."), config)  # raises KeyError


def test_every_family_is_listed_under_its_model_type():
    listed = {
        name
        for line in README.read_text().splitlines()
        if line.startswith("| `")
        for name in re.findall("`([a-z0-9_]+)`", line.split("|")[1])
    }
    assert set(hub_load.FAMILIES) <= listed
