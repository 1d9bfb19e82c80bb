"""Decodes prompts batch by batch, each batch with several methods in turn, so that their times are comparable."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from specjax.decoding import batch, identity
from specjax.decoding.plan import Plan
from specjax.decoding.sampling import Sampling
from specjax.decoding.statistics import Statistics
from specjax.models.kv_cache import Meter
from specjax.reporting import metrics, records
from specjax.runtime import mesh as meshes
from specjax.runtime import processes, stopping
from specjax.runtime.timing import progress


@dataclasses.dataclass(frozen=True)
class Method:
    """A plan with parameters and sampling settings: all that decoding needs besides prompts.

    Attributes:
      plan: static settings: models, drafter, rule, gamma and capacity.
      params: the target's parameters.
      draft_params: the drafter's parameters; None if it has none.
      sampling: temperature, top-k, top-p, lenience, threshold and block costs.
    """

    plan: Plan
    params: Any
    draft_params: Any
    sampling: Sampling

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        first: int,
        batch_size: int,
        *,
        indices: Sequence[int] | None = None,
        **settings: Any,
    ) -> tuple[int, batch.BatchResult]:
        """Decodes prompts `first .. first + batch_size - 1`; a shorter last batch is padded to the same shape.

        Args:
          prompts: all prompts of the run.
          indices: index of each prompt, which with `seed` determines its random numbers; by default that in `prompts`.
          settings: further arguments of `batch.decode`.

        Returns:
          the number of rows that are not padding, and the result.
        """
        span = slice(first, first + batch_size)
        part, places = prompts[span], (range(len(prompts)) if indices is None else indices)[span]
        how = {"indices": places, "sampling": self.sampling, "size": batch_size, **settings}
        return len(part), batch.decode(self.plan, self.params, self.draft_params, part, **how)


@dataclasses.dataclass(frozen=True)
class Output:
    """The results of one method.

    Attributes:
      batches: (number of prompts, result) of each batch; further rows of a result are padding.
    """

    batches: list[tuple[int, batch.BatchResult]] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> list[list[int]]:
        """Emitted ids of each prompt."""
        return [row for rows, result in self.batches for row in result.tokens[:rows]]

    @property
    def origins(self) -> list[list[int]]:
        """The origin of each emitted token of each prompt, as an index into `loop.ORIGINS`."""
        return [row for rows, result in self.batches for row in result.origins[:rows]]

    @property
    def emitted(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def iterations(self) -> int:
        """Total number of blocks over all batches."""
        return sum(result.iterations for _, result in self.batches)

    @property
    def seconds(self) -> Float[np.ndarray, "batches"]:
        """Wall-clock seconds of each batch, prefill included."""
        return np.asarray([result.seconds for _, result in self.batches])

    @property
    def prefill_seconds(self) -> float:
        return sum(result.prefill_seconds for _, result in self.batches)

    @property
    def compile_seconds(self) -> float:
        return sum(result.compile_seconds for _, result in self.batches)

    @property
    def blocks(self) -> list[tuple[float, int]]:
        """Seconds of decoding and number of blocks of each batch."""
        return [(result.decode_seconds, result.iterations) for _, result in self.batches]

    def counts(self) -> metrics.Counts:
        """Counts of each prompt. Raises ValueError if they contradict each other."""
        return metrics.Counts(**batch.join_counts([result.counts(rows) for rows, result in self.batches]))


def decode_in_turns(
    methods: Sequence[Method],
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    label: str,
    numbers: Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
    folder: Path | None = None,
    **settings: Any,
) -> Iterator[tuple[int, list[tuple[int, batch.BatchResult]]]]:
    """Decodes each batch of prompts with every method, and yields the results of a batch as soon as it is decoded.

    First every method decodes one block, which compiles. The order of the methods rotates from batch to batch, so that
    none always follows the same one.

    Args:
      label: label of the progress bar.
      numbers: indices of the batches to decode; all of them by default.
      indices: see `Method.decode`.
      folder: where finished batches are stored, so that a stopped run resumes; its name has to change with all that
        determines the results besides label, prompts and indices.
      settings: `max_new_tokens`, `eos_ids`, `seed`, `put` and `end_of` of `batch.decode`.

    Yields:
      (batch number, for each method (number of prompts, result)).

    Raises:
      Stopped: between two batches, if the process was asked to stop.
    """
    total = -(-len(prompts) // batch_size)
    numbers = range(total) if numbers is None else numbers
    indices = range(len(prompts)) if indices is None else indices

    def decode(method: Method, number: int, **how: Any) -> tuple[int, batch.BatchResult]:
        return method.decode(prompts, number * batch_size, batch_size, indices=indices, **settings | how)

    def path(number: int) -> Path:
        span = slice(number * batch_size, (number + 1) * batch_size)
        key = f"{label}{len(methods)}{[list(prompt) for prompt in prompts[span]]}{list(indices[span])}"
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"

    paths = {} if folder is None else {number: path(number) for number in numbers}
    stored = processes.from_first([number for number, path in paths.items() if path.exists()])
    missing = [number for number in numbers if number not in stored]
    compiling = progress(methods if missing else (), description=f"{label}: compile", unit="case")
    compiled = [decode(method, missing[0], max_new_tokens=1)[1].compile_seconds for method in compiling]
    with progress(total=total * len(methods), description=label, unit="run") as bar:
        bar.update((total - len(missing)) * len(methods))
        for turn, number in enumerate(numbers):
            stopping.stop_if_asked()
            if number in stored:
                yield number, _read_batch(paths[number])
                continue
            results: list[Any] = [None] * len(methods)
            for offset in range(len(methods)):
                index = (turn + offset) % len(methods)
                rows, result = decode(methods[index], number)
                seconds = result.compile_seconds + (compiled[index] if number == missing[0] else 0.0)
                results[index] = rows, dataclasses.replace(result, compile_seconds=seconds)
                bar.update(1)
            if folder is not None and processes.first():
                records.write_atomically(paths[number], json.dumps([_plain(*result) for result in results]))
            yield number, results


# The index of sample s of prompt i is i + s times this; indices are int32.
_SAMPLE = 2**20
MOST_SAMPLES = 2**31 // _SAMPLE - 1


def decode_all(
    method: Method,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    samples: int = 1,
    mesh: Any = None,
    listener: Callable[[Sequence[Sequence[int]]], dict[str, Any]] = lambda part: {},
    **settings: Any,
) -> tuple[list[Sequence[int]], Output]:
    """Decodes every prompt `samples` times, batch by batch. Returns the prompt of each row, and the results.

    Each row has an index that determines its random numbers; sample 0 has the index of its prompt.

    Args:
      samples: at most `MOST_SAMPLES`.
      listener: for the prompts of a batch, further arguments of `batch.decode`, as are `settings`.
    """
    places = [number + sample * _SAMPLE for number in range(len(prompts)) for sample in range(samples)]
    rows, output, size = [prompts[place % _SAMPLE] for place in places], Output(), min(batch_size, len(places))
    with contextlib.nullcontext() if mesh is None else meshes.use(mesh):
        for first in range(0, len(rows), size):
            how = {"indices": places, "put": batch.Placer(mesh), **settings, **listener(rows[first : first + size])}
            output.batches.append(method.decode(rows, first, size, **how))
    return rows, output


def _plain(rows: int, result: batch.BatchResult) -> dict[str, Any]:
    """A batch's number of prompts and result as JSON types."""
    arrays = lambda fields: {name: np.asarray(value).tolist() for name, value in vars(fields).items()}
    executions = {name: [arrays(meter) for meter in meters] for name, meters in result.executions.items()}
    return {"rows": rows, **vars(result), "statistics": arrays(result.statistics), "executions": executions}


def _read_batch(path: Path) -> list[tuple[int, batch.BatchResult]]:
    """The inverse of `_plain`, for a file with the results of all methods."""
    dtype = lambda name: bool if name == "failed" else np.int32
    arrays = lambda kind, fields: kind(**{name: np.asarray(value, dtype(name)) for name, value in fields.items()})
    results = []
    for fields in json.loads(path.read_text(encoding="utf-8")):
        rows = fields.pop("rows")
        fields["statistics"] = arrays(Statistics, fields["statistics"])
        meters = {name: [arrays(Meter, each) for each in listed] for name, listed in fields["executions"].items()}
        results.append((rows, batch.BatchResult(**fields | {"executions": meters})))
    return results


def compare_with_plain(
    method: Method, prompts: Sequence[Sequence[int]], plain: Output | None, output: Output, seed: int
) -> dict[str, Any] | None:
    """`identity.compare` with plain decoding; None if there is none, or if equal tokens are not guaranteed.

    They are guaranteed for exact rules that are greedy or use plain decoding's random numbers (`coupled`).
    """
    plan = method.plan
    if plain is None or not plan.gamma or plan.rule.lossy or not (plan.greedy or plan.rule.shared_noise):
        return None
    how = dict(slots=plan.capacity, seed=seed, sampling=method.sampling)
    return identity.compare(plan, method.params, prompts, plain.tokens, output.tokens, **how)
