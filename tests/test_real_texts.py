"""The table and the claim of the study of texts on a real target, from a made-up record."""

import json

import pytest

from configs.distillspec import texts
from configs.records import condense
from specjax.reporting import records

EFFICIENCY = {"ground_truth": 1.5, "target": 1.8, "draft": 1.5}
ENVIRONMENT = {"jax": "0", "python": "3", "device_kind": "cpu", "git_commit": "0123456789abcdef"}


def scored(draft, efficiency):
    about = {"table": "acceptance", "draft": f"stage:{draft}", "texts": 9, "tokens": 900, "temperature": 1.0}
    return [
        about | {"rule": "lossless", "gamma": gamma, "block_efficiency": efficiency + gamma - 4} for gamma in (2, 4)
    ]


@pytest.fixture(scope="module")
def record():
    rows = scored("start_small", 1.2)
    for text, efficiency in EFFICIENCY.items():
        for seed in range(3):
            stage = f"small_{text}_reverse_kl_{seed}"
            rows += [{"stage": stage, "train_seconds": 10.0}, *scored(stage, efficiency + seed * 0.15)]
    return {"rows": rows, "environment": ENVIRONMENT}


def test_an_arm_is_read_from_the_name_of_its_stage():
    assert texts.arm_of("small_ground_truth_reverse_kl_2") == (texts.Arm("small", "ground_truth", "reverse_kl"), 2)
    assert texts.arm_of("start_small") is texts.arm_of("text") is None


def test_gains_over_fixed_text_are_paired_by_seed(record):
    gains = texts.gains_over_fixed(record, "reverse_kl")
    assert list(gains) == ["target, small, T 1", "draft, small, T 1"]
    expected = sum(100 * 0.3 / (1.5 + 0.15 * seed) for seed in range(3)) / 3
    assert gains["target, small, T 1"].value == pytest.approx(expected)
    assert gains["draft, small, T 1"].edges == (0, 0)
    assert texts.gains_over_fixed(record) == {}  # the arms of this record minimise another divergence


def test_the_table_has_every_arm_with_its_gain_over_the_start(record):
    table = texts.compared(record)
    row = next(line for line in table.splitlines() if line.startswith("| small | draft |"))
    assert "| 1.650 [" in row and "| +37.5% [" in row and "| +0.0% |" in row
    assert "900 tokens of 9 texts at T 1; 3 seeds" in table


def test_without_fixed_text_gains_are_over_the_stored_text_and_over_the_draft_that_all_continue():
    rows = scored("eagle3", 1.4)
    for text, efficiency in {"target": 1.5, "assisted": 1.65, "longer": 1.6}.items():
        stage = f"eagle3_{text}_forward_kl_0"
        rows += [{"stage": stage, "train_seconds": 10.0}, *scored(stage, efficiency)]
    lines = texts.compared({"rows": rows, "environment": ENVIRONMENT}).splitlines()
    assert "over the stored text" in lines[0]
    (assisted,) = [line for line in lines if "| assisted |" in line]
    assert "| +17.9% (1 seed) | +10.0% (1 seed) |" in assisted


def test_a_record_names_the_exports_of_its_run_by_stage(tmp_path):
    stage, other = tmp_path / "small_draft_reverse_kl_0", "/elsewhere/start_small/export"
    rows = [{"table": "acceptance", "draft": path, "gamma": 4} for path in (f"{stage}/export", other)]
    stage.mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"seed": 0, "stages": [stage.name], stage.name: {"seed": 0}}))
    records.write_results(stage / "results.json", binary="design", config={}, environment=ENVIRONMENT, rows=rows)
    assert [row["draft"] for row in condense.condensed([tmp_path])["rows"]] == [f"stage:{stage.name}", other]
