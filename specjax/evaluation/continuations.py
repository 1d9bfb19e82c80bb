"""What a user asks of emitted tokens besides the tokens: texts that end at stop strings, and log-probabilities."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.decoding import batch
from specjax.hub.model import Model
from specjax.models.attachment import Attachment
from specjax.models.language_model import LanguageModel, consecutive
from specjax.runtime import checks, processes
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError, note

# Number of positions whose logits are in memory at one time, and the multiple to which scored texts are padded.
_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Stops:
    """Strings that end a text. The text ends before the first one; the tokens that complete it are still emitted.

    Attributes:
      target: the model whose tokenizer decodes the tokens.
      strings: the stop strings; () never stops.
    """

    target: Model
    strings: tuple[str, ...]

    @classmethod
    def of(cls, target: Model, stop: Any) -> "Stops":
        """Takes one string or several. Raises UserError for anything else, and for a string that no text can have."""
        strings = (stop,) if isinstance(stop, str) else stop
        if not isinstance(strings, Sequence) or not all(isinstance(each, str) and each for each in strings):
            raise UserError(
                f'stop must be strings that end a text, such as ["\\n\\n"], not {stop!r}; none may be empty'
            )
        for each in strings:
            token = target.tokenizer.special_id(each)
            if token is not None and token not in target.tokenizer.stop_ids:
                raise UserError(
                    f"stop has {each!r}, a special token, which no text has; give its id {token} to eos_ids of "
                    'api.generate, or to "eos_token_id" in generation_config.json'
                )
        return cls(target, tuple(strings))

    def text(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """The text of emitted tokens, up to the first stop string."""
        text = self.target.tokenizer.decode(tokens, after=self.target.context(prompt))
        return text[: min((text.find(each) for each in self.strings if each in text), default=len(text))]

    def end(self, prompt: Sequence[int], tokens: Sequence[int]) -> int | None:
        """The number of tokens until one completes a stop string; None if none does. It ignores later tokens."""
        context = self.target.context(prompt)

        def stopped(count: int) -> bool:
            text = self.target.tokenizer.decode(tokens[:count], after=context)
            return any(each in text for each in self.strings)

        if not self.strings or not stopped(len(tokens)):
            return None
        # Not by bisection: of bytes as fallback, part of a character makes those before it U+FFFD until it is complete.
        return next(count for count in range(1, len(tokens) + 1) if stopped(count))


# Fields of generation_config.json that change the text and are not implemented, with their neutral values.
_NOT_IMPLEMENTED = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "typical_p", "guidance_scale"), 1.0),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "epsilon_cutoff", "eta_cutoff", "penalty_alpha"), 0.0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), None),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), None),
    "num_beams": 1,
}


def sampling_of_checkpoint(
    target: Model, sampling: str, values: tuple[float, int, float, float]
) -> tuple[float, int, float, float]:
    """Temperature, top-k, top-p and min-p: the given values, or with "checkpoint" those of generation_config.json.

    As in transformers, text is greedy without `do_sample`, and the file leaves out values that equal the defaults:
    temperature 1, top_k 50, top_p 1, no min_p.

    Args:
      sampling: "" or "checkpoint".
      values: the user's values; with "checkpoint" the defaults of `api.generate`.

    Raises:
      UserError: for another `sampling`, values of the user, a missing file, or a field of the wrong type.
    """
    if not sampling:
        return values
    if sampling != "checkpoint":
        raise UserError(f'sampling must be "" or "checkpoint", not {sampling!r}')
    if values != (1.0, 0, 1.0, 0.0):
        raise UserError(
            'with sampling="checkpoint" temperature, top_k, top_p and min_p come from its file; leave them out'
        )
    fields = target.tokenizer.generation_config
    if not fields:
        raise UserError("the target has no generation_config.json; give temperature, top_k and top_p in its place")
    for name, neutral in _NOT_IMPLEMENTED.items():
        if fields.get(name) not in (None, [], neutral):
            note(f"{name}={fields[name]} of the target's generation_config.json is ignored")
    if not fields.get("do_sample"):
        return 0.0, 0, 1.0, 0.0
    read = []
    for name, default, off in (("temperature", 1.0, 1.0), ("top_k", 50, 0), ("top_p", 1.0, 1.0), ("min_p", 0.0, 0.0)):
        value = fields.get(name, default)
        read.append(off if value is None else value)
        checks.instance(f"{name} of the target's generation_config.json", read[-1], type(off))
    return tuple(read)


def note_positions(
    name: str, draft: LanguageModel | Attachment, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Says so if texts may be longer than a draft was made for; the emitted text stays exact."""
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > draft.config.max_positions:
        note(
            f"{name} has {draft.config.max_positions} positions and a text may have {longest} tokens; further tokens "
            "are exact, but drafts of them are rarely accepted"
        )


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: LanguageModel,
    params: Any,
    prompt: Int[Array, "one P"],
    length: Int[Array, " one"],
    text: Int[Array, "one T"],
) -> Float[Array, " T"]:
    """The log-probability of the token after each position of a text."""
    # With a cache, rotary embeddings that depend on the prompt's length are those of decoding.
    start = model.start(params, prompt, length, text.shape[1])
    hidden, _ = model.extend(params, start, text, consecutive(text))
    following = jnp.pad(text[0, 1:], (0, 1))

    def part(inputs):
        states, tokens = inputs
        logs = jax.nn.log_softmax(model.head(params, states[None])[0], axis=-1)
        return jnp.take_along_axis(logs, tokens[:, None], axis=-1)[:, 0]

    parts = hidden[0].reshape(-1, _CHUNK, hidden.shape[-1]), following.reshape(-1, _CHUNK)
    return jax.lax.map(part, parts).reshape(-1)


def log_probabilities(
    target: Model, prompts: Sequence[Sequence[int]], emitted: Sequence[Sequence[int]]
) -> list[list[float]]:
    """The target's log-probability of every emitted token given prompt and preceding tokens, in one forward per text.

    It is that of the unadjusted distribution: temperature 1, without top-k, top-p and min-p.
    """
    model, rows = target.decoder, []
    for prompt, tokens in zip(prompts, emitted, strict=True):
        opening = model.start_text(prompt)
        width = -(-(len(opening) + len(tokens)) // _CHUNK) * _CHUNK
        text, _ = batch.pad([[*opening, *tokens]], width)
        read, length = batch.pad([prompt], batch.prompt_slots([prompt]))
        with contextlib.nullcontext() if target.mesh is None else meshes.use(target.mesh):
            scores = processes.fetch(_score(model, target.params, read, length, text))
        rows.append(np.asarray(scores)[len(opening) - 1 :][: len(tokens)].tolist())
    return rows
