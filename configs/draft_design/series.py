"""What a step takes against depth, width, heads, batch, context and gamma: series of shapes, their lines, a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.draft_design.profiling import Case, Point, Profile, line
from specjax import design
from specjax.draft_design import shapes
from specjax.models.config import DecoderConfig
from specjax.reporting import page, plots, records, row_tables
from specjax.runtime import dtypes
from specjax.runtime.errors import UserError

# A series -> what a line is fitted against.
AGAINST = {
    "depth_at_fixed_parameters": ("layers", "width"),
    "width_at_fixed_depth": ("width", "parameters"),
    "heads_at_fixed_width": ("heads",),
    "batch": ("batch",),
    "context": ("context",),
    "verification": ("gamma",),
    "draft_loop": (),
    "published_shapes": (),
}


def base_shape(section: Any) -> DecoderConfig:
    """The decoder that a config's `base` describes."""
    fields = section.to_dict()
    fields["compute_dtype"] = dtypes.compute_dtype(fields["compute_dtype"])
    return DecoderConfig.llama(**fields)


def run(config: Any, workdir: str | Path) -> dict:
    """Runs the study's stage; returns the content of results.json."""
    return design.finish(config, workdir, measured(config, Path(workdir)))


def measured(config: Any, workdir: Path) -> list[dict]:
    """Every series of the config, all cases measured in turns, then the lines through them; writes report.html.

    Raises:
      UserError: for heads that do not divide, a budget that no shape meets, and a profile of another device.
    """
    profile = Profile(config.profile or workdir / "profile.json", memory=config.memory or None)
    base = base_shape(config.base)
    rows: list[dict] = []
    made = [(name, said, case) for name, cases in _series(config, base).items() for said, case in cases]
    points = profile.measure([case for _, _, case in made], config.repeats)
    rows += [_row(*each, point) for each, point in zip(made, points, strict=True)]
    for name, keys in AGAINST.items():
        members = [row for row in rows if row["table"] == name and not row["estimate"]]
        rows += [_line(name, key, members) for key in keys if len({row[key] for row in members}) > 2]
    rows.append({"table": "device", **profile.device, **profile.rates(config.repeats)})
    _report(config, workdir, rows)
    return rows


def _series(config: Any, base: DecoderConfig) -> dict[str, list[tuple[dict, Case]]]:
    """The cases of each series, each with what it is called by."""
    case = lambda shape, **how: Case(shape, **{"steps": config.steps, "context": config.context, **how})
    at_depth = lambda layers: shapes.at_parameters(base, layers, config.parameters)
    middle = at_depth(config.depth)
    found = {
        "depth_at_fixed_parameters": [({}, case(at_depth(layers))) for layers in config.depths],
        "width_at_fixed_depth": [({}, case(_wide(base, config.depth, width))) for width in config.widths],
        "heads_at_fixed_width": [({}, case(_with_heads(middle, heads))) for heads in config.heads],
        "batch": [({"batch": size}, case(middle, batch=size)) for size in config.batch_sizes],
        "context": [({"context": length}, case(middle, context=length)) for length in config.contexts],
        "verification": [({"gamma": gamma}, case(at_depth(config.depth), tokens=gamma + 1)) for gamma in config.gammas],
        "draft_loop": [({"steps_a_dispatch": steps}, case(middle, steps=steps)) for steps in config.dispatches],
        "published_shapes": [({"draft": name}, case(shapes.preset(name))) for name in config.published],
    }
    return {name: cases for name, cases in found.items() if cases}


def _wide(base: DecoderConfig, layers: int, width: int) -> DecoderConfig:
    heads = shapes.heads_of(width, base.head_size)
    group = base.heads // base.kv_heads
    inner = shapes.rounded(width * base.mlp_width / base.width)
    return shapes.reshaped(base, layers=layers, width=width, heads=heads, kv_heads=heads // group, mlp_width=inner)


def _with_heads(shape: DecoderConfig, heads: int) -> DecoderConfig:
    """The same width, cut into more or fewer heads, with as many query heads a key head (rounded, one at least)."""
    inner = shape.heads * shape.head_size
    kv_heads = max(1, heads * shape.kv_heads // shape.heads)
    if inner % heads:
        raise UserError(f"a width of {inner} does not divide into {heads} heads; take a number of heads that does")
    return shapes.reshaped(shape, heads=heads, kv_heads=kv_heads, head_size=inner // heads)


def _row(name: str, said: dict, case: Case, point: Point) -> dict:
    shape = case.shape
    return {
        "table": name,
        **said,
        **{key: getattr(shape, key) for key in ("layers", "width", "heads", "mlp_width")},
        "parameters": shapes.parameters(shape),
        "milliseconds": 1e3 * point.seconds,
        "spread": point.spread,
        "estimate": point.estimate,
        "weight_mebibytes": shapes.weight_bytes(shape) / 2**20,
        "kv_mebibytes": shapes.kv_bytes(shape, case.context, case.batch) / 2**20,
    }


def _line(name: str, key: str, members: Sequence[Mapping]) -> dict:
    at, seconds = [row[key] for row in members], [row["milliseconds"] for row in members]
    found = line(at, seconds)
    return {
        "table": "lines",
        "series": name.replace("_", " "),
        "against": key,
        "points": len(members),
        "milliseconds_for_one_more": found["slope"],
        "r_squared": found["r_squared"],
        "slowest_over_fastest": max(seconds) / min(seconds),
    }


def _report(config: Any, workdir: Path, rows: list[dict]) -> None:
    """report.html with a figure of every series that has a line, and all tables."""
    grouped: dict[str, list[dict]] = {}
    for row in rows:
        grouped.setdefault(row["table"], []).append(row)
    drawn = []
    for name in (name for name, keys in AGAINST.items() if keys and name in grouped):
        path, key = workdir / "figures" / f"{name}.png", AGAINST[name][0]
        points = [(row[key], row["milliseconds"]) for row in grouped[name]]
        title = name.replace("_", " ")
        plots.lines_figure({title: {"measured": points}}, path, x_label=key, y_label="milliseconds a step")
        drawn.append(page.Figure(path, f"Milliseconds of a decoding step: {title}."))
    _write(config, workdir, "What a decoding step takes", [page.Section("Latency", [page.Figures(drawn)])], rows)


def _write(config: Any, workdir: Path, title: str, sections: list, rows: list[dict]) -> None:
    page.write_report(
        workdir / "report.html",
        title=title,
        subtitle=workdir.name,
        environment=records.environment(config.seed),
        sections=sections + [page.Section(*each) for each in row_tables.page_tables(rows)],
    )
