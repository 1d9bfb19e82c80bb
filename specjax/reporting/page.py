"""Writes report.html: a self-contained page without network requests, for wide and narrow, light and dark screens.

A page has sections, and a section has blocks (`Cards`, `Table`, `Figures`, `Samples`, `Details`), each rendered by the
template page.html. `run_sections` makes the usual sections from the records of a run.
"""

import base64
import collections
import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from specjax.reporting import metrics, panels, plots, records, tables
from specjax.reporting.records import json_clean
from specjax.runtime.files import write_atomically

ORIGINS = {
    "prompt": "given",
    "accepted": "drafted, and accepted by the target",
    "recovered": "sampled by the target after a rejection",
    "bonus": "sampled by the target after all drafted tokens, if any, were accepted",
    "plain": "decoded without a draft",
}
# Columns of the parts of a block.
_PARTS = {
    "draft_step": "draft step, ms",
    "target_step": "target step, ms",
    "verify": "verification, ms",
    "rule": "rule, ms",
}
# Figures that would have more lines than this are left out, because they would be unreadable.
MOST_LINES = 24


@dataclasses.dataclass(frozen=True)
class Card:
    """One headline number."""

    label: str
    value: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Cards:
    cards: Sequence[Card]


@dataclasses.dataclass(frozen=True)
class Column:
    heading: str
    text: bool
    """Whether cells are words, aligned left, instead of numbers, aligned right."""


@dataclasses.dataclass(frozen=True)
class Table:
    columns: Sequence[Column]
    lines: Sequence[Sequence[str]]
    best: frozenset[int] = frozenset()
    """Indices of the lines to highlight."""
    marks: Mapping[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    """The colour of the cells at these lines and columns: "tie", or "different" for text that must not differ."""
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    path: Path
    """A PNG file; on dark screens its dark version (see `panels.dark_twin`) is shown if it exists."""
    caption: str


@dataclasses.dataclass(frozen=True)
class Figures:
    figures: Sequence[Figure]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Generated texts in which each token has the colour of its origin.

    A sample is `{"prompt": str, "title": str, "tokens": [(text, origin), ...]}`. Raises ValueError for an origin that
    is not a key of `ORIGINS`.
    """

    samples: Sequence[Mapping]

    def __post_init__(self):
        unknown = {origin for sample in self.samples for _, origin in sample["tokens"]} - ORIGINS.keys()
        if unknown:
            raise ValueError(f"tokens come from {', '.join(ORIGINS)}, not from {', '.join(sorted(unknown))}")

    @property
    def legend(self) -> dict[str, str]:
        """The origins that occur in the samples, in the order of `ORIGINS`, with their meanings."""
        present = {origin for sample in self.samples for _, origin in sample["tokens"]}
        return {origin: meaning for origin, meaning in ORIGINS.items() if origin in present}


@dataclasses.dataclass(frozen=True)
class Details:
    """A mapping shown as JSON, collapsed until the reader opens it."""

    title: str
    content: Mapping


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Cards | Table | Figures | Samples | Details]
    intro: str = ""


def write_report(workdir: Path, *, title: str, environment: Mapping, sections: Sequence[Section]) -> None:
    """Renders the sections with page.html, writes report.html of a run atomically, and prints its path."""
    import jinja2

    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    engine.filters.update(data_uri=_data_uri, pretty=_pretty, tally=_tally, kind=lambda block: type(block).__name__)
    engine.tests["present"] = lambda file: Path(file).is_file()
    template = engine.from_string(resources.files("specjax.reporting").joinpath("page.html").read_text("utf-8"))
    names = {"title": title, "subtitle": workdir.name, "environment": json_clean(environment), "sections": sections}
    path = workdir / "report.html"
    write_atomically(path, template.render(**names, dark_twin=panels.dark_twin))
    print(f"report: {path}")


def run_sections(figures: Path, results: Mapping, stages: Mapping[str, Sequence[Mapping]]) -> list[Section]:
    """The usual sections of a run; those without data are left out.

    Args:
      figures: folder in which speedup.png, acceptance.png and training_*.png are written.
      results: the content of a results.json; its rows, comparisons, samples and config are shown.
      stages: lines of metrics.jsonl by training stage.
    """
    rows = [row for row in results["rows"] if "drafted_tokens" in row]
    sections = []
    drafted = [row for row in rows if row["gamma"] > 0 and row["drafted_tokens"]]
    timed = [row for row in drafted if row["speedup"] is not None]
    palette = list(dict.fromkeys([*(row["drafter"] for row in drafted), *stages]))
    few = len(palette) <= MOST_LINES
    if timed:
        sections.append(Section("At a glance", [Cards(headline(rows))]))
    if rows:
        drawn = []
        if timed and few:
            plots.speedup_figure(timed, figures / "speedup.png", palette=palette)
            caption = "Speed-up over plain decoding, with 95% intervals; dashed, predicted from the parts."
            drawn.append(Figure(figures / "speedup.png", caption))
        if drafted and few:
            plots.acceptance_figure(drafted, figures / "acceptance.png", palette=palette)
            caption = "How often a drafted token is accepted once its position is reached, at the largest gamma."
            drawn.append(Figure(figures / "acceptance.png", caption))
        table = results_table(rows)
        sections.append(Section("Results", [Figures(drawn), table] if drawn else [table]))
    if results.get("concurrency"):
        intro = "Texts decoded together, with the numbers that serving engines report."
        table = rows_table(results["concurrency"], list(results["concurrency"][0]))
        sections.append(Section("By concurrency", [table], intro))
    if any(row.get("decode_seconds") for row in rows):
        sections.append(Section("Where time goes", [seconds_table(rows)]))
    if results.get("comparisons"):
        intro = "Block efficiency on the same prompts; 95% intervals by paired bootstrap over prompts."
        sections.append(Section("Compared, prompt by prompt", [comparison_table(results["comparisons"])], intro))
    curves = plots.training_figures(stages, figures, palette=palette) if few else []
    if curves:
        captioned = [Figure(path, f"{path.stem.replace('_', ' ').capitalize()} by step.") for path in curves]
        intro = "Running means over raw values; dashed, held-out data. Each stage counts its own steps."
        sections.append(Section("Training", [Figures(captioned)], intro))
    if results.get("samples"):
        intro = "Every token in the colour of where it came from."
        sections.append(Section("Samples", [Samples(results["samples"])], intro))
    if "config" in results:
        sections.append(Section("Settings", [Details("Config", results["config"])]))
    return sections


def write_run(
    workdir: Path, results: Mapping, stages: Mapping[str, Sequence[Mapping]], more: Sequence[Section] = ()
) -> None:
    """Writes report.html and figures/ from a run's results and the metrics of its training stages.

    Args:
      more: further sections, shown after the headline.
    """
    sections = run_sections(workdir / "figures", results, stages)
    sections[1:1] = more
    title = "Speculative decoding, measured"
    write_report(workdir, title=title, environment=results["environment"], sections=sections)


def write_run_report(workdir: Path, config: Any) -> None:
    """Writes the report of a run with several stages: its results, and the training curves of every stage."""
    write_run(workdir, run_results(workdir, config), training_curves(workdir, config))


def run_results(workdir: Path, config: Any) -> dict:
    """The run's results.json, with keys that only the last stage's file has, such as samples, added."""
    last = records.read_results(workdir / config.stages[-1] / "results.json")
    return last | records.read_results(workdir / "results.json")


def training_curves(workdir: Path, config: Any) -> dict[str, list[dict]]:
    """The lines of metrics.jsonl by stage, for stages that have this file."""
    paths = {name: workdir / name / "metrics.jsonl" for name in config.stages}
    return {name: records.read_metrics(path) for name, path in paths.items() if path.exists()}


def comparison_table(comparisons: Sequence[Mapping]) -> Table:
    """A table of `metrics.comparisons`: paired differences and ratios of block efficiency."""
    between = lambda ends: "" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]"
    measures = {"difference": ("block_efficiency_difference", "+.2f"), "ratio": ("block_efficiency_ratio", ".2f")}
    texts = lambda row: {
        name: f"{row[key]:{form}}{between(row[f'{key}_ci'])}" for name, (key, form) in measures.items()
    }
    several = len({row.get("batch_size") for row in comparisons}) > 1
    keys = (*(("batch_size",) if several else ()), "drafter", "against", "rule", "temperature", "gamma", *measures)
    return rows_table([row | texts(row) for row in comparisons], keys)


def headline(rows: Sequence[Mapping]) -> list[Card]:
    """Cards with the best speed-up per temperature (lossy rules separately), prediction error, and equal outputs."""
    timed = [row for row in rows if row["gamma"] > 0 and row["speedup"] is not None]
    cards = []
    for lossy, temperature in sorted({(tables.is_lossy(row), row["temperature"]) for row in timed}):
        group = [row for row in timed if (tables.is_lossy(row), row["temperature"]) == (lossy, temperature)]
        best = max(group, key=lambda row: row["speedup"])
        under = f", {tables.rule_label(best)}" if lossy else ""
        interval = best["speedup_ci"]
        spread = f", 95% interval {interval[0]:.2f}–{interval[1]:.2f}" if interval else ""
        note = f"{best['drafter']}{under}, gamma {best['gamma']}{spread}"
        title = f"temperature {temperature:g}{', lossy' if lossy else ''}"
        cards.append(Card(f"Best speed-up, {title}", f"{best['speedup']:.2f}×", note))
        per_call = f"of at most {best['gamma'] + 1}, by {best['drafter']}{under}"
        cards.append(Card(f"Tokens per target call, {title}", f"{best['block_efficiency']:.2f}", per_call))
    ratios = sorted(row["speedup"] / row["predicted_speedup"] for row in timed if row.get("predicted_speedup"))
    if ratios:
        note = f"median of {len(ratios)} settings, {ratios[0]:.2f} to {ratios[-1]:.2f}"
        cards.append(Card("Measured / predicted", f"{statistics.median(ratios):.2f}", note))
    compared = [row["identical_to_baseline"] for row in rows if row["gamma"] > 0 and row.get("identical_to_baseline")]
    if compared:
        equal, total = (sum(result[key] for result in compared) for key in ("equal", "of"))
        differences = [difference for result in compared for difference in result["differences"]]
        note = "token for token as without a draft"
        if differences:
            note += f"; {tables.differences_text({'differences': differences})}, listed in results.json"
        cards.append(Card("Identical outputs", f"{equal} of {total}", note))
    return cards


def results_table(rows: Sequence[Mapping]) -> Table:
    """A table of all rows, in which the fastest lossless row at each temperature is highlighted."""
    keys = tables.summary_columns(rows)
    exact = [
        i for i, row in enumerate(rows) if row["gamma"] and row["speedup"] is not None and not tables.is_lossy(row)
    ]
    best: dict[tuple, int] = {}
    for i in sorted(exact, key=lambda i: rows[i]["speedup"]):
        best[rows[i].get("task"), rows[i]["temperature"]] = i
    caption = "± is half the 95% bootstrap interval. Marked: the fastest at each temperature."
    if any(map(tables.is_lossy, rows)):
        caption += " Lossy rows do not follow the target's distribution and are never marked."
    return rows_table(tables.short_targets(rows), keys, best=frozenset(best.values()), caption=caption)


def seconds_table(rows: Sequence[Mapping]) -> Table:
    """A table of the seconds of each row, and of the milliseconds of a block's parts where they were measured."""
    parts = [name for name in _PARTS if any(row.get(f"{name}_seconds") is not None for row in rows)]
    lines = []
    for row in rows:
        cells = {}
        for name in parts:
            value, between = row.get(f"{name}_seconds"), (row.get("part_seconds_ci") or {}).get(name)
            spread = f" ± {500 * (between[1] - between[0]):.2g}" if between else ""
            cells[_PARTS[name]] = None if value is None else f"{1000 * value:.3g}{spread}"
        lines.append(row | cells)
    keys = [key for key in tables.summary_columns(rows) if key not in (*tables.SUMMARY, "quality")]
    keys += ["drafter", "temperature", "gamma", "compile_seconds", "prefill_seconds", "decode_seconds"]
    caption = "Compiling, or loading from the cache, is in no other seconds."
    if parts:
        caption += " The target's call is the rest of a block of this run; drafting and rule were timed separately."
    numbers = [_PARTS[name] for name in parts]
    return rows_table(tables.short_targets(lines), [*keys, *numbers], numbers=numbers, caption=caption)


def rows_table(rows: Sequence[Mapping], keys: Sequence[str], *, numbers: Sequence[str] = (), **more: Any) -> Table:
    """A table with a line for each row and a column for each key.

    Args:
      numbers: keys of numbers that the rows have as text.
      more: further fields of `Table`.
    """
    columns = [Column(tables.heading(key), key not in numbers and tables.is_text(rows, key)) for key in keys]
    marks = {}
    for place, row in enumerate(rows):
        identical = row.get("identical_to_baseline")
        if "identical_to_baseline" in keys and identical and identical["differences"]:
            different = metrics.count_differences(identical)[1] > 0
            marks[place, list(keys).index("identical_to_baseline")] = "different" if different else "tie"
    return Table(columns, [[tables.cell(row, key) for key in keys] for row in rows], marks=marks, **more)


def _data_uri(path: str | Path) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode("ascii")


def _pretty(content: Mapping) -> str:
    return json.dumps(json_clean(content), indent=2, ensure_ascii=False)


def _tally(sample: Mapping) -> str:
    """The number of tokens by origin as text, such as "72 accepted, 9 bonus"."""
    counts = collections.Counter(origin for _, origin in sample["tokens"])
    return ", ".join(f"{counts[origin]} {origin}" for origin in ORIGINS if counts[origin] and origin != "prompt")
