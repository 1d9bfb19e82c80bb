"""Replays: a target's greedy text, stored once, on which drafts are scored without loading the target.

Greedy speculative decoding emits the text of plain decoding with any draft. So the usual decoding loop runs with the
stored text in place of the target; blocks and counts are those of real decoding, except for ties of logits. Drafters
that read the target's layers or cache cannot be scored, because those are not stored.
"""

import dataclasses
import functools
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.decoding import batch
from specjax.decoding.drafters.base import DrafterOptions
from specjax.decoding.drafters.model import ModelDraft
from specjax.decoding.drafters.ngram import NGram
from specjax.decoding.drafters.table import build_drafter
from specjax.decoding.plan import Plan
from specjax.decoding.sampling import Sampling
from specjax.evaluation.engine import Method, Output, decode_all
from specjax.hub.model import Model
from specjax.models.language_model import LanguageModel, consecutive
from specjax.reporting import metrics, records
from specjax.runtime import files
from specjax.runtime.errors import UserError

FILE, ARRAYS = "replay.json", "replay.npz"
SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Replay:
    """A target's greedy continuations of some prompts.

    Attributes:
      target: fingerprint of the target.
      tokenizer: fingerprint of its tokenizer.
      vocab_size: number of logits of the target.
      max_new_tokens: maximum number of tokens of a continuation.
      eos_ids: token ids that end a continuation.
      prompts: token ids of each prompt.
      emitted: token ids of each continuation.
      top_ids: the target's k most probable tokens at each emitted position, undefined after the end of a text; k = 0
        stores none.
      top_probs: the probabilities of these tokens at temperature 1.
    """

    target: str
    tokenizer: str
    vocab_size: int
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    emitted: tuple[tuple[int, ...], ...]
    top_ids: Int[np.ndarray, "P T k"]
    top_probs: Float[np.ndarray, "P T k"]

    def check_target(self, target: Model) -> None:
        """Raises UserError if this replay was recorded with another target."""
        self.check_tokenizer(target)
        if target.fingerprint != self.target:
            raise UserError(
                f"this replay is of another target (fingerprint {self.target[:8]}, this model's is "
                f"{target.fingerprint[:8]}); record it again with this one"
            )

    def check_tokenizer(self, model: Model) -> None:
        """Raises UserError if this replay was recorded with another tokenizer than the model's."""
        if model.tokenizer.fingerprint() != self.tokenizer:
            raise UserError(
                "this replay was recorded with another tokenizer than this model's; use a draft with the target's "
                "tokenizer, or record the replay again"
            )


def record(
    target: Model, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int, top_k: int = 0
) -> Replay:
    """Decodes the prompts greedily and stores the text, with the `top_k` most probable tokens at each position.

    Raises:
      UserError: for an encoder-decoder, prompts that are too long, and a top_k above the vocabulary size.
    """
    decoder = target.decoder
    if decoder.is_encoder_decoder:
        raise UserError("only decoder-only targets can be recorded; use evaluate for drafts of an encoder-decoder")
    if not 0 <= top_k <= decoder.vocab_size:
        raise UserError(f"top_k must lie in 0 .. {decoder.vocab_size}, the vocabulary, not {top_k}")
    batch.check_prompts(prompts, decoder, max_new_tokens)
    eos_ids = tuple(target.tokenizer.stop_ids)
    method = Method.of(target, prompts, Sampling.of(0.0), max_new_tokens=max_new_tokens)
    how = {"seed": 0, "max_new_tokens": max_new_tokens, "eos_ids": eos_ids}
    emitted = tuple(map(tuple, decode_all(method, prompts, batch_size=batch_size, **how)[1].tokens))
    top_ids, top_probs = _most_probable(target, prompts, emitted, max_new_tokens, batch_size, top_k)
    return Replay(
        target=target.fingerprint,
        tokenizer=target.tokenizer.fingerprint(),
        vocab_size=decoder.vocab_size,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        prompts=tuple(tuple(int(token) for token in prompt) for prompt in prompts),
        emitted=emitted,
        top_ids=top_ids,
        top_probs=top_probs,
    )


def save(replay: Replay, directory: str | Path) -> None:
    """Writes `replay.json` and `replay.npz`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    fields = {key: value for key, value in vars(replay).items() if not key.startswith("top_")}
    np.savez_compressed(directory / ARRAYS, top_ids=replay.top_ids, top_probs=replay.top_probs)
    text = json.dumps({"schema": SCHEMA, **records.json_clean(fields)})
    files.write_atomically(directory / FILE, text + "\n")


def load(directory: str | Path) -> Replay:
    """Reads what `save` wrote. Raises UserError if it is missing, damaged or of another schema."""
    directory = Path(directory)
    if not (directory / FILE).is_file():
        raise UserError(f"{directory} holds no {FILE}; name the directory of a replay, or record one")
    try:
        fields = json.loads((directory / FILE).read_text(encoding="utf-8"))
        with open(directory / ARRAYS, "rb") as file, np.load(file) as arrays:
            fields |= {name: arrays[name] for name in ("top_ids", "top_probs")}
        schema = fields.pop("schema")
        rows = {name: tuple(tuple(row) for row in fields[name]) for name in ("prompts", "emitted")}
        replay = Replay(**{**fields, **rows, "eos_ids": tuple(fields["eos_ids"])})
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"the replay in {directory} is damaged ({error}); record it again") from error
    if schema != SCHEMA:
        raise UserError(f"the replay in {directory} has schema {schema}, this version reads {SCHEMA}; record it again")
    return replay


def score(
    replay: Replay, options: DrafterOptions, gamma: int, *, draft: Model | None = None, batch_size: int = 1
) -> metrics.Counts:
    """The counts of greedy speculative decoding with this drafter, one row for each prompt.

    Args:
      options: options of the drafter, `ModelDraft` or `NGram`.
      draft: the draft model of a `ModelDraft`.

    Raises:
      UserError: for a drafter that reads the target's states, and a draft with another tokenizer.
    """
    if not isinstance(options, ModelDraft | NGram):
        raise UserError(f"a replay holds no states of the target; it scores ModelDraft and NGram, not {options}")
    if draft is not None:
        replay.check_tokenizer(draft)
    params = None if draft is None else draft.params
    table = Stored(None, logits_size=replay.vocab_size)
    drafter = build_drafter(options, table, gamma, None if draft is None else draft.decoder)
    lengths = {"max_new_tokens": replay.max_new_tokens}
    plan = Plan.for_prompts(table, replay.prompts, greedy=True, drafter=drafter, gamma=gamma, **lengths)
    how, sampling = {"seed": 0, "eos_ids": replay.eos_ids, **lengths}, Sampling.of(0.0, threshold=options.threshold)
    texts = _texts(replay.prompts, replay.emitted, plan.capacity)
    output = Output()
    for first in range(0, len(texts), batch_size):
        prompts, part = (rows[first : first + batch_size] for rows in (replay.prompts, texts))
        part = jnp.asarray(np.concatenate([part, np.repeat(part[-1:], batch_size - len(part), axis=0)]))
        method = Method(plan, {"texts": part}, params, sampling)
        output.batches.append(method.decode(prompts, batch_size, **how))
    return output.counts()


@dataclasses.dataclass(frozen=True)
class Stored(LanguageModel):
    """A model that repeats stored texts: its parameters are `texts` [B, S]; at position i it predicts token i + 1.

    Predictions are those of the target only after a prefix of the stored text; greedy verification uses no others.
    """

    @property
    def layers(self) -> int:
        return 1

    def start(self, params, prompts, lengths, capacity):
        del params, prompts, lengths, capacity
        return ()

    def extend(self, params, cache, inputs, positions, mask=None, *, layers=None):
        del inputs, mask, layers
        texts = params["texts"]
        following = jnp.minimum(positions + 1, texts.shape[1] - 1)
        return jnp.take_along_axis(texts, following, axis=1)[..., None].astype(jnp.float32), cache

    def column_logits(self, params, hidden):
        del params
        return jax.nn.one_hot(hidden[..., 0].astype(jnp.int32), self.vocab_size, dtype=jnp.float32)


def agreement(replay: Replay, draft: Model, *, batch_size: int = 8) -> dict[str, Float[np.ndarray, "N"]]:
    """How well the draft predicts each emitted token from the stored text before it.

    Returns arrays over all emitted tokens of all prompts:
      "agrees": 1 if the draft's most probable token is the emitted one, else 0;
      "surprise": the draft's negative log-probability of the emitted token; its mean is the log-perplexity;
      "overlap": sum of min(target, draft) over the stored top tokens, empty if none are stored. It is a lower bound of
        the acceptance at temperature 1 (DistillSpec's token-level acceptance, arXiv 2310.08461).

    Raises:
      UserError: for a draft with another tokenizer.
    """
    replay.check_tokenizer(draft)
    model = draft.decoder.with_vocab_size(replay.vocab_size)
    slots = batch.prompt_slots(replay.prompts) + replay.max_new_tokens
    scores: dict[str, list[np.ndarray]] = {"agrees": [], "surprise": [], "overlap": []}
    rows = _predictions(model, draft.params, replay.prompts, replay.emitted, slots, batch_size, jax.nn.log_softmax)
    for number, predicted in rows:
        tokens = np.asarray(replay.emitted[number])
        scores["agrees"].append((predicted.argmax(-1) == tokens).astype(np.float32))
        scores["surprise"].append(-predicted[np.arange(len(tokens)), tokens])
        if replay.top_ids.shape[2]:
            probs = np.exp(np.take_along_axis(predicted, replay.top_ids[number, : len(tokens)], axis=1))
            scores["overlap"].append(np.minimum(probs, replay.top_probs[number, : len(tokens)]).sum(-1))
    return {name: np.concatenate(parts) if parts else np.zeros(0, np.float32) for name, parts in scores.items()}


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: LanguageModel, params: Any, texts: Int[Array, "B S"]) -> Float[Array, "B S V"]:
    hidden, _ = model.extend(params, None, texts, consecutive(texts))
    return model.head(params, hidden)


def _predictions(model, params, prompts, emitted, slots: int, batch_size: int, of: Callable) -> Iterator[tuple]:
    """Yields each prompt's number, and the rows of `of(logits)` that predict its emitted tokens."""
    texts = _texts(prompts, emitted, slots)
    for first in range(0, len(texts), batch_size):
        values = of(_forward(model, params, jnp.asarray(texts[first : first + batch_size])))
        for row, number in enumerate(range(first, min(first + batch_size, len(texts)))):
            start = len(prompts[number]) - 1
            span = slice(start, start + len(emitted[number]))
            yield number, jax.tree.map(lambda array, row=row, span=span: np.asarray(array[row, span]), values)


def _most_probable(target: Model, prompts, emitted, longest: int, batch_size: int, top_k: int):
    """Ids and probabilities `[P, T, k]` of the `top_k` most probable tokens at each emitted position."""
    ids = np.zeros((len(prompts), longest, top_k), np.int32)
    probs = np.zeros(ids.shape, np.float32)
    if top_k == 0:
        return ids, probs
    slots, best = max(map(len, prompts)) + longest, lambda logits: jax.lax.top_k(jax.nn.softmax(logits), top_k)
    rows = _predictions(target.decoder, target.params, prompts, emitted, slots, batch_size, best)
    for number, (best_probs, best_ids) in rows:
        ids[number, : len(best_ids)], probs[number, : len(best_ids)] = best_ids, best_probs
    return ids, probs


def _texts(prompts, emitted, slots: int) -> Int[np.ndarray, "P S"]:
    """Prompts with their continuations, right-padded."""
    return batch.pad([(*prompt, *text) for prompt, text in zip(prompts, emitted, strict=True)], slots)[0]
