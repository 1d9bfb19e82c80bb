"""The fields of the rows that evaluations write to results.json, and a table that documents them."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, get_type_hints

import numpy as np

from specjax.decoding.results import layers_per_token
from specjax.decoding.sampling import Sampling
from specjax.evaluation.cases import Case, Setting
from specjax.evaluation.engine import Output
from specjax.reporting import metrics, tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The results of one drafter with one rule, gamma and setting. None means that a value is undefined."""

    task: Annotated[str, "name of the task that the prompts come from"]
    prompts: Annotated[int, "number of prompts; in Spec-Bench of turns"]
    target: Annotated[str, "directory of the target whose text is written"]
    drafter: Annotated[str, "the config's name for the drafter; `none` is plain decoding"]
    rule: Annotated[str, "verification rule: how drafted tokens are accepted or rejected"]
    lenience: Annotated[float | None, "epsilon of a lossy rule; null for an exact one"]
    gamma: Annotated[int, "largest number of drafted tokens per block; 0 for plain decoding"]
    threshold: Annotated[float, "drafting stops after a token whose draft probability is below this; 0 never stops"]
    block_costs: Annotated[
        list[float] | None,
        "cost of a block with 0 .. gamma drafted tokens, in seconds if measured; null if the draft length is fixed",
    ]
    temperature: Annotated[float, "sampling temperature; 0 is greedy"]
    top_k: Annotated[int, "sampling from the k most probable tokens; 0 is off"]
    top_p: Annotated[float, "sampling from the smallest set of tokens with this probability; 1 is off"]
    min_p: Annotated[float, "sampling from tokens with this share of the largest probability or more; 0 is off"]
    batch_size: Annotated[
        int,
        "prompts decoded together; when one ends, the next of its group of prompts takes its place",
    ]
    max_new_tokens: Annotated[int, "most tokens emitted per prompt"]
    seed: Annotated[int, "seed of prompt selection, sampling and bootstrap"]
    emitted_tokens: Annotated[int, "tokens that the user receives, the end token included, over all prompts"]
    target_calls: Annotated[int, "verifications by the target, over all prompts; prefill is not one"]
    drafted_tokens: Annotated[int, "proposed tokens, over all prompts"]
    accepted_tokens: Annotated[int, "emitted tokens that were drafted, over all prompts"]
    block_efficiency: Annotated[float | None, "emitted / target calls, between 1 and gamma + 1"]
    block_efficiency_ci: Annotated[list[float] | None, "its 95% interval, bootstrapped over prompts or questions"]
    acceptance_rate: Annotated[float | None, "accepted / drafted"]
    acceptance_rate_ci: Annotated[list[float] | None, "its 95% interval, bootstrapped over prompts or questions"]
    sequence_acceptance: Annotated[float | None, "accepted / emitted"]
    acceptance_by_position: Annotated[
        list[float | None],
        "among blocks that drafted position i and accepted all earlier positions: share that accepted position i",
    ]
    ctar: Annotated[
        list[float | None],
        "share of target calls with more than w tokens, w = 1 .. gamma; block_efficiency = 1 + sum(ctar) exactly",
    ]
    tokens_per_second: Annotated[float | None, "emitted / wall-clock seconds; prefill included, compiling excluded"]
    baseline_tokens_per_second: Annotated[
        float | None,
        "the same of plain decoding (gamma = 0 in the same loop), interleaved group by group",
    ]
    speedup: Annotated[
        float | None,
        "tokens_per_second / baseline_tokens_per_second; the baseline is always plain decoding of the config's target",
    ]
    speedup_ci: Annotated[list[float] | None, "its 95% interval, bootstrapped over groups of prompts or questions"]
    prefill_seconds: Annotated[float, "seconds of prefill, over all groups of prompts"]
    decode_seconds: Annotated[float, "seconds of all blocks, over all groups"]
    compile_seconds: Annotated[float, "seconds of compiling, or of loading from JAX's cache, in no other seconds"]
    iterations: Annotated[int, "blocks that ran, over all groups; a group runs until its last text ends"]
    target_layers_per_token: Annotated[
        float,
        "executions of target layers per emitted token, drafting included, prefill excluded, on the rows' own tokens",
    ]
    target_layers_per_token_padded: Annotated[
        float,
        "the same, but over all columns of all rows that ran: with padding and rows that have ended or wait",
    ]
    draft_layers_per_token: Annotated[
        float, "executions of layers of the draft itself (model or adapter) per emitted token"
    ]
    draft_layers_per_token_padded: Annotated[float, "the same over all columns of all rows that ran"]
    target_layers_per_token_once: Annotated[
        float,
        "target_layers_per_token if no layer ran twice on a token: layers x (target calls + drafted) / emitted",
    ]
    serving: Annotated[
        dict[str, Any],
        "the same run under the names of vLLM's benchmark: `output_throughput` (tokens_per_second), mean, median and "
        "99th percentile of `ttft_ms` (until a text's first block ends) and `tpot_ms` (per token after it), "
        "`mean_acceptance_length` (block_efficiency), `draft_acceptance_rate` (acceptance_rate), "
        "`per_position_acceptance_rates`, which are of all target calls, whether or not earlier tokens were accepted, "
        "and `acceptance_histogram`, the numbers of target calls that accepted 0 .. gamma drafted tokens",
    ]
    identical_to_baseline: Annotated[
        dict[str, Any] | None,
        "exact rules at temperature 0 or `coupled`: number of prompts whose tokens equal plain decoding's, and "
        "for each other prompt the first position that differs, the gap between the two best scores there, the bound "
        "below which rounding can exchange them, and whether it is a tie",
    ]

    def to_dict(self) -> dict[str, Any]:
        """The row as a dict of JSON types, as in results.json."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRow(Row):
    """A row of `specjax.evaluate`, with the quality of the text and the speed-up predicted from part times."""

    expected_iterations: Annotated[
        float,
        "iterations expected from each text's acceptance, shrunk to that of all, and length: for each group the "
        "expected end of its last text",
    ]
    quality: Annotated[dict[str, float], "the task's metrics over all prompts, each between 0 and 1"]
    quality_difference: Annotated[dict[str, float], "the same minus that of plain decoding on the same prompts"]
    quality_ci: Annotated[dict[str, list[float] | None], "95% bootstrap intervals of quality over prompts"]
    quality_difference_ci: Annotated[
        dict[str, list[float] | None],
        "95% paired bootstrap intervals of quality_difference over prompts",
    ]
    draft_step_seconds: Annotated[float | None, "seconds per drafted token, timed separately at the run's mean context"]
    target_step_seconds: Annotated[float | None, "seconds of the target on one token per row: a plain block less rule"]
    verify_seconds: Annotated[
        float | None, "seconds of the target on gamma + 1 tokens per row: a block of the run less drafting and rule"
    ]
    rule_seconds: Annotated[float | None, "seconds of rule and bookkeeping per block, timed separately"]
    baseline_rule_seconds: Annotated[float | None, "the same at gamma = 0"]
    part_seconds_ci: Annotated[
        dict[str, list[float] | None] | None,
        "95% intervals of these five, bootstrapped over batches and over timings",
    ]
    cost_ratio: Annotated[float | None, "draft_step_seconds / target_step_seconds"]
    predicted_speedup: Annotated[float | None, "speed-up predicted from these seconds and expected_iterations"]
    mbsu: Annotated[
        float | None,
        "memory-bound speed-up: block efficiency / (gamma x draft size / target size + 1), sizes in parameters",
    ]
    confidence: Annotated[
        dict[str, list[int]] | None,
        "of self-drafts: accepted tokens, and first rejected tokens of a block, in 20 bins of the draft's largest "
        "probability at temperature 1",
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecBenchRow(Row):
    """A row of `specjax.spec_bench`."""

    subtask: Annotated[str, "Spec-Bench's subtask, or `overall`"]
    questions: Annotated[int, "number of questions of the subtask"]


def settings_of(config: Any, setting: Setting, case: Case, sampling: Sampling, prompts: int) -> dict[str, Any]:
    """The fields of a row that describe the case and its settings."""
    return {
        "task": config.task.name,
        "prompts": prompts,
        "target": case.section.target,
        "drafter": case.name,
        "rule": case.rule,
        "lenience": case.lenience,
        "gamma": case.gamma,
        "threshold": case.section.options.threshold,
        "block_costs": None if sampling.block_costs is None else np.asarray(sampling.block_costs).tolist(),
        "temperature": setting.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "min_p": config.min_p,
        "batch_size": setting.batch_size,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
    }


def measured(
    output: Output, plain: Output, layers: int, seed: int, units: Sequence[int] | None = None
) -> dict[str, Any]:
    """The fields of a row that are computed from counts and seconds.

    Args:
      output: the results of the case.
      plain: plain decoding of the same batches.
      layers: number of layers of the target.
      units: for each batch the question that it belongs to, 0 .. N - 1, if intervals resample questions instead of
        prompts and batches.
    """
    counts, of_batch = output.counts(), np.arange(len(output.batches)) if units is None else np.asarray(units)
    of_prompt = np.repeat(of_batch, [len(result.rows) for result in output.batches])
    timings = (
        metrics.Timing(_sums(each.counts().emitted, of_prompt), _sums(each.seconds, of_batch))
        for each in (output, plain)
    )
    if units is not None:
        counts = metrics.Counts(**{name: _sums(values, of_prompt) for name, values in vars(counts).items()})
    row = metrics.evaluate_row(counts, *timings, seed=seed)
    return {
        **row,
        "serving": _serving(row, output),
        "iterations": output.iterations,
        "prefill_seconds": output.prefill_seconds,
        "decode_seconds": float(output.seconds.sum()) - output.prefill_seconds,
        "compile_seconds": output.compile_seconds,
        **layers_per_token(output.batches, layers),
    }


def _serving(row: dict[str, Any], output: Output) -> dict[str, Any]:
    """See `Row.serving`."""
    first, seconds = np.asarray([(row.first_token_seconds, row.seconds) for row in output.rows]).T
    counts = output.counts()
    # How many tokens a text's first block emitted is not recorded; it counts as a mean block.
    later = np.maximum(counts.emitted - counts.emitted / np.maximum(counts.target_calls, 1), 1)
    milliseconds = {"ttft": 1e3 * first, "tpot": 1e3 * (seconds - first) / later}
    how = {"mean": np.mean, "median": np.median, "p99": lambda values: np.percentile(values, 99)}
    reached = np.concatenate([[counts.target_calls.sum()], counts.accepted_at.sum(0)])  # accepted 0, 1, .. or more
    return {
        "output_throughput": row["tokens_per_second"],
        **{f"{name}_{of}_ms": float(take(values)) for of, values in milliseconds.items() for name, take in how.items()},
        "mean_acceptance_length": row["block_efficiency"],
        "draft_acceptance_rate": row["acceptance_rate"],
        "per_position_acceptance_rates": (reached[1:] / max(reached[0], 1)).tolist(),
        "acceptance_histogram": (-np.diff(reached, append=0)).tolist(),
    }


def _sums(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The sums of the rows of each group, 0 .. N - 1."""
    sums = np.zeros((groups.max() + 1, *values.shape[1:]), values.dtype)
    np.add.at(sums, groups, values)
    return sums


def metrics_table() -> str:
    """Every field with its meaning, as a Markdown table for `configs/evaluate/README.md`."""
    lines = []
    for kind, where in ((Row, ""), (EvaluationRow, "evaluate: "), (SpecBenchRow, "Spec-Bench: ")):
        for name in kind.__annotations__:
            (meaning,) = get_type_hints(kind, include_extras=True)[name].__metadata__
            lines.append({"field": f"`{name}`", "meaning": where + meaning})
    return tables.markdown_table(lines, ("field", "meaning"))
