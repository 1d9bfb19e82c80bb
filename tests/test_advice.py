"""Advice: what is recommended, from which numbers, and when it is to do without a draft."""

import ast
import dataclasses
import functools
import shlex
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from configs.draft_design import budget
from configs.draft_design import profiling as profile
from configs.draft_design.profiling import Point
from specjax import api, design, distill
from specjax.draft_design import advice
from specjax.evaluation import throughput
from specjax.evaluation.expert_use import ExpertUse
from specjax.evaluation.throughput import PartSeconds
from specjax.hub import adapter as hub_adapter
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.decoder import Decoder
from specjax.reporting import metrics, row_tables
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WORK = advice.Workload(((1, 2),), max_new_tokens=1000, batch_sizes=(1,), temperature=0.0, seed=0)
TASK = ConfigDict({"name": "text", "path": "a.txt"})
OPT = dataclasses.replace(
    tiny.config(), family="opt", rotary=None, learned_positions=64, position_offset=2, norm="layer", gated_mlp=False
)


def candidate(step: float, acceptance, *, trained=True, name="a", sizes=(1,)):
    """Blocks of 10 ms plain, 11 and 12 ms of verification at gamma 1 and 2."""
    parts = {(size, g): PartSeconds(step, 9e-3, (10 + g) * 1e-3, 0.0, 1e-3) for size in sizes for g in (1, 2)}
    return advice.Candidate(name, Decoder(tiny.config()), acceptance, parts, trained)


def test_a_sparse_targets_untimed_gammas_cost_what_their_experts_say():
    """Plain steps of 10 ms use 8 of 64 experts, blocks of gamma 8 use 44.8 and take 30 ms: each expert is 0.54 ms."""
    use = ExpertUse(((8 / 64,) * 64,))
    parts = {(1, 8): PartSeconds(1e-3, 9e-3, 30e-3, 0.0, 1e-3)}
    half = {0.0: advice.Acceptance(throughput.iid(0.7, 8), throughput.iid(0.6, 8), throughput.iid(0.8, 8), 8.0)}
    dense = advice.Candidate("a", Decoder(tiny.config()), half, parts, True)
    rows = dataclasses.replace(dense, use=use).options(WORK)
    assert [row["gamma"] for row in rows] == list(range(1, 9))
    touched = [64 * (1 - (7 / 8) ** tokens) for tokens in range(2, 10)]
    np.testing.assert_allclose([row["experts_in_a_block"] for row in rows], touched)
    expected = [10 + 20 * (count - 8) / (touched[-1] - 8) for count in touched]
    np.testing.assert_allclose([row["verify_milliseconds"] for row in rows], expected)
    # The curve is steep at first, so a line through the same two timings would recommend another gamma.
    line = dict(enumerate(np.linspace(10e-3, 30e-3, 9)))
    assert advice.recommend(rows)["gamma"] != throughput.best_gamma(
        throughput.iid(0.7, 8), throughput.Costs(1e-3, tuple(line.values()))
    )
    assert [row["gamma"] for row in dense.options(WORK)] == [8]


def test_a_gamma_at_which_the_acceptance_was_measured_is_judged_by_that():
    """N-gram lookup's, which is higher in short blocks: 1.9 tokens in 12 ms beat 2.1 in 14."""
    longest = advice.Acceptance((0.6, 0.5), (0.6, 0.5), (0.6, 0.5), 2.0)
    shorter = advice.Acceptance((0.9,), (0.9,), (0.9,), 1.0)
    of = candidate(1e-3, {0.0: longest})
    assert advice.recommend(of.options(WORK))["gamma"] == 2
    rows = dataclasses.replace(of, at={1: shorter}).options(WORK)
    assert [row["block_efficiency"] for row in rows] == pytest.approx([1.9, 2.1])
    assert rows[1] == of.options(WORK)[1]
    assert advice.recommend(rows)["gamma"] == 1


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
    reasons = advice.reasons(rows)
    assert reasons[0].startswith("expect 1.71 times the speed") and "faster even at the low end" in reasons[0]
    assert "must emit 1.40 tokens to break even and emits 2.40" in reasons[1]


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
    reasons = advice.reasons(rows)
    assert "speculation does not pay here: the best draft gives 0.60 times the plain speed" in reasons[0]
    assert "the draft is not trained yet" in reasons[3]


def train_config(command):
    """configs/draft_design/train.py with what a printed command sets."""
    program, *arguments = shlex.split(command)[3:]
    assert program == "--config=configs/draft_design/train.py"
    config = configs.load(str(CONFIGS / "draft_design" / "train.py"))
    for key, value in (
        each.removeprefix("--config.").split("=", 1) for each in arguments if each.startswith("--config.")
    ):
        *names, last = key.split(".")
        section = functools.reduce(lambda section, name: section[name], names, config)
        section[last] = value if isinstance(section[last], str) else ast.literal_eval(value)
    return config


@pytest.mark.parametrize("target", [tiny.config(tied_head=False, rope_theta=5e5), OPT], ids=str)
def test_the_command_trains_the_very_shape_that_was_timed(target):
    target = dataclasses.replace(target, vocab_size=300, max_positions=64)
    ((shape, params),) = advice.untrained(target, (1,), 0.8, advice.stated(0.5, 0.7, 2), 0)
    config = train_config(advice.command("a dir", TASK, {}, shape))
    assert distill.random_model(config.model, 300, 0) == shape.decoder
    assert (config.target, config.tokenizer.path, config.task.path) == ("a dir", "a dir", "a.txt")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == shape.decoder.num_params


def test_the_command_of_a_draft_that_there_is_decodes_with_it_as_it_was_advised():
    there = candidate(1e-3, {0.0: advice.stated(0.5, 0.7, 2)}, name="DRAFT")
    message = advice.command("DIR", TASK, advice.recommend(there.options(WORK)), there)
    assert "--config.drafter.path=DRAFT --config.gamma=2" in message and "--config.temperature=0.0" in message
    assert shlex.split(message)[-1] == "--config.prompt=def main("


def test_acceptance_is_measured_as_ratios_of_sums():
    counts = metrics.Counts(
        **{name: np.array(value) for name, value in {"emitted": [6, 3], "target_calls": [3, 2]}.items()},
        drafted=np.array([6, 2]),
        accepted=np.array([3, 1]),
        drafted_at=np.array([[3, 2], [2, 1]]),
        accepted_at=np.array([[2, 1], [1, 0]]),
        emitted_more_than=np.array([[2, 1], [1, 0]]),
    )
    result = advice.measured(counts, seed=0)
    assert result.ctar == pytest.approx((0.6, 0.2)) and result.drafted == 1.6
    assert result.low[0] <= 0.6 <= result.high[0]
    assert result.tokens == (6, 3) and result.texts.shape == (2, 2)


def test_rows_that_are_unlike_slow_a_batch_down():
    even = advice.Acceptance((0.5, 0.25), (0.4, 0.16), (0.6, 0.36), 2.0, np.array([[0.5, 0.25]] * 2), (40, 40))
    unlike = dataclasses.replace(even, texts=np.array([[0.9, 0.45], [0.1, 0.05]]))
    pair = dataclasses.replace(WORK, batch_sizes=(1, 2))
    rows = {key: candidate(1e-3, {0.0: each}, sizes=(1, 2)).options(pair) for key, each in (("e", even), ("u", unlike))}
    speeds = {key: [row["tokens_per_second"] for row in value] for key, value in rows.items()}
    assert [row["batch_size"] for row in rows["e"]] == [1, 1, 2, 2]
    # One after the other, only the sum of their blocks counts; together, those of the slower one.
    expected = [80 / (throughput.expected_rounds([ctar[:2]], [40]) * 14e-3) for ctar in ((0.9, 0.45), (0.1, 0.05))]
    assert speeds["u"][1] == pytest.approx(1 / sum(1 / speed for speed in expected))
    assert speeds["u"][3] == pytest.approx(expected[1], rel=0.02) and speeds["u"][3] < 0.8 * speeds["e"][3]


def test_each_batch_size_gets_its_verdict_which_a_check_judges():
    lines = [
        {"draft": "", "gamma": 0, "measured": 100.0},
        {"draft": "a", "gamma": 1, "measured": 99.0},
        {"draft": "a", "gamma": 2, "measured": 106.0},
    ]
    rows = candidate(1e-3, {0.0: advice.stated(0.1, 0.2, 2)}).options(WORK)
    plain = advice._verdict(advice.recommend(rows), lines)
    assert (plain["batch_size"], plain["gamma"], plain["fastest_gamma"], plain["right"]) == (1, 0, 2, False)
    assert plain["predicted_speedup"] == 1 and plain["share_of_fastest"] == pytest.approx(100 / 106)
    rows = candidate(1e-3, {0.0: advice.stated(0.7, 0.9, 2)}).options(WORK)
    verdict = advice._verdict(advice.recommend(rows), lines)
    assert (verdict["draft"], verdict["gamma"], verdict["right"]) == ("a", 2, True)
    assert verdict["measured_speedup"] == pytest.approx(1.06) and verdict["predicted_speedup"] > 1.4


@pytest.mark.slow
def test_what_advice_cannot_be_given_on_is_refused(tmp_path):
    config = configs.load(f"{CONFIGS}/advise.py:smoke")
    with pytest.raises(UserError, match="config.target is empty; give --config.target=DIR"):
        design.advise(config, tmp_path)
    tokenizer = train_byte_bpe(["def f(x):\n    return x\n" * 40], 270)
    model = Decoder(tiny.config(vocab_size=270))
    api.save(api.Model(model, tiny.decoder(vocab_size=270)[1], tokenizer), tmp_path / "target")
    config.target = str(tmp_path / "target")
    target = api.load(config.target)
    attached = hub_adapter.LoadedAttachment(*tiny.eagle3(target.decoder, target.params), target.fingerprint)
    hub_adapter.save(tmp_path / "eagle3", attached)
    config.task.update({"name": "text", "path": str(tmp_path / "text.py")})
    (tmp_path / "text.py").write_text("".join(f"def f_{i}(x):\n    return x\n\n\n" for i in range(300)))
    for changes, message in (
        ({"acceptance": (0.7, 0.5)}, r"acceptance is \(0.7, 0.5\); set a range .* within 0 .. 1"),
        ({"layers": ()}, "no candidate; set drafts, or layers"),
        ({"gammas": (0, 1)}, r"gammas are \(0, 1\); set one or more"),
        ({"gammas": ()}, r"gammas are \(\); set one or more"),
        ({"share": 0.0}, "share is 0.0; set a fraction"),
        (
            {"drafts": (str(tmp_path / "eagle3"),)},
            "advice is for draft models and n-gram lookup, and .*eagle3 attaches",
        ),
        ({"share": 1e-6}, "no shape of 1 layers in these proportions"),
        ({"batch_sizes": (1, 3)}, r"batch_sizes must lie in 1 .. 2, the number of prompts, not 3"),
        ({"check": True}, "check decodes with drafts that exist, and there are none; set drafts"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"max_new_tokens": 600}, "exceed the model's 512 positions; shorten the prompt or lower max_new_tokens"),
    ):
        asked = ConfigDict(config)
        asked.update(changes)
        with pytest.raises(UserError, match=message):
            design.advise(asked, tmp_path)


def test_a_replay_of_longer_texts_and_a_target_with_a_replay_are_refused(tmp_path, monkeypatch):
    asked = ConfigDict({"replay": "r", "temperature": 0.0, "max_new_tokens": 80, "target": "t"})
    stored = types.SimpleNamespace(check_target=lambda target: None, max_new_tokens=128)
    monkeypatch.setattr(design.replay, "load", lambda path: stored)
    with pytest.raises(UserError, match="80 and the replay's texts have 128 tokens; set max_new_tokens to 128"):
        design._replay(asked, api.Model(*tiny.decoder(vocab_size=260), train_byte_bpe(["x = 1\n" * 30], 260)))
    with pytest.raises(UserError, match="a replay is scored without its target; give --config.replay=DIR or"):
        design.replayed(asked, tmp_path)


def test_of_one_prompt_no_interval_is_claimed():
    alone = advice.Acceptance((0.8, 0.6), (0.8, 0.6), (0.8, 0.6), 2.0)
    assert "one prompt gives no interval" in advice.reasons(candidate(1e-3, {0.0: alone}).options(WORK))[0]


@pytest.mark.slow
def test_the_shape_is_the_fastest_at_its_parameters_or_the_largest_within_its_milliseconds(tmp_path, monkeypatch):
    tokenizer = train_byte_bpe(["x = 1\n" * 30], 260)
    api.save(api.Model(*tiny.decoder(vocab_size=260), tokenizer), tmp_path / "target")
    timed = lambda cases, repeats: {case.key: Point(1e-3 * case.shape.layers, 0.0) for case in cases}
    monkeypatch.setattr(profile, "_timed", timed)
    config = configs.load(f"{CONFIGS}/draft_design/build.py:smoke")
    with pytest.raises(UserError, match="config.target is empty"):
        budget.build(config, tmp_path)
    config.target, config.layers, config.parameters = str(tmp_path / "target"), (2, 1), 12_000
    *result, train = budget.build(config, tmp_path)
    assert [(row["layers"], row["chosen"]) for row in result] == [(2, False), (1, True)]
    assert all(abs(row["parameters"] / 12_000 - 1) < 0.03 for row in result)
    assert "--config.model.layers=1" in train["command"]
    config.parameters, config.milliseconds, config.sizes = 0, 2.5, (12_000, 16_000)
    config.layers = (1, 2, 3)
    *result, _ = budget.build(config, tmp_path)
    assert [row["chosen"] for row in result].count(True) == 1
    (chosen,) = (row for row in result if row["chosen"])
    assert chosen["parameters"] == max(row["parameters"] for row in result if row["layers"] < 3)
    config.milliseconds = 0.5
    with pytest.raises(UserError, match="no shape takes at most 0.5 ms per step"):
        budget.build(config, tmp_path)
    config.parameters = 12_000
    with pytest.raises(UserError, match="a budget is either parameters or milliseconds"):
        budget.build(config, tmp_path)


def test_the_page_shows_candidates_advice_and_reasons():
    rows = candidate(1e-3, {0.0: advice.stated(0.5, 0.7, 2)}).options(WORK)
    rows = [
        *rows,
        advice.recommend(rows),
        *({"table": "reasons", "because": reason} for reason in advice.reasons(rows)),
    ]
    assert list(row_tables.by_table(rows)) == ["candidates", "advice", "reasons"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("runs/a/eagle3/export", "runs/a/pard/export", "ngram"), ("eagle3", "pard", "ngram")),
        (("runs/a/draft/export", "runs/b/draft/export"), ("a/draft", "b/draft")),
        (("m/export", "m", "export"), ("m/export", "m", "export")),
        (("/a/b", "b"), ("a/b", "b")),
    ],
)
def test_a_table_has_as_much_of_a_path_as_tells_it_from_the_others(paths, names):
    (printed,) = row_tables.by_table([{"table": "scores", "draft": path} for path in paths]).values()
    assert tuple(row["draft"] for row in printed) == names
