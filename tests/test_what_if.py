"""The throughput model on typed numbers: its tables against values worked by hand, and what it refuses."""

from pathlib import Path

import pytest

from specjax.draft_design import what_if
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "draft_design" / "what_if.py"


def asked(**changes):
    config = configs.load(str(CONFIG))
    config.update({"drafts": ("a:0.5:1", "b:0.5:4"), "target_milliseconds": (10.0, 11.0), "longest": 3})
    config.update(changes)
    return config


def test_every_draft_has_its_best_gamma_and_its_break_even_point(tmp_path):
    rows = what_if.run(asked(), tmp_path)
    first, second = (row for row in rows if row["table"] == "best")
    # 1.75 tokens in 2 + 12 ms beat 1.5 in 12 and 1.875 in 16; of the other draft 1.5 in 15 are level with plain.
    assert (first["gamma"], first["tokens_per_second"]) == (2, pytest.approx(125.0))
    assert first["speedup"] == pytest.approx(1.25) and first["level_with_the_best_at_milliseconds"] == pytest.approx(
        1.0
    )
    assert first["break_even_acceptance"] == pytest.approx((-1 + (1 + 4 * 0.4) ** 0.5) / 2)
    assert second["draft"] == "b" and second["gamma"] in (0, 1) and second["speedup"] == pytest.approx(1.0)
    assert len([row for row in rows if row["table"] == "by_gamma"]) == 6


def test_a_slower_draft_has_the_speed_that_it_would_need(tmp_path):
    rows = what_if.run(asked(drafts=("a:0.5:1", "b:0.8:4")), tmp_path)
    best = {row["draft"]: row for row in rows if row["table"] == "best"}
    winner, other = sorted(best.values(), key=lambda row: -row["tokens_per_second"])
    level = other["level_with_the_best_at_milliseconds"]
    at = {"a": 0.5, "b": 0.8}
    again = what_if.run(asked(drafts=(f"x:{at[other['draft']]}:{level}",)), tmp_path)
    same = next(row for row in again if row["table"] == "by_gamma" and row["gamma"] == other["gamma"])
    assert same["tokens_per_second"] == pytest.approx(winner["tokens_per_second"])


def test_layers_that_the_target_shares_are_paid_once(tmp_path):
    rows = what_if.run(asked(drafts=("a:0.5:1",), shared_milliseconds=2.0), tmp_path)
    block = {row["gamma"]: row["block_milliseconds"] for row in rows if row["table"] == "by_gamma"}
    # 2 ms on each of gamma + 1 tokens, 1 ms a drafted one, and what is left of the target's call.
    assert block[2] == pytest.approx(3 * 2 + 2 * 1 + (12 - 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drafts": ()}, "drafts is empty; give --config.drafts=name:acceptance:milliseconds, one or more"),
        ({"drafts": ("a:1.5:1",)}, 'drafts has "a:1.5:1"; write name:acceptance:milliseconds'),
        ({"drafts": ("a:fast",)}, 'drafts has "a:fast"; write name:acceptance:milliseconds'),
        ({"target_milliseconds": (0.0,)}, "target_milliseconds are \\(0.0,\\); set positive milliseconds"),
        ({"longest": 0}, "longest is 0; set the largest gamma"),
    ],
)
def test_numbers_that_say_nothing_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        what_if.run(asked(**changes), tmp_path)
