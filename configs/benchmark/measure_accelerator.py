"""Measures decoding and training of large random models: what a step reaches of the device's memory bandwidth, what
speculative decoding adds, where the device waits for the host, and the time of an on-policy training step."""

import functools
import itertools
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from configs.benchmark.timed_steps import TimedStep, in_turns, step_case
from specjax.decoding import identity, loop
from specjax.decoding.drafters.model import ModelDraft
from specjax.decoding.drafters.table import build_drafter
from specjax.decoding.plan import Plan
from specjax.decoding.rules import Lossless
from specjax.decoding.sampling import Sampling, row_keys
from specjax.distillation.trainer import Trainer, TrainingInputs
from specjax.evaluation import latency
from specjax.evaluation.engine import Method
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError, nearest
from specjax.runtime.timing import compile_seconds, timed


def random_model(config: Any, name: str, dtype: str = "") -> tuple[Decoder, Any]:
    """A model of `config.models` and random parameters, made on the device; `dtype` replaces that of the config."""
    if name not in config.models:
        raise UserError(f'the config describes no model "{name}"{nearest(name, config.models.keys())}')
    changed = {"param_dtype": dtype, "compute_dtype": dtype} if dtype else {}
    model = Decoder(DecoderConfig.llama(**config.models[name].to_dict() | changed))
    leaves, structure = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    # A program for each shape: one program for all of them took a minute to compile on a GPU.
    keys = jax.random.split(jax.random.key(config.seed), len(leaves))
    return model, jax.tree.unflatten(
        structure, [_random(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Kernels that leave the size of their inputs as it is; gains of 1."""
    if len(shape) < 2:
        return jnp.ones(shape, dtype)
    return (jax.random.normal(key, shape, jnp.float32) * shape[-1] ** -0.5).astype(dtype)


def bandwidth(config: Any) -> list[dict]:
    """Gigabytes per second of a copy on the device, bytes read and bytes written; the best of several runs."""
    size = config.bandwidth.megabytes << 20
    array = jnp.zeros((size // 4,), jnp.float32)
    negate = jax.jit(lambda x: -x)  # XLA removes a copy that changes nothing
    seconds = min(timed(lambda: negate(array))[1] for _ in range(2 + 5 * config.repeats))
    return [
        {"device": jax.devices()[0].device_kind, "megabytes": config.bandwidth.megabytes, "copy": 2e-9 * size / seconds}
    ]


def large_plain(config: Any) -> Iterator[dict]:
    """Plain decoding, by model and batch size, and the share of the copy's bandwidth that its weights and cache take.

    `gigabytes_per_second` counts all weights and the filled part of the cache once for each step.
    """
    section, copy = config.large_plain, bandwidth(config)[0]["copy"]
    for name in section.models:
        model, params = random_model(config, name)
        for size in section.batch_sizes:
            rows = _rows(config, model, size)
            method = rows.method(params)
            compiled = compile_seconds()
            prefills = [timed(functools.partial(rows.state, method))[1] for _ in range(config.repeats + 1)]
            step = statistics.median(in_turns([rows.case(method)], config.repeats)[0]) / config.new_tokens
            compiled = compile_seconds() - compiled
            read = _step_bytes(model, params, size, config.prompt + config.new_tokens // 2)
            yield {
                "model": name,
                "parameters": model.num_params,
                "batch_size": size,
                "prefill_seconds": statistics.median(prefills),
                "seconds_per_step": step,
                "tokens_per_second": size / step,
                "gigabytes_per_second": read / step / 1e9,
                "share_of_copy": read / step / 1e9 / copy,
                "compile_seconds": compiled,
            }


def _step_bytes(model: Decoder, params: Any, batch: int, context: int) -> int:
    """Bytes that one step has to read: the matrices once, and the keys and values of the text."""
    config = model.config
    leaves = [x for x in jax.tree.leaves(params) if x.ndim == 2]
    embedding = 0 if config.tied_head else max(x.nbytes for x in leaves)  # of which a step reads a row or two
    per_token = 2 * config.layers * config.kv_heads * config.head_size * jnp.dtype(config.compute_dtype).itemsize
    return sum(x.nbytes for x in leaves) - embedding + batch * context * per_token


class _rows:
    """Random prompts of one length for a batch, and ways to decode them."""

    def __init__(self, config: Any, model: Decoder, size: int):
        self.config, self.model, self.size = config, model, size
        self.prompts = np.random.default_rng(config.seed).integers(0, model.vocab_size, (size, config.prompt), np.int32)
        self.keys = row_keys(config.seed, jnp.arange(size))
        every = lambda value: jnp.full((size,), value, jnp.int32)
        self.lengths = every(config.prompt)
        self.limits = loop.Limits(every(config.new_tokens), jnp.full((1,), -1, jnp.int32), jnp.int32(2**31 - 1))

    def method(self, params: Any, draft: tuple[Decoder, Any] | None = None, gamma: int = 0, temperature: float = 0.0):
        """Plain decoding with these parameters, or speculative decoding with a draft model."""
        drafter = build_drafter(ModelDraft(), self.model, gamma, draft[0]) if draft else None
        how = {"drafter": drafter, "gamma": gamma, "rule": Lossless(), "greedy": temperature == 0}
        plan = Plan.for_prompts(self.model, self.config.prompt, max_new_tokens=self.config.new_tokens, **how)
        return Method(plan, params, draft[1] if draft else None, Sampling.of(temperature))

    def tokens(self, method: Method) -> jax.Array:
        return jnp.pad(self.prompts, ((0, 0), (0, method.plan.prompt_slots - self.config.prompt)))

    def state(self, method: Method) -> loop.DecodeState:
        arrays = self.tokens(method), self.lengths, self.keys
        return loop.prefill(method.plan, method.params, method.draft_params, *arrays)

    def run(self, method: Method, state: loop.DecodeState) -> loop.DecodeState:
        return loop.run(method.plan, method.params, method.draft_params, state, method.sampling, self.limits)

    def case(self, method: Method) -> tuple[Callable, Callable]:
        """(fresh, call) for `in_turns`."""
        return functools.partial(self.state, method), functools.partial(self.run, method)

    def parts(self, plain: Method, method: Method) -> tuple[float, float]:
        """Seconds of drafting and of the rule with commit in a block."""
        half = self.config.new_tokens // 2
        rows = latency.Rows(self.tokens(method), self.lengths, self.keys, self.limits, half, self.config.prompt + half)
        meter = latency.PartsMeter(plain, [method], rows)
        meter.keep_up(0.0)
        blocks = [(1.0, 1)] * 3
        parts = meter.parts(method.plan, blocks, blocks, self.config.seed)
        return parts.draft_step * method.plan.gamma, parts.rule


def large_speculative(config: Any) -> Iterator[dict]:
    """A draft of a tenth of the target's size: seconds of a block, and those that its parts predict.

    The parts are timed separately: gamma steps of the draft, a call of the target on gamma + 1 tokens, and the rule
    with commit. Random models agree by chance only, so the last number is the speed-up of a draft accepted in full.
    """
    section = config.large_speculative
    for target, draft in section.pairs:
        models = random_model(config, target), random_model(config, draft)
        (model, params), gamma = models[0], section.gamma
        for size, temperature in itertools.product(section.batch_sizes, section.temperatures):
            rows = _rows(config, model, size)
            plain = rows.method(params, temperature=temperature)
            method = rows.method(params, models[1], gamma, temperature)
            iterations = int(rows.run(method, rows.state(method)).iterations)
            context = config.prompt + config.new_tokens // 2
            sizes = {"batch": size, "context": context, "capacity": method.plan.capacity, "steps": config.steps}
            verify = step_case(TimedStep(model, tokens=gamma + 1, **sizes), params)
            once, block, called = in_turns([rows.case(plain), rows.case(method), verify], config.repeats)
            step, block = statistics.median(once) / config.new_tokens, statistics.median(block) / iterations
            drafting, rule = rows.parts(plain, method)
            predicted = drafting + statistics.median(called) / config.steps + rule
            yield {
                "target": target,
                "draft": draft,
                "batch_size": size,
                "temperature": temperature,
                "gamma": gamma,
                "plain_seconds_per_step": step,
                "seconds_per_block": block,
                "draft_seconds_per_step": drafting / gamma,
                "verify_seconds": statistics.median(called) / config.steps,
                "rule_seconds": rule,
                "measured_over_predicted": block / predicted,
                "emitted_per_block": config.new_tokens / iterations,
                "speedup_if_all_are_accepted": (gamma + 1) * step / block,
            }


def greedy_identity(config: Any) -> Iterator[dict]:
    """Greedy text with a draft against plain text: equal rows, ties by rounding, and other differences."""
    section = config.greedy_identity
    for dtype in section.dtypes:
        made = [random_model(config, name, dtype) for name in (section.target, section.draft)]
        models, params = zip(*made, strict=True)
        rows = _rows(config, models[0], section.batch_size)
        plain, texts = rows.method(params[0]), []
        method = rows.method(params[0], (models[1], params[1]), section.gamma)
        for each in (plain, method):
            state = rows.run(each, rows.state(each))
            span = slice(config.prompt, config.prompt + config.new_tokens)
            texts.append([row[span].tolist() for row in np.asarray(state.tokens)])
        how = {"slots": method.plan.capacity, "seed": config.seed, "sampling": method.sampling}
        same = identity.compare(method.plan, params[0], rows.prompts.tolist(), *texts, **how)
        yield {"dtype": dtype, "target": section.target, "draft": section.draft, "rows": section.batch_size, **same}


def profile(config: Any) -> Iterator[dict]:
    """Decodes under JAX's profiler: the share of time in which the device computes, its pauses, and what takes longest.

    On CPU there is no device to trace, so that only the number of blocks is reported.
    """
    section = config.profile
    target, draft = random_model(config, section.target), random_model(config, section.draft)
    for size, gamma in itertools.product(section.batch_sizes, (0, section.gamma)):
        rows = _rows(config, target[0], size)
        method = rows.method(target[1], draft if gamma else None, gamma, 1.0 if gamma else 0.0)
        rows.run(method, rows.state(method))
        state = jax.block_until_ready(rows.state(method))
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                state = jax.block_until_ready(rows.run(method, state))
            spans = _device_spans(next(Path(folder).rglob("*.xplane.pb")))
        row = {"target": section.target, "draft": section.draft if gamma else "", "batch_size": size, "gamma": gamma}
        yield row | _activity(spans, int(state.iterations))


# Pauses of the device longer than this, in microseconds, are counted.
_PAUSE = 10.0


def _device_spans(path: Path) -> list[tuple[float, float, str]]:
    """(start, end, name) in microseconds of all that ran on the first device's streams."""
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    device = next((plane for plane in planes if plane.name.startswith(("/device:GPU", "/device:TPU"))), None)
    lines = [] if device is None else [line for line in device.lines if line.name.startswith(("Stream", "XLA Ops"))]
    events = (event for line in lines for event in line.events)
    return sorted((e.start_ns / 1e3, (e.start_ns + e.duration_ns) / 1e3, e.name) for e in events)


def _activity(spans: Sequence[tuple[float, float, str]], blocks: int) -> dict:
    """What the device did in a block; times in microseconds."""
    if not spans:
        return {"blocks": blocks}
    busy, last, pauses = 0.0, spans[0][0], []
    totals: dict[str, list[float]] = {}
    for start, end, name in spans:
        if start - last > _PAUSE:
            pauses.append(start - last)
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
        totals.setdefault(re.sub(r"[._]\d+$", "", name), []).append(end - start)
    longest = sorted(totals.items(), key=lambda item: -sum(item[1]))[:24]
    return {
        "blocks": blocks,
        "busy_share": busy / (last - spans[0][0]),
        "block": (last - spans[0][0]) / blocks,
        "operations": len(spans) / blocks,
        "pauses": len(pauses) / blocks,
        "paused": sum(pauses) / blocks,
        "copies_to_host": sum("D2H" in name or "DtoH" in name for _, _, name in spans) / blocks,
        "longest": [{"name": name, "times": len(each) / blocks, "total": sum(each) / blocks} for name, each in longest],
    }


def on_policy_step(config: Any) -> list[dict]:
    """Seconds of a training step on the draft's own text (DistillSpec, arXiv 2310.08461), and of writing the text."""
    section = config.on_policy_step
    settings = common.distillation("", "random", steps=1000)
    settings.optimizer.warmup_steps = 0
    settings.data.update({"batch_size": section.batch_size, "prompt_length_max": config.prompt})
    settings.data.generation.max_new_tokens = config.new_tokens
    (target, target_params), (draft, params) = (random_model(config, name) for name in (section.target, section.draft))
    mesh = meshes.make_mesh(settings.mesh)
    placed = meshes.shard(target_params, target.axes(), mesh)
    inputs = TrainingInputs(draft, params, target, placed, iter(()), [], (), config.prompt)
    draws, lengths = np.random.default_rng(config.seed), np.full((section.batch_size,), config.prompt, np.int32)
    batch = {"tokens": draws.integers(0, draft.vocab_size, (section.batch_size, config.prompt), np.int32)}
    batch |= {"lengths": lengths, "prompt_lengths": lengths, "loss_start": lengths}
    with tempfile.TemporaryDirectory() as folder, meshes.use(mesh):
        trainer = Trainer(settings, folder, inputs, mesh, min_seconds=0.0, evaluator=None)

        def step() -> None:
            trainer._advance(batch)
            trainer._read_pending()

        write = lambda: jax.block_until_ready(trainer._text("draft", batch)[0])
        calls = {"step_seconds": step, "writing_seconds": write}
        seconds = {name: [timed(call)[1] for _ in range(config.repeats + 1)][1:] for name, call in calls.items()}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    written = section.batch_size * config.new_tokens
    row = {"system": "specjax", "target": section.target, "draft": section.draft, "batch_size": section.batch_size}
    return [row | medians | {"tokens_per_second": written / medians["step_seconds"]}]
