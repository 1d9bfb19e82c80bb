"""What quality costs: points, fronts, tables, claims and figures are right functions of the rows of records."""

import json
from pathlib import Path

import jax
import pytest
import tiny

from configs.distillspec import claims as distillspec_claims
from configs.distillspec import page as distillspec_page
from configs.distillspec import tables as distillspec_tables
from configs.distillspec import tradeoffs
from configs.distillspec.tradeoffs import Point, operating_point, pareto_front
from configs.records import claims, condense, sync
from configs.records.claims import Measured
from specjax import api, evaluate
from specjax.hub.tokenizer import train_byte_bpe
from specjax.runtime import config as configs
from specjax.runtime import process_memory
from specjax.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"jax": "0.1", "python": "3.12", "device_kind": "cpu", "git_commit": "0123456789abcdef"}


@pytest.mark.parametrize(
    ("points", "least", "best"),
    [
        ([("a", 0.5, 0.8), ("b", 0.7, 0.9), ("c", 0.6, 0.9)], 0.85, "c"),
        ([("a", 0.5, 0.8), ("b", 0.5, 0.9)], 0.7, "b"),  # of equally cheap ones the better
        ([("a", 0.5, 0.9), ("b", 0.5, 0.9)], 0.7, "a"),  # of equal ones the first
        ([("a", 0.5, 0.85)], 0.85, "a"),  # exactly the loss that is allowed
        ([("a", 0.5, 0.8), ("b", 0.1, 0.2)], 0.85, None),
        ([], 0.85, None),
    ],
)
def test_the_operating_point_is_the_cheapest_within_the_loss(points, least, best):
    assert operating_point({name: Point(cost, quality) for name, cost, quality in points}, least) == best


def test_the_front_is_what_no_other_beats_and_ties_stay():
    points = {
        "worse in both": Point(0.9, 0.1),
        "cheap": Point(0.1, 0.2),
        "good": Point(0.8, 0.9),
        "as cheap, worse": Point(0.1, 0.1),
        "as good, dearer": Point(0.9, 0.9),
        "twin of good": Point(0.8, 0.9),
    }
    assert pareto_front(points) == ["cheap", "good", "twin of good"]
    assert pareto_front({}) == []


def test_a_mean_over_seeds_has_students_interval():
    three = Measured.over_seeds([1.0, 2.0, 3.0])
    assert three.value == 2 and three.high - 2 == pytest.approx(4.303 / 3**0.5)
    one = Measured.over_seeds([0.5])
    assert one.edges is None
    assert (three.plus_minus, one.plus_minus) == ("2.000 ± 2.484", "0.500")


def row(stage, seed, drafter, gamma, quality, efficiency, speedup, rule="lossless", lenience=None, temperature=0.0):
    settings = {"stage": stage, "run_seed": seed, "drafter": drafter, "gamma": gamma, "rule": rule}
    scores = {"quality": {"exact_match": quality}, "quality_difference": {"exact_match": quality - 0.8}}
    settings |= {"lenience": lenience, "temperature": temperature, "prompts": 9, "task": "t"}
    return settings | scores | {"block_efficiency": efficiency, "speedup": speedup}


def record(rows, timed=True):
    """A record of two seeds; a row is as `row` takes it after the seed. Timed ones may be absent."""
    stages = ("quality", "latency") if timed else ("quality",)
    made = [row(stage, seed, *args) for stage in stages for seed in (0, 1) for args in rows]
    return {"environment": ENVIRONMENT, "rows": made}


LOSSY = [
    ("none", 0, 0.8, 1.0, 1.0),
    ("d", 4, 0.8, 2.0, 1.6),
    ("d", 4, 0.795, 2.5, 2.0, "lenient_exp", 0.5),
    ("d", 4, 0.5, 4.0, 3.2, "lenient_exp", 0.1),
    ("d", 4, 0.79, 3.0, 2.4, "lenient_linear", 0.1),
    ("alone", 0, 0.1, 1.0, 5.0),
]


def test_the_lossy_operating_point_stays_within_one_percent_of_plain_decoding():
    calls, latency = distillspec_tables.lossy_points(record(LOSSY))
    assert calls["by"] == "target calls" and latency["by"] == "latency"
    for line in (calls, latency):  # lenient_linear loses 1.25%
        assert line["lossy rule"] == "lenient_exp 0.5, lossy" and line["against lossless"] == "-20.0%"
        assert line["quality"] == "0.795 ± 0.000" and line["lost"] == "0.005 ± 0.000"
    strict = [row if len(row) < 6 else (*row[:2], 0.5, *row[3:]) for row in LOSSY]
    lines = distillspec_tables.lossy_points(record(strict))
    assert {line["lossy rule"] for line in lines} == {"none within the loss"}


def test_without_latencies_the_tables_say_what_any_machine_would():
    untimed = record(LOSSY, timed=False)
    assert [line["by"] for line in distillspec_tables.lossy_points(untimed)] == ["target calls"]
    assert "| lenient_exp 0.5, lossy | 4 | 2.500 ± 0.000 | 0.795 ± 0.000 | 0.005 ± 0.000 | – |" in (
        distillspec_tables.lossy(untimed)
    )


def test_the_claim_on_the_exponent_is_judged_by_the_operating_points():
    exponent = next(claim for claim in distillspec_claims.CLAIMS if "p^ε" in claim.statement)
    assert exponent.judged(record(LOSSY))[1] == claims.REPRODUCED
    other = [(*r[:2], 0.8, *r[3:]) if r[5:6] == ("lenient_linear",) else r for r in LOSSY]
    assert exponent.judged(record(other))[1] == claims.NOT_REPRODUCED
    assert distillspec_tables.lossy_fronts(record(LOSSY)) == {"lenient_exp": 2, "lenient_linear": 1}


def garden_rows(small_kd=0.796):
    return [
        ("none", 0, 0.8, 1.0, 1.0),
        ("large_sd", 4, 0.8, 2.0, 1.25),
        ("large_distillspec", 4, 0.8, 3.0, 2.0),
        ("small_raw_sd", 0, 0.6, 1.0, 4.0),
        ("small_raw_sd", 4, 0.6, 2.0, 5.0),
        ("small_raw_distillspec", 4, 0.6, 2.5, 6.0),
        ("small_kd_sd", 0, small_kd, 1.0, 4.0),
        ("small_kd_sd", 4, small_kd, 2.0, 5.0),
        ("small_kd_distillspec", 4, small_kd, 2.5, 8.0),
    ]


def garden(small_kd=0.796, timed=True):
    made = record(garden_rows(small_kd), timed)
    sizes = {"large": 100, "small_raw": 10, "small_kd": 10}
    made["rows"] += [{"stage": name, "run_seed": 0, "params": size} for name, size in sizes.items()]
    return made


def test_the_garden_names_the_best_within_the_loss_and_what_each_part_brought():
    best = distillspec_tables.garden_best(garden())
    assert best == "small_kd, DistillSpec"
    parts = distillspec_tables.garden_parts(garden(), best)
    assert [line["factor"] for line in parts] == [None, 0.25, 1.0, 0.8, 0.625]
    assert [line["change in quality"] for line in parts[1:]] == pytest.approx([-0.2, 0.196, 0, 0])
    page = distillspec_tables.garden(garden())
    assert "small_kd, DistillSpec, relative latency 1 to 0.125 ± 0.000 (8.0x lower)" in page
    assert (
        "| small_kd | DistillSpec | 10 | 0.796 ± 0.000 | 0.004 ± 0.000 | 2.500 ± 0.000 | 0.125 ± 0.000 | yes |" in page
    )
    assert distillspec_tables.garden_best(garden(small_kd=0.7)) == "large, DistillSpec"


def test_a_garden_without_latencies_says_so():
    page = distillspec_tables.garden(garden(timed=False))
    assert "Latencies are not measured yet." in page and "| small_kd | DistillSpec |" in page


@pytest.mark.slow
def test_a_drafters_own_target_is_decoded_with_the_baseline_and_judged_on_the_same_prompts(tmp_path, monkeypatch):
    """In two settings, between which the programs of the first are let go of, as where the process is crowded."""
    cleared, clear = [], jax.clear_caches
    monkeypatch.setattr(process_memory, "crowded", lambda: True)
    monkeypatch.setattr(jax, "clear_caches", lambda: (cleared.append(1), clear()))
    texts = [f"{n} and {n}" for n in range(40)]
    tokenizer = train_byte_bpe(texts, 270)
    for name, layers in (("large", 2), ("small", 1)):
        decoder, params = tiny.decoder(layers, layers=layers, vocab_size=tokenizer.vocab_size)
        api.save(api.Model(decoder, params, tokenizer), tmp_path / name)
    lines = [json.dumps({"question": text, "answer": f"#### {n}"}) for n, text in enumerate(texts)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    config = configs.load("configs/evaluate.py:smoke")
    config.target = config.drafter.path = str(tmp_path / "large")
    config.task.update({"name": "gsm8k", "path": str(tmp_path / "data.jsonl")})
    config.selection.count, config.temperatures, config.compare = 2, (0.0,), ()
    config.batch_sizes = (1, 2)
    own = {"kind": "model", "path": str(tmp_path / "large"), "target": str(tmp_path / "small")}
    config.drafters = {
        "own": {**own, "rules": {"lossless": (0, 2)}},
        "same": {**own, "target": config.target, "rules": {"lossless": (2,)}},
    }
    rows = evaluate.run(config, tmp_path / "w")["rows"]
    plain, alone, drafted, same = rows[:4]
    assert len(cleared) == 2 and [row["batch_size"] for row in rows] == [1] * 4 + [2] * 4
    assert [row["block_efficiency"] for row in rows[4:]] == [row["block_efficiency"] for row in rows[:4]]
    assert [row["target"].rpartition("/")[2] for row in (plain, alone, drafted, same)] == [
        *("large", "small", "small", "large")
    ]
    assert alone["block_efficiency"] == 1 and alone["identical_to_baseline"] is None
    for row in (drafted, same):  # each is its own target's greedy text
        assert row["identical_to_baseline"]["equal"] == 2
    assert same["acceptance_rate"] == 1 and drafted["acceptance_rate"] < 1
    for row in (plain, alone, drafted, same):
        assert row["baseline_tokens_per_second"] == plain["tokens_per_second"]
        difference = row["quality"]["exact_match"] - plain["quality"]["exact_match"]
        assert row["quality_difference"]["exact_match"] == difference


@pytest.mark.slow
@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize(("name", "made"), [("lossy", lambda timed: record(LOSSY, timed)), ("garden", garden)])
def test_every_figure_is_drawn_for_light_and_dark(tmp_path, name, made, timed):
    draw = made(timed=timed) if name == "garden" else made(timed)
    distillspec_page.FIGURES[name](draw, tmp_path / "figure.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.dark.png", "figure.png"]


PAGES = sorted((ROOT / "configs").glob("*/README.md"))


@pytest.mark.parametrize("name", sync.FIGURES)
def test_the_figure_of_a_committed_record_lies_next_to_its_page(name):
    page = next(page for page in PAGES if f"<!-- table:{name} -->" in page.read_text(encoding="utf-8"))
    committed = (ROOT / "configs" / "records" / f"{name}.json").is_file()
    assert (f'src="{name}.png"' in page.read_text(encoding="utf-8")) == committed
    for file in (f"{name}.png", f"{name}.dark.png"):
        assert (page.parent / file).is_file() == committed, "run `make tables`"


def test_claims_name_records_that_have_tables_and_work_without_them():
    table = claims.claims_table(distillspec_claims.CLAIMS, {})
    assert table.count(claims.NOT_MEASURED) == len(distillspec_claims.CLAIMS)
    assert {claim.record for listed in sync.CLAIMS.values() for claim in listed} <= set(sync.TABLES)
    both = claims.claims_table(distillspec_claims.CLAIMS, {"lossy": record(LOSSY), "garden": garden()})
    assert both.count(f"| {claims.REPRODUCED} |") == 3


def run(workdir, seed, steps=5, rows=({"drafter": "d", "speedup": 2.0, "samples": "much"},)):
    """A workdir of a run with one finished stage of two."""
    config = {"seed": seed, "stages": ["quality", "latency"], "quality": {"seed": seed, "steps": steps}, "latency": {}}
    results = {"schema": 1, "binary": "evaluate", "config": {}, "environment": ENVIRONMENT, "rows": list(rows)}
    (workdir / "quality").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "quality" / "results.json").write_text(json.dumps(results))
    return workdir


def test_runs_of_several_seeds_join_in_one_record_with_what_they_have(tmp_path):
    runs = [run(tmp_path / str(seed), seed) for seed in (0, 1)]
    assert condense.main([str(tmp_path / "r.json"), *map(str, runs)]) == 0
    made = json.loads((tmp_path / "r.json").read_text())
    row = {"stage": "quality", "drafter": "d", "speedup": 2.0}
    assert made["rows"] == [{**row, "run_seed": 0}, {**row, "run_seed": 1}]
    assert made["environment"] == ENVIRONMENT


def test_runs_that_do_not_belong_together_are_refused(tmp_path, capsys):
    first, other = run(tmp_path / "0", 0), run(tmp_path / "other", 1, steps=6)
    with pytest.raises(UserError, match="other is of another config than .*; join runs that differ in seed alone"):
        condense.condensed([first, other])
    with pytest.raises(UserError, match="another run of seed 0"):
        condense.condensed([first, first])
    with pytest.raises(UserError, match=r"there is no .*nowhere/config\.json; name the workdir of a run"):
        condense.condensed([tmp_path / "nowhere"])
    (first / "quality" / "results.json").unlink()
    with pytest.raises(UserError, match="no stage of .* has finished"):
        condense.condensed([first])
    assert condense.main(["r.json"]) == 2
    assert "give the record to write" in capsys.readouterr().err


def test_the_main_metric_is_the_one_that_papers_quote():
    assert tradeoffs.main_metric([{"params": 1}, {"quality": {"rouge1": 1, "rouge2": 1}}]) == "rouge2"
    assert tradeoffs.main_metric([{"quality": {"exact_match": 1}}]) == "exact_match"
