"""A model with its parameters and tokenizer, as users load and save it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from specjax.hub import adapter as hub_adapter
from specjax.hub import load as hub_load
from specjax.hub import save as hub_save
from specjax.hub.location import locate
from specjax.hub.tokenizer import Tokenizer, check_same_tokens
from specjax.hub.tokenizer_files import JSON_FILE, SENTENCEPIECE_FILES
from specjax.models.language_model import LanguageModel, consecutive
from specjax.models.vocabulary import DraftVocabulary
from specjax.runtime import mesh as meshes
from specjax.runtime import program_cache
from specjax.runtime.dtypes import QUANTISED
from specjax.runtime.errors import UserError


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    decoder: LanguageModel, params: Any, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], texts: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    start = decoder.start(params, prompts, lengths, 0)
    return decoder.head(params, decoder.extend(params, start, texts, consecutive(texts))[0])


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model with its parameters and tokenizer; it is on one device if `mesh` is None.

    In planning (`specjax.planning`) the parameters are ShapeDtypeStructs and `tokenizer` is None.
    """

    decoder: LanguageModel
    params: Any
    tokenizer: Tokenizer | None
    mesh: meshes.AnyMesh | None = None

    @property
    def network(self) -> LanguageModel:
        """The model without its parameters; `LoadedAttachment` has this attribute too."""
        return self.decoder

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of config and parameters, by which an adapter identifies its target."""
        return hub_adapter.fingerprint(self.decoder, self.params)

    def context(self, prompt: Sequence[int]) -> Sequence[int]:
        """The ids before a generated text, for `Tokenizer.decode(ids, after=...)`; none for an encoder-decoder."""
        return () if self.decoder.is_encoder_decoder else prompt

    def logits(
        self, tokens: Sequence[Sequence[int]] | Any, decoder_tokens: Sequence[Sequence[int]] | Any = None
    ) -> Float[Array, "B T V"]:
        """Logits for texts of `[B, T]` ids: entry `[b, t]` predicts token t + 1 from tokens 0 .. t (teacher forcing).

        Args:
          tokens: the texts; for an encoder-decoder the prompts, all of the same length.
          decoder_tokens: for an encoder-decoder the texts, including the start token; otherwise None.

        Raises:
          UserError: for ids outside the vocabulary, and if `decoder_tokens` are missing or not allowed.
        """
        is_pair = self.decoder.is_encoder_decoder
        if is_pair != (decoder_tokens is not None):
            raise UserError(
                "an encoder-decoder takes logits(prompt_tokens, decoder_tokens), another model logits(tokens); "
                f"this is a {self.decoder.config.family} model"
            )
        prompts, texts = self._ids(tokens), self._ids(decoder_tokens if is_pair else tokens)
        lengths = jnp.full(prompts.shape[:1], prompts.shape[1], jnp.int32)
        return _logits(self.decoder, self.params, prompts, lengths, texts)

    def _ids(self, tokens) -> jax.Array:
        ids = np.asarray(tokens, np.int32)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.decoder.vocab_size:
            raise UserError(f"token ids must lie in 0 .. {self.decoder.vocab_size - 1}, this model's vocabulary")
        return jnp.asarray(ids)


def load(
    directory: str | Path,
    *,
    param_dtype: str = "auto",
    compute_dtype: str = "auto",
    mesh: jax.sharding.Mesh | None = None,
    replicate: bool = False,
) -> Model:
    """Loads a model with its tokenizer.

    Args:
      directory: a Hugging Face directory (`config.json`, `*.safetensors`, tokenizer), a GGUF file, or a name on the
        Hugging Face hub: "owner/name" or "owner/name/file.gguf".
      param_dtype: "auto" (see `runtime.dtypes.auto_param_dtype`), "float32", "bfloat16" or "float16"; or for decoding
        alone "int8" or "int4", which quantise the kernels of attention and MLPs while they are loaded. Embedding, head,
        norms and routers stay in the compute dtype.
      replicate: every device of the mesh's tensor axis holds the full model, for a small draft of a sharded target.

    Raises:
      UserError: for files that are missing or damaged, and for an unsupported model.
    """
    program_cache.start()
    dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
    directory, shardings = locate(directory), None
    if mesh is not None:
        shardings = hub_load.describe(directory, **dtypes).shardings(mesh, replicate=replicate)
    decoder, params = hub_load.load(directory, shardings=shardings, **dtypes)
    return Model(decoder, params, Tokenizer.load(directory), mesh)


def loader(config: Any, mesh: jax.sharding.Mesh | None = None) -> Callable[..., Model]:
    """`load` with the dtypes of a config, onto a mesh."""
    return functools.partial(load, param_dtype=config.param_dtype, compute_dtype=config.compute_dtype, mesh=mesh)


def save(model: Model, directory: str | Path, *, full_head: bool = False) -> None:
    """Writes a directory that `load` and Hugging Face transformers read.

    Args:
      full_head: writes a draft with a reduced head with all ids, because other programs read no draft vocabulary. The
        rows of the other ids are those of its embedding, which is what the head of a draft cut from a model with a tied
        head had. Such a draft takes the time of a full head, and it can draft the other ids, so its acceptance differs
        from that of the reduced one. In a draft whose head never was its embedding, these rows are arbitrary.
    """
    decoder, params = model.decoder, model.params
    if full_head and decoder.vocabulary is not None:
        rows = params["embedding"].at[decoder.vocabulary.ids].set(params["unembedding"]["kernel"])
        params = decoder.reduced_params(params, rows)
        decoder = dataclasses.replace(decoder, config=dataclasses.replace(decoder.config, draft_vocabulary=None))
    hub_save.save(directory, decoder, params, model.tokenizer)


def load_adapter(
    directory: str | Path, target: Model, *, states_after: Sequence[int] = ()
) -> hub_adapter.LoadedAttachment:
    """Loads an adapter that was trained on this target onto the target's devices.

    Args:
      directory: an adapter or heads of specjax, or a published draft, here or on the Hugging Face hub: EAGLE-3 in the
        layout of SGLang and SpecForge, DFlash in that of its authors, or either in that of `speculators`.
      states_after: for EAGLE-3 drafts whose files leave open what their layer ids mean, see `hub.adapter.load`.

    Raises:
      UserError: for files that are missing or damaged, and for an adapter of another target.
    """
    shardings = None
    if target.mesh is not None:
        shardings = lambda adapter: adapter.shardings(target.mesh)
    directory = locate(directory)
    loaded = hub_adapter.load(directory, target.decoder, target.params, states_after=states_after, shardings=shardings)
    if target.decoder.config.param_dtype in QUANTISED:
        logging.warning("whether %s was trained with this target is not checked, because it is quantised", directory)
    else:
        loaded.check(target.fingerprint)
    if any((directory / name).is_file() for name in (JSON_FILE, *SENTENCEPIECE_FILES)):
        check_same_tokens(target.tokenizer, Tokenizer.load(directory))
    return loaded


def with_end_ids(options: Any, target: Model) -> Any:
    """A drafter's options, whose draft vocabulary, if it has one, includes the ids that end the target's texts."""
    if options.vocabulary is None or target.tokenizer is None:
        return options
    return dataclasses.replace(options, vocabulary=options.vocabulary.including(target.tokenizer.stop_ids))


def reduced(
    loaded: Model | hub_adapter.LoadedAttachment, vocabulary: DraftVocabulary | None
) -> Model | hub_adapter.LoadedAttachment:
    """A draft with a head over these ids alone, whose columns are copies of its head's; unchanged for None.

    Raises:
      UserError: for ids that its head lacks, for an encoder-decoder, and for an attachment trained with a vocabulary.
    """
    if vocabulary is None or loaded.network.vocabulary == vocabulary:
        return loaded
    if isinstance(jax.tree.leaves(loaded.params)[0], jax.ShapeDtypeStruct):
        raise UserError(
            "a plan cannot cut the head of a draft to the ids in `vocabulary`; leave the option out, or name a draft "
            "that was trained with it"
        )
    if isinstance(loaded, hub_adapter.LoadedAttachment):
        network, params = loaded.network.reduced(loaded.params, vocabulary)
        return dataclasses.replace(loaded, network=network, params=params)
    decoder = loaded.decoder.reduced(vocabulary)
    kernel = loaded.decoder.head_kernel(loaded.params, vocabulary)
    params = loaded.decoder.reduced_params(loaded.params, kernel)
    if loaded.mesh is not None:
        params = jax.device_put(params, decoder.shardings(loaded.mesh))
    return dataclasses.replace(loaded, decoder=decoder, params=params)


def check_pair(target: Model, draft: Model) -> None:
    """Raises UserError unless both are decoder-only or both encoder-decoders, and their token ids mean the same.

    Their vocabularies may be padded to different sizes, because ids beyond the tokenizer's have no meaning.
    """
    if target.decoder.is_encoder_decoder != draft.decoder.is_encoder_decoder:
        raise UserError("an encoder-decoder and a decoder-only model cannot draft for each other; take two of a kind")
    if target.tokenizer is None or draft.tokenizer is None:
        return
    check_same_tokens(target.tokenizer, draft.tokenizer)
