"""Makes tables from result rows, for the terminal, for Markdown and for the README, without side effects."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from specjax.reporting import metrics
from specjax.runtime.errors import UserError, nearest

NOTHING = "–"
SETTINGS = ("task", "target", "rule", "lenience", "threshold", "top_k", "top_p", "batch_size", "max_new_tokens", "seed")
SUMMARY = (
    "drafter",
    "temperature",
    "gamma",
    "block_efficiency",
    "acceptance_rate",
    "tokens_per_second",
    "speedup",
    "predicted_speedup",
    "identical_to_baseline",
)
# Columns of the table by concurrency, as `concurrency` makes its rows; the numbers are those of a row's `serving`.
_SERVING = (
    "output_throughput",
    "speedup",
    "mean_ttft_ms",
    "mean_tpot_ms",
    "mean_acceptance_length",
    "draft_acceptance_rate",
    "per_position_acceptance_rates",
    "acceptance_by_position",
    "acceptance_histogram",
)
_PERCENT = ("per_position_acceptance_rates", "acceptance_by_position")
HEADINGS = {
    "temperature": "T",
    "acceptance_rate": "acceptance",
    "tokens_per_second": "tok/s",
    "baseline_tokens_per_second": "plain tok/s",
    "speedup": "speed-up",
    "predicted_speedup": "predicted",
    "identical_to_baseline": "identical",
    "compile_seconds": "compile, s",
    "prefill_seconds": "prefill, s",
    "decode_seconds": "decode, s",
    "output_throughput": "output tok/s",
    "mean_ttft_ms": "TTFT, ms",
    "mean_tpot_ms": "TPOT, ms",
    "mean_acceptance_length": "acceptance length",
    "draft_acceptance_rate": "draft acceptance",
    "per_position_acceptance_rates": "by position, unconditional, %",
    "acceptance_by_position": "by position, conditional, %",
    "acceptance_histogram": "calls by accepted tokens",
}


def summary_table(rows: Sequence[Mapping]) -> str:
    """A table of main metrics for the terminal, with a column for each setting in which the rows differ."""
    return aligned_table(rows, summary_columns(rows))


def concurrency(rows: Sequence[Mapping]) -> list[dict]:
    """The rows of a table by concurrency, the batch size, with the numbers of serving engines; [] for one batch size.

    Unconditional acceptance by position is of all target calls; conditional, of those that accepted all earlier tokens.
    """
    if len({row["batch_size"] for row in rows}) < 2:
        return []
    flat = [row | row["serving"] | {"concurrency": row["batch_size"], "rule": rule_label(row)} for row in rows]
    keys = ("concurrency", "drafter", *varying(flat, ("task", "rule", "temperature")), "gamma", *_SERVING)
    return [{key: row[key] for key in keys} for row in flat]


def aligned_table(rows: Sequence[Mapping], columns: Sequence[str]) -> str:
    """A table for the terminal: words aligned left, numbers right."""
    cells = [[heading(key) for key in columns], *([cell(row, key) for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    pads = [str.ljust if is_text(rows, key) else str.rjust for key in columns]
    lines = [
        "  ".join(pad(text, width) for pad, text, width in zip(pads, line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown_table(rows: Sequence[Mapping], columns: Sequence[str] | Mapping[str, str]) -> str:
    """A Markdown table. `columns` are keys of the rows, or a mapping from keys to headings.

    Raises UserError for a column that no row has.
    """
    keys = list(columns)
    known = sorted({key for row in rows for key in row})
    for key in keys:
        if rows and key not in known:
            raise UserError(f'no row has the column "{key}"{nearest(key, known)}')
    titles = [columns[key] if isinstance(columns, Mapping) else heading(key) for key in keys]
    rules = ["---" if is_text(rows, key) else "---:" for key in keys]
    lines = [titles, rules, *([cell(row, key) for key in keys] for row in rows)]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def summary_columns(rows: Sequence[Mapping]) -> list[str]:
    """Keys of the settings in which these rows differ, and of their main metrics."""
    settings = {*varying(rows, SETTINGS), *(["rule"] if any(map(is_lossy, rows)) else [])}
    scored = ["quality"] if any(row.get("quality") for row in rows) else []
    return [*(key for key in SETTINGS if key in settings and key != "lenience"), *SUMMARY, *scored]


def rule_label(row: Mapping) -> str:
    """The name of the row's rule; for a lossy rule with its lenience and the word "lossy"."""
    return f"{row['rule']} {row['lenience']:g}, lossy" if is_lossy(row) else row["rule"]


def is_lossy(row: Mapping) -> bool:
    """Whether the row's rule changes the target's distribution; only such rows have a lenience."""
    return row.get("lenience") is not None


def varying(rows: Iterable[Mapping], keys: Iterable[str]) -> list[str]:
    """The keys for which the rows do not all have the same value."""
    rows = list(rows)
    return [key for key in keys if len({repr(row.get(key)) for row in rows}) > 1]


def short_targets(rows: Sequence[Mapping]) -> list[Mapping]:
    """The rows with `target` replaced by its path relative to the folder that contains all targets."""
    targets = {row["target"] for row in rows if row.get("target")}
    if len(targets) < 2 or len(set(map(os.path.isabs, targets))) > 1:
        return list(rows)
    folder = os.path.commonpath([os.path.dirname(target) for target in targets])
    short = lambda row: {"target": os.path.relpath(row["target"], folder or ".")} if row.get("target") else {}
    return [{**row, **short(row)} for row in rows]


def heading(key: str) -> str:
    return HEADINGS.get(key, key.replace("_", " "))


def is_text(rows: Sequence[Mapping], key: str) -> bool:
    """Whether a column contains words, which are aligned left, instead of numbers."""
    return any(isinstance(row.get(key), str) for row in rows)


def cell(row: Mapping, key: str) -> str:
    """A value of a row as text, with half the width of its 95% interval if the row has one; a dash for None."""
    value = row.get(key)
    if value is None:
        return NOTHING
    if key == "rule":
        return rule_label(row)
    if key == "identical_to_baseline":
        return f"{value['equal']}/{value['of']}" + (f" ({differences_text(value)})" if value["differences"] else "")
    if key in _PERCENT and value:
        return " ".join(NOTHING if share is None else f"{100 * share:.0f}" for share in value)
    if key in ("block_efficiency", "acceptance_rate", "speedup", "predicted_speedup"):
        low_high = row.get(f"{key}_ci")
        return f"{value:.2f}" + (f" ± {(low_high[1] - low_high[0]) / 2:.2f}" if low_high else "")
    return _plain(value)


def differences_text(identical: Mapping) -> str:
    """The numbers of ties and of true differences, such as "2 ties, 1 different"."""
    ties, different = metrics.count_differences(identical)
    parts = [f"{ties} tie{'s' * (ties > 1)}"] * bool(ties) + [f"{different} different"] * bool(different)
    return ", ".join(parts)


def _plain(value: Any) -> str:
    if value is None or value in ({}, [], ()):
        return NOTHING
    match value:
        case bool():
            return "yes" if value else "no"
        case float() if abs(value) >= 100:
            return f"{value:.0f}"
        case float():
            return f"{value:.3g}"
        case Mapping():
            return re.sub(r"\s+", " ", ", ".join(f"{name} {_plain(item)}" for name, item in value.items()))
        case list() | tuple():
            return " ".join(_plain(item) for item in value)
    return str(value)
