"""What decoding lists of token ids takes: checked and padded prompts, placed arrays, and caches of conversations."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.decoding import loop
from specjax.decoding.plan import Plan, padded_length
from specjax.models import kv_cache
from specjax.models.language_model import LanguageModel
from specjax.runtime import mesh as meshes
from specjax.runtime import processes
from specjax.runtime.errors import UserError


def prompt_slots(prompts: Sequence[Sequence[int]]) -> int:
    """The padded length of a batch of these prompts."""
    return padded_length(max(map(len, prompts)))


def check_prompts(prompts: Sequence[Sequence[int]], model: LanguageModel, max_new_tokens: int) -> None:
    """Raises UserError for an empty prompt, an id that the model lacks, or a text that may exceed its positions."""
    vocab_size, max_positions = model.vocab_size, model.config.max_positions
    if not prompts:
        raise UserError("There are no prompts to continue; give at least one.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"Prompt {number} is empty; decoding starts from at least one token.")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise UserError(
                f"Prompt {number} has token id {bad}, outside the vocabulary of {vocab_size}; "
                "encode it with this model's tokenizer."
            )
        if len(prompt) + max_new_tokens > max_positions:
            raise UserError(
                f"Prompt {number} has {len(prompt)} tokens, which with {max_new_tokens} new ones exceed the model's "
                f"{max_positions} positions; shorten the prompt or lower max_new_tokens."
            )


def pad(prompts: Sequence[Sequence[int]], slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `[B, slots]`, right-padded with 0, and lengths `[B]`."""
    tokens = np.zeros((len(prompts), slots), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, np.asarray([len(prompt) for prompt in prompts], np.int32)


@dataclasses.dataclass(frozen=True)
class Placer:
    """Shards host arrays `[rows, ...]`, which are the same in every process, by rows over the batch axes of a mesh.

    Attributes:
      mesh: the mesh; None is the default device.
    """

    mesh: jax.sharding.Mesh | None = None

    @property
    def _num_shards(self) -> int:
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def rows(self, count: int) -> int:
        """The smallest number of rows, at least `count`, that divides evenly over the devices."""
        return -(-count // self._num_shards) * self._num_shards

    def __call__(self, array: np.ndarray) -> jax.Array:
        if self.mesh is None:
            return jax.device_put(array)
        axes = ("batch" if array.shape[0] % self._num_shards == 0 else None, *[None] * (array.ndim - 1))
        return meshes.place(array, jax.NamedSharding(self.mesh, meshes.spec(axes)))


@dataclasses.dataclass
class Conversation:
    """The caches that `decode` leaves, so that a later call prefills only what its texts add to the earlier ones.

    Pass the same object to every call of one conversation, with the same models. The result is that of a call without
    it. Caches are computed anew where they cannot be extended: if the plan or the number of rows changed (when a text
    outgrows the capacity), for an encoder-decoder, and if rotary embeddings depend on the prompt's length.

    Attributes:
      plan: the plan of the last call.
      state: its last state; None before the first call.
      texts: the tokens of each row of the state: prompt and emitted tokens.
      reused: number of first tokens of each prompt that the last call found in the caches.
    """

    plan: Plan | None = None
    state: loop.DecodeState | None = None
    texts: Sequence[Sequence[int]] = ()
    reused: Sequence[int] = ()

    def take(self, plan: Plan, prompts: Sequence[Sequence[int]]) -> tuple[Any, np.ndarray]:
        """The state to extend (or None), and how many first tokens of each prompt it holds. The caller donates it."""
        state, self.state = self.state, None
        starts = np.zeros((len(prompts),), np.int32)
        usable = state is not None and self.plan == plan and len(state.lengths) == len(prompts)
        if not usable or plan.target.is_encoder_decoder or kv_cache.depends_on_prompt(state):
            return None, starts
        for row, (old, new) in enumerate(zip(self.texts, prompts, strict=True)):
            differs = (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
            starts[row] = next(differs, min(len(old), len(new)))
        return state, starts

    def keep(self, plan: Plan, state: loop.DecodeState) -> None:
        """Keeps the state after a call, whose texts are complete."""
        tokens, lengths = processes.fetch((state.tokens, state.lengths))
        self.plan, self.state = plan, state
        self.texts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


# Places arrays on the default device.
HERE = Placer()


def make_limits(max_new_tokens: Sequence[int], eos_ids: Sequence[int], put: Placer) -> loop.Limits:
    """The limits of rows that emit up to so many tokens each.

    Limits of equally many rows and `eos_ids` share an executable, also those that end `run` after some blocks.
    """
    room, eos = np.asarray(max_new_tokens, np.int32), tuple(eos_ids) or (-1,)
    return loop.Limits(put(room), jnp.asarray(eos, jnp.int32), jnp.int32(2**31 - 1), jnp.int32(0))
