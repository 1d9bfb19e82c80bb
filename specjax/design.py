"""Which draft to build: latency profiles, the throughput model, pruning, studies and advice, each an action.

    python -m specjax.design --config=FILE --workdir=DIR [--config.section.key=value ...]

`config.action` names what is done; its rows go to results.json and its tables to the terminal.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from specjax.draft_design import series, shapes, throughput
from specjax.reporting import design_tables, records
from specjax.runtime import cli
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError, nearest


def run(config: Any, workdir: str | Path) -> dict:
    """Does what the config's `action` says; returns the content of results.json.

    Raises:
      UserError: for an action that does not exist, and whatever the action refuses.
    """
    if config.action not in ACTIONS:
        raise UserError(f'there is no action "{config.action}"{nearest(config.action, ACTIONS)}')
    rows = ACTIONS[config.action](config, Path(workdir))
    path = Path(workdir) / "results.json"
    records.write_results(path, binary="design", config=configs.to_plain(config), rows=rows)
    results = records.read_results(path)
    print(design_tables.terminal(results["rows"]), flush=True)
    return results


def published(config: Any, workdir: Path) -> list[dict]:
    """The model on the paper's own rows, and parameters and caches of its shapes.

    A check of arithmetic: gamma and the target's seconds are not printed in the paper, they are what makes both rows
    come out.
    """
    del workdir
    rows = []
    for name, block_efficiency, draft_step, tokens_per_second in config.published:
        costs = throughput.Costs(draft_step, (config.target_seconds,) * (config.gamma + 1))
        computed = block_efficiency / costs.block(config.gamma)
        rows.append(
            {
                "table": "consistency",
                "draft": name,
                "block_efficiency": block_efficiency,
                "draft_step_seconds": draft_step,
                "gamma": config.gamma,
                "target_seconds": config.target_seconds,
                "computed_tokens_per_second": computed,
                "published_tokens_per_second": tokens_per_second,
                "off_by": computed / tokens_per_second - 1,
            }
        )
    for name in config.shapes:
        shape = shapes.preset(name)
        rows.append(
            {
                "table": "shapes",
                "draft": name,
                **{key: getattr(shape, key) for key in ("layers", "width", "heads", "mlp_width")},
                "parameters": shapes.parameters(shape),
                "context": config.context,
                "kv_mebibytes": shapes.kv_bytes(shape, config.context) / 2**20,
            }
        )
    return rows


ACTIONS: dict[str, Callable[[Any, Path], list[dict]]] = {"published": published, "profile": series.run}


if __name__ == "__main__":
    raise SystemExit(cli.launch(run, "specjax.design"))
