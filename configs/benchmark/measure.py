"""Measures what decoding costs beside the least it could: loops, verification, blocks, context, memory, loading.

    python -m configs.benchmark.measure --config=configs/benchmark/cpu.py --workdir=DIR [--config.key=value ...]

Weights are random. Every time is that of a loop on the device, never of a lone dispatch; what is compared is
run in turns, so that a slow moment of the machine hits all alike.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from configs.benchmark.measure_loading import loading
from configs.benchmark.measure_memory import distillation_memory
from specjax.decoding import loop, rules
from specjax.decoding.drafters.model import ModelDraft
from specjax.decoding.drafters.table import build_drafter
from specjax.decoding.sampling import Sampling, row_keys
from specjax.evaluation import latency
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder, Params
from specjax.reporting import records, tables
from specjax.runtime import cli, processes
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError, nearest
from specjax.runtime.timing import in_turns, progress


def run(config: Any, workdir: str | Path) -> dict:
    """Runs the benchmarks that the config lists, prints a table of each; returns the content of results.json.

    Raises:
      UserError: for a benchmark or a model that does not exist, and for texts that do not fit their cache.
    """
    for name in config.tables:
        if name not in BENCHMARKS:
            raise UserError(f'there is no benchmark "{name}"{nearest(name, BENCHMARKS)}')
    processes.refuse_several("benchmark")
    if meshes.make_mesh(config.mesh).size > 1 and set(config.tables) - {"loading"}:
        raise UserError("all benchmarks but loading are of one device; set mesh.data, mesh.fsdp and mesh.tensor to 1")
    rows = []
    with progress(config.tables, total=len(config.tables), description="benchmark", unit="table") as bar:
        for name in bar:
            measured = [{"benchmark": name, **row} for row in BENCHMARKS[name](config)]
            columns = [key for key in measured[0] if key != "benchmark"]
            print(f"\n{tables.heading(name)}\n{tables.aligned_table(measured, columns)}", flush=True)
            rows += measured
    path = Path(workdir) / "results.json"
    return records.write_results(path, binary="benchmark", config=configs.to_plain(config), rows=rows)


def plain_decoding(config: Any) -> list[dict]:
    """Our loop at gamma 0 beside the barest loop over the same model, and beside the bare matrix-vector rate.

    Gigabytes a second count the weights that a step reads, each once; not the cache.
    """
    section, rows = config.plain, []
    for name in section.models:
        model, params = _model(config, name)
        cases = _plain_cases(config, model, params)
        seconds = [[s / section.new_tokens for s in case] for case in in_turns(cases, config.repeats)]
        size = sum(kernel.nbytes for kernel in _kernels(params)) / 1e9
        mine, minimal, products = (statistics.median(case) for case in seconds)
        rows.append(
            {
                "model": name,
                "parameters": model.num_params,
                "seconds_per_token": mine,
                "minimal_seconds_per_token": minimal,
                "matvec_seconds": products,
                "ratio_to_minimal": statistics.median(a / b for a, b in zip(*seconds[:2], strict=True)),
                "gigabytes_per_second": size / mine,
                "minimal_gigabytes_per_second": size / minimal,
                "matvec_gigabytes_per_second": size / products,
            }
        )
    return rows


def _plain_cases(config: Any, model: Decoder, params: Params) -> tuple:
    """Our loop, the minimal one, and the bare products, each as (make the inputs, run)."""
    length, new_tokens = config.plain.prompt, config.plain.new_tokens
    prompts, lengths = _prompts(config, 1, length, model.vocab_size)
    capacity = loop.capacity_for(length, new_tokens, 0)
    plan = loop.Plan(model, None, rules.rule_named("lossless"), 0, capacity, True)
    sampling, limits = Sampling.of(0.0), _limits(1, new_tokens)
    keys = row_keys(config.seed, jnp.arange(1))
    fresh = lambda: loop.begin(plan, params, None, prompts, lengths, keys)
    ours = lambda state: loop.run(plan, params, None, state, sampling, limits)
    minimal = lambda state: _minimal_loop(model, new_tokens, params, state.target_cache, state.tokens, state.lengths[0])
    ones = lambda: jnp.ones((1, model.config.width), jnp.float32)
    products = lambda x: _matvec_loop(new_tokens, _kernels(params), x)
    return (fresh, ours), (fresh, minimal), (ones, products)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def _minimal_loop(model: Decoder, new_tokens: int, params: Params, cache, tokens, length):
    """Greedy decoding of one row with nothing beside the model: what a loop costs at least."""
    end = length + new_tokens

    def step(carry):
        cache, tokens, length = carry
        pending = jax.lax.dynamic_slice(tokens, (0, length - 1), (1, 1))
        hidden, cache = model.extend(params, cache, pending, (length - 1)[None, None])
        chosen = jnp.argmax(model.head(params, hidden), axis=-1).astype(jnp.int32)
        return cache, jax.lax.dynamic_update_slice(tokens, chosen, (0, length)), length + 1

    return jax.lax.while_loop(lambda carry: carry[2] < end, step, (cache, tokens, length))


def _kernels(params: Params) -> list[jax.Array]:
    """The matrices of a step; the embedding serves as the tied head."""
    return [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]


@functools.partial(jax.jit, static_argnums=0)
def _matvec_loop(steps: int, kernels: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """One row through every matrix, step after step; each product waits for the last, as in a model."""
    width = x.shape[1]

    def step(_, x):
        for kernel in kernels:
            # [V, D] is the tied head, read as it lies; it is the only matrix with more rows than any layer's.
            tied = kernel is kernels[0] and kernel.shape[1] == width
            inputs = kernel.shape[1] if tied else kernel.shape[0]
            x = jnp.tile(x, (1, -(-inputs // x.shape[1])))[:, :inputs]
            x = jnp.einsum("BD,VD->BV", x, kernel) if tied else x @ kernel
            # Kept at size 1, or the numbers would run into denormals, which are slow.
            x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x)) + 1e-6)
        return jnp.tile(x, (1, -(-width // x.shape[1])))[:, :width]

    return jax.lax.fori_loop(0, steps, step, x)


def verification(config: Any) -> list[dict]:
    """Seconds of the target on gamma + 1 tokens of one row, relative to one token."""
    section, rows = config.verification, []
    for name in section.models:
        model, params = _model(config, name)
        widths = (1, *(gamma + 1 for gamma in section.gammas))
        cases = [_step_case(config, model, params, width, section.context, section.capacity) for width in widths]
        step, *wider = [[s / config.steps for s in case] for case in in_turns(cases, config.repeats)]
        for gamma, seconds in zip(section.gammas, wider, strict=True):
            relative = statistics.median(a / b for a, b in zip(seconds, step, strict=True))
            rows.append(
                {
                    "model": name,
                    "parameters": model.num_params,
                    "gamma": gamma,
                    "seconds": statistics.median(seconds),
                    "relative_to_one_step": relative,
                }
            )
    return rows


def _step_case(config: Any, model: Decoder, params: Params, width: int, context: int, capacity: int):
    """Steps of `width` tokens after `context - 1` others. What the cache holds is no matter."""
    if context + width - 1 > capacity:
        raise UserError(f"a context of {context} tokens and {width} more do not fit a capacity of {capacity}")
    step = latency.Step(model, tokens=width, batch=1, context=context, capacity=capacity, steps=config.steps)
    return latency.step_case(step, params)


def blocks(config: Any) -> list[dict]:
    """Seconds of a block (propose, verify, rule, commit) of a model drafter, by gamma and batch size."""
    section, rows = config.blocks, []
    target, params = _model(config, section.target)
    draft, draft_params = _model(config, section.draft)
    for size in section.batch_sizes:
        prompts, lengths = _prompts(config, size, section.prompt, target.vocab_size)
        keys = row_keys(config.seed, jnp.arange(size))
        sampling, limits = Sampling.of(section.temperature), _limits(size, section.new_tokens)
        capacity = loop.capacity_for(section.prompt, section.new_tokens, max(section.gammas))
        cases, iterations = [], []
        for gamma in section.gammas:
            drafter = build_drafter(ModelDraft(), target, gamma, draft)
            greedy = section.temperature == 0
            plan = loop.Plan(target, drafter, rules.rule_named("lossless"), gamma, capacity, greedy)
            fresh = functools.partial(loop.begin, plan, params, draft_params, prompts, lengths, keys)
            call = functools.partial(loop.run, plan, params, draft_params, sampling=sampling, limits=limits)
            cases.append((fresh, call))
            iterations.append(int(call(fresh()).iterations))
        for gamma, count, seconds in zip(section.gammas, iterations, in_turns(cases, config.repeats), strict=True):
            each = statistics.median(seconds) / count
            rows.append({"batch_size": size, "gamma": gamma, "iterations": count, "seconds_per_block": each})
    return rows


def context(config: Any) -> list[dict]:
    """Seconds of a step against the text's length at one capacity, and against capacity for a short text."""
    section = config.context
    model, params = _model(config, section.model)
    settings = [("context", length, section.capacity) for length in section.contexts]
    settings += [("capacity", section.short_context, capacity) for capacity in section.capacities]
    cases = [_step_case(config, model, params, 1, length, capacity) for _, length, capacity in settings]
    rows, first = [], {}
    for (varied, length, capacity), seconds in zip(settings, in_turns(cases, config.repeats), strict=True):
        each = [s / config.steps for s in seconds]
        reference = first.setdefault(varied, each)
        rows.append(
            {
                "varied": varied,
                "context": length,
                "capacity": capacity,
                "seconds": statistics.median(each),
                "relative_to_first": statistics.median(a / b for a, b in zip(each, reference, strict=True)),
            }
        )
    return rows


BENCHMARKS: dict[str, Callable[[Any], list[dict]]] = {
    "plain_decoding": plain_decoding,
    "verification": verification,
    "blocks": blocks,
    "context": context,
    "distillation_memory": distillation_memory,
    "loading": loading,
}


def _model_config(config: Any, name: str, **changes: Any) -> DecoderConfig:
    if name not in config.models:
        raise UserError(f'the config describes no model "{name}"{nearest(name, config.models.keys())}')
    return DecoderConfig.llama(**{**config.models[name].to_dict(), **changes})


def _model(config: Any, name: str) -> tuple[Decoder, Params]:
    model = Decoder(_model_config(config, name))
    return model, model.init(jax.random.key(config.seed))


def _prompts(config: Any, batch: int, length: int, vocabulary: int):
    """Random prompts, all of one length, and their lengths."""
    tokens = jax.random.randint(jax.random.key(config.seed), (batch, length), 0, vocabulary, jnp.int32)
    return tokens, jnp.full((batch,), length, jnp.int32)


def _limits(batch: int, new_tokens: int) -> loop.Limits:
    return loop.Limits(jnp.full((batch,), new_tokens, jnp.int32), jnp.full((1,), -1, jnp.int32))


if __name__ == "__main__":
    raise SystemExit(cli.launch(run, "configs.benchmark.measure"))
