"""The interface for notebooks and scripts: load, generate, save.

from specjax import api
target = api.load("path/to/target")
draft = api.load("path/to/draft")
out = api.generate(target, ["def main("], drafter=draft, gamma=4, temperature=1.0, max_new_tokens=64, seed=0)
out.texts, out.stats.block_efficiency
"""

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specjax.decoding import batch, loop
from specjax.decoding.batch import Conversation as Conversation
from specjax.decoding.drafters.adaptive import block_costs
from specjax.decoding.drafters.base import DrafterOptions
from specjax.decoding.drafters.block_parallel import BlockParallelDraft as BlockParallelDraft
from specjax.decoding.drafters.eagle3 import Eagle3 as Eagle3
from specjax.decoding.drafters.early_exit import EarlyExit as EarlyExit
from specjax.decoding.drafters.kangaroo import Kangaroo as Kangaroo
from specjax.decoding.drafters.medusa import Medusa as Medusa
from specjax.decoding.drafters.model import ModelDraft as ModelDraft
from specjax.decoding.drafters.ngram import NGram as NGram
from specjax.decoding.drafters.pard import Pard as Pard
from specjax.decoding.drafters.skip_layers import SkipLayers as SkipLayers
from specjax.decoding.drafters.table import build_drafter, make_options, options_class
from specjax.decoding.plan import Plan
from specjax.decoding.rules import RULES, Rule, rule_named
from specjax.decoding.sampling import Sampling
from specjax.evaluation.continuations import Stops, log_probabilities, note_positions, sampling_of_checkpoint
from specjax.evaluation.engine import MOST_SAMPLES, Method, Output, decode_all
from specjax.hub.adapter import LoadedAttachment
from specjax.hub.adapter import save as save_adapter  # noqa: F401
from specjax.hub.adapter import save_for_engines as save_for_engines
from specjax.hub.model import Model, check_pair, reduced, with_end_ids
from specjax.hub.model import load as load
from specjax.hub.model import load_adapter as load_adapter
from specjax.hub.model import save as save
from specjax.reporting import metrics
from specjax.runtime import checks
from specjax.runtime.errors import UserError, nearest


class Draft:
    """A loaded draft model, adapter or heads with drafter options: `Draft(model, threshold=0.6)`.

    `Draft(model, vocabulary="ids.json")` drafts only these ids, with a head cut to them (FR-Spec, arXiv 2502.14856).

    Attributes:
      loaded: the result of `load` or `load_adapter`.
      options: the options of its drafter.
    """

    def __init__(self, loaded: Model | LoadedAttachment, options: DrafterOptions | None = None, **values: Any):
        """Takes options by name for the drafter of `loaded`, or an `options` object, such as one of your own class.

        Raises:
          UserError: if `loaded` is not a loaded model or adapter, and for options that its drafter does not have.
        """
        if not isinstance(loaded, Model | LoadedAttachment):
            raise UserError(f"api.Draft takes what api.load or api.load_adapter returned, not {loaded!r}")
        self.loaded, self.options = loaded, options or make_options(loaded.network.drafter, values)
        self._cut: tuple[Model | LoadedAttachment, DrafterOptions] | None = None

    def cut(self, target: Model) -> tuple[Model | LoadedAttachment, DrafterOptions]:
        """What is loaded and the options, both with the draft vocabulary of the options; computed once."""
        if self._cut is None:
            options = with_end_ids(self.options, target)
            self._cut = reduced(self.loaded, options.vocabulary), options
        return self._cut


@dataclasses.dataclass(frozen=True)
class Lossy:
    """A lossy rule with its lenience: `Lossy("typical", 0.3)`.

    Attributes:
      rule: name of the rule, or a rule of your own.
      lenience: epsilon in (0, 1]; smaller accepts more.
    """

    rule: str | Rule
    lenience: float

    def __post_init__(self):
        checks.instance("lenience", self.lenience, float)


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts of each prompt, wall-clock seconds, and number of blocks of a generation, with totals as properties."""

    counts: metrics.Counts
    seconds: float
    iterations: int
    compile_seconds: float = 0.0

    @property
    def emitted_tokens(self) -> int:
        return int(self.counts.emitted.sum())

    @property
    def target_calls(self) -> int:
        return int(self.counts.target_calls.sum())

    @property
    def block_efficiency(self) -> float:
        """Emitted tokens per target call, between 1 and gamma + 1."""
        return self.emitted_tokens / self.target_calls

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted tokens / drafted tokens; None if nothing was drafted."""
        drafted = int(self.counts.drafted.sum())
        return int(self.counts.accepted.sum()) / drafted if drafted else None

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens per second, including prefill, without the compiling of a first call with a shape."""
        return self.emitted_tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class Generation:
    """The result of `generate`: one entry per prompt, or `samples` consecutive ones for each prompt.

    Attributes:
      texts: the new texts, without a stop string and what follows it.
      tokens: the emitted ids, without the prompt; they end with EOS or with the token that completes a stop string.
      origins: where each token came from, see `loop.ORIGINS`.
      stats: counts of these tokens; seconds and iterations include up to 16 blocks after a stop string.
      lossy: whether a lossy rule was used, so that the texts do not follow the target's distribution.
      logprobs: the target's log-probability of each token at temperature 1 and without top-k and top-p; None unless
        asked for.
    """

    texts: list[str]
    tokens: list[list[int]]
    origins: list[list[str]]
    stats: Stats
    lossy: bool
    logprobs: list[list[float]] | None = None


def generate(
    target: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    drafter: Model | LoadedAttachment | Draft | DrafterOptions | str | None = None,
    gamma: int = 4,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    rule: str | Rule | Lossy = "lossless",
    max_new_tokens: int = 64,
    batch_size: int = 8,
    eos_ids: Sequence[int] | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    samples: int = 1,
    logprobs: bool = False,
    sampling: str = "",
    blocks_at_once: int | None = None,
    on_text: Callable[[Generation], bool | None] | None = None,
    conversation: Conversation | None = None,
    **removed: Any,
) -> Generation:
    """Continues prompts, speculatively if there is a drafter; further calls with the same shapes do not recompile.

    Args:
      prompts: strings, or lists of token ids.
      drafter: a loaded draft model; an adapter or Medusa heads of the target (`load_adapter`); either of them with
        options, `Draft(model, threshold=0.6)`; a drafter that loads nothing, "ngram" or `NGram(longest=3)`,
        "early_exit" or `EarlyExit(exit_layer=2)`, `SkipLayers(skipped=(1, 3))`; or None for plain decoding.
      gamma: maximum number of drafted tokens per block.
      min_p: sample from tokens with at least this share of the largest probability, after top_k and top_p; 0 is off.
      rule: "lossless", "block", "coupled", `Lossy("typical", 0.5)` or another of `RULES`, or an exact Rule of yours.
      eos_ids: ids that end a text; None uses the tokenizer's `stop_ids`, () uses none.
      stop: strings before which a text ends, also where they span several tokens.
      samples: number of texts per prompt, each with its own random numbers; the first is that of `samples=1`.
      logprobs: whether to compute the log-probability of every emitted token, by one forward of the target per text.
      sampling: "checkpoint" takes temperature, top-k, top-p and min-p from generation_config.json; leave these out.
      batch_size: number of texts decoded together; where one ends, the next starts, or with `on_text` the next batch.
      on_text: called with the batch's result so far, after every `blocks_at_once` blocks and at its end; True ends it.
      conversation: keeps the caches of one batch, which a later call with it extends by what its prompts add.

    Raises:
      UserError: for values of the wrong type or out of range, empty or too long prompts, ids outside the vocabulary,
        different vocabularies or tokenizers, and arguments of earlier versions (with what to write instead).
    """
    _refuse(removed)
    _check_numbers(locals())
    temperature, top_k, top_p, min_p = sampling_of_checkpoint(target, sampling, (temperature, top_k, top_p, min_p))
    rule, lenience = _rule(rule)
    loaded, options = _drafter(target, drafter)
    proposer, gamma, how = _proposer(target, loaded, options, gamma, {"lenience": lenience, "min_p": min_p})
    adjust, ids = Sampling.of(temperature, top_k, top_p, **how), _ids(target, loaded, prompts, max_new_tokens)
    stops, limits = Stops.of(target, stop), {"max_new_tokens": max_new_tokens}
    method = Method.of(target, ids, adjust, loaded, drafter=proposer, gamma=gamma, rule=rule, **limits)
    generation = functools.partial(_generation, target, method.plan, stops)
    run = {"samples": samples, "batch_size": batch_size, "mesh": target.mesh, "seed": seed, **limits}
    ids, output = decode_all(
        method,
        ids,
        listener=None if on_text is None else lambda part: _listener(generation, part, blocks_at_once, on_text),
        eos_ids=target.tokenizer.stop_ids if eos_ids is None else _eos_ids(target, eos_ids),
        end_of=stops.end if stops.strings else None,
        conversation=conversation,
        **run,
    )
    made = generation(ids, output)
    return dataclasses.replace(made, logprobs=log_probabilities(target, ids, made.tokens)) if logprobs else made


# Arguments of earlier versions, and what to write instead.
_REMOVED = {
    "threshold": "drafter=api.Draft(draft, threshold=0.6) or api.EarlyExit(threshold=0.6)",
    "adaptive": "drafter=api.Draft(draft, adaptive=True, costs=(0.1, 0.02))",
    "exit_layer": "drafter=api.EarlyExit(exit_layer=2)",
    "skipped": "drafter=api.SkipLayers(skipped=(1, 3))",
    "shortest": "drafter=api.NGram(shortest=2, longest=4)",
    "longest": "drafter=api.NGram(shortest=2, longest=4)",
    "lenience": 'rule=api.Lossy("typical", 0.3)',
}


# The types of arguments of `generate`.
_TYPES = {int: ("gamma", "top_k", "max_new_tokens", "batch_size", "seed", "samples")}
_TYPES |= {float: ("temperature", "top_p", "min_p"), bool: ("logprobs",)}


def _check_numbers(arguments: Mapping[str, Any]) -> None:
    for kind, names in _TYPES.items():
        for name in names:
            checks.instance(name, arguments[name], kind)
    for name in ("batch_size", "samples"):
        if arguments[name] < 1:
            raise UserError(f"{name} must be at least 1, not {arguments[name]}")
    if arguments["samples"] > MOST_SAMPLES:
        raise UserError(f"samples must be at most {MOST_SAMPLES}, not {arguments['samples']}; use several seeds")


def _refuse(removed: dict[str, Any]) -> None:
    for name in removed:
        if name in _REMOVED:
            raise UserError(f"{name} is no longer an argument of api.generate; write {_REMOVED[name]}")
        raise UserError(f"api.generate has no argument {name}{nearest(name, inspect.signature(generate).parameters)}")


def _drafter(target: Model, drafter: Any) -> tuple[Model | LoadedAttachment | None, DrafterOptions | None]:
    """The drafter's loaded model or adapter (or None), checked against the target, and the drafter's options."""
    if drafter is None:
        return None, None
    if isinstance(drafter, Model | LoadedAttachment):
        drafter = Draft(drafter)
    if isinstance(drafter, Draft):
        if isinstance(drafter.loaded, Model):
            check_pair(target, drafter.loaded)
        else:
            drafter.loaded.check(target.fingerprint)
        return drafter.cut(target)
    if isinstance(drafter, str):
        place = drafter.partition(":")[0]
        if not place.endswith(".py") and ("/" in place or Path(place).is_dir()):
            raise UserError(f'drafter is the path "{drafter}"; load it: drafter=api.load("{drafter}")')
        _check_loads_nothing(options_class(drafter))
        drafter = make_options(drafter, {})
    if not isinstance(drafter, DrafterOptions):
        raise UserError(f"drafter must be a loaded model or adapter, options, a name or None, not {drafter!r}")
    _check_loads_nothing(type(drafter))
    return None, with_end_ids(drafter, target)


def _proposer(
    target: Model, loaded: Any, options: DrafterOptions | None, gamma: int, how: dict[str, Any]
) -> tuple[Any, int, dict[str, Any]]:
    """The drafter (or None) with its gamma, and the arguments of `Sampling.of` for drafter and rule."""
    network = None if loaded is None else loaded.network
    drafter = None if options is None else build_drafter(options, target.decoder, gamma, network)
    if drafter is None:
        return None, 0, how
    return drafter, drafter.gamma, how | {"threshold": options.threshold, "block_costs": _costs(options, drafter.gamma)}


def _check_loads_nothing(options: type[DrafterOptions]) -> None:
    if options.loads:
        load = "api.load(DIRECTORY)" if options.loads == "model" else "api.load_adapter(DIRECTORY, target)"
        raise UserError(f"{options.__name__} drafts with a trained {options.loads}; write drafter=api.Draft({load})")


def _costs(options: DrafterOptions, gamma: int) -> tuple[float, ...] | None:
    if not options.adaptive:
        return None
    if not options.costs:
        raise UserError("adaptive needs costs=(of a drafted token, of verifying it), relative to a plain step")
    return block_costs(*options.costs, gamma)


def _rule(rule: Any) -> tuple[Rule, float]:
    """The rule and its lenience (1 for an exact rule)."""
    named, lenience = (rule.rule, rule.lenience) if isinstance(rule, Lossy) else (rule, None)
    made = rule_named(named) if isinstance(named, str) else named
    if not isinstance(made, Rule):
        raise UserError(f"rule must be a name, api.Lossy(...) or a Rule, not {named!r}")
    if made.lossy and lenience is None:
        raise UserError(f"the rule {named} is lossy; write rule=api.Lossy({named!r}, LENIENCE), LENIENCE in (0, 1]")
    if lenience is not None and not made.lossy:
        lossy = ", ".join(name for name, other in RULES.items() if other.lossy)
        raise UserError(f"the rule {named} is exact; write rule={named!r}, or take {lossy}")
    return made, 1.0 if lenience is None else lenience


def _ids(target: Model, loaded: Any, prompts: Any, max_new_tokens: int) -> list[list[int]]:
    """Converts prompts to token ids and checks them."""
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise UserError(f"prompts must be a list of strings or of lists of token ids, not {prompts!r}; write [prompt]")
    ids = [_prompt_ids(target, number, prompt) for number, prompt in enumerate(prompts)]
    batch.check_prompts(ids, target.decoder, max_new_tokens)
    if loaded is not None:
        note_positions("the draft", loaded.network, ids, max_new_tokens)
    return ids


def _prompt_ids(target: Model, number: int, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return target.tokenizer.encode_prompt(prompt)
    if isinstance(prompt, numbers.Number):
        raise UserError(f"prompt {number} is the number {prompt}; give a list of prompts, each a list of token ids")
    tokens = [prompt] if isinstance(prompt, Mapping) else list(prompt) if isinstance(prompt, Iterable) else [None]
    if any(isinstance(token, Mapping) for token in tokens):
        raise UserError(f"prompt {number} is a chat; write target.tokenizer.apply_chat(messages) in its place")
    return _token_ids(f"prompt {number}", tokens)


def _token_ids(name: str, ids: Iterable[Any]) -> list[int]:
    ids = list(ids)
    for token in ids:
        checks.instance(f"a token id of {name}", token, int)
    return [int(token) for token in ids]


def _eos_ids(target: Model, eos_ids: Any) -> list[int]:
    if isinstance(eos_ids, str | Mapping) or not isinstance(eos_ids, Iterable):
        raise UserError(f"eos_ids must be a list of token ids, such as (2,), not {eos_ids!r}")
    ids, size = _token_ids("eos_ids", eos_ids), target.decoder.config.vocab_size
    for token in ids:
        if not 0 <= token < size:
            raise UserError(f"eos_ids has {token}, outside the vocabulary of {size}; take ids of target.tokenizer")
    return ids


def _listener(generation: Callable, prompts: Sequence, blocks_at_once: int | None, on_text) -> dict[str, Any]:
    """The arguments of `scheduler.decode` that make it call `on_text` after every `blocks_at_once` blocks."""
    if blocks_at_once is not None:
        checks.instance("blocks_at_once", blocks_at_once, int)
    if blocks_at_once is None or blocks_at_once < 1:
        raise UserError(f"blocks_at_once must be 1 or more for on_text to be called, not {blocks_at_once}")
    return {"blocks": blocks_at_once, "on_blocks": lambda result: on_text(generation(prompts, Output([result])))}


def _generation(
    target: Model, plan: Plan, stops: Stops, prompts: Sequence[Sequence[int]], output: Output
) -> Generation:
    """The decoded batches as one Generation."""
    return Generation(
        texts=list(map(stops.text, prompts, output.tokens)),
        tokens=output.tokens,
        origins=[[loop.ORIGINS[origin] for origin in row] for row in output.origins],
        stats=Stats(output.counts(), float(output.seconds.sum()), output.iterations, output.compile_seconds),
        lossy=plan.rule.lossy and plan.gamma > 0,
    )
