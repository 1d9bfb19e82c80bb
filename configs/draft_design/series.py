"""The time of a decoding step by depth, width, heads, batch, context and gamma: series, their lines, a report."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from configs.draft_design.paper_check import preset
from configs.draft_design.profiling import Profile, StepCase, columns
from specjax import design
from specjax.draft_design import shapes
from specjax.models.config import DecoderConfig
from specjax.reporting import page, plots, records, row_tables
from specjax.runtime import dtypes
from specjax.runtime.errors import UserError

# {series: the columns that a line is fitted against}
AGAINST = {
    "depth_at_fixed_parameters": ("layers", "width"),
    "width_at_fixed_depth": ("width", "parameters"),
    "heads_at_fixed_width": ("heads",),
    "batch": ("batch",),
    "context": ("context",),
    "verification": ("gamma",),
}


def run(config: Any, workdir: str | Path) -> dict:
    """Runs the profile; returns the content of results.json."""
    return design.finish(config, workdir, measured(config, Path(workdir)))


def measured(config: Any, workdir: Path) -> list[dict]:
    """Measures every series of the config in turns and fits their lines; writes report.html, returns all rows.

    Raises:
      UserError: for heads that do not divide the width, a budget that no shape meets, and a profile of another device.
    """
    profile = Profile(config.profile or workdir / "profile.json", memory=config.memory or None)
    cases = list(_cases(config))
    points = profile.measure([case for *_, case in cases], config.repeats)
    rows = [
        {"table": series, **named, **columns(case, point)}
        for (series, named, case), point in zip(cases, points, strict=True)
    ]
    lines = [_line(rows, name, key) for name, keys in AGAINST.items() for key in keys]
    rows += [fitted for fitted in lines if fitted is not None]
    rows.append({"table": "device", **profile.device, **profile.rates(config.repeats)})
    figures = []
    for name, (key, *_) in AGAINST.items():
        at = [(row[key], row["milliseconds"]) for row in rows if row["table"] == name]
        path, title = workdir / "figures" / f"{name}.png", name.replace("_", " ")
        if at:
            labels = [(key, "milliseconds per step")]
            plots.lines_figure({title: {"measured": sorted(at)}}, path, labels=labels, from_zero=True)
            figures.append(page.Figure(path, f"Milliseconds of a decoding step: {title}."))
    page.write_report(
        workdir,
        title="What a decoding step takes",
        environment=records.environment(config.seed),
        sections=[page.Section("Latency", [page.Figures(figures)]), *row_tables.sections(rows)],
    )
    return rows


def _cases(config: Any) -> Iterator[tuple[str, dict, StepCase]]:
    """(series, columns that name the case, case) of everything to measure."""
    compute_dtype = dtypes.compute_dtype(config.base.compute_dtype)
    base = DecoderConfig.llama(**{**config.base.to_dict(), "compute_dtype": compute_dtype})
    at_depth = lambda layers: shapes.at_parameters(base, layers, config.parameters)
    middle = at_depth(config.depth)
    case = lambda shape, **how: StepCase(shape, **{"steps": config.steps, "context": config.context, **how})
    for layers in config.depths:
        yield "depth_at_fixed_parameters", {}, case(at_depth(layers))
    for width in config.widths:
        yield "width_at_fixed_depth", {}, case(_wide(base, config.depth, width))
    for heads in config.heads:
        yield "heads_at_fixed_width", {}, case(_with_heads(middle, heads))
    for size in config.batch_sizes:
        yield "batch", {"batch": size}, case(middle, batch=size)
    for length in config.contexts:
        yield "context", {"context": length}, case(middle, context=length)
    for gamma in config.gammas:
        yield "verification", {"gamma": gamma}, case(middle, tokens=gamma + 1)
    for steps in config.dispatches:
        yield "draft_loop", {"steps_a_dispatch": steps}, case(middle, steps=steps)
    for name in config.published:
        yield "published_shapes", {"draft": name}, case(preset(name))


def _wide(base: DecoderConfig, layers: int, width: int) -> DecoderConfig:
    if width % base.head_size:
        raise UserError(f"a width of {width} does not divide into heads of {base.head_size}; use a multiple")
    heads = width // base.head_size
    kv_heads = heads // (base.heads // base.kv_heads)
    inner = shapes.rounded(width * base.mlp_width / base.width)
    return shapes.reshaped(base, layers=layers, width=width, heads=heads, kv_heads=kv_heads, mlp_width=inner)


def _with_heads(shape: DecoderConfig, heads: int) -> DecoderConfig:
    """The same width, split into more or fewer heads, with the same ratio of query heads to key heads if possible."""
    inner = shape.heads * shape.head_size
    if inner % heads:
        raise UserError(f"a width of {inner} does not divide into {heads} heads; take a number of heads that does")
    kv_heads = max(1, heads * shape.kv_heads // shape.heads)
    return shapes.reshaped(shape, heads=heads, kv_heads=kv_heads, head_size=inner // heads)


def _line(rows: list[dict], series: str, key: str) -> dict | None:
    """The least-squares line of a series' milliseconds by a column; None with fewer than three values of the column."""
    members: list[Mapping] = [row for row in rows if row["table"] == series and not row["estimate"]]
    at, milliseconds = [row[key] for row in members], [row["milliseconds"] for row in members]
    if len(set(at)) < 3:
        return None
    correlation = float(np.corrcoef(at, milliseconds)[0, 1]) if len(set(milliseconds)) > 1 else 1.0
    return {
        "table": "lines",
        "series": series.replace("_", " "),
        "against": key,
        "points": len(members),
        "milliseconds_for_one_more": float(np.polyfit(at, milliseconds, 1)[0]),
        "r_squared": correlation**2,
        "slowest_over_fastest": max(milliseconds) / min(milliseconds),
    }
