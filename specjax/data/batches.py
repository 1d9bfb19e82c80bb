"""Converts examples to arrays: batches of packed or padded rows for training, and prompts for evaluation.

A batch is a dict of int32 arrays:

  tokens          [B, T]  right-padded with the tokenizer's pad id
  lengths         [B]     number of tokens that are not padding
  loss_start      [B]     position of the first token that the loss includes
  prompt_lengths  [B]     number of leading tokens that are the prompt if a model continues the row

For an encoder-decoder, `tokens` are the start token and the text after the prompt, `prompt_lengths` count the prompt's
tokens, and there is another array:

  sources         [B, T]  the prompts, right-padded

In a run of several processes, each process can make only the rows of a training batch on its own devices. `tokens` and
`sources` then have only these rows; the arrays `[B]` have all rows of the batch in every process.
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

# Number of characters that are tokenised at a time, to bound the tokenizer's memory.
_CHARACTERS_AT_ONCE = 1_000_000

# To get a prompt of n tokens, n times this many characters are tokenised. Code has about 4 per token.
_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class Prompt:
    """One prompt of an evaluation.

    Attributes:
      index: its index in the evaluation; for tasks with prompts, also the example's index in `task.validation`.
      tokens: its token ids, never empty.
      text: the text of these ids.
      reference: the expected continuation; "" if there is none.
      category: the category of the example; "" if the task has none.
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

    Every epoch visits every row once, in a different order; a batch may have rows of two epochs. Equal arguments give
    equal batches. `get_state()` returns a small JSON-compatible value, from which `set_state()` resumes exactly, in any
    process.

    In language modelling, documents, each followed by EOS, are concatenated and cut into full rows (an incomplete last
    row is dropped); `prompt_lengths` are random in `prompt_length`, bounds included, by row and seed. With prompts and
    completions, a row is one example followed by EOS and cut at `sequence_length`; examples whose prompt fills the row
    are dropped and counted in the log. If the task cuts prompts, a prompt is first cut at its end to make room for the
    completion, but not to less than half the row.

    Args:
      prompt_length: minimum and maximum number of prompt tokens in language modelling.
      start_token: start token of an encoder-decoder, whose rows are split into prompt and text; None for decoder-only.
      own_rows: indices in a batch of the rows that this process makes; None is all of them.

    Raises:
      UserError: for a task without training data, and for sizes that contradict each other or the data.
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

    If the split has fewer than `count * batch_size` rows, it is repeated. `start_token` is as in `training_batches`,
    and so is `prompt_length` for an encoder-decoder. In language modelling with a decoder-only model, `prompt_lengths`
    are 1, because these rows are for a loss over all tokens, not for generation.

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

    In language modelling a prompt is a piece of a document that starts at a line, and has no reference. Positions and
    numbers of tokens, within `prompt_length` (bounds included), are random by `seed`. In other tasks they are the
    prompts of the first examples; with `chat` each is a user's turn in the tokenizer's chat template.

    Raises:
      UserError: if there are fewer than `count`, or a prompt has more than `prompt_length[1]` tokens and cannot be cut,
        because the task does not cut prompts or `chat` is set.
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
    """The first `limit` tokens; if the prompt ends with EOS, as T5's do, the EOS is kept as the last one."""
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
    """The rows of a split by index, from which `stream.Batches` makes batches."""

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
        """The arrays `[B]` of these rows: lengths, loss_start and prompt_lengths."""
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
    # Prompt and completion are tokenised separately, so that a prompt has the same tokens as in generation.
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
        if len(tokens) < length:  # too close to the document's end, or a long run of characters is one token
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
