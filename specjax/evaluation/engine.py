"""Decodes prompts batch by batch, each batch with several methods in turn, so that their times are comparable."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from specjax.decoding import batch, identity
from specjax.decoding.plan import Plan
from specjax.decoding.sampling import Sampling
from specjax.reporting import metrics
from specjax.runtime import stopping
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

    def counts(self) -> metrics.Counts:
        """Counts of each prompt. Raises ValueError if they contradict each other."""
        return metrics.Counts(**batch.join_counts([result.counts(rows) for rows, result in self.batches]))


def decode_in_turns(
    methods: Sequence[Method],
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    seed: int,
    put: batch.Placer,
    label: str,
    numbers: Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
    end_of: Callable[[Sequence[int], Sequence[int]], int | None] | None = None,
) -> Iterator[tuple[int, list[tuple[int, batch.BatchResult]]]]:
    """Decodes each batch of prompts with every method, and yields the results of a batch as soon as it is decoded.

    First every method decodes one batch whose result is dropped, so that no batch's seconds include compilation. The
    order of the methods rotates from batch to batch, so that none always follows the same one.

    Args:
      label: label of the progress bar.
      numbers: indices of the batches to decode; all of them by default.
      indices: index of each prompt in the whole run, which with `seed` determines its random numbers; by default its
        index in `prompts`.
      end_of: ends texts at stop strings, see `batch.decode`.

    Yields:
      (batch number, for each method (number of prompts, result)).

    Raises:
      Stopped: between two batches, if the process was asked to stop.
    """
    total = -(-len(prompts) // batch_size)
    numbers = range(total) if numbers is None else numbers
    indices = range(len(prompts)) if indices is None else indices

    def decode(method: Method, number: int) -> tuple[int, batch.BatchResult]:
        span = slice(number * batch_size, (number + 1) * batch_size)
        result = batch.decode(
            method.plan,
            method.params,
            method.draft_params,
            prompts[span],
            indices=indices[span],
            seed=seed,
            sampling=method.sampling,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            put=put,
            size=batch_size,
            end_of=end_of,
        )
        return len(prompts[span]), result

    if not numbers:
        return
    for method in progress(methods, description=f"{label}: compile", unit="case"):
        decode(method, numbers[0])
    with progress(total=total * len(methods), description=label, unit="run") as bar:
        bar.update((total - len(numbers)) * len(methods))
        for turn, number in enumerate(numbers):
            stopping.stop_if_asked()
            results: list[Any] = [None] * len(methods)
            for offset in range(len(methods)):
                index = (turn + offset) % len(methods)
                results[index] = decode(methods[index], number)
                bar.update(1)
            yield number, results


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
