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

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from absl import logging

from specjax.data.layouts import Message
from specjax.data.stream import Batch, Batches, Rows
from specjax.data.tasks import Example, Task
from specjax.hub.tokenizer import Tokenizer
from specjax.models.language_model import LanguageModel
from specjax.runtime import checks
from specjax.runtime.errors import UserError, prefixed

Item = TypeVar("Item")

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


@dataclass(frozen=True)
class RowLayout:
    """How the examples of a split become rows, see `training_batches`.

    Attributes:
      batch_size: number of rows of a batch.
      sequence_length: maximum number of tokens of a row.
      prompt_length: minimum and maximum number of prompt tokens in language modelling.
      seed: determines random numbers.
      start_token: start token of an encoder-decoder, whose rows are split into prompt and text; None for decoder-only.
      chat: whether prompts are the user's turn, and completions the assistant's, in the tokenizer's chat template;
        conversations are in any case, if there is a template.
    """

    batch_size: int
    sequence_length: int
    prompt_length: tuple[int, int]
    seed: int
    start_token: int | None = None
    chat: bool = False

    @classmethod
    def of_config(cls, data: Any, *, seed: int, model: LanguageModel) -> "RowLayout":
        """The layout of rows for this model that a config's `data` section describes."""
        lengths = data.prompt_length_min, data.prompt_length_max
        start_token = model.config.start_token if model.is_encoder_decoder else None
        return cls(data.batch_size, data.sequence_length, lengths, seed, start_token, data.chat)

    def rows(self, task: Task, examples: Sequence[Example], tokenizer: Tokenizer) -> Rows:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.sequence_length < 2:
            raise UserError(f"sequence_length must be at least 2, got {self.sequence_length}")
        checks.seed("seed", self.seed)
        if self.chat and task.is_language_modelling:
            raise UserError(f'data.chat is set, and task "{task.name}" has documents, not prompts; set it to False')
        rows = self._packed if task.is_language_modelling else self._paired
        return Rows(*rows(task, examples, tokenizer), self.sequence_length, tokenizer.pad_id, self.start_token)

    def _packed(self, task: Task, examples: Sequence[Example], tokenizer: Tokenizer) -> tuple:
        """The tokens, loss starts and prompt lengths of the rows, as `_paired` returns them."""
        _check_prompt_length(self.prompt_length)
        low, high = self.prompt_length
        if high >= self.sequence_length:
            raise UserError(
                f"prompts of up to {high} tokens leave nothing to continue in rows of "
                f"{self.sequence_length}; lower the prompt length or raise sequence_length"
            )
        texts = (example.completion for example in examples)
        documents = (document for chunk in _chunks(texts, len) for document in tokenizer.encode_batch(chunk))
        stream = np.concatenate([np.asarray([*document, tokenizer.end_id], np.int32) for document in documents])
        number = len(stream) // self.sequence_length
        if number == 0:
            raise UserError(
                f"the text has {len(stream)} tokens, not enough for one row of {self.sequence_length}; "
                "lower sequence_length or give more text"
            )
        prompts = np.random.default_rng([self.seed, 0]).integers(low, high + 1, number, dtype=np.int32)
        rows = stream[: number * self.sequence_length].reshape(number, self.sequence_length)
        return rows, np.ones(number, np.int32), prompts

    def _paired(self, task: Task, examples: Sequence[Example], tokenizer: Tokenizer) -> tuple:
        length, rows, starts = self.sequence_length, [], []
        cut_prompts, cut_completions = 0, 0
        separate = self.start_token is not None
        for prompt, completion in _encode(task, examples, tokenizer, chat=self.chat, separate=separate):
            if task.cuts_prompts:
                room = max(length - len(completion), length // 2)
                cut_prompts += len(prompt) > room
                prompt = _cut(prompt, room, tokenizer)
            if len(prompt) < length:
                rows.append(np.concatenate([prompt, completion])[:length])
                starts.append(len(prompt))
                cut_completions += len(prompt) + len(completion) > length
        _log_cut(task, cut_prompts, len(examples), f"rows of {length} tokens")
        if not rows:
            raise UserError(f'every prompt of task "{task.name}" has {length} tokens or more; raise sequence_length')
        if dropped := len(examples) - len(rows):
            message = "%s: %d of %d examples dropped, their prompts have %d tokens or more"
            logging.warning(message, task.name, dropped, len(examples), length)
        if cut_completions:
            message = "%s: %d of %d completions cut to fit rows of %d tokens; raise sequence_length to keep them whole"
            logging.warning(message, task.name, cut_completions, len(rows), length)
        start = np.asarray(starts, np.int32)
        return rows, start, start


def training_batches(
    task: Task,
    tokenizer: Tokenizer,
    layout: RowLayout,
    *,
    own_rows: Sequence[int] | None = None,
    prompts_alone: bool = False,
) -> Batches:
    """Returns an endless iterator over batches of the training split.

    Every epoch visits every row once, in a different order; a batch may have rows of two epochs. Equal arguments give
    equal batches. `get_state()` returns a small JSON-compatible value, from which `set_state()` resumes exactly, in any
    process.

    In language modelling, documents, each followed by an end token, are concatenated and cut into full rows (an
    incomplete last row is dropped); `prompt_lengths` are random in `prompt_length`, bounds included, by row and seed.
    With prompts and completions, a row is one example followed by an end token and cut at `sequence_length`. The log
    counts the completions that are cut, and the examples that are dropped: those whose prompt fills the row and,
    without `prompts_alone`, those without a completion. If the task cuts prompts, a prompt is first cut at its end to
    make room for the completion, but not to less than half the row.

    Args:
      own_rows: indices in a batch of the rows that this process makes; None is all of them.
      prompts_alone: whether only the prompts of rows are used, so that examples need no completion.

    Raises:
      UserError: for a task without training data or completions, for sizes that contradict each other or the data, and
        for a conversation that the chat template refuses.
    """
    if not task.train:
        raise UserError(
            f'task "{task.name}" is for evaluation only; train on another task, such as `prompt_completion`, which '
            "holds a part of the file out and needs no completions if data.fixed is 0"
        )
    examples = task.train
    if not (prompts_alone or task.is_language_modelling):
        examples = _completed(task, examples)
        if not examples:
            raise UserError(
                f'task "{task.name}" has no completions, only prompts; set data.fixed to 0 to train on text that the '
                "models write, or add completions"
            )
    own_rows = range(layout.batch_size) if own_rows is None else own_rows
    return Batches(layout.rows(task, examples, tokenizer), layout.batch_size, layout.seed, own_rows)


def validation_batches(task: Task, tokenizer: Tokenizer, layout: RowLayout, *, count: int) -> list[Batch]:
    """Returns `count` batches of the validation split, its rows in an order drawn from the layout's seed.

    If the split has fewer than `count` batches, it is repeated. In language modelling with a decoder-only model,
    `prompt_lengths` are 1, because these rows are for a loss over all tokens, not for generation. If no example has a
    completion, the loss is over the tokens of the prompts.

    Raises:
      UserError: as `training_batches`, and for an encoder-decoder without completions.
    """
    if count < 1:
        raise UserError(f"the number of validation batches must be at least 1, got {count}")
    examples = task.validation if task.is_language_modelling else _completed(task, task.validation)
    if not examples and layout.start_token is not None:
        raise UserError(f'task "{task.name}" has no completions to validate an encoder-decoder on; add some')
    if layout.start_token is None and task.is_language_modelling:
        layout = replace(layout, prompt_length=(1, 1))
    rows = layout.rows(task, examples or task.validation, tokenizer)
    if not examples:
        logging.info("%s: without completions, the validation loss is that of the prompts", task.name)
        rows = replace(rows, loss_start=np.ones_like(rows.loss_start))
    order = np.random.default_rng([layout.seed, 1]).permutation(len(rows.tokens))
    order = np.resize(order, (count, layout.batch_size))
    return [rows.batch(indices, range(layout.batch_size)) for indices in order.tolist()]


def _completed(task: Task, examples: Sequence[Example]) -> Sequence[Example]:
    completed = [example for example in examples if example.completion]
    if 0 < len(completed) < len(examples):
        message = "%s: %d of %d examples dropped, they have no completion"
        logging.warning(message, task.name, len(examples) - len(completed), len(examples))
    return completed


def evaluation_prompts(
    task: Task, tokenizer: Tokenizer, *, count: int, prompt_length: tuple[int, int], seed: int, chat: bool = False
) -> list[Prompt]:
    """Returns `count` prompts of the validation split (0: all); a larger `count` begins with the same prompts.

    In language modelling a prompt is a piece of a document that starts at a line, and has no reference. Positions and
    numbers of tokens, within `prompt_length` (bounds included), are random by `seed`. In other tasks they are the
    prompts of the first examples, one of each category in turn; with `chat` each is a user's turn in the tokenizer's
    chat template. Conversations are in the template in any case, if there is one.

    Raises:
      UserError: if there are fewer than `count`, or a prompt has more than `prompt_length[1]` tokens and cannot be cut,
        because the task does not cut prompts or `chat` is set.
    """
    _check_prompt_length(prompt_length)
    checks.seed("seed", seed)
    if count < 0 or (count == 0 and task.is_language_modelling):
        raise UserError(f"the number of evaluation prompts must be at least 1, got {count}")
    if task.is_language_modelling:
        return _windows(task, tokenizer, count, prompt_length, seed)
    if count > len(task.validation):
        raise UserError(f'task "{task.name}" has {len(task.validation)} prompts, fewer than the {count} asked for')
    examples = _in_turns(task.validation)[:count] if count else task.validation
    prompts, cut = [], 0
    for index, (tokens, _) in enumerate(_encode(task, examples, tokenizer, chat=chat, completions=False)):
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


def _in_turns(examples: Sequence[Example]) -> list[Example]:
    """The first example of each category, then the second of each, and so on."""
    counts = collections.Counter()
    turns = []
    for example in examples:
        turns.append(counts[example.category])
        counts[example.category] += 1
    return [examples[place] for place in sorted(range(len(examples)), key=turns.__getitem__)]


def _log_cut(task: Task, cut: int, count: int, bound: str) -> None:
    if cut:
        logging.info("%s: %d of %d prompts were cut at their end to fit %s", task.name, cut, count, bound)


def _cut(tokens: np.ndarray, limit: int, tokenizer: Tokenizer) -> np.ndarray:
    """The first `limit` tokens; if the prompt ends with EOS, as T5's do, the EOS is kept as the last one."""
    if len(tokens) <= limit:
        return tokens
    tail = int(tokens[-1] in tokenizer.eos_ids)
    return np.concatenate([tokens[: limit - tail], tokens[len(tokens) - tail :]])


def _encode(
    task: Task,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    chat: bool,
    completions: bool = True,
    separate: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the ids of each prompt, and of its completion with an end token: none if there is no completion.

    Args:
      completions: whether to encode completions.
      separate: whether completions are texts of their own, as in an encoder-decoder, rather than continuations.
    """
    for chunk in _chunks(examples, lambda example: len(example.prompt) + len(example.completion)):
        prompts = [_prompt(example, tokenizer, chat) for example in chunk]
        texts = [
            example.completion if isinstance(prompt, str) else example.completion.removeprefix(example.gap)
            for example, prompt in zip(chunk, prompts, strict=True)
        ]
        paired = [completions and not separate and bool(text) for text in texts]
        with prefixed(f'task "{task.name}": '):
            pairs = iter(tokenizer.encode_pairs(*([a[i] for i, p in enumerate(paired) if p] for a in (prompts, texts))))
            for prompt, text, is_pair in zip(prompts, texts, paired, strict=True):
                if is_pair:
                    ids, completion = next(pairs)
                else:
                    ids = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else tokenizer.apply_chat(prompt)
                    completion = [*tokenizer.encode(text), tokenizer.end_id] if completions and text else []
                yield np.asarray(ids, np.int32), np.asarray(completion, np.int32)


def _prompt(example: Example, tokenizer: Tokenizer, chat: bool) -> str | Sequence[Message]:
    """The prompt as `Tokenizer.encode_pairs` takes it: a text, or a conversation for the chat template."""
    if chat:
        return example.messages or ({"role": "user", "content": example.prompt},)
    return example.messages if example.messages and tokenizer.has_chat_template else example.prompt


def _chunks(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Lists of consecutive items, of about `_CHARACTERS_AT_ONCE` in total."""
    chunk, characters = [], 0
    for item in items:
        chunk.append(item)
        characters += size(item)
        if characters >= _CHARACTERS_AT_ONCE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


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


def _check_prompt_length(prompt_length: tuple[int, int]) -> None:
    low, high = prompt_length
    if not 1 <= low <= high:
        raise UserError(f"prompt lengths must satisfy 1 <= min <= max, got {low} and {high}")
