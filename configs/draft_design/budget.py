"""Shapes of drafts for a target at a budget."""

from pathlib import Path
from typing import Any

from configs.draft_design import profiling as profile
from specjax import design
from specjax.draft_design import advice, shapes
from specjax.hub import load as hub_load
from specjax.models.decoder import Decoder
from specjax.runtime.errors import UserError


def run(config: Any, workdir: str | Path) -> dict:
    """Runs the study's stage; returns the content of results.json."""
    return design.finish(config, workdir, build(config, Path(workdir)))


def build(config: Any, workdir: Path) -> list[dict]:
    """Shapes of drafts for a target at a budget: of parameters, or of milliseconds a step on this device."""
    if not config.target:
        raise UserError("config.target is empty; give --config.target=DIR")
    if bool(config.parameters) == bool(config.milliseconds):
        raise UserError("a budget is either parameters or milliseconds; set one of them, and the other to 0")
    dtypes = {"param_dtype": config.param_dtype, "compute_dtype": config.compute_dtype}
    _, like = hub_load.read_config(Path(config.target), **dtypes)
    sizes = (config.parameters,) if config.parameters else config.sizes
    like = shapes.plain_llama(like)
    found = [shapes.at_parameters(like, layers, size) for layers in config.layers for size in sizes]
    store = profile.Profile(config.profile or workdir / "profile.json")
    cases = [profile.Case(shape, context=config.context, batch=config.batch_size) for shape in found]
    points = dict(zip(found, store.measure(cases, config.repeats), strict=True))
    fastest = min(found, key=lambda shape: points[shape].seconds)
    seconds_of = lambda shape: points[shape].seconds
    chosen = shapes.within_seconds(found, seconds_of, config.milliseconds / 1e3) if config.milliseconds else fastest
    rows = [
        {
            "table": "shapes",
            **{key: getattr(shape, key) for key in ("layers", "width", "heads", "mlp_width")},
            "parameters": shapes.parameters(shape),
            "milliseconds": 1e3 * point.seconds,
            "spread": point.spread,
            "estimate": point.estimate,
            "kv_mebibytes": shapes.kv_bytes(shape, config.context, config.batch_size) / 2**20,
            "chosen": shape == chosen,
        }
        for shape, point in points.items()
    ]
    named = advice.Candidate(f"{chosen.layers}x{chosen.width}", Decoder(chosen), {}, {}, False)
    return [*rows, {"table": "to_train_it", "command": advice.command(config.target, config.task, {}, named)}]
