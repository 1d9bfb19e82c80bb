"""Latency profiles: seconds of a step by shape, batch, context and tokens, stored in a file for one device."""

import dataclasses
import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.benchmark.timed_steps import TimedStep, in_turns, step_case
from specjax.draft_design import shapes
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.runtime import files
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.errors import UserError
from specjax.runtime.timing import progress

SCHEMA = 1
# Capacities are multiples of this, so that slightly different contexts read equally many slots.
_SLOTS = 128
# Sizes of the products of `rates`: a matrix far larger than any processor's cache, and a square for a dense product.
_MATRIX, _SQUARE = (4096, 4096), 1024
# The share of the memory that cases may fill.
_FILL = 0.8


@dataclasses.dataclass(frozen=True)
class StepCase:
    """A step to time; fields are as in `TimedStep`, with a model of this shape."""

    shape: DecoderConfig
    tokens: int = 1
    batch: int = 1
    context: int = 64
    steps: int = 24

    @property
    def key(self) -> str:
        """The case as text, which is its key in the file."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def capacity(self) -> int:
        """Slots of the cache."""
        return -(-(self.context + self.tokens) // _SLOTS) * _SLOTS

    def timed_step(self) -> TimedStep:
        return TimedStep(Decoder(self.shape), self.tokens, self.batch, self.context, self.capacity, self.steps)


def weight_bytes(config: DecoderConfig) -> int:
    """Bytes of the parameters."""
    return shapes.parameters(config) * jnp.dtype(dtype_named(config.param_dtype)).itemsize


def step_bytes(config: DecoderConfig, context: int, batch: int = 1) -> int:
    """Bytes that a decode step must read: the weights, and the keys and values of the context."""
    weights = Decoder(config).num_step_params * jnp.dtype(dtype_named(config.param_dtype)).itemsize
    return weights + kv_bytes(config, context, batch)


def kv_bytes(config: DecoderConfig, tokens: int, batch: int = 1) -> int:
    """Bytes of the key/value cache of decoding with this many tokens per row; computed without allocating it."""
    prompts, lengths = jnp.zeros((batch, 1), jnp.int32), jnp.ones((batch,), jnp.int32)

    def arrays():
        cache = Decoder(config).start({}, prompts, lengths, tokens)
        return *cache.keys, *cache.values

    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.eval_shape(arrays))


def bytes_of(cases: Sequence[StepCase]) -> int:
    """Bytes of the weights, once for each shape, and of all caches."""
    weights = sum(map(weight_bytes, {case.shape for case in cases}))
    return weights + sum(kv_bytes(case.shape, case.capacity, case.batch) for case in cases)


@dataclasses.dataclass(frozen=True)
class Point:
    """Seconds of one step of a case.

    Attributes:
      seconds: the median.
      spread: the interquartile range divided by the median.
      estimate: whether this is a roofline's bound, not a measurement.
    """

    seconds: float
    spread: float
    estimate: bool = False

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Point":
        """The point of several measurements."""
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
        return cls(median, (high - low) / median)


def shape_columns(shape: DecoderConfig) -> dict[str, int]:
    """The table columns that describe a shape."""
    sizes = {key: getattr(shape, key) for key in ("layers", "width", "heads", "mlp_width")}
    return {**sizes, "parameters": shapes.parameters(shape)}


def columns(case: StepCase, point: Point) -> dict[str, Any]:
    """The table columns of a timed shape."""
    return {
        **shape_columns(case.shape),
        "milliseconds": 1e3 * point.seconds,
        "spread": point.spread,
        "estimate": point.estimate,
        "weight_mebibytes": weight_bytes(case.shape) / 2**20,
        "kv_mebibytes": kv_bytes(case.shape, case.context, case.batch) / 2**20,
    }


def device() -> dict[str, Any]:
    """A description that identifies the device of a profile and the version of JAX."""
    first = jax.devices()[0]
    described = {"platform": first.platform, "device_kind": first.device_kind, "device_count": jax.device_count()}
    described["jax"] = jax.__version__
    if first.platform == "cpu":  # every processor has the device kind "cpu"
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        name = _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
        described |= {"processor": name, "cpus": cpus}
    return described


def memory_bytes() -> int | None:
    """Bytes of device memory available for arrays; None if the device does not report it."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    available = _field("/proc/meminfo", "MemAvailable") if jax.default_backend() == "cpu" else ""
    return int(available.split()[0]) * 1024 if available else None


def _field(path: str, name: str) -> str:
    """The value of the first line `NAME: VALUE` of a file; "" without one."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


class Profile:
    """The points of one device, in a file that is written after each group of cases, so that a profile can resume."""

    def __init__(self, path: str | Path, *, memory: int | None = None):
        """Opens the file, or starts one.

        Args:
          memory: bytes. A case that needs more than four fifths of them is estimated, not run; cases that fit together
            are timed together. None asks the device.

        Raises:
          UserError: for a damaged file, and a file of another device or another schema.
        """
        self._path = Path(path)
        self._memory = memory_bytes() if memory is None else memory
        self._points: dict[str, Point] = {}
        self._rates: dict[str, float] = {}
        self.device = device()
        if self._path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            schema, theirs = stored["schema"], stored["device"]
            self._points = {key: Point(**point) for key, point in stored["points"].items()}
            self._rates = stored["rates"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"the profile {self._path} is damaged ({error}); delete it and profile again") from error
        if schema != SCHEMA:
            raise UserError(f"the profile {self._path} has schema {schema}, this version reads {SCHEMA}; delete it")
        keys = sorted(theirs.keys() | self.device.keys())
        pairs = {key: (theirs.get(key), self.device.get(key)) for key in keys}
        differing = [f"{key}: {there} there, {here} here" for key, (there, here) in pairs.items() if there != here]
        if differing:
            raise UserError(
                f"the profile {self._path} is of another device ({'; '.join(differing)}); name another file and "
                "profile this one"
            )

    def measure(self, cases: Sequence[StepCase], repeats: int) -> list[Point]:
        """A point for each case: from the file, otherwise measured in turns with other new cases.

        A case that does not fit the memory gets a roofline estimate, marked as one.
        """
        missing = list({case.key: case for case in cases if case.key not in self._points}.values())
        with progress(total=len(missing), description="profile", unit="case") as bar:
            for group in self._groups([case for case in missing if self._fits([case])]):
                self._add(_timed(group, repeats))
                bar.update(len(group))
            for case in missing:
                if not self._fits([case]):
                    self._add({case.key: Point(estimated_seconds(case, self.rates(repeats)), 0.0, estimate=True)})
                    bar.update(1)
        return [self._points[case.key] for case in cases]

    def _fits(self, cases: Sequence[StepCase]) -> bool:
        return not self._memory or bytes_of(cases) <= _FILL * self._memory

    def _groups(self, cases: Sequence[StepCase]) -> list[list[StepCase]]:
        """The cases in their order, in groups that fit the memory."""
        groups: list[list[StepCase]] = []
        for case in cases:
            if groups and self._fits([*groups[-1], case]):
                groups[-1].append(case)
            else:
                groups.append([case])
        return groups

    def rates(self, repeats: int) -> dict[str, float]:
        """Bytes per second of a matrix-vector product on this device, and operations per second of a dense product."""
        if not self._rates:
            self._rates = _measured_rates(repeats)
            self._add({})
        return self._rates

    def _add(self, points: dict[str, Point]) -> None:
        """Adds measured points and writes the file."""
        self._points |= points
        stored = {key: dataclasses.asdict(point) for key, point in self._points.items()}
        content = {"schema": SCHEMA, "device": self.device, "rates": self._rates, "points": stored}
        files.write_atomically(self._path, json.dumps(content, indent=1) + "\n")


def _timed(cases: Sequence[StepCase], repeats: int) -> dict[str, Point]:
    weights = {shape: Decoder(shape).init(jax.random.key(0)) for shape in {case.shape for case in cases}}
    timed = in_turns([step_case(case.timed_step(), weights[case.shape]) for case in cases], repeats)
    return {case.key: Point.of([each / case.steps for each in s]) for case, s in zip(cases, timed, strict=True)}


def estimated_seconds(case: StepCase, rates: dict[str, float]) -> float:
    """The roofline's bound (Williams et al. 2009): the time to read the bytes, or to compute, at the rates of `rates`.

    A real step takes longer, because the bound ignores launches and dependences between layers.
    """
    moved = step_bytes(case.shape, case.context, case.batch)
    operations = 2 * Decoder(case.shape).num_step_params * case.tokens * case.batch
    return max(moved / rates["bytes_per_second"], operations / rates["operations_per_second"])


def _measured_rates(repeats: int) -> dict[str, float]:
    key, rounds = jax.random.key(0), 8
    matrix, vector = jax.random.normal(key, _MATRIX), jnp.ones((1, _MATRIX[0]))
    square = jax.random.normal(key, (_SQUARE, _SQUARE))
    scaled = lambda x: x * jax.lax.rsqrt(jnp.mean(jnp.square(x)) + 1e-6)  # neither denormals nor infinities

    @jax.jit
    def products(x, kernel):
        return jax.lax.fori_loop(0, rounds, lambda _, x: scaled(x @ kernel), x)

    cases = [(lambda: vector, lambda x: products(x, matrix)), (lambda: square, lambda x: products(x, square))]
    reading, computing = (float(np.median(seconds)) / rounds for seconds in in_turns(cases, repeats))
    return {"bytes_per_second": matrix.nbytes / reading, "operations_per_second": 2 * _SQUARE**3 / computing}
