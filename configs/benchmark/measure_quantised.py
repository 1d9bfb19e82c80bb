"""Measures a checkpoint in several dtypes of its parameters.

python -m configs.benchmark.measure_quantised --config=configs/benchmark/quantised.py --workdir=DIR
"""

import functools
import math
import statistics
from pathlib import Path
from typing import Any

import jax

from specjax import api
from specjax.evaluation.continuations import log_probabilities
from specjax.hub.model import Model
from specjax.reporting import records, tables
from specjax.runtime import cli, processes
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError


def run(config: Any, workdir: str | Path) -> dict:
    """Measures every dtype next to the first one, prints a table; returns the content of results.json.

    Raises:
      UserError: if target or text are missing, or the text is too short.
    """
    processes.refuse_several("benchmark")
    for key in ("target", "text"):
        if not config[key]:
            raise UserError(f"config.{key} is empty; give --config.{key}=...")
    path, settings = Path(workdir) / "results.json", configs.to_plain(config)
    rows = _earlier(path, settings)
    target = _load(config, config.dtypes[0])
    texts = _texts(config, target)
    for dtype in config.dtypes:
        if dtype not in [row["param_dtype"] for row in rows]:
            rows.append(_row(config, dtype, target, texts))
            records.write_results(path, binary="benchmark", config=settings, rows=rows)
    print(tables.aligned_table(rows, list(rows[0])), flush=True)
    return records.write_results(path, binary="benchmark", config=settings, rows=rows)


def _earlier(path: Path, settings: dict) -> list[dict]:
    """The rows of an earlier run with the same settings."""
    if not path.exists():
        return []
    earlier = records.read_results(path)
    return earlier["rows"] if earlier["config"] == records.json_clean(settings) else []


def _load(config: Any, dtype: str) -> Model:
    return api.load(config.target, param_dtype=dtype, compute_dtype=config.compute_dtype)


def _texts(config: Any, target: Model) -> list[list[int]]:
    tokens = target.tokenizer.encode(Path(config.text).read_text(encoding="utf-8"))
    length = max(config.perplexity_length, config.prompt_length)
    if len(tokens) < config.prompts * length:
        raise UserError(f"config.text has {len(tokens)} tokens, and {config.prompts * length} are needed; take another")
    return [tokens[start : start + length] for start in range(0, config.prompts * length, length)]


def _row(config: Any, dtype: str, target: Model, texts: list[list[int]]) -> dict:
    """One dtype's figures; its speed is measured in turns with the target's."""
    model = target if dtype == config.dtypes[0] else _load(config, dtype)
    prompts = [text[: config.prompt_length] for text in texts]
    limits = {"temperature": 0.0, "max_new_tokens": config.max_new_tokens, "eos_ids": (), "batch_size": 1}
    runs = {
        "target": functools.partial(api.generate, target, prompts, **limits),
        "plain": functools.partial(api.generate, model, prompts, **limits),
        "draft": functools.partial(api.generate, target, prompts, drafter=model, gamma=config.gamma, **limits),
    }
    drafted = runs["draft"]()  # also compiles
    speeds = {name: [] for name in runs}
    for _ in range(config.rounds):
        for name, generate in runs.items():
            speeds[name].append(generate().stats.tokens_per_second)
    medians = {name: statistics.median(speed) for name, speed in speeds.items()}
    scores = [x for row in log_probabilities(model, [t[:1] for t in texts], [t[1:] for t in texts]) for x in row]
    return {
        "param_dtype": dtype,
        "gigabytes": sum(x.nbytes for x in jax.tree.leaves(model.params)) / 1e9,
        "tokens_per_second": medians["plain"],
        "speed_to_target": medians["plain"] / medians["target"],
        "perplexity": math.exp(-statistics.fmean(scores)),
        "block_efficiency": drafted.stats.block_efficiency,
        "acceptance_rate": drafted.stats.acceptance_rate,
        "speedup_as_draft": medians["draft"] / medians["target"],
    }


if __name__ == "__main__":
    cli.leave(cli.launch(run, "configs.benchmark.measure_quantised"))
