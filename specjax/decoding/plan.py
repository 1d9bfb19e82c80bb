"""The static settings of decoding, which determine the compiled program, and the sizes of its padded arrays."""

import dataclasses
from collections.abc import Sequence

from specjax.decoding.drafters.base import Drafter
from specjax.decoding.rules import Lossless, Rule
from specjax.models.language_model import LanguageModel

# Padded prompt lengths and capacities are multiples of these, so that similar lengths share an executable.
PROMPT_MULTIPLE = 32
CAPACITY_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """All static settings of decoding; with the array shapes they determine the executable. See `for_prompts`.

    Attributes:
      target: the target model.
      drafter: proposes tokens; None for plain decoding (gamma = 0).
      rule: decides which drafted tokens are accepted; None only in prefill.
      gamma: maximum number of drafted tokens per block.
      capacity: number of cache slots and token slots of each row; see `capacity_for`.
      greedy: whether the temperature is 0.
      replicate_draft: every device of the tensor axis holds all of the draft, including all heads of its caches.
      prompt_slots: padded length of the prompts; 0 pads each batch to its own longest prompt. It is not compared,
        because the shape of the padded prompts determines the executable anyway.
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
        """The plan that decodes these prompts; plain decoding by default.

        Args:
          prompts: token ids of all prompts, or the number of tokens of the longest one.
          round_up: whether to round prompt slots and capacity up to the multiples above.
        """
        longest = prompts if isinstance(prompts, int) else max(len(prompt) for prompt in prompts)
        slots = padded_length(longest) if round_up else longest
        capacity = capacity_for(target.text_slots(slots), max_new_tokens, gamma)
        if round_up:
            capacity = _round_up(capacity, CAPACITY_MULTIPLE)
        return cls(target, drafter if gamma else None, rule, gamma, capacity, greedy, replicate_draft, slots)


def capacity_for(text_slots: int, max_new_tokens: int, gamma: int) -> int:
    """The slots that a row needs: with one token left until its limit, a block still writes gamma + 1 slots."""
    return text_slots + max_new_tokens + gamma + 1


def padded_length(tokens: int) -> int:
    """The padded length of prompts of at most this many tokens."""
    return _round_up(tokens, PROMPT_MULTIPLE)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
