"""Advice: what is recommended, from which numbers, and when it is to do without a draft."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from specjax import api, design
from specjax.draft_design import advice, profile
from specjax.draft_design.profile import Point
from specjax.draft_design.throughput import Parts
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.decoder import Decoder
from specjax.reporting import design_tables, metrics
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "draft_design" / "advise.py"
WORK = advice.Workload(((1, 2),), max_new_tokens=1000, batch_size=1, temperature=0.0, seed=0)
TASK = ConfigDict({"name": "text", "path": "a.txt"})


def candidate(step: float, acceptance, *, trained=True, name="a"):
    """Blocks of 10 ms plain, 11 and 12 ms of verification at gamma 1 and 2."""
    parts = {g: Parts(step, 9e-3, (10 + g) * 1e-3, 0.0, 1e-3) for g in (1, 2)}
    return advice.Candidate(name, Decoder(tiny.config()), acceptance, parts, trained)


def test_the_fastest_option_is_recommended_with_its_interval_and_break_even():
    half = advice.Acceptance((0.8, 0.6), (0.7, 0.4), (0.9, 0.8), 2.0)
    rows = candidate(1e-3, {0.0: half}).options(WORK)
    assert [row["gamma"] for row in rows] == [1, 2]
    # 2.4 tokens in 14 ms beat 1.8 in 12; of 1000 tokens the last block is cut short.
    assert rows[1]["tokens_per_second"] == pytest.approx(2.4 / 14e-3, rel=2e-3)
    advised = advice.recommend(rows)
    assert advised["pays"] and advised["gamma"] == 2
    assert advised["tokens_per_second_low"] == pytest.approx(2.1 / 14e-3, rel=2e-3)
    assert advised["tokens_per_second_high"] == pytest.approx(2.7 / 14e-3, rel=2e-3)
    assert advised["break_even_acceptance"] == pytest.approx((-1 + 2.6**0.5) / 2)
    said = advice.reasons(rows)
    assert said[0].startswith("1.71 times as fast") and "the low end of the acceptance wins" in said[0]
    assert "has to emit 1.40 tokens to break even and emits 2.40" in said[1]


def test_a_threshold_is_recommended_where_drafting_less_costs_less():
    always = advice.Acceptance((0.5, 0.3), (0.5, 0.3), (0.5, 0.3), 2.0)
    stops = advice.Acceptance((0.5, 0.28), (0.5, 0.28), (0.5, 0.28), 1.2)
    rows = candidate(3e-3, {0.0: always, 0.4: stops}).options(WORK)
    assert [(row["gamma"], row["threshold"]) for row in rows] == [(1, 0.0), (2, 0.0), (2, 0.4)]
    # 1.2 drafted tokens: 3.6 ms, and 11.2 ms of verification.
    assert rows[2]["tokens_per_second"] == pytest.approx(1.78 / 14.8e-3, rel=2e-3)
    assert advice.recommend(rows)["threshold"] == 0.4


def test_where_nothing_is_faster_than_plain_decoding_it_says_so():
    rows = candidate(9e-3, {0.0: advice.stated(0.1, 0.3, 2)}, trained=False).options(WORK)
    advised = advice.recommend(rows)
    assert not advised["pays"] and advised["gamma"] == 0
    assert advised["tokens_per_second"] == advised["plain_tokens_per_second"] == pytest.approx(100)
    said = advice.reasons(rows)
    assert "speculation does not pay here: the best candidate would be 0.60 times as fast" in said[0]
    assert "nobody has trained it yet" in said[3]


def test_the_command_trains_the_shape_or_decodes_with_the_draft():
    shape = candidate(1e-3, {0.0: advice.stated(0.5, 0.7, 2)}, trained=False, name="2x16")
    row = advice.recommend(shape.options(WORK))
    said = advice.command("DIR", TASK, row, shape)
    assert said.startswith("python -m specjax.main --config=configs/draft_design/train.py --workdir=runs/draft_2x16")
    assert "--config.model.layers=2 --config.model.width=16" in said and "--config.tokenizer.path=DIR" in said
    given = dict(part.split("=") for part in said.split() if part.startswith("--config."))
    train = configs.load(str(CONFIG.with_name("train.py")))
    for key in given:
        section = train
        for name in key.removeprefix("--config.").split("."):
            section = section[name]
    there = candidate(1e-3, {0.0: advice.stated(0.5, 0.7, 2)}, name="DRAFT")
    assert "--config.drafter.path=DRAFT --config.gamma=2" in advice.command("DIR", TASK, row, there)


def test_acceptance_is_measured_as_ratios_of_sums():
    counts = metrics.Counts(
        **{name: np.array(value) for name, value in {"emitted": [6, 3], "target_calls": [3, 2]}.items()},
        drafted=np.array([6, 2]),
        accepted=np.array([3, 1]),
        drafted_at=np.array([[3, 2], [2, 1]]),
        accepted_at=np.array([[2, 1], [1, 0]]),
        emitted_more_than=np.array([[2, 1], [1, 0]]),
    )
    found = advice.measured(counts, seed=0)
    assert found.ctar == pytest.approx((0.6, 0.2)) and found.drafted == 1.6
    assert found.low[0] <= 0.6 <= found.high[0]


@pytest.mark.slow
def test_what_advice_cannot_be_given_on_is_refused(tmp_path):
    config = configs.load(f"{CONFIG}:smoke")
    with pytest.raises(UserError, match="config.target is empty; give --config.target=DIR"):
        design.advise(config, tmp_path)
    tokenizer = train_byte_bpe(["def f(x):\n    return x\n" * 40], 270)
    model = Decoder(tiny.config(vocab_size=270))
    api.save(api.Model(model, tiny.decoder(vocab_size=270)[1], tokenizer), tmp_path / "target")
    config.target = str(tmp_path / "target")
    config.task.update({"name": "text", "path": str(tmp_path / "text.py")})
    (tmp_path / "text.py").write_text("".join(f"def f_{i}(x):\n    return x\n\n\n" for i in range(300)))
    config.acceptance = (0.7, 0.5)
    with pytest.raises(UserError, match=r"acceptance is a range within 0 .. 1, .* not \(0.7, 0.5\)"):
        design.advise(config, tmp_path)
    config.layers = ()
    with pytest.raises(UserError, match="nothing to choose from; name drafts, or layers of shapes"):
        design.advise(config, tmp_path)
    config.batch_size = 3
    with pytest.raises(UserError, match=r"batch_size must lie in 1 .. 2, the number of prompts, not 3"):
        design.advise(config, tmp_path)


@pytest.mark.slow
def test_the_shape_is_the_fastest_at_its_parameters_or_the_largest_within_its_milliseconds(tmp_path, monkeypatch):
    tokenizer = train_byte_bpe(["x = 1\n" * 30], 260)
    api.save(api.Model(*tiny.decoder(vocab_size=260), tokenizer), tmp_path / "target")
    timed = lambda cases, repeats: {case.key: Point(1e-3 * case.shape.layers, 0.0) for case in cases}
    monkeypatch.setattr(profile, "_timed", timed)
    config = configs.load(f"{CONFIG.with_name('build.py')}:smoke")
    with pytest.raises(UserError, match="config.target is empty"):
        design.build(config, tmp_path)
    config.target, config.layers, config.parameters = str(tmp_path / "target"), (2, 1), 12_000
    *found, train = design.build(config, tmp_path)
    assert [(row["layers"], row["chosen"]) for row in found] == [(2, False), (1, True)]
    assert all(abs(row["parameters"] / 12_000 - 1) < 0.03 for row in found)
    assert "--config.model.layers=1" in train["command"]
    config.parameters, config.milliseconds, config.sizes = 0, 2.5, (12_000, 16_000)
    config.layers = (1, 2, 3)
    *found, _ = design.build(config, tmp_path)
    assert [row["chosen"] for row in found].count(True) == 1
    (chosen,) = (row for row in found if row["chosen"])
    assert chosen["parameters"] == max(row["parameters"] for row in found if row["layers"] < 3)
    config.milliseconds = 0.5
    with pytest.raises(UserError, match="no shape takes at most 0.0005 s a step"):
        design.build(config, tmp_path)
    config.parameters = 12_000
    with pytest.raises(UserError, match="a budget is either parameters or milliseconds"):
        design.build(config, tmp_path)


def test_the_page_shows_candidates_advice_and_reasons():
    rows = candidate(1e-3, {0.0: advice.stated(0.5, 0.7, 2)}).options(WORK)
    rows = [*rows, advice.recommend(rows), *({"table": "reasons", "because": said} for said in advice.reasons(rows))]
    assert list(design_tables.by_table(rows)) == ["candidates", "advice", "reasons"]
