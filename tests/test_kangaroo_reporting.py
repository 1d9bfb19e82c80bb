"""Kangaroo's tables, claims and figures on made-up records."""

import pytest

from configs.kangaroo import claims as kangaroo_claims
from configs.kangaroo import page as kangaroo_page
from configs.kangaroo import tables as kangaroo_tables

ENVIRONMENT = {"jax": "0.10.2", "python": "3.11.7", "device_kind": "cpu", "git_commit": "0123456789abcdef"}
FATES = {"accepted": [0, 1, 3, 4], "rejected": [2, 2, 0, 0]}


def row(stage, drafter, speedup, **changes):
    """A row of an evaluation, as a record keeps it."""
    values = {
        "stage": stage,
        "drafter": drafter,
        "rule": "lossless",
        "gamma": 2,
        "threshold": 0.6,
        "temperature": 0.0,
        "block_efficiency": 1.9,
        "acceptance_rate": 0.6,
        "drafted_tokens": 40,
        "ctar": [0.6, 0.3],
        "tokens_per_second": 100.0 * speedup,
        "speedup": speedup,
        "speedup_ci": [speedup - 0.1, speedup + 0.1],
        "identical_to_baseline": {"equal": 4, "of": 4, "differences": []},
        "confidence": FATES,
        "target_layers_per_token": 17.5,
        "target_layers_per_token_once": 17.0,
        "target_layers_per_token_padded": 18.0,
        "draft_layers_per_token": 1.25,
    }
    return {**values, **changes}


def trained(stage, params=100, **changes):
    values = {"stage": stage, "params": params, "steps": 10, "train_seconds": 5.0, "validation_acceptance": 0.5}
    return {**values, **changes}


def record(rows, config):
    return {"rows": rows, "config": config, "environment": ENVIRONMENT}


def drafters(**paths):
    return {"drafters": {name: {"kind": "kangaroo", "path": path} for name, path in paths.items()}}


def main_record(**changes):
    timed = {"draft_step_seconds": 1e-4, "target_step_seconds": 2e-3, "verify_seconds": 3e-3, "rule_seconds": 1e-5}
    timed |= {"cost_ratio": 0.05, "predicted_speedup": 1.4}
    plain = {"gamma": 0, "threshold": 0.0, "ctar": [], "identical_to_baseline": None}
    rows = [
        trained("adapter", 590_592),
        trained("medusa", 2_000_000),
        row("evaluation", "none", 1.0, **plain),
        row("evaluation", "adapter", 1.5),
        row("evaluation", "adapter", 1.6, temperature=1.0, target_layers_per_token_once=changes.get("once", 17.0)),
        row("evaluation", "adapter_fixed", 1.3, threshold=0.0, **timed),
        row("evaluation", "medusa", changes.get("medusa", 1.2), threshold=0.0),
        row("evaluation", "early_exit", 1.1, threshold=0.0),
        row("batches", "adapter", 1.3, batch_size=4),
    ]
    paths = drafters(adapter="stage:adapter", adapter_fixed="stage:adapter", medusa="stage:medusa")
    paths["drafters"]["early_exit"] = {"kind": "early_exit", "exit_layer": 2}
    return record(rows, {"evaluation": paths})


def ablation_record(**changes):
    rates, speeds = changes.get("rates", (1.5, 1.9, 2.2)), changes.get("speeds", (1.2, 1.4, 1.3))
    layers = (1, 2, 4)
    rows, exits = [], {}
    for layer, rate, speed in zip(layers, rates, speeds, strict=True):
        for name, threshold in ((f"exit_{layer}", 0.6), (f"exit_{layer}_fixed", 0.0)):
            exits[name] = f"stage:exit_{layer}"
            rows.append(row("exits", name, speed, threshold=threshold, block_efficiency=rate))
    for gamma in (2, 4):
        for threshold, speed in ((0.0, 1.1), (0.5, 1.4), (0.9, changes.get("strict", 1.2))):
            how = {"gamma": gamma, "threshold": threshold}
            rows.append(row("grid", f"threshold_{round(100 * threshold)}", speed, **how))
    kinds = dict(zip(("attention", "own_head", "layer", "mlp", "none"), (1.5, 1.4, 1.3, 1.2, 1.0), strict=True))
    rows += [row("kinds", name, speed) for name, speed in kinds.items()]
    for name, speed in (("raw", 1.4), ("adjusted", 1.2), ("fixed", 1.1)):
        rows += [row("temperatures", name, speed, temperature=temperature) for temperature in (0.2, 1.0)]
    # As condensing leaves them: a stage similar to another names it.
    config = {"exit_1": {"adapter": {"exit_layer": 1, "kind": "attention"}}}
    config |= {f"exit_{layer}": {"like": "exit_1", "adapter.exit_layer": layer} for layer in layers[1:]}
    config |= {"exits": drafters(**exits), "kinds": {"like": "exits"}}
    for name in kinds:
        config["kinds"] |= {f"drafters.{name}.kind": "kangaroo", f"drafters.{name}.path": f"stage:{name}"}
    rows += [trained("own_head", 200), trained("exit_2", 50)]
    return record(rows, config)


def recipe_record(gain=1.1):
    recipes = ("paper", "on_policy", "paper_clock", "reverse_kl", "jsd", "tv")
    rows = []
    for seed in (0, 1, 2):
        for recipe in recipes:
            rows.append(trained(f"{recipe}_{seed}"))
            for temperature in (0.0, 1.0):
                rate = (2.0 + 0.1 * seed) * (gain if recipe == "on_policy" else 1)
                how = {"temperature": temperature, "block_efficiency": rate}
                rows.append(row("evaluation", f"{recipe}_{seed}", 1.2, **how))
    return record(rows, {})


def spec_bench_record():
    rows = [
        row("spec_bench", name, 1.2 + i, subtask=subtask, questions=2 + i)
        for name in ("kangaroo", "ngram")
        for i, subtask in enumerate(("mt_bench", "qa", "overall"))
    ]
    return record(rows, {})


def test_the_main_table_has_each_drafters_parameters_ctar_and_timed_parts():
    text = kangaroo_tables.main_table(main_record())
    assert "| adapter | 0.59M | lossless | 0 | 2 | 0.6 | 1.90 | 0.60 | 60 30 | 150 | 1.50 ± 0.10 | 4/4 |" in text
    assert "| none | – | lossless | 0 | 0 | 0 |" in text
    assert "| early_exit | 0 |" in text
    assert "| adapter_fixed | 0 | 2 | 0.10 | 2.00 | 3.00 | 0.01 | 0.05 | 1.30 ± 0.10 | 1.40 |" in text
    assert "| adapter_fixed | 0 | 2 | 0 | 17.5 | 17 | 18 | 1.25 |" in text
    assert "| 4 | adapter | 2 | 0.6 | 1.90 | 0.60 | 130 | 1.30 ± 0.10 | 4/4 |" in text
    assert text.endswith("commit 0123456789ab")


def test_ablations_are_grouped_by_what_was_varied():
    text = kangaroo_tables.ablations(ablation_record())
    assert "| 2 | 1.90 | 0.60 | 1.40 ± 0.10 | 1.90 | 0.60 | 1.40 ± 0.10 |" in text
    assert "| 0.5 | 1.40x (1.90) | 1.40x (1.90) |" in text
    assert "| own_head | 200 | 1.90 | 0.60 | 1.40 ± 0.10 |" in text
    assert "| adjusted | 0.2 | 40 | 1.90 | 0.60 | 1.20 ± 0.10 |" in text
    assert "Of 8 accepted and 4 rejected tokens (greedy, gamma 4, no threshold)" in text


def test_separation_is_the_chance_of_the_surer_being_the_accepted_one():
    assert kangaroo_tables.separation({"accepted": [0, 2], "rejected": [3, 0]}) == 1
    assert kangaroo_tables.separation({"accepted": [2, 0], "rejected": [0, 3]}) == 0
    assert kangaroo_tables.separation({"accepted": [1, 1], "rejected": [1, 1]}) == 0.5
    # Of 8 x 4 pairs: 1 in the second bin has 2 below and half of 2 in its own bin, the other 7 have all 4 below.
    assert kangaroo_tables.separation(FATES) == (1 * 3 + 7 * 4) / 32
    assert kangaroo_tables.separation({"accepted": [0], "rejected": [1]}) is None


def test_gains_of_recipes_are_paired_by_seed():
    text = kangaroo_tables.recipes(recipe_record())
    assert "| on_policy | 0 | 10 | 5 | 0.500 | 2.310 ± 0.273 | +10.0% ± 0.0 | 3 |" in text
    assert "| paper | 0 | 10 | 5 | 0.500 | 2.100 ± 0.248 | – | 3 |" in text


def test_spec_bench_is_reported_by_subtask_and_in_total():
    text = kangaroo_tables.spec_bench(spec_bench_record())
    assert "| kangaroo, gamma 2, T 0 | 1.90 / 1.20x | 1.90 / 2.20x | 1.90 / 3.20x |" in text
    assert "| ngram | 0 | 2 | 0.6 | 4 | 1.90 | 60 30 | 0.60 | 320 | 3.20 ± 0.10 | 4/4 |" in text


def verdicts(half=0.01, **records):
    """The verdicts on all claims, with intervals of this half width around every speed-up and compression rate."""
    for row in (row for record in records.values() for row in record["rows"] if "drafter" in row):
        for key in ("speedup", "block_efficiency"):
            row[f"{key}_ci"] = [row[key] - half, row[key] + half]
    return [claim.judged(records.get(claim.record))[1] for claim in kangaroo_claims.CLAIMS]


def test_verdicts_follow_the_records():
    good = {"kangaroo": main_record(), "kangaroo_ablations": ablation_record(), "kangaroo_recipes": recipe_record()}
    reproduced = ["reproduced"] * 2 + ["holds"] + ["reproduced"] * 6 + ["holds"]
    assert verdicts() == ["not measured yet"] * 11
    assert verdicts(**good) == [*reproduced, "not measured yet"]
    assert verdicts(kangaroo_spec_bench=spec_bench_record())[-1] == "not testable here"
    against = {
        "kangaroo": main_record(medusa=1.9, once=12.0),
        "kangaroo_ablations": ablation_record(rates=(1.5, 1.4, 2.2), strict=2.0),
        "kangaroo_recipes": recipe_record(gain=0.9),
    }
    result = verdicts(**against)
    refuted = ("not reproduced", "does not hold")
    assert [place for place, verdict in enumerate(result) if verdict in refuted] == [1, 3, 4, 5, 9]
    some = ablation_record()
    some["rows"] = [row for row in some["rows"] if row["stage"] == "exits"]  # as far as a run has come
    partial = verdicts(kangaroo_ablations=some)
    assert [place for place, verdict in enumerate(partial) if verdict != "not measured yet"] == [4]
    assert kangaroo_tables.ablations(some).count("(greedy)") == 1
    deepest = verdicts(kangaroo_ablations=ablation_record(speeds=(1.2, 1.3, 1.4)))
    assert deepest[4] == "not reproduced", "a peak at the end is none inside"


def test_an_interval_that_decides_nothing_gives_no_verdict():
    wide = {"kangaroo": main_record(), "kangaroo_ablations": ablation_record()}
    assert [verdict == "not decided" for verdict in verdicts(half=1.0, **wide)[:8]] == [True] * 3 + [False] + [True] * 4
    alone = {
        "rows": [
            row
            for row in recipe_record()["rows"]
            if row.get("stage", "").endswith("_0") or row.get("drafter", "").endswith("_0")
        ]
    }
    assert verdicts(kangaroo_recipes=record(alone["rows"], {}))[9] == "not decided", "one seed has no interval"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "made"), [("kangaroo_ablations", ablation_record), ("kangaroo_spec_bench", spec_bench_record)]
)
def test_figures_are_drawn_for_light_and_dark_pages(tmp_path, name, made):
    kangaroo_page.FIGURES[name](made(), tmp_path / f"{name}.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.dark.png", f"{name}.png"]
