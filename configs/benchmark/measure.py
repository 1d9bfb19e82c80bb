"""Measures decoding and its least possible cost: loops, verification, blocks, context, memory, loading.

    python -m configs.benchmark.measure --config=configs/benchmark/cpu.py --workdir=DIR [--config.key=value ...]

Weights are random. Every time is that of a loop on the device, not of a single dispatch. Cases that are compared run in
turns, so that a slow phase of the machine affects all of them.
"""

import functools
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from configs.benchmark import measure_accelerator
from configs.benchmark.measure_accelerator import random_model
from configs.benchmark.measure_experts import experts
from configs.benchmark.measure_loading import loading
from configs.benchmark.measure_memory import distillation_memory
from configs.benchmark.measure_transformers import transformers_decoding, transformers_step
from configs.benchmark.timed_steps import TimedStep, in_turns, step_case
from specjax.decoding import loop
from specjax.decoding.drafters.model import ModelDraft
from specjax.decoding.drafters.table import build_drafter
from specjax.decoding.plan import Plan
from specjax.decoding.sampling import Sampling, row_keys
from specjax.models.decoder import Decoder, Params
from specjax.reporting import records, tables
from specjax.runtime import cli, processes
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError, nearest
from specjax.runtime.timing import progress


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
    write = lambda: records.write_results(
        Path(workdir) / "results.json", binary="benchmark", config=configs.to_plain(config), rows=rows
    )
    with progress(config.tables, total=len(config.tables), description="benchmark", unit="table") as bar:
        for name in bar:
            measured = []
            try:
                for row in BENCHMARKS[name](config):
                    measured.append({"benchmark": name, **row})
                    rows.append(measured[-1])
                    write()  # after every row, so that a run which is cut off leaves what it measured
            except ModuleNotFoundError as error:
                if error.name not in ("torch", "transformers"):
                    raise
                logging.warning("%s is left out, because it needs the package %s", name, error.name)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                logging.warning("%s ends here, because the device has no memory for its next row: %s", name, error)
            columns = [key for key in (measured or [{}])[0] if key != "benchmark"]
            print(f"\n{tables.heading(name)}\n{tables.aligned_table(measured, columns)}", flush=True)
    return write()


def plain_decoding(config: Any) -> list[dict]:
    """Our loop at gamma 0, compared with the smallest loop over the same model and with bare matrix-vector products.

    Gigabytes per second count the weights that a step reads, each once, without the cache.
    """
    section, rows = config.plain, []
    new_tokens = section.new_tokens
    for name in section.models:
        model, params = random_model(config, name)
        fresh, ours = _decoding(config, (model, params), None, section, 1, 0, 0)
        minimal = lambda state, model=model, params=params: _minimal_loop(
            model, new_tokens, params, state.target_cache, state.tokens, state.lengths[0]
        )
        kernels = _kernels(params)
        ones = lambda model=model: jnp.ones((1, model.config.width), jnp.float32)
        products = lambda x, kernels=kernels: _matvec_loop(new_tokens, kernels, x)
        timed = in_turns([(fresh, ours), (fresh, minimal), (ones, products)], config.repeats)
        size = sum(kernel.nbytes for kernel in kernels) / 1e9
        medians = [statistics.median(seconds) / new_tokens for seconds in timed]
        row = {"model": name, "parameters": model.num_params}
        names = ("seconds_per_token", "minimal_seconds_per_token", "matvec_seconds")
        row |= dict(zip(names, medians, strict=True)) | {"ratio_to_minimal": _ratio(*timed[:2])}
        rates = ("gigabytes_per_second", "minimal_gigabytes_per_second", "matvec_gigabytes_per_second")
        rows.append(row | {rate: size / seconds for rate, seconds in zip(rates, medians, strict=True)})
    return rows


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """The median, over rounds, of the ratio of two cases that ran in turns."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def _decoding(
    config: Any, target, draft, section: Any, batch: int, gamma: int, largest_gamma: int
) -> tuple[Callable, Callable]:
    """(make the state, decode) of random prompts of one length; `target` and `draft` are (model, params).

    The capacity is that of the largest gamma, whatever the gamma.
    """
    (model, params), (draft_model, draft_params) = target, draft or (None, None)
    drafter = None if draft is None else build_drafter(ModelDraft(), model, gamma, draft_model)
    temperature = 0.0 if draft is None else section.temperature
    spare = largest_gamma - gamma
    how = {"max_new_tokens": section.new_tokens + spare, "greedy": temperature == 0, "round_up": False}
    plan = Plan.for_prompts(model, section.prompt, drafter=drafter, gamma=gamma, **how)
    shape = (batch, section.prompt)
    prompts = jax.random.randint(jax.random.key(config.seed), shape, 0, model.vocab_size, jnp.int32)
    every = lambda value: jnp.full((batch,), value, jnp.int32)
    keys = row_keys(config.seed, jnp.arange(batch))
    limits = loop.Limits(every(section.new_tokens), jnp.full((1,), -1, jnp.int32))
    fresh = functools.partial(loop.prefill, plan, params, draft_params, prompts, every(section.prompt), keys)
    run = functools.partial(loop.run, plan, params, draft_params, sampling=Sampling.of(temperature), limits=limits)
    return fresh, run


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def _minimal_loop(model: Decoder, new_tokens: int, params: Params, cache, tokens, length):
    """Greedy decoding of one row by the model and nothing else: the least that a loop costs."""
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
    """One row through every matrix, step after step; each product waits for the one before it, as in a model."""
    width = x.shape[1]

    def step(_, x):
        for kernel in kernels:
            inputs = kernel.shape[1]
            x = jnp.tile(x, (1, -(-inputs // x.shape[1])))[:, :inputs]
            x = jnp.einsum("BI,OI->BO", x, kernel)
            # Scaled to size 1, so that no number becomes denormal, which is slow.
            x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x)) + 1e-6)
        return jnp.tile(x, (1, -(-width // x.shape[1])))[:, :width]

    return jax.lax.fori_loop(0, steps, step, x)


def verification(config: Any) -> list[dict]:
    """Seconds of the target on gamma + 1 tokens of one row, relative to one token."""
    section, rows = config.verification, []
    for name in section.models:
        widths = (1, *(gamma + 1 for gamma in section.gammas))
        settings = [(width, section.context, section.capacity) for width in widths]
        parameters, (step, *wider) = _step_seconds(config, name, settings)
        for gamma, seconds in zip(section.gammas, wider, strict=True):
            row = {"model": name, "parameters": parameters, "gamma": gamma, "seconds": statistics.median(seconds)}
            rows.append(row | {"relative_to_one_step": _ratio(seconds, step)})
    return rows


def _step_seconds(config: Any, name: str, settings: Sequence[tuple[int, int, int]]) -> tuple[int, list[list[float]]]:
    """A model's parameters, and its seconds per step for each (tokens, context, capacity), all in turns."""
    (model, params), cases = random_model(config, name), []
    for width, context, capacity in settings:
        if context + width - 1 > capacity:
            raise UserError(f"a context of {context} tokens and {width} more do not fit a capacity of {capacity}")
        step = TimedStep(model, tokens=width, batch=1, context=context, capacity=capacity, steps=config.steps)
        cases.append(step_case(step, params))
    timed = in_turns(cases, config.repeats)
    return model.num_params, [[seconds / config.steps for seconds in case] for case in timed]


def blocks(config: Any) -> list[dict]:
    """Seconds of a block (propose, verify, rule, commit) of a model drafter, by gamma and batch size."""
    section, rows = config.blocks, []
    target, draft = random_model(config, section.target), random_model(config, section.draft)
    largest = max(section.gammas)
    for size in section.batch_sizes:
        cases = [_decoding(config, target, draft, section, size, gamma, largest) for gamma in section.gammas]
        iterations = [int(run(fresh()).iterations) for fresh, run in cases]
        for gamma, count, seconds in zip(section.gammas, iterations, in_turns(cases, config.repeats), strict=True):
            each = statistics.median(seconds) / count
            rows.append({"batch_size": size, "gamma": gamma, "iterations": count, "seconds_per_block": each})
    return rows


def context(config: Any) -> list[dict]:
    """Seconds of a step by the length of the text at one capacity, and by the capacity for a short text."""
    section = config.context
    settings = [("context", length, section.capacity) for length in section.contexts]
    settings += [("capacity", section.short_context, capacity) for capacity in section.capacities]
    _, timed = _step_seconds(config, section.model, [(1, *sizes) for _, *sizes in settings])
    rows, first = [], {}
    for (varied, length, capacity), seconds in zip(settings, timed, strict=True):
        row = {"varied": varied, "context": length, "capacity": capacity, "seconds": statistics.median(seconds)}
        rows.append(row | {"relative_to_first": _ratio(seconds, first.setdefault(varied, seconds))})
    return rows


BENCHMARKS: dict[str, Callable[[Any], Iterable[dict]]] = {
    "plain_decoding": plain_decoding,
    "verification": verification,
    "blocks": blocks,
    "context": context,
    "distillation_memory": distillation_memory,
    "loading": loading,
    "bandwidth": measure_accelerator.bandwidth,
    "large_plain": measure_accelerator.large_plain,
    "large_speculative": measure_accelerator.large_speculative,
    "greedy_identity": measure_accelerator.greedy_identity,
    "experts": experts,
    "on_policy_step": measure_accelerator.on_policy_step,
    "profile": measure_accelerator.profile,
    "transformers_decoding": transformers_decoding,
    "transformers_step": transformers_step,
}


if __name__ == "__main__":
    cli.leave(cli.launch(run, "configs.benchmark.measure"))
