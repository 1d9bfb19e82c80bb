"""The throughput model on the published rows of arXiv 2402.01528, and what the published shapes hold."""

from pathlib import Path
from typing import Any

from specjax import design
from specjax.draft_design import shapes
from specjax.evaluation import throughput


def run(config: Any, workdir: str | Path) -> dict:
    """Runs the study's stage; returns the content of results.json."""
    return design.finish(config, workdir, published(config, Path(workdir)))


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
