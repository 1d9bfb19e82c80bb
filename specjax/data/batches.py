"""Examples to arrays: packed and padded rows in batches, and the prompts of an evaluation.

A batch is a dict of int32 arrays:

  tokens          [B, T]  right-padded with the tokenizer's pad id
  lengths         [B]     how many of them are real
  loss_start      [B]     position of the first token that is a prediction target
  prompt_lengths  [B]     how many leading tokens are the prompt when a model is to continue the row

An encoder-decoder reads the prompt separately. Its `tokens` are the start token and the text after the prompt, its
`prompt_lengths` count the prompt's tokens, and there is one array more:

  sources         [B, T]  the prompts, right-padded

In a run of several processes each may make only its own rows of every training batch. Then `tokens` and `sources` hold
these rows alone; the arrays `[B]` are those of the whole batch in every process.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from absl import logging
from jaxtyping import Int32

from specjax.data.stream import Batch, Batches, stack
from specjax.data.tasks import Example, Task
from specjax.hub.tokenizer import Tokenizer
from specjax.runtime.errors import UserError

# Texts are tokenised this many characters at a time, to bound the memory that the tokenizer needs.
_CHARACTERS_AT_ONCE = 1_000_000

# A window of n tokens is cut from n times this many characters. Code has about 4 per token.
_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class Prompt:
    """One prompt of an evaluation.

    Attributes:
      index: its place in the evaluation; with a prompt task, also the example's place in `task.validation`.
      tokens: its ids, never empty.
      text: the text of the ids.
      reference: the text that should follow; "" if there is none.
      category: the kind of prompt, if the task has kinds.
    """

    index: int
    tokens: tuple[int, ...]
    text: str
    reference: str
    category: str


def training_batches(
    task: Task,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    prompt_length: tuple[int, int],
    seed: int,
    start_token: int | None = None,
    own_rows: Sequence[int] | None = None,
) -> Batches:
    """Returns an endless iterator over batches of the training split.

    Every epoch visits every row once, in its own order; a batch may straddle two epochs. Equal arguments give equal
    batches. `get_state()` is a small JSON-compatible value, and `set_state()` returns to it exactly and at once, in any
    process.

    Language modelling packs: documents, each ended by EOS, are concatenated and cut into full rows (less than one row
    is left over); `prompt_lengths` are drawn from `prompt_length`, bounds included, by row and seed. With prompts and
    completions a row is one example ended by EOS and cut at `sequence_length`; examples whose prompt leaves no room are
    dropped and counted in the log. If the task cuts prompts, a prompt is first cut at its end so that the completion
    fits, but to no less than half the row.

    Args:
      prompt_length: least and most tokens of a prompt, in language modelling.
      start_token: that of an encoder-decoder, whose rows are split into prompt and text; None for a decoder-only model.
      own_rows: places in a batch of the rows that this process makes; None is all of them.

    Raises:
      UserError: for a task without training data, and for sizes that do not fit each other or the data.
    """
    if not task.train:
        raise UserError(f'task "{task.name}" is for evaluation only; train on another task')
    rows = _rows(task, task.train, tokenizer, sequence_length, prompt_length, batch_size, seed, start_token)
    return Batches(rows, batch_size, seed, range(batch_size) if own_rows is None else own_rows)


def validation_batches(
    task: Task,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    prompt_length: tuple[int, int],
    count: int,
    seed: int,
    start_token: int | None = None,
) -> list[Batch]:
    """Returns `count` batches of the validation split, its rows in an order drawn from `seed`.

    A split with fewer rows than `count * batch_size` is repeated from its start, as in training. `start_token` is as in
    `training_batches`, and so is `prompt_length` for an encoder-decoder. A decoder-only model's `prompt_lengths` are 1
    in language modelling: these rows are for a loss over all tokens, not for generation.

    Raises:
      UserError: as `training_batches`, and for a task without completions.
    """
    if count < 1:
        raise UserError(f"the number of validation batches must be at least 1, got {count}")
    if not any(example.completion for example in task.validation):
        raise UserError(f'task "{task.name}" has no completions to compute a loss on; use it for evaluation only')
    if start_token is None:
        prompt_length = (1, 1)
    rows = _rows(task, task.validation, tokenizer, sequence_length, prompt_length, batch_size, seed, start_token)
    order = np.resize(np.random.default_rng([seed, 1]).permutation(len(rows)), (count, batch_size))
    return [stack([rows[index] for index in indices]) for indices in order.tolist()]


def evaluation_prompts(
    task: Task, tokenizer: Tokenizer, *, count: int, prompt_length: tuple[int, int], seed: int, chat: bool = False
) -> list[Prompt]:
    """Returns `count` prompts of the validation split (0: all); a larger `count` begins with the same prompts.

    Language modelling: windows of the documents, from the start of a line, without a reference. Places and lengths in
    tokens, within `prompt_length` (bounds included), are drawn from `seed`. Otherwise: the first examples, as they are,
    or with `chat` each as a user's turn in the tokenizer's chat template.

    Raises:
      UserError: if there are fewer than `count`, or if an example's prompt has more than `prompt_length[1]` tokens and
        may not be cut, because the task does not cut prompts or they are turns of a chat.
    """
    _check_prompt_length(prompt_length)
    _check_seed(seed)
    if count < 0 or (count == 0 and task.is_language_modelling):
        raise UserError(f"the number of evaluation prompts must be at least 1, got {count}")
    if task.is_language_modelling:
        return _windows(task, tokenizer, count, prompt_length, seed)
    if count > len(task.validation):
        raise UserError(f'task "{task.name}" has {len(task.validation)} prompts, fewer than the {count} asked for')
    examples = task.validation[: count or None]
    prompts, cut = [], 0
    for index, tokens in enumerate(_prompt_tokens(tokenizer, [example.prompt for example in examples], chat)):
        example, text = examples[index], examples[index].prompt
        if len(tokens) > prompt_length[1] and task.cuts_prompts and not chat:
            tokens = _cut(tokens, prompt_length[1], tokenizer)
            text = tokenizer.decode(tokens.tolist())
            cut += 1
        if len(tokens) > prompt_length[1]:
            raise UserError(
                f'prompt {index} of task "{task.name}" ("{text[:40]}...") has '
                f"{len(tokens)} tokens, more than the limit of {prompt_length[1]}; raise that limit"
            )
        prompts.append(Prompt(index, tuple(tokens.tolist()), text, example.completion, example.category))
    _log_cut(task, cut, len(examples), f"the limit of {prompt_length[1]} tokens")
    return prompts


def _log_cut(task: Task, cut: int, count: int, bound: str) -> None:
    if cut:
        logging.info("%s: %d of %d prompts were cut at their end to fit %s", task.name, cut, count, bound)


def _cut(tokens: np.ndarray, limit: int, tokenizer: Tokenizer) -> np.ndarray:
    """The first `limit` tokens; an EOS that ends every prompt of the model, as T5's, is preserved."""
    if len(tokens) <= limit:
        return tokens
    tail = int(tokens[-1] in tokenizer.eos_ids)
    return np.concatenate([tokens[: limit - tail], tokens[len(tokens) - tail :]])


def _prompt_tokens(tokenizer: Tokenizer, prompts: Sequence[str], chat: bool) -> list[np.ndarray]:
    if not chat:
        return _tokenise(tokenizer.encode_prompt_batch, prompts)
    return [np.asarray(tokenizer.apply_chat([{"role": "user", "content": prompt}]), np.int32) for prompt in prompts]


@dataclass(frozen=True)
class _Rows:
    """The rows of a split by index; `stream.Batches` makes batches of them."""

    rows: Int32[np.ndarray, "rows T"] | list[np.ndarray]
    loss_start: Int32[np.ndarray, " rows"]
    prompt_lengths: Int32[np.ndarray, " rows"]
    sequence_length: int
    pad_id: int
    start_token: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row, prompt = self.rows[index], self.prompt_lengths[index]
        numbers = {name: array[0] for name, array in self.numbers([index]).items()}
        if self.start_token is None:
            return {"tokens": self._padded(row), **numbers}
        text = np.concatenate([np.asarray([self.start_token], np.int32), row[prompt:]])
        return {"tokens": self._padded(text), **numbers, "sources": self._padded(row[:prompt])}

    def numbers(self, indices: Sequence[int]) -> Batch:
        """The arrays `[B]` of these rows, without their tokens."""
        lengths = np.asarray([len(self.rows[index]) for index in indices], np.int32)
        starts, prompts = self.loss_start[indices], self.prompt_lengths[indices]
        if self.start_token is not None:
            lengths, starts = lengths - prompts + 1, np.ones_like(starts)
        return {"lengths": lengths, "loss_start": starts, "prompt_lengths": prompts}

    def _padded(self, tokens) -> np.ndarray:
        padded = np.full(self.sequence_length, self.pad_id, np.int32)
        padded[: len(tokens)] = tokens
        return padded


def _rows(
    task: Task,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    sequence_length: int,
    prompt_length: tuple[int, int],
    batch_size: int,
    seed: int,
    start_token: int | None,
) -> _Rows:
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if sequence_length < 2:
        raise UserError(f"sequence_length must be at least 2, got {sequence_length}")
    _check_seed(seed)
    if task.is_language_modelling:
        _check_prompt_length(prompt_length)
        if prompt_length[1] >= sequence_length:
            raise UserError(
                f"prompts of up to {prompt_length[1]} tokens leave nothing to continue in rows of "
                f"{sequence_length}; lower the prompt length or raise sequence_length"
            )
        rows = _packed_rows(examples, tokenizer, sequence_length, prompt_length, seed)
    else:
        rows = _paired_rows(task, examples, tokenizer, sequence_length)
    return replace(rows, start_token=start_token)


def _packed_rows(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    sequence_length: int,
    prompt_length: tuple[int, int],
    seed: int,
) -> _Rows:
    end = np.asarray(tokenizer.eos_ids[:1], np.int32)
    documents = _tokenise(tokenizer.encode_batch, [example.completion for example in examples])
    stream = np.concatenate([part for document in documents for part in (document, end)])
    number = len(stream) // sequence_length
    if number == 0:
        raise UserError(
            f"the text has {len(stream)} tokens, not enough for one row of {sequence_length}; "
            "lower sequence_length or give more text"
        )
    low, high = prompt_length
    prompts = np.random.default_rng([seed, 0]).integers(low, high + 1, number, dtype=np.int32)
    rows = stream[: number * sequence_length].reshape(number, sequence_length)
    return _Rows(rows, np.ones(number, np.int32), prompts, sequence_length, tokenizer.pad_id)


def _paired_rows(task: Task, examples: Sequence[Example], tokenizer: Tokenizer, sequence_length: int) -> _Rows:
    end = np.asarray(tokenizer.eos_ids[:1], np.int32)
    # Prompt and completion are tokenised separately: a prompt has the same tokens here as when a model continues it.
    prompts = _tokenise(tokenizer.encode_prompt_batch, [example.prompt for example in examples])
    completions = _tokenise(tokenizer.encode_batch, [example.completion for example in examples])
    if task.cuts_prompts:
        room = [max(sequence_length - len(text) - 1, sequence_length // 2) for text in completions]
        uncut = prompts
        prompts = [_cut(prompt, limit, tokenizer) for prompt, limit in zip(uncut, room, strict=True)]
        cut = sum(len(part) < len(prompt) for part, prompt in zip(prompts, uncut, strict=True))
        _log_cut(task, cut, len(examples), f"rows of {sequence_length} tokens")
    rows, starts = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        if len(prompt) < sequence_length:
            rows.append(np.concatenate([prompt, completion, end])[:sequence_length])
            starts.append(len(prompt))
    if not rows:
        raise UserError(
            f'every prompt of task "{task.name}" has {sequence_length} tokens or more; raise sequence_length'
        )
    dropped = len(examples) - len(rows)
    if dropped:
        message = "%s: %d of %d examples dropped, their prompts have %d tokens or more"
        logging.warning(message, task.name, dropped, len(examples), sequence_length)
    start = np.asarray(starts, np.int32)
    return _Rows(rows, start, start, sequence_length, tokenizer.pad_id)


def _windows(task: Task, tokenizer: Tokenizer, count: int, prompt_length: tuple[int, int], seed: int) -> list[Prompt]:
    documents = [example.completion for example in task.validation]
    places = [(document, start) for document, text in enumerate(documents) for start in _line_starts(text)]
    draw = np.random.default_rng([seed, 2])
    prompts: list[Prompt] = []
    for place in draw.permutation(len(places)):
        document, start = places[place]
        length = int(draw.integers(prompt_length[0], prompt_length[1] + 1))
        text = documents[document][start : start + length * _CHARACTERS_PER_TOKEN]
        tokens = tuple(tokenizer.encode_prompt(text)[:length])
        if len(tokens) < length:  # too close to the document's end, or one long ruler that is a single token
            continue
        prompts.append(Prompt(len(prompts), tokens, tokenizer.decode(tokens), "", ""))
        if len(prompts) == count:
            return prompts
    raise UserError(
        f'the validation text of task "{task.name}" offers {len(prompts)} prompts of {prompt_length[0]} to '
        f"{prompt_length[1]} tokens, fewer than the {count} asked for; ask for fewer or shorter ones"
    )


def _line_starts(text: str) -> Iterator[int]:
    """Yields the offset of each line that is not blank."""
    start = 0
    for line in text.split("\n"):
        if line.strip():
            yield start
        start += len(line) + 1


def _tokenise(encode_batch: Callable[..., list[list[int]]], texts: Sequence[str]) -> list[np.ndarray]:
    arrays: list[np.ndarray] = []
    chunk: list[str] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if characters >= _CHARACTERS_AT_ONCE:
            arrays += [np.asarray(ids, np.int32) for ids in encode_batch(chunk)]
            chunk, characters = [], 0
    return arrays + [np.asarray(ids, np.int32) for ids in encode_batch(chunk)]


def _check_prompt_length(prompt_length: tuple[int, int]) -> None:
    low, high = prompt_length
    if not 1 <= low <= high:
        raise UserError(f"prompt lengths must satisfy 1 <= min <= max, got {low} and {high}")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be in 0 .. {2**32 - 1}, got {seed}")
