"""Decodes prompts with a method, or groups of prompts with several methods in turn, so that times are comparable."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from specjax.decoding import batch, identity, scheduler
from specjax.decoding.plan import Plan
from specjax.decoding.results import BatchResult, Row, counts_of
from specjax.decoding.sampling import Sampling
from specjax.decoding.statistics import Statistics
from specjax.hub.adapter import LoadedAttachment
from specjax.hub.model import Model
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

    @classmethod
    def of(
        cls,
        target: Model,
        prompts: Sequence[Sequence[int]] | int,
        sampling: Sampling,
        draft: Model | LoadedAttachment | None = None,
        **settings: Any,
    ) -> "Method":
        """The method that decodes these prompts; plain decoding by default.

        Args:
          prompts: token ids of all prompts, or the number of tokens of the longest one.
          draft: what the drafter loads; None for nothing.
          settings: further arguments of `Plan.for_prompts`, such as `drafter` and `gamma`.
        """
        plan = Plan.for_prompts(target.decoder, prompts, greedy=float(sampling.temperature) == 0, **settings)
        return cls(plan, target.params, None if draft is None else draft.params, sampling)

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        batch_size: int,
        *,
        indices: Sequence[int] | None = None,
        **settings: Any,
    ) -> BatchResult:
        """Decodes prompts in a compiled batch of `batch_size` rows.

        Args:
          indices: index of each prompt, which with `seed` determines its random numbers; by default that in `prompts`.
          settings: further arguments of `scheduler.decode`.
        """
        indices = range(len(prompts)) if indices is None else indices
        how = {"indices": indices, "sampling": self.sampling, "slots": batch_size, **settings}
        return scheduler.decode(self.plan, self.params, self.draft_params, prompts, **how)


@dataclasses.dataclass(frozen=True)
class Output:
    """The results of one method.

    Attributes:
      batches: the result of each call of `scheduler.decode`.
    """

    batches: list[BatchResult] = dataclasses.field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """The result of each prompt."""
        return [row for result in self.batches for row in result.rows]

    @property
    def tokens(self) -> list[list[int]]:
        """Emitted ids of each prompt."""
        return [row.tokens for row in self.rows]

    @property
    def origins(self) -> list[list[int]]:
        """The origin of each emitted token of each prompt, as an index into `loop.ORIGINS`."""
        return [row for result in self.batches for row in result.origins]

    @property
    def emitted(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def iterations(self) -> int:
        """Total number of blocks over all batches."""
        return sum(result.iterations for result in self.batches)

    @property
    def seconds(self) -> Float[np.ndarray, "batches"]:
        """Wall-clock seconds of each result, prefill included."""
        return np.asarray([result.seconds for result in self.batches])

    @property
    def prefill_seconds(self) -> float:
        return sum(result.prefill_seconds for result in self.batches)

    @property
    def compile_seconds(self) -> float:
        return sum(result.compile_seconds for result in self.batches)

    @property
    def blocks(self) -> list[tuple[float, int]]:
        """Seconds of decoding and number of blocks of each result."""
        return [(result.decode_seconds, result.iterations) for result in self.batches]

    def counts(self) -> metrics.Counts:
        """Counts of each prompt. Raises ValueError if they contradict each other."""
        return metrics.Counts(**counts_of(self.rows))


def group_size(prompts: int, batch_size: int) -> int:
    """The number of prompts that `decode_in_turns` decodes at once: up to three for each row, if there are four groups.

    More prompts per row leave fewer rows unused at the end of a group, and fewer groups to compute intervals from.
    """
    return batch_size * min(max(prompts // batch_size // 4, 1), 3) if batch_size > 1 else 1


def decode_in_turns(
    methods: Sequence[Method],
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    group: int,
    label: str,
    indices: Sequence[int] | None = None,
    folder: Path | None = None,
    **settings: Any,
) -> Iterator[tuple[int, list[BatchResult]]]:
    """Decodes each group of prompts with every method, and yields the results of a group as soon as it is decoded.

    First every method decodes one block, which compiles. The order of the methods rotates from group to group, so that
    none always follows the same one. Within a group, rows that end take the next prompt, as in `scheduler.decode`.

    Args:
      group: number of prompts in a group, see `group_size`.
      label: label of the progress bar.
      indices: see `Method.decode`.
      folder: where finished groups are stored, so that a stopped run resumes; its name has to change with all that
        determines the results besides label, prompts and indices.
      settings: `max_new_tokens`, `eos_ids`, `seed`, `put` and `end_of` of `scheduler.decode`.

    Yields:
      (group number, for each method its result).

    Raises:
      Stopped: between two groups, if the process was asked to stop.
    """
    numbers = range(-(-len(prompts) // group))
    indices = range(len(prompts)) if indices is None else indices
    span = lambda number: slice(number * group, (number + 1) * group)

    def decode(method: Method, number: int, **how: Any) -> BatchResult:
        part = {"indices": indices[span(number)], **settings, **how}
        return method.decode(prompts[span(number)], batch_size, **part)

    def path(number: int) -> Path:
        texts = [list(prompt) for prompt in prompts[span(number)]]
        key = str((label, len(methods), texts, list(indices[span(number)])))
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"

    paths = {} if folder is None else {number: path(number) for number in numbers}
    stored = processes.from_first([number for number, path in paths.items() if path.exists()])
    missing = [number for number in numbers if number not in stored]
    compiling = progress(methods if missing else (), description=f"{label}: compile", unit="case")
    compiled = [decode(method, missing[0], max_new_tokens=1).compile_seconds for method in compiling]
    with progress(total=len(numbers) * len(methods), description=label, unit="run") as bar:
        bar.update((len(numbers) - len(missing)) * len(methods))
        for number in numbers:
            stopping.stop_if_asked()
            if number in stored:
                yield number, _read_results(paths[number])
                continue
            results: list[Any] = [None] * len(methods)
            for offset in range(len(methods)):
                index = (number + offset) % len(methods)
                result = decode(methods[index], number)
                seconds = result.compile_seconds + (compiled[index] if number == missing[0] else 0.0)
                results[index] = dataclasses.replace(result, compile_seconds=seconds)
                bar.update(1)
            if folder is not None and processes.first():
                _write_results(paths[number], results)
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
    listener: Callable[[Sequence[Sequence[int]]], dict[str, Any]] | None = None,
    **settings: Any,
) -> tuple[list[Sequence[int]], Output]:
    """Decodes every prompt `samples` times. Returns the prompt of each row, and the results.

    Rows that end take the next prompt. Each text has an index that determines its random numbers; sample 0 has the
    index of its prompt.

    Args:
      samples: at most `MOST_SAMPLES`.
      listener: decodes batch by batch: for the prompts of a batch, further arguments of `scheduler.decode`, as are
        `settings`.
    """
    places = [number + sample * _SAMPLE for number in range(len(prompts)) for sample in range(samples)]
    rows, output, size = [prompts[place % _SAMPLE] for place in places], Output(), min(batch_size, len(places))
    with contextlib.nullcontext() if mesh is None else meshes.use(mesh):
        for first in range(0, len(rows), len(rows) if listener is None else size):
            span = slice(first, None if listener is None else first + size)
            how = {"put": batch.Placer(mesh), **settings, **(listener(rows[span]) if listener else {})}
            output.batches.append(method.decode(rows[span], size, indices=places[span], **how))
    return rows, output


def _write_results(path: Path, results: Sequence[BatchResult]) -> None:
    arrays = lambda array: array.tolist()
    records.write_atomically(path, json.dumps(list(map(dataclasses.asdict, results)), default=arrays))


def _read_results(path: Path) -> list[BatchResult]:
    dtype = lambda name: bool if name == "failed" else np.int32

    def row(fields: dict[str, Any]) -> Row:
        statistics = {name: np.asarray(values, dtype(name)) for name, values in fields["statistics"].items()}
        return Row(**fields | {"statistics": Statistics(**statistics)})

    stored = json.loads(path.read_text(encoding="utf-8"))
    return [BatchResult(**fields | {"rows": list(map(row, fields["rows"]))}) for fields in stored]


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
