"""Expected tokens per target call on stored text of a target, from probabilities, without decoding.

Given its text, the blocks of exact speculative decoding are a Markov chain whose transitions are known: the text is in
no way random, only the ends of its blocks are. Let p be the target's and q the draft's probability of the text's own
token at each of the gamma positions of a block, each after the text before it. Then the chance S(i) that the first i
tokens are drafted and accepted in a block that starts here is, with S(0) = w(0) = 1,

  `lossless`   S(i + 1) = S(i) * min(1, q / p): a token x is emitted with probability p(x), and drafted and accepted
               with probability min(p(x), q(x)) (arXiv 2211.17192)
  `block`      S(i + 1) = S(i) * min(1, q / (p * w(i))), w(i + 1) = min(w(i) * p / q, 1): the first i tokens are drafted
               with probability q(1) * .. * q(i), and then accepted with probability w(i) (arXiv 2403.10444)

A block emits i + 1 tokens with probability S(i) - S(i + 1), and gamma + 1 with S(gamma). Summing the chances that a
block starts at each token gives the expected number of target calls of the text. At temperature 0, q / p is 1 where the
draft's most probable token is the text's, and 0 elsewhere, and the number is exact.

For a draft whose distribution depends on the text alone (a model, Kangaroo), one forward gives q for every block.
Others (EAGLE-3, block-parallel, Medusa) draft from where the block starts: they are unrolled from every position, as in
training.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from specjax.decoding import batch, rules
from specjax.decoding.drafters.model import ModelDraft
from specjax.decoding.drafters.table import build_drafter, make_options
from specjax.decoding.sampling import Sampling, most_probable, probabilities
from specjax.evaluation.engine import Method, decode_all
from specjax.hub.adapter import LoadedAttachment
from specjax.hub.model import Model
from specjax.models.attachment import AttachedDraft, runtime_params
from specjax.models.language_model import LanguageModel, consecutive
from specjax.reporting import metrics
from specjax.runtime.errors import UserError
from specjax.runtime.timing import progress

RULES = ("lossless", "block")
# Predictions whose logits are in memory at one time, and the multiples to which texts and their answers are padded.
_CHUNK, _WIDTH, _WINDOW = 512, 128, 32

Rows = Mapping[str, np.ndarray]


def survival(ratios: Float[np.ndarray, "*X gamma"], rule: str) -> Float[np.ndarray, "*X gamma_plus_1"]:
    """The chance that the first 0 .. gamma tokens of a block are drafted and accepted, from q / p of each.

    Raises:
      UserError: for a rule that is not in `RULES`.
    """
    if rule not in RULES:
        raise UserError(f'acceptance without decoding is known for the rules {" and ".join(RULES)}, not for "{rule}"')
    chance = weight = np.ones(ratios.shape[:-1])
    chances = [chance]
    for i in range(ratios.shape[-1]):
        ratio = ratios[..., i]
        with np.errstate(divide="ignore"):
            chance = chance * np.minimum(ratio / weight, 1)
            if rule == "block":
                weight = np.minimum(weight / ratio, 1)
        chances.append(chance)
    return np.stack(chances, axis=-1)


def expected_calls(
    chances: Float[np.ndarray, "N T gamma_plus_1"], emitted: Int[np.ndarray, "N"]
) -> Float[np.ndarray, "N"]:
    """The expected number of target calls of each text.

    Args:
      chances: the `survival` of a block that starts at each emitted token; ignored after the text's end.
      emitted: number of emitted tokens.
    """
    count, longest, most = chances.shape
    advances = chances - np.pad(chances[..., 1:], ((0, 0), (0, 0), (0, 1)))  # by 1 .. gamma + 1 tokens
    starts = np.zeros((count, longest + most))
    starts[:, 0] = 1
    for place in range(longest):
        starts[:, place + 1 : place + 1 + most] += starts[:, place, None] * advances[:, place]
    return np.where(np.arange(longest + most)[None] < emitted[:, None], starts, 0).sum(1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _token_probs(
    model: LanguageModel,
    greedy: bool,
    width: int,
    params: Any,
    tokens: Int[Array, "B T"],
    starts: Int[Array, "B"],
    sampling: Sampling,
) -> Float[Array, "B width P"]:
    """For each prediction at the `width` positions of a row from its start on, the probability of the text's token that
    it predicts."""
    hidden, _ = model.extend(params, None, tokens, consecutive(tokens))
    ahead = [jnp.roll(tokens, -1 - offset, axis=1) for offset, _ in model.predicts]
    cut = jax.vmap(functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=width))
    hidden, labels = cut(hidden, starts), cut(jnp.stack(ahead, axis=-1), starts)
    chunk = max(_CHUNK // (tokens.shape[0] * len(ahead)), 1)

    def in_chunks(array):
        array = jnp.pad(array, ((0, 0), (0, -width % chunk), (0, 0)))
        return jnp.moveaxis(array.reshape(array.shape[0], -1, chunk, array.shape[2]), 1, 0)

    def of_chunk(part):
        hidden, labels = part
        logits, flat = model.column_logits(params, hidden), labels.reshape(labels.shape[0], -1)
        inside = flat < logits.shape[-1]
        columns = jnp.minimum(flat, logits.shape[-1] - 1)
        if model.vocabulary is not None:
            columns, inside = model.vocabulary.columns(flat)
        if greedy:
            probs = (most_probable(logits) == columns).astype(jnp.float32)
        else:
            probs = jnp.take_along_axis(probabilities(logits, sampling, greedy=False), columns[..., None], axis=2)
            probs = probs[..., 0]
        return jnp.where(inside, probs, 0).reshape(labels.shape)

    probs = jnp.moveaxis(jax.lax.map(of_chunk, (in_chunks(hidden), in_chunks(labels))), 0, 1)
    return probs.reshape(tokens.shape[0], -1, len(ahead))[:, :width]


class Scorer:
    """The target's texts at one temperature, and its own probabilities of their tokens.

    Attributes:
      rows: `tokens` [N, T], `lengths` [N] and `loss_start` [N], as in `data.batches`.
      temperature: temperature, top-k and top-p at which the texts were written.
    """

    def __init__(self, target: Model, rows: Rows, temperature: tuple[float, int, float], batch_size: int):
        self.target, self.rows, self.temperature, self.batch_size = target, rows, temperature, batch_size
        self.emitted = rows["lengths"] - rows["loss_start"]
        # At temperature 0 the text's token has probability 1, also where another one ties with it.
        self._target_probs = None
        if temperature[0]:
            self._target_probs = self._probs(target.decoder, target.params, "the target")[..., 0]

    def _probs(self, model: LanguageModel, params: Any, name: str) -> Float[np.ndarray, "N T P"]:
        """`_token_probs` by position, in batches of similar lengths; undefined where nothing emitted is predicted."""
        lengths, tokens, size = self.rows["lengths"], self.rows["tokens"], self.batch_size
        furthest = max(offset for offset, _ in model.predicts)
        first_used = np.maximum(self.rows["loss_start"] - 1 - furthest, 0)
        probs = np.zeros((*tokens.shape, len(model.predicts)), np.float32)
        order = np.argsort(-lengths, kind="stable")
        greedy, sampling = self.temperature[0] == 0, Sampling.of(*self.temperature)
        for first in progress(range(0, len(order), size), description=f"scoring: {name}", unit="batch"):
            chosen = order[first : first + size]
            width = min(-(-int(lengths[chosen].max()) // _WIDTH) * _WIDTH, tokens.shape[1])
            padded = np.resize(chosen, size)  # repeats texts, so that few shapes are compiled
            used = int((lengths - first_used)[chosen].max())
            window = min(-(-used // _WINDOW) * _WINDOW, width)
            starts = np.minimum(first_used[padded], width - window)
            batch_tokens = jnp.asarray(tokens[padded, :width])
            values = _token_probs(model, greedy, window, params, batch_tokens, jnp.asarray(starts), sampling)
            places = starts[: len(chosen), None] + np.arange(window)
            probs[chosen[:, None], places] = np.asarray(values)[: len(chosen)]
        return probs

    def ratios(self, draft: Model | LoadedAttachment, gamma: int) -> Float[np.ndarray, "N E gamma"]:
        """q / p of the gamma tokens of a block that starts at each emitted token; 0 past the text's end.

        Raises:
          UserError: if the draft drafts fewer than gamma tokens.
        """
        model, params = self._model_of(draft, gamma)
        drafted = self._probs(model, params, "a draft")
        index = np.arange(self.emitted.max())[None, :, None] + np.arange(gamma)[None, None]
        predicts = [offset for offset, _ in model.predicts]
        alone = len(predicts) == 1  # one prediction serves every token of a block
        offsets = np.asarray(predicts * gamma if alone else predicts[:gamma])
        places = self.rows["loss_start"][:, None, None] + index
        inside = (index < self.emitted[:, None, None]) & (places - 1 - offsets >= 0)
        places = np.where(inside, places, offsets + 1)
        number = np.arange(len(places))[:, None, None]
        ratios = drafted[number, places - 1 - offsets, 0 if alone else np.arange(gamma)].astype(np.float64)
        if self._target_probs is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = np.where(ratios > 0, ratios / self._target_probs[number, places - 1], 0)
        return np.where(inside, ratios, 0)

    def _model_of(self, draft: Model | LoadedAttachment, gamma: int) -> tuple[LanguageModel, Any]:
        if isinstance(draft, Model):
            return draft.decoder.with_vocab_size(self.target.decoder.vocab_size), draft.params
        model = AttachedDraft.of(draft.network.unrolled(gamma))
        return model, runtime_params(model, draft.params, self.target.params)


def decode(
    scorer: Scorer, draft: Model | LoadedAttachment, rule: str, gamma: int, prompts: int, max_new_tokens: int, seed: int
) -> tuple[metrics.Counts, Rows]:
    """Decodes the first prompts of a scorer's texts. Returns the counts, and the new texts as the rows of a Scorer."""
    target, rows = scorer.target, scorer.rows
    chosen = [rows["tokens"][i, : rows["loss_start"][i]].tolist() for i in range(min(prompts, len(rows["lengths"])))]
    options = ModelDraft() if isinstance(draft, Model) else make_options(draft.network.drafter, {})
    how = {"drafter": build_drafter(options, target.decoder, gamma, draft.network), "gamma": gamma}
    how |= {"max_new_tokens": max_new_tokens, "rule": rules.rule_named(rule)}
    method = Method.of(target, chosen, Sampling.of(*scorer.temperature), draft, **how)
    how = {"max_new_tokens": max_new_tokens, "eos_ids": target.tokenizer.stop_ids, "seed": seed}
    _, output = decode_all(method, chosen, batch_size=scorer.batch_size, **how)
    texts = [[*prompt, *new] for prompt, new in zip(chosen, output.tokens, strict=True)]
    tokens, lengths = batch.pad(texts, max(map(len, texts)))
    return output.counts(), {"tokens": tokens, "lengths": lengths, "loss_start": rows["loss_start"][: len(chosen)]}


def score(
    scorer: Scorer,
    draft: Model | LoadedAttachment,
    rules_and_gammas: Mapping[str, Sequence[int]],
    *,
    decoded: int,
    max_new_tokens: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Yields for each rule and gamma the expected block efficiency with its interval, a bootstrap over texts.

    `over_lossless` is the block efficiency relative to that of the rule `lossless` at the same gamma, with an interval
    that pairs the two by text; None for `lossless` itself.

    Args:
      decoded: number of texts whose prompts are decoded to check it; 0 for none. `decoded` is their block efficiency,
        `expected` that of the texts that this wrote, and `ratio` the former relative to the latter.
      rules_and_gammas: gammas that the draft cannot draft are left out, which is logged.

    Raises:
      UserError: if it can draft none of them.
    """
    rules_and_gammas = _drafted(draft, rules_and_gammas)
    ratios = scorer.ratios(draft, max(max(gammas) for gammas in rules_and_gammas.values()))
    calls_of = lambda rule, gamma: expected_calls(survival(ratios[..., :gamma], rule), scorer.emitted)
    for rule, gammas in rules_and_gammas.items():
        for gamma in gammas:
            calls = calls_of(rule, gamma)
            row = {"rule": rule, "gamma": gamma, "temperature": scorer.temperature[0]}
            row |= {"texts": len(calls), "tokens": int(scorer.emitted.sum())}
            row |= _efficiency("block_efficiency", scorer.emitted, calls, seed)
            lossless = {"over_lossless": None, "over_lossless_ci": None}
            row |= lossless if rule == "lossless" else _ratio("over_lossless", calls_of("lossless", gamma), calls, seed)
            if decoded:
                counts, rows = decode(scorer, draft, rule, gamma, decoded, max_new_tokens, seed)
                again = Scorer(scorer.target, rows, scorer.temperature, scorer.batch_size)
                expected = expected_calls(survival(again.ratios(draft, gamma), rule), again.emitted)
                row |= {"decoded_tokens": int(counts.emitted.sum())}
                row |= _efficiency("decoded", counts.emitted, counts.target_calls, seed)
                row |= {"expected": float(again.emitted.sum() / expected.sum())}
                row["ratio"] = row["decoded"] / row["expected"]
            yield row


def _drafted(
    draft: Model | LoadedAttachment, rules_and_gammas: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """The gammas of each rule that the draft can draft, without rules that have none."""
    most = draft.network.most_drafted if isinstance(draft, LoadedAttachment) else None
    if most is None:
        return dict(rules_and_gammas)
    drafted = {rule: tuple(gamma for gamma in gammas if gamma <= most) for rule, gammas in rules_and_gammas.items()}
    if left_out := sorted({gamma for gammas in rules_and_gammas.values() for gamma in gammas if gamma > most}):
        logging.info("the draft drafts at most %d tokens: no rows for gamma %s", most, ", ".join(map(str, left_out)))
    drafted = {rule: gammas for rule, gammas in drafted.items() if gammas}
    if not drafted:
        raise UserError(f"the draft drafts at most {most} tokens, and every gamma in rules is larger; add smaller ones")
    return drafted


def _efficiency(name: str, emitted: np.ndarray, calls: np.ndarray, seed: int) -> dict[str, Any]:
    """Tokens per call and its 95% interval, and half the interval's width relative to it."""
    row = _ratio(name, emitted, calls, seed)
    interval = row[f"{name}_ci"]
    width = None if interval is None else (interval[1] - interval[0]) / 2 / row[name]
    return row | {f"{name}_within": width}


def _ratio(name: str, above: np.ndarray, below: np.ndarray, seed: int) -> dict[str, Any]:
    """The ratio of two sums over texts and its 95% interval, a bootstrap over texts."""
    of = lambda weights: {name: float(weights @ above / (weights @ below))}
    (interval,) = metrics.intervals(of, len(below), seed=seed).values()
    return of(np.ones(len(below))) | {f"{name}_ci": interval}
