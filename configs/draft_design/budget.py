"""Shapes of drafts for a target at a budget of parameters, or of milliseconds per step on this device."""

from pathlib import Path
from typing import Any

from configs.draft_design import profiling
from specjax import design
from specjax.draft_design import advice, shapes
from specjax.hub import load as hub_load
from specjax.models.decoder import Decoder
from specjax.runtime.errors import UserError


def run(config: Any, workdir: str | Path) -> dict:
    """Runs `build`; returns the content of results.json."""
    return design.finish(config, workdir, build(config, Path(workdir)))


def build(config: Any, workdir: Path) -> list[dict]:
    """A row for each timed shape, with the one to choose, and the command that trains it.

    Raises:
      UserError: without a target, with both budgets or none, and if no shape meets the budget.
    """
    if not config.target:
        raise UserError("config.target is empty; give --config.target=DIR")
    if bool(config.parameters) == bool(config.milliseconds):
        raise UserError("a budget is either parameters or milliseconds; set one of them, and the other to 0")
    dtypes = {"param_dtype": config.param_dtype, "compute_dtype": config.compute_dtype}
    like = shapes.plain_llama(hub_load.read_config(config.target, **dtypes)[1])
    sizes = (config.parameters,) if config.parameters else config.sizes
    candidates = [shapes.at_parameters(like, layers, size) for layers in config.layers for size in sizes]
    cases = [profiling.StepCase(shape, context=config.context, batch=config.batch_size) for shape in candidates]
    points = profiling.Profile(config.profile or workdir / "profile.json").measure(cases, config.repeats)
    seconds = {case.shape: point.seconds for case, point in zip(cases, points, strict=True)}
    chosen = min(candidates, key=seconds.__getitem__)
    if config.milliseconds:
        fitting = [shape for shape in candidates if seconds[shape] <= config.milliseconds / 1e3]
        if not fitting:
            raise UserError(
                f"no shape takes at most {config.milliseconds:.3g} ms per step (the fastest takes "
                f"{1e3 * seconds[chosen]:.3g}); allow more time, or offer smaller shapes"
            )
        chosen = max(fitting, key=shapes.parameters)
    rows = [
        {"table": "shapes", **profiling.columns(case, point), "chosen": case.shape == chosen}
        for case, point in zip(cases, points, strict=True)
    ]
    named = advice.Candidate(f"{chosen.layers}x{chosen.width}", Decoder(chosen), {}, {}, False)
    return [*rows, {"table": "to_train_it", "command": advice.command(config.target, config.task, {}, named)}]
