"""Latency profiles: seconds of a step by shape, batch, context and tokens, kept on disk for one device."""

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.draft_design import shapes
from specjax.evaluation import latency
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.reporting import records
from specjax.runtime.errors import UserError
from specjax.runtime.timing import in_turns, progress

SCHEMA = 1
# Capacities are multiples of this, so that a context and a slightly longer one read as many slots.
_SLOTS = 128
# The bare loops of `rates`: rows and columns of a matrix far beyond any processor's cache, and of a dense product.
_MATRIX, _SQUARE = (4096, 4096), 1024


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed: see `latency.Step`.

    Attributes:
      steps: of one dispatch; 1 is a lone step.
    """

    shape: DecoderConfig
    tokens: int = 1
    batch: int = 1
    context: int = 64
    steps: int = 24

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def bytes(self) -> int:
        """What has to be in memory: weights, and a cache for the context."""
        return shapes.weight_bytes(self.shape) + shapes.kv_bytes(self.shape, self._capacity, self.batch)

    @property
    def _capacity(self) -> int:
        return -(-(self.context + self.tokens) // _SLOTS) * _SLOTS

    def step(self) -> latency.Step:
        """The case as the clock takes it."""
        return latency.Step(Decoder(self.shape), self.tokens, self.batch, self.context, self._capacity, self.steps)


@dataclasses.dataclass(frozen=True)
class Point:
    """Seconds of one step of a case.

    Attributes:
      seconds: the median.
      spread: the interquartile range over the median.
      estimate: whether it is a roofline's bound and no measurement.
    """

    seconds: float
    spread: float
    estimate: bool = False


def device() -> dict[str, Any]:
    """What tells the machine of a profile from another, the compiler that wrote its programs included."""
    found = jax.devices()[0]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    said = {"platform": found.platform, "device_kind": found.device_kind, "device_count": jax.device_count()}
    said["jax"] = jax.__version__
    # All processors call themselves "cpu".
    return said | ({"processor": _processor(), "cpus": cpus} if found.platform == "cpu" else {})


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """What the device has for arrays; None where it does not say."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    path = Path("/proc/meminfo")
    if jax.default_backend() != "cpu" or not path.is_file():
        return None
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("MemAvailable")]
    return int(lines[0].split()[1]) * 1024 if lines else None


class Profile:
    """The points of one device, in a file that is written after each group of cases: an interrupted profile goes on."""

    def __init__(self, path: str | Path, *, memory: int | None = None):
        """Opens the file, or begins one.

        Args:
          memory: bytes; a case that takes more than four fifths of them is estimated and not run, and so many are timed
            together. None asks the device.

        Raises:
          UserError: for a file of another device, another schema, or damaged.
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
        differing = [
            f"{key}: {theirs.get(key)} there, {self.device.get(key)} here"
            for key in sorted(theirs.keys() | self.device.keys())
            if theirs.get(key) != self.device.get(key)
        ]
        if differing:
            raise UserError(
                f"the profile {self._path} is of another device ({'; '.join(differing)}); name another file and "
                "profile this one"
            )

    def measure(self, cases: Sequence[Case], repeats: int) -> list[Point]:
        """A point for each case: from the file, else measured in turns with the others that are not there yet.

        A case that does not fit the memory gets a roofline estimate, which says that it is one.
        """
        missing = {case.key: case for case in cases if case.key not in self._points}
        too_large = {key: case for key, case in missing.items() if self._memory and case.bytes > 0.8 * self._memory}
        runnable = [case for key, case in missing.items() if key not in too_large]
        with progress(total=len(missing), description="profile", unit="case") as bar:
            for group in self._groups(runnable):
                self._points |= _timed(group, repeats)
                self._write()
                bar.update(len(group))
            for key, case in too_large.items():
                self._points[key] = Point(estimated_seconds(case, self.rates(repeats)), 0.0, estimate=True)
                self._write()
                bar.update(1)
        return [self._points[case.key] for case in cases]

    def _groups(self, cases: Sequence[Case]) -> list[list[Case]]:
        """The cases in their order, as many together as fit the memory."""
        groups: list[list[Case]] = []
        filled, there = 0, set()
        for case in cases:
            # Cases of one shape share its weights.
            needed = case.bytes - (shapes.weight_bytes(case.shape) if case.shape in there else 0)
            if not groups or (self._memory and filled + needed > 0.8 * self._memory):
                groups.append([])
                filled, there, needed = 0, set(), case.bytes
            groups[-1].append(case)
            filled += needed
            there.add(case.shape)
        return groups

    def rates(self, repeats: int) -> dict[str, float]:
        """The device's own: bytes a second of a matrix-vector product, operations a second of a dense product."""
        if not self._rates:
            self._rates = _measured_rates(repeats)
            self._write()
        return self._rates

    def _write(self) -> None:
        points = {key: dataclasses.asdict(point) for key, point in self._points.items()}
        content = {"schema": SCHEMA, "device": self.device, "rates": self._rates, "points": points}
        records.write_atomically(self._path, json.dumps(content, indent=1) + "\n")


def _timed(cases: Sequence[Case], repeats: int) -> dict[str, Point]:
    weights: dict[DecoderConfig, Any] = {}
    for case in cases:
        if case.shape not in weights:
            weights[case.shape] = Decoder(case.shape).init(jax.random.key(0))
    made = [latency.step_case(case.step(), weights[case.shape]) for case in cases]
    found = {}
    for case, seconds in zip(cases, in_turns(made, repeats), strict=True):
        found[case.key] = Point(*median_and_spread([s / case.steps for s in seconds]))
    return found


def median_and_spread(seconds: Sequence[float]) -> tuple[float, float]:
    """The median, and the interquartile range relative to it: 0 for a single measurement."""
    median = statistics.median(seconds)
    if len(seconds) < 2:
        return median, 0.0
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return median, (high - low) / median


def estimated_seconds(case: Case, rates: dict[str, float]) -> float:
    """The roofline's bound (Williams et al. 2009): what has to be read, or computed, at the rates of bare products.

    It knows nothing of launches and of layers that wait for one another, so a real step takes longer.
    """
    moved = shapes.step_bytes(case.shape, case.context, case.batch)
    operations = 2 * Decoder(case.shape).num_step_params * case.tokens * case.batch
    return max(moved / rates["bytes_per_second"], operations / rates["operations_per_second"])


def _measured_rates(repeats: int) -> dict[str, float]:
    key = jax.random.key(0)
    matrix, vector = jax.random.normal(key, _MATRIX), jnp.ones((1, _MATRIX[0]))
    square = jax.random.normal(key, (_SQUARE, _SQUARE))
    scaled = lambda x: x * jax.lax.rsqrt(jnp.mean(jnp.square(x)) + 1e-6)  # neither denormals nor infinities
    rounds = 8

    @jax.jit
    def products(x, kernel):
        return jax.lax.fori_loop(0, rounds, lambda _, x: scaled(x @ kernel), x)

    cases = [(lambda: vector, lambda x: products(x, matrix)), (lambda: square, lambda x: products(x, square))]
    reading, computing = (statistics.median(seconds) / rounds for seconds in in_turns(cases, repeats))
    return {"bytes_per_second": matrix.nbytes / reading, "operations_per_second": 2 * _SQUARE**3 / computing}


def line(x: Sequence[float | int], y: Sequence[float]) -> dict[str, float]:
    """The least-squares line through points: slope, intercept and the share of the variance that it explains."""
    at, values = np.asarray(x, float), np.asarray(y, float)
    slope, intercept = np.polyfit(at, values, 1)
    left = np.sum((values - slope * at - intercept) ** 2)
    whole = np.sum((values - values.mean()) ** 2)
    return {
        "slope": float(slope),
        "intercept": float(intercept),
        "r_squared": float(1 - left / whole) if whole else 1.0,
    }
