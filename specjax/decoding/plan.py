"""The static settings of decoding, which determine the compiled program, and the sizes of its padded arrays."""

import dataclasses
from collections.abc import Sequence

from specjax.decoding.drafters.base import Drafter
from specjax.decoding.rules import Lossless, Rule
from specjax.models.language_model import LanguageModel
from specjax.runtime import mesh as meshes

# Capacities are this times a power of 2, so that few executables serve all lengths.
SMALLEST_CAPACITY = 512
# Slots for the tokens of a block in a rounded capacity, so that gamma does not change it.
_BLOCK_SLOTS = 64
# Prompts of an encoder-decoder are padded to this times a power of 2, and texts of one forward to a multiple of it.
PROMPT_MULTIPLE = 32
# Tokens per row in one call of prefill: few on CPU, where short prompts should start soon.
_CHUNKS = {"cpu": 32}
_LARGEST_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Plan:
    """All static settings of decoding; with the array shapes they determine the executable. See `for_prompts`.

    Attributes:
      target: the target model.
      drafter: proposes tokens; None for plain decoding (gamma = 0) without one that keeps states.
      rule: decides which drafted tokens are accepted; None only in prefill.
      gamma: maximum number of drafted tokens per block.
      capacity: number of cache slots and token slots of each row; see `capacity_for`.
      greedy: whether the temperature is 0.
      replicate_draft: every device of the tensor axis holds all of the draft, including all heads of its caches.
      chunk: number of tokens of each row that one call of prefill runs on.
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
    chunk: int = 1
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
          round_up: whether to round capacity and prompt slots up; otherwise they are exact.
        """
        longest = prompts if isinstance(prompts, int) else max(len(prompt) for prompt in prompts)
        text_slots = target.text_slots(longest)
        chunk = min(_CHUNKS.get(meshes.platform(), _LARGEST_CHUNK), _LARGEST_CHUNK if round_up else text_slots)
        slots = longest
        capacity = capacity_for(text_slots, max_new_tokens, max(gamma, _BLOCK_SLOTS) if round_up else gamma, chunk)
        if round_up:
            capacity = power_of_two_times(SMALLEST_CAPACITY, capacity)
            # Prefill of texts does not depend on their length; the encoder runs on all columns of the prompts.
            slots = power_of_two_times(PROMPT_MULTIPLE, longest) if target.is_encoder_decoder else capacity
        return cls(target, drafter, rule, gamma, capacity, greedy, replicate_draft, chunk, slots)

    @property
    def for_prefill(self) -> "Plan":
        """The plan without rule and temperature: plans that differ only in these share the programs of prefill."""
        return dataclasses.replace(self, rule=None, greedy=True)


def capacity_for(text_slots: int, max_new_tokens: int, gamma: int, chunk: int = 1) -> int:
    """The slots that a row needs for a text of `text_slots` tokens and its continuation.

    With one token left until its limit, a block still writes gamma + 1 slots. A chunk of prefill may start at the last
    token of the text.
    """
    return text_slots + max(max_new_tokens + gamma + 1, chunk - 1)


def padded_length(tokens: int) -> int:
    """The padded length of texts of at most this many tokens that are computed in one forward."""
    return -(-tokens // PROMPT_MULTIPLE) * PROMPT_MULTIPLE


def power_of_two_times(smallest: int, least: int) -> int:
    """The smallest of `smallest` * 1, 2, 4, 8, .. that is at least `least`."""
    return smallest * 2 ** max(-(-least // smallest) - 1, 0).bit_length()
