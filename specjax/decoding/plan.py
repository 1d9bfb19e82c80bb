"""What is fixed about a decode before it is compiled, and how many slots prompts and limits need."""

import dataclasses
from collections.abc import Sequence

from specjax.decoding.drafters.base import Drafter
from specjax.decoding.rules import Lossless, Rule
from specjax.models.language_model import LanguageModel

# Prompt slots and capacities are multiples of these, so that neighbouring lengths share an executable.
PROMPT_MULTIPLE = 32
CAPACITY_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a decode; together with array shapes this is the compile key. `for_prompts` makes one.

    Attributes:
      target: the model whose law the text follows.
      drafter: what proposes tokens; None for plain decoding (gamma = 0).
      rule: which drafted tokens are accepted.
      gamma: most tokens drafted a block.
      capacity: cache slots and token slots of a row; see `capacity_for`.
      greedy: temperature 0.
      replicate_draft: every device of the tensor axis holds all of the draft, and so all heads of its caches.
      prompt_slots: padded length of the prompts; 0 pads each batch to its own longest prompt. It is no part of the
        compile key, because the padded prompts have that shape themselves.
    """

    target: LanguageModel
    drafter: Drafter | None
    rule: Rule | None
    gamma: int
    capacity: int
    greedy: bool
    replicate_draft: bool = False
    prompt_slots: int = dataclasses.field(default=0, compare=False)

    @classmethod
    def for_prompts(
        cls,
        target: LanguageModel,
        prompts: Sequence[Sequence[int]] | int,
        *,
        max_new_tokens: int,
        greedy: bool,
        drafter: Drafter | None = None,
        gamma: int = 0,
        rule: Rule = Lossless(),
        replicate_draft: bool = False,
        round_up: bool = True,
    ) -> "Plan":
        """The plan of a run whose longest prompt and limit are known; drafter and rule default to plain decoding.

        Args:
          prompts: token ids of all prompts, or the number of tokens of the longest.
          round_up: pad prompts and capacity to the multiples above. False is for callers whose shapes never change.
        """
        longest = prompts if isinstance(prompts, int) else max(len(prompt) for prompt in prompts)
        slots = padded_length(longest) if round_up else longest
        capacity = capacity_for(target.text_slots(slots), max_new_tokens, gamma)
        if round_up:
            capacity = _round_up(capacity, CAPACITY_MULTIPLE)
        return cls(target, drafter if gamma else None, rule, gamma, capacity, greedy, replicate_draft, slots)


def capacity_for(text_slots: int, max_new_tokens: int, gamma: int) -> int:
    """The slots that a row can use: one token before its limit it still writes gamma + 1 of them."""
    return text_slots + max_new_tokens + gamma + 1


def padded_length(tokens: int) -> int:
    """The padded length of a prompt, or batch of prompts, of so many tokens."""
    return _round_up(tokens, PROMPT_MULTIPLE)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
