"""The reporting room: numbers from counts, records on disk, tables, figures, the page."""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest

from configs.benchmark import page as benchmark_page
from configs.records import sync
from specjax.reporting import metrics, page, panels, plots, records, tables
from specjax.runtime.errors import InexactText, UserError


def counts_of(blocks, gamma):
    """Counts of prompts given as lists of blocks (accepted, drafted); each block emits one token more."""
    columns = {field.name: [] for field in dataclasses.fields(metrics.Counts)}
    for prompt in blocks:
        accepted, drafted = (np.array(side, int) for side in zip(*prompt, strict=True))
        position = np.arange(gamma)
        columns["emitted"].append((accepted + 1).sum())
        columns["target_calls"].append(len(accepted))
        columns["drafted"].append(drafted.sum())
        columns["accepted"].append(accepted.sum())
        reached = (position <= accepted[:, None]) & (position < drafted[:, None])
        columns["drafted_at"].append(reached.sum(0))
        columns["accepted_at"].append((position < accepted[:, None]).sum(0))
        columns["emitted_more_than"].append((accepted[:, None] + 1 > position + 1).sum(0))
    return metrics.Counts(**{name: np.array(column) for name, column in columns.items()})


def random_counts(prompts=12, gamma=3, seed=0, ease=0.6):
    rng = np.random.default_rng(seed)
    accepted = np.minimum(rng.geometric(1 - ease, size=(prompts, 10)) - 1, gamma)
    return counts_of([[(a, gamma) for a in prompt] for prompt in accepted], gamma)


def row_of(counts, seconds, baseline_seconds, seed=0):
    """The row of a method that emits as much as plain decoding."""
    emitted = np.bincount(np.arange(len(counts.emitted)) % len(seconds), weights=counts.emitted).astype(int)
    timings = (metrics.Timing(emitted, np.array(each, float)) for each in (seconds, baseline_seconds))
    return metrics.evaluate_row(counts, *timings, seed=seed)


def result_row(drafter="distilled", gamma=4, temperature=0.0, speedup=1.5, **changes):
    row = {
        "task": "stdlib",
        "prompts": 8,
        "drafter": drafter,
        "rule": "lossless",
        "gamma": gamma,
        "temperature": temperature,
        "drafted_tokens": 40 if gamma else 0,
        "block_efficiency": 1 + gamma / 2,
        "block_efficiency_ci": [0.9 + gamma / 2, 1.1 + gamma / 2],
        "acceptance_rate": 0.5 if gamma else None,
        "acceptance_rate_ci": None,
        "acceptance_by_position": [0.5] * gamma,
        "tokens_per_second": 812.3,
        "speedup": speedup,
        "speedup_ci": [speedup - 0.1, speedup + 0.1],
        "predicted_speedup": speedup if gamma else None,
        "identical_to_baseline": {"equal": 8, "of": 8, "differences": []} if temperature == 0 else None,
    }
    return row | changes


# --- metrics


def test_ratios_are_those_of_a_worked_example():
    counts = counts_of([[(2, 2), (0, 2)], [(1, 2), (0, 1), (0, 0)]], gamma=2)
    row = row_of(counts, [1.0, 1.0], [2.0, 3.0])
    assert [row[key] for key in ("emitted_tokens", "target_calls", "drafted_tokens", "accepted_tokens")] == [
        8,
        5,
        7,
        3,
    ]
    assert row["block_efficiency"] == pytest.approx(8 / 5)
    assert row["acceptance_rate"] == pytest.approx(3 / 7)
    assert row["sequence_acceptance"] == pytest.approx(3 / 8)
    # Position 1 was drafted in four blocks and accepted in two; position 2 was reached in two and accepted in
    # one.
    assert row["acceptance_by_position"] == [pytest.approx(2 / 4), pytest.approx(1 / 2)]
    assert row["ctar"] == [pytest.approx(2 / 5), pytest.approx(1 / 5)]
    assert row["tokens_per_second"] == pytest.approx(8 / 2)
    assert row["speedup"] == pytest.approx(2.5)


@pytest.mark.parametrize("gamma", [0, 1, 5])
def test_block_efficiency_is_one_plus_the_sum_of_ctar(gamma):
    counts = random_counts(gamma=gamma)
    row = row_of(counts, [1.0] * 12, [2.0] * 12)
    assert row["block_efficiency"] == pytest.approx(1 + sum(row["ctar"]), abs=1e-12)


def test_counts_that_contradict_each_other_are_refused():
    good = random_counts()
    for name in ("emitted", "target_calls", "accepted", "emitted_more_than", "accepted_at"):
        with pytest.raises(ValueError, match="contradict"):
            dataclasses.replace(good, **{name: getattr(good, name) + 1})
    with pytest.raises((ValueError, TypeError)):  # TypeError where the annotations are checked
        dataclasses.replace(good, drafted=good.drafted[:-1])


def test_the_baseline_has_no_acceptance_and_stays_json_clean():
    counts = counts_of([[(0, 0)] * 3, [(0, 0)] * 4], gamma=0)
    row = row_of(counts, [1.0, 1.0], [1.0, 1.0])
    assert row["block_efficiency"] == 1 and row["speedup"] == 1
    assert row["acceptance_rate"] is None and row["acceptance_rate_ci"] is None
    assert row["acceptance_by_position"] == [] and row["ctar"] == []
    json.dumps(row, allow_nan=False)


def test_a_position_that_was_never_reached_has_no_rate():
    counts = counts_of([[(0, 2)], [(0, 2)]], gamma=2)
    row = row_of(counts, [1.0, 1.0], [1.0, 1.0])
    assert row["acceptance_by_position"] == [0.0, None]


def test_one_prompt_has_no_interval():
    counts = random_counts(prompts=1)
    row = row_of(counts, [1.0], [2.0])
    assert row["speedup"] == 2
    assert row["block_efficiency_ci"] is None and row["speedup_ci"] is None


def test_speedup_is_a_ratio_of_rates_and_its_interval_is_paired():
    counts = random_counts(prompts=6)
    noise = np.array([1.0, 5.0, 0.5, 9.0, 2.0, 3.0])
    row = row_of(counts, noise, 2 * noise)
    assert row["speedup"] == pytest.approx(2)
    # Noise that method and baseline share must vanish; resampled separately it would make an interval several
    # units wide.
    assert row["speedup_ci"] == pytest.approx([2, 2])


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    truth = 1 + sum(0.6**i for i in range(1, 4))
    hits = 0
    for seed in range(100):
        counts = random_counts(prompts=40, seed=seed)
        low, high = row_of(counts, [1.0], [1.0], seed)["block_efficiency_ci"]
        hits += low <= truth <= high
    assert 87 <= hits <= 100


def test_intervals_repeat_with_the_seed():
    counts = random_counts()
    row = functools.partial(row_of, counts, [1.0, 2.0], [2.0, 2.0])
    assert row(seed=3) == row(seed=3) != row(seed=4)


def test_an_interval_of_values_resamples_items_and_one_item_has_none():
    hits = np.arange(400) % 4 == 0
    share = lambda weights: {"share": float(weights @ hits[: len(weights)] / weights.sum())}
    low, high = metrics.intervals(share, 400, seed=0)["share"]
    # Of a proportion: 1.96 standard errors to each side.
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 * 0.75 / 400), rel=0.1) and low < 0.25 < high
    assert metrics.intervals(share, 400, seed=0) == {"share": [low, high]}
    assert metrics.intervals(share, 1, seed=0) == {"share": None}


def test_a_paired_difference_sees_what_two_intervals_would_hide():
    # Prompts differ widely; on each of them `a` gains one accepted token in one block of ten.
    rng = np.random.default_rng(0)
    blocks = [[(int(level), 6)] * 10 for level in rng.integers(0, 5, size=30)]
    better = [[(prompt[0][0] + 1, 6), *prompt[1:]] for prompt in blocks]
    a, b = counts_of(better, 6), counts_of(blocks, 6)
    result = metrics.paired_difference(a, b, seed=0)
    assert result["block_efficiency_difference"] == pytest.approx(0.1)
    assert result["block_efficiency_difference_ci"] == pytest.approx([0.1, 0.1])
    assert 1 < result["block_efficiency_ratio_ci"][0] < result["block_efficiency_ratio"]
    assert metrics.paired_difference(a, a, seed=0)["block_efficiency_ratio_ci"] == [1, 1]
    with pytest.raises(ValueError, match="same prompts"):
        metrics.paired_difference(a, random_counts(prompts=3), seed=0)


# --- records


def test_the_environment_has_exactly_the_keys_of_the_schema():
    outcome = records.environment(7)
    assert list(outcome) == [
        *("git_commit", "specjax", "jax", "flax", "python", "platform"),
        *("device_kind", "device_count", "process_count", "seed"),
    ]
    assert outcome["seed"] == 7 and outcome["device_count"] >= 1
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(-dirty)?", outcome["git_commit"])


def test_results_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "results.json"
    rows = [
        {
            "speedup": np.float32(1.5),
            "ctar": np.array([0.5, np.nan]),
            "equal": np.int64(3),
            "same": np.bool_(True),
        }
    ]
    records.write_results(path, binary="evaluate", config={"seed": 1}, rows=rows, note="x")
    record = records.read_results(path)
    assert record["schema"] == 1 and record["binary"] == "evaluate" and record["note"] == "x"
    assert record["environment"]["seed"] == 1
    assert record["rows"] == [{"speedup": 1.5, "ctar": [0.5, None], "equal": 3, "same": True}]
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_a_failed_write_leaves_the_old_results_alone(tmp_path):
    path = tmp_path / "results.json"
    records.write_results(path, binary="evaluate", config={"seed": 1}, rows=[])
    before = path.read_text()
    with pytest.raises(TypeError, match="no place in a JSON record"):
        records.write_results(path, binary="evaluate", config={"seed": 1}, rows=[{"bad": object()}])
    assert path.read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ('{"schema": 1, "rows": [', "damaged"),
        ('{"schema": 99}', "schema 99"),
        ("[1, 2]", "schema None"),
        ('{"schema": 1, "rows": []}', "lacks binary, config, environment"),
    ],
)
def test_results_that_cannot_be_read_are_named_with_a_remedy(tmp_path, text, message):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        records.read_results(path)
    assert str(path) in str(caught.value)


def test_metrics_of_a_killed_run_leave_no_duplicates(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with records.MetricsLog(tmp_path) as log:
        for step in range(1, 8):
            log.write(step, {"loss": np.float32(step), "note": "text"})
    path.write_text(path.read_text() + '{"step": 8, "lo')
    with records.MetricsLog(tmp_path, resume_step=5) as log:
        for step in range(6, 10):
            log.write(step, {"loss": float("nan")})
    lines = records.read_metrics(path)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert lines[4]["loss"] == 5 and lines[5]["loss"] is None
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2


def test_a_run_begun_anew_begins_its_log_anew(tmp_path):
    for _ in range(2):
        with records.MetricsLog(tmp_path) as log:
            log.write(1, {"loss": 2.0})
    assert records.read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_a_damaged_metrics_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        records.read_metrics(path)
    with pytest.raises(UserError, match="does not exist"):
        records.read_metrics(tmp_path / "none.jsonl")


# --- tables


def test_the_summary_table_is_aligned_and_says_what_matters():
    text = tables.summary_table([result_row("none", 0, speedup=1.0), result_row(temperature=1.0)])
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["drafter", "T", "gamma"]
    assert "3.00 ± 0.10" in lines[3] and "1.50 ± 0.10" in lines[3] and "812" in lines[3]
    assert lines[2].endswith("8/8") and lines[3].endswith(tables.NOTHING)
    assert lines[2].index("1.00 ± 0.10") == lines[3].index("3.00 ± 0.10")


def test_a_setting_in_which_rows_differ_gets_a_column():
    assert "rule" not in tables.summary_table([result_row(), result_row()])
    assert "coupled" in tables.summary_table([result_row(), result_row(rule="coupled")])


def test_quality_is_in_the_summary_where_a_row_has_one():
    assert "quality" not in tables.summary_table([result_row(quality={})])
    assert "rouge2 0.12" in tables.summary_table([result_row(quality={"rouge2": 0.12}), result_row(quality={})])


def test_a_lossy_row_says_so_in_every_table_even_among_its_like():
    lossy = result_row(rule="lenient_exp", lenience=0.25, identical_to_baseline=None)
    for rows in ([lossy], [lossy, lossy | {"lenience": 0.5}], [result_row(), lossy]):
        assert tables.summary_columns(rows)[0] == "rule"
        assert "lenient_exp 0.25, lossy" in tables.summary_table(rows)
        assert "lenient_exp 0.25, lossy" in tables.markdown_table(rows, ["rule", "speedup"])
        assert "never marked" in page.results_table(rows).caption
    assert "lossy" not in tables.summary_table([result_row(), result_row(lenience=None)])


def test_several_batch_sizes_are_a_table_by_concurrency_in_serving_engines_words():
    numbers = dict.fromkeys(("output_throughput", "mean_ttft_ms", "mean_tpot_ms", "mean_acceptance_length"), 2.0)
    serving = {**numbers, "draft_acceptance_rate": 0.5, "per_position_acceptance_rates": [0.5, 0.25]}
    row = result_row(gamma=2, batch_size=1, serving={**serving, "acceptance_histogram": [2, 1, 1]})
    plain = result_row("none", 0, batch_size=1, serving={**serving, "per_position_acceptance_rates": []})
    plain["serving"]["acceptance_histogram"] = [4]
    assert tables.concurrency([plain, row]) == []
    lossy = row | {"batch_size": 8, "rule": "typical", "lenience": 0.3}
    rows = tables.concurrency([plain, row, plain | {"batch_size": 8}, lossy])
    head, _, *lines = tables.aligned_table(rows, list(rows[0])).splitlines()
    assert head.split()[:4] == ["concurrency", "drafter", "rule", "gamma"]
    assert "unconditional, %  by position, conditional, %  calls by accepted tokens" in head
    assert lines[1].split()[-7:] == ["50", "25", "50", "50", "2", "1", "1"] and lines[0].split()[-3:] == ["–", "–", "4"]
    assert lines[3].startswith("          8  distilled  typical 0.3, lossy")


def test_a_faster_lossy_row_is_neither_marked_nor_the_headline():
    rows = [result_row("none", 0), result_row(speedup=1.5), result_row(speedup=2.5, rule="typical", lenience=0.09)]
    assert page.results_table(rows).best == {1}
    cards = {card.label: (card.value, card.note) for card in page.headline(rows)}
    assert cards["Best speed-up, temperature 0"] == ("1.50×", "distilled, gamma 4, 95% interval 1.40–1.60")
    value, note = cards["Best speed-up, temperature 0, lossy"]
    assert value == "2.50×" and "distilled, typical 0.09, lossy" in note


def test_a_comparison_says_whether_it_is_lossy_and_names_the_batch_size_if_there_are_several():
    compared = {"drafter": "a", "against": "b", "temperature": 1.0, "gamma": 4, "rule": "lenient_linear"}
    compared |= dict.fromkeys(("block_efficiency_difference", "block_efficiency_ratio"), 1.0)
    compared |= dict.fromkeys(("block_efficiency_difference_ci", "block_efficiency_ratio_ci"))
    assert page.comparison_table([compared | {"lenience": 0.5}]).lines[0][2] == "lenient_linear 0.5, lossy"
    sizes = [compared | {"lenience": None, "batch_size": size} for size in (1, 4)]
    assert [line[0] for line in page.comparison_table(sizes).lines] == ["1", "4"]
    environment = {"jax": "0.1", "python": "3.12", "device_kind": "cpu", "git_commit": "0123456789abcdef"}
    record = {"rows": [result_row()], "comparisons": [compared | {"lenience": 0.5}], "environment": environment}
    assert "| lenient_linear 0.5, lossy |" in benchmark_page.quickstart(record)


def test_ties_are_shown_next_to_the_number_of_identical_texts():
    ties = [{"prompt": 3, "position": 7, "top2_gap": 1e-7}]
    row = result_row(identical_to_baseline={"equal": 7, "of": 8, "differences": ties})
    assert tables.cell(row, "identical_to_baseline") == "7/8 (1 tie)"
    assert page.rows_table([row], ["drafter", "identical_to_baseline"]).marks == {(0, 1): "tie"}
    metrics.check_exact([row])


def test_true_differences_are_counted_and_coloured_differently_from_ties_and_end_the_run():
    gap = {"position": 7, "top2_gap": 1.5, "tie_bound": 2e-5}
    differences = [{"prompt": 3, "tie": False, **gap}, {"prompt": 4, "tie": True, **gap}]
    row = result_row(identical_to_baseline={"equal": 6, "of": 8, "differences": differences})
    assert tables.cell(row, "identical_to_baseline") == "6/8 (1 tie, 1 different)"
    table = page.rows_table([row], ["drafter", "identical_to_baseline"])
    assert table.marks == {(0, 1): "different"}
    with pytest.raises(InexactText, match=r"1 of 8 texts of .* differ from plain decoding's by more than rounding"):
        metrics.check_exact([row])
    # A record of an earlier version has gaps alone.
    differences = [{"prompt": 3, "position": 7, "top2_gap": gap} for gap in (1e-7, 1.0)]
    old = result_row(identical_to_baseline={"equal": 6, "of": 8, "differences": differences})
    assert tables.cell(old, "identical_to_baseline") == "6/8 (1 tie, 1 different)"


def test_a_markdown_table_names_any_keys_and_escapes_bars():
    rows = [result_row("a|b", quality={"exact_match": 0.25}), result_row("c", quality={})]
    text = tables.markdown_table(rows, {"drafter": "who", "speedup": "gain", "quality": "quality"})
    assert text.splitlines() == [
        "| who | gain | quality |",
        "| --- | ---: | ---: |",
        "| a\\|b | 1.50 ± 0.10 | exact_match 0.25 |",
        "| c | 1.50 ± 0.10 | – |",
    ]
    with pytest.raises(UserError, match='did you mean "speedup"'):
        tables.markdown_table(rows, ["speedupp"])


def test_readme_tables_are_replaced_and_nothing_else():
    text = "a\n<!-- table:one -->\nold\n<!-- /table -->\nb\n<!-- table:two --><!-- /table -->\nc\n"
    synced = sync.sync_readme(text, {"one": "| 1 |", "two": "| \\1 |\n"})
    assert synced == (
        "a\n<!-- table:one -->\n| 1 |\n<!-- /table -->\nb\n<!-- table:two -->\n| \\1 |\n<!-- /table -->\nc\n"
    )
    assert sync.sync_readme(synced, {"one": "| 1 |", "two": "| \\1 |\n"}) == synced


def test_missing_readme_markers_are_named():
    with pytest.raises(UserError, match="<!-- table:one -->"):
        sync.sync_readme("nothing here", {"one": "x"})
    unclosed = "<!-- table:one -->\n<!-- table:two -->\n<!-- /table -->"
    with pytest.raises(UserError, match="table:one --> is never closed"):
        sync.sync_readme(unclosed, {"one": "x"})


# --- figures and page


ROWS = [result_row("none", 0, speedup=1.0)] + [
    result_row(drafter, gamma, temperature, 1 + gamma / 10)
    for temperature in (0.0, 1.0)
    for drafter in ("control", "distilled")
    for gamma in (2, 4)
]
STAGES = {
    "target": [{"step": step, "loss": 8.0 / step} for step in range(1, 100)],
    "distilled": [{"step": 1, "loss": 0.5, "acceptance": None}, {"step": 1, "validation_loss": 0.4}],
}
SAMPLE = {
    "prompt": "def <b>",
    "title": "distilled & more",
    "tokens": [("<script>alert(1)</script>", "accepted"), ("\n    x", "recovered"), (" y", "bonus")],
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    results = {"rows": ROWS, "samples": [SAMPLE], "config": {"seed": 0, "note": "</pre>"}}
    sections = page.run_sections(folder / "figures", results, STAGES)
    page.write_report(folder, title="A <title>", environment={"git_commit": "abc"}, sections=sections)
    return folder / "report.html"


@pytest.mark.slow
def test_every_figure_is_saved_for_light_and_dark(report):
    names = sorted(file.name for file in (report.parent / "figures").iterdir())
    figures = ("acceptance", "speedup", "training_loss")
    assert names == sorted(f"{name}{twin}.png" for name in figures for twin in ("", ".dark"))
    assert all((report.parent / "figures" / name).read_bytes()[:4] == b"\x89PNG" for name in names)


def test_the_page_asks_nothing_of_the_network_and_runs_no_script(report):
    html = report.read_text()
    assert not re.search(r"""(?:src|href|srcset|action)\s*=\s*["']?\s*(?:https?:)?//""", html)
    assert not re.search(r"url\(\s*[\"']?(?!data:)", html) and "@import" not in html and "<link" not in html
    assert "<script" not in html
    sources = re.findall(r'(?:src|srcset)="([^"]{22})', html)
    assert len(sources) == 6 and set(sources) == {"data:image/png;base64,"}


def test_the_page_escapes_what_models_and_configs_say(report):
    html = report.read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "A &lt;title&gt;" in html and "def &lt;b&gt;" in html and "distilled &amp; more" in html
    assert html.count("</pre>") == 2


def test_the_page_shows_numbers_and_the_origin_of_every_token(report):
    html = report.read_text()
    assert '<span class="token recovered">\n    x</span><span class="token bonus"> y</span>' in html
    assert "1 accepted, 1 recovered, 1 bonus" in html and "decoded without a draft" not in html
    assert "1.40×" in html and "control, gamma 4" in html
    assert "32 of 32" in html
    assert html.count('<tr class="best">') == 2
    assert "<dt>git commit</dt><dd>abc</dd>" in html
    assert 'name="viewport"' in html and "prefers-color-scheme: dark" in html


def test_an_unknown_origin_is_refused():
    with pytest.raises(ValueError, match="guessed"):
        page.Samples([SAMPLE | {"tokens": [("x", "guessed")]}])


def test_a_run_without_training_or_samples_has_a_shorter_page(tmp_path):
    sections = page.run_sections(tmp_path, {"rows": [ROWS[0]]}, {})
    assert [section.title for section in sections] == ["Results"]
    untimed = [row | {"speedup": None, "speedup_ci": None, "predicted_speedup": None} for row in ROWS]
    sections = page.run_sections(tmp_path, {"rows": untimed}, {})
    assert [section.title for section in sections] == ["Results"]
    assert [file.name for file in tmp_path.glob("*.png") if "dark" not in file.name] == ["acceptance.png"]


def test_the_legend_of_a_figure_names_lossy_rules():
    lossy = result_row(rule="lenient_exp", lenience=0.25)
    names = lambda rows: plots._names(plots._grouped(rows))
    assert names([lossy]) == ["distilled (lenient_exp 0.25, lossy)"]
    assert names([result_row(lenience=None), lossy]) == ["distilled (lossless)", "distilled (lenient_exp 0.25, lossy)"]


def test_figures_without_data_say_so(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.speedup_figure([ROWS[0]], tmp_path / "x.png")
    assert plots.training_figures({"target": [{"step": 1, "loss": None}]}, tmp_path) == []


def test_a_drafter_keeps_its_colour_when_others_are_absent():
    palette = ["control", "distilled", "ngram"]
    alone, together = panels.looks_of(palette, ["ngram"]), panels.looks_of(palette, palette)
    assert alone(panels.LIGHT, "ngram") == together(panels.LIGHT, "ngram")
    assert len({together(panels.DARK, name) for name in palette}) == 3


def test_lines_beyond_the_colours_differ_in_their_markers():
    names = [f"drafter {number}" for number in range(20)]
    look = panels.looks_of((), names)
    assert len({look(panels.LIGHT, name) for name in names}) == 20


def test_the_legend_names_only_what_differs_between_lines():
    rows = [result_row("a", threshold=0.4), result_row("b", threshold=0.6), result_row("b", threshold=0.0)]
    assert plots._names(plots._grouped(rows)) == ["a", "b (threshold 0.6)", "b (threshold 0.0)"]


@pytest.fixture
def drawn(monkeypatch):
    """Figures, collected instead of being saved; the light one of each first."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


@pytest.mark.parametrize("longest", [4, 22, 34, 48])
def test_no_entry_of_a_legend_is_cut_off(drawn, tmp_path, longest):
    rows = [result_row((f"{number}" + 6 * "_adapter")[:longest]) for number in range(5)]
    plots.speedup_figure(rows, tmp_path / "x.png")
    figure = drawn[0]
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert legend.x1 <= figure.bbox.x1
    top = figure.axes[0].title.get_window_extent().y1
    assert top <= legend.y0, "the legend is above the panels"


def test_a_line_that_is_alone_at_a_gamma_is_drawn_at_it(drawn, tmp_path):
    rows = [result_row("a", 2), result_row("a", 4), result_row("b", 4), result_row("c", 3)]
    plots.speedup_figure(rows, tmp_path / "x.png")
    lines = {line.get_label(): line.get_xdata() for line in drawn[0].axes[0].lines}
    np.testing.assert_allclose(lines["a"], [2, 3.975])
    np.testing.assert_allclose(lines["b"], [4.025])
    np.testing.assert_allclose(lines["c"], [3])


def test_a_curve_has_room_above_it_and_whole_numbers_below(drawn, tmp_path):
    panels = {"batch": {"measured": [(1, 1.0), (2, 1.01)]}}
    plots.lines_figure(panels, tmp_path / "x.png", labels=[("x", "y")], from_zero=True)
    axes = drawn[0].axes[0]
    drawn[0].canvas.draw()
    assert axes.get_ylim() == (0, pytest.approx(1.06 * 1.01))
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


@pytest.mark.parametrize(
    "targets, shown",
    [
        (("/runs/a/target/export", "/runs/a/large/export"), ["target/export", "large/export"]),
        (("runs/a/target", "runs/a/target/export"), ["target", "target/export"]),
        (("one", "team/two"), ["one", "team/two"]),
        (("/runs/a", "team/two"), ["/runs/a", "team/two"]),
    ],
)
def test_targets_are_shown_without_the_folder_that_they_share(targets, shown):
    rows = [result_row(target=target) for target in targets]
    assert [line[0] for line in page.results_table(rows).lines] == shown
    assert [row["target"] for row in rows] == list(targets)


def test_the_report_shows_where_time_goes():
    timed = {"compile_seconds": 12.0, "prefill_seconds": 0.5, "decode_seconds": 2.0}
    parts = {"draft_step_seconds": 0.0015, "target_step_seconds": 0.02, "verify_seconds": 0.03, "rule_seconds": 1e-4}
    between = {"draft_step": [0.0014, 0.0016], "verify": None}
    lines = [ROWS[0] | timed, ROWS[1] | timed | parts | {"part_seconds_ci": between}]
    table = page.seconds_table(lines)
    shown = dict(zip([column.heading for column in table.columns], table.lines[1], strict=True))
    assert (shown["compile, s"], shown["prefill, s"], shown["decode, s"]) == ("12", "0.5", "2")
    assert (shown["draft step, ms"], shown["verification, ms"]) == ("1.5 ± 0.1", "30")
    assert table.lines[0][-1] == tables.NOTHING
