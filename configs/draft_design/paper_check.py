"""The throughput model on the published rows of arXiv 2402.01528, and the caches of the published shapes."""

from pathlib import Path
from typing import Any

from configs.draft_design.profiling import kv_bytes, shape_columns
from specjax import design
from specjax.evaluation import throughput
from specjax.models.config import DecoderConfig
from specjax.runtime.errors import UserError, nearest

# Layers, width, heads, head size and MLP width of the drafts of arXiv 2402.01528, all pruned from LLaMA-7B (vocabulary
# 32,000, untied head). "noft": not fine-tuned after pruning. The width of the three smallest is 2560: with 4096, as
# notes on the paper say, the parameters differ from the numbers in the names.
PRESETS = {
    "noft-1.3b": (24, 2048, 16, 128, 5504),
    "wide-1.3b": (12, 2560, 20, 128, 9280),
    "wide-796m": (5, 2560, 32, 128, 11008),
    "wide-543m": (3, 2560, 32, 128, 11008),
    "wide-290m": (1, 2560, 32, 128, 11008),
}


def preset(name: str, dtype: str = "float16") -> DecoderConfig:
    """A published shape. Raises UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f'there is no published shape "{name}"{nearest(name, PRESETS)}')
    layers, width, heads, head_size, mlp_width = PRESETS[name]
    return DecoderConfig.llama(
        vocab_size=32000,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_size=head_size,
        mlp_width=mlp_width,
        max_positions=2048,
        rope_theta=10000.0,
        norm_epsilon=1e-6,
        tied_head=False,
        param_dtype=dtype,
        compute_dtype=dtype,
    )


def run(config: Any, workdir: str | Path) -> dict:
    """Rows of the model on the paper's rows, and of its shapes; returns the content of results.json.

    This checks arithmetic only. The paper prints neither gamma nor the target's seconds: the config has the values that
    make both rows come out.
    """
    rows: list[dict] = []
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
        shape = preset(name)
        row = {"table": "shapes", "draft": name, **shape_columns(shape), "context": config.context}
        rows.append(row | {"kv_mebibytes": kv_bytes(shape, config.context) / 2**20})
    return design.finish(config, workdir, rows)
