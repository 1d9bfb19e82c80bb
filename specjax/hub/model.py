"""A model as users hold it: decoder, parameters and tokenizer together."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.hub import load as hub_load
from specjax.hub import save as hub_save
from specjax.hub.tokenizer import Tokenizer
from specjax.models.decoder import Decoder
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError


@functools.partial(jax.jit, static_argnums=0)
def _logits(decoder: Decoder, params: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    return decoder.head(params, decoder.extend(params, None, tokens, positions)[0])


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model with its parameters and tokenizer; on one device where there is no mesh."""

    decoder: Decoder
    params: Any
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh | None = None

    def logits(self, tokens: Sequence[Sequence[int]] | Any) -> Float[Array, "B T V"]:
        """Teacher-forced logits of `[B, T]` ids: row t predicts the token after `tokens[:, t]`.

        Raises:
          UserError: for ids outside the vocabulary.
        """
        tokens = np.asarray(tokens, np.int32)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.decoder.vocab_size:
            raise UserError(f"token ids must lie in 0 .. {self.decoder.vocab_size - 1}, this model's vocabulary")
        return _logits(self.decoder, self.params, jnp.asarray(tokens))


def load(
    directory: str | Path,
    *,
    param_dtype: str = "float32",
    compute_dtype: str = "auto",
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """Loads `config.json`, `*.safetensors` and `tokenizer.json` of a Hugging Face directory.

    Raises:
      UserError: for whatever is missing, damaged, or not implemented.
    """
    dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
    shardings = None
    if mesh is not None:
        _, config = hub_load.read_config(Path(directory), **dtypes)
        shardings = meshes.shardings(Decoder(config).axes(), mesh)
    decoder, params = hub_load.load(directory, shardings=shardings, **dtypes)
    return Model(decoder, params, Tokenizer.load(directory), mesh)


def save(model: Model, directory: str | Path) -> None:
    """Writes a directory that `load` and Hugging Face transformers read."""
    hub_save.save(directory, model.decoder, model.params, model.tokenizer)


def check_pair(target: Model, draft: Model) -> None:
    """Raises UserError unless draft and target share vocabulary and tokenizer."""
    if target.decoder.vocab_size != draft.decoder.vocab_size:
        raise UserError(
            f"the target has a vocabulary of {target.decoder.vocab_size} and the draft one of "
            f"{draft.decoder.vocab_size}; take a draft with the target's"
        )
    if target.tokenizer.fingerprint() != draft.tokenizer.fingerprint():
        raise UserError("target and draft have different tokenizers; take a draft trained with the target's")
