"""Reads directories of drafts in published layouts, see `hub.eagle3_config` and `hub.dflash_config`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.hub import dflash_config, draft_config, eagle3_config, weights
from specjax.hub import load as hub_load
from specjax.hub.draft_config import Format
from specjax.hub.json_files import read_json, reading
from specjax.hub.weights import Stored
from specjax.models.attachment import Attachment
from specjax.models.config import DecoderConfig
from specjax.models.language_model import Params
from specjax.models.vocabulary import DraftVocabulary, draft_vocabulary
from specjax.runtime.errors import UserError, prefixed

FORMATS = (eagle3_config.FORMAT, dflash_config.FORMAT)
_EMBEDDING = "embed_tokens.weight"
# Tensors that are not parameters of the draft: the target's, and tables that follow from the config.
_IGNORED = ("verifier_lm_head.weight", "verifier_norm.weight", "rotary_emb.inv_freq", "mask_hidden")


def holds_one(directory: str | Path) -> bool:
    """Whether the directory holds a draft of any architecture that attaches to a target."""
    path = Path(directory) / hub_load.CONFIG_FILE
    return path.is_file() and draft_config.is_draft(read_json(path))


def describe(
    directory: Path, target: DecoderConfig, target_params: Params | None = None, states_after: Sequence[int] = ()
) -> tuple[Attachment, str, dict[str, Stored]]:
    """The draft in a directory without its parameters, its target's fingerprint, and the stored tensors by name.

    Args:
      target_params: with them, a stored copy of the target's embedding is not part of the draft.
      states_after: see `hub.adapter.load`.

    Returns:
      the fingerprint is "" if the files do not say it; names are those of `Format.tensor_name`.

    Raises:
      UserError: for damaged files, another architecture, and a draft of another target (which of hidden size,
        tokenizer, layers).
    """
    path = directory / hub_load.CONFIG_FILE
    fields = read_json(path)
    with prefixed(f"{path}: "):
        form, layout = described_format(fields)
    stored = {
        name.removeprefix("model.").replace("midlayer.", "layers.0."): tensor
        for name, tensor in weights.stored_in(directory).items()
        if not name.endswith(_IGNORED)
    }
    to_draft = stored.pop("t2d", None)
    size = to_draft and to_draft.shape[0]
    vocabulary = _vocabulary(directory, stored.pop("d2t", None), to_draft, size or target.vocab_size)
    own = _EMBEDDING in stored and not _is_targets(stored[_EMBEDDING], target_params)
    if not own:
        stored.pop(_EMBEDDING, None)
    how = {"vocab_size": size, "vocabulary": vocabulary, "own_embedding": own, "states_after": states_after}
    with prefixed(f"{path}: "), reading("the description"):
        config = form.read(fields, layout, target, **how)
        fingerprint = fields.get(draft_config.OURS, {}).get("target", {}).get("fingerprint", "")
    return form.network(config), fingerprint, stored


def described_format(fields: Mapping[str, Any]) -> tuple[Format, str]:
    """The architecture and the layout of a draft's `config.json`. Raises UserError if no format has them."""
    names = fields.get("architectures")
    for form in FORMATS:
        if draft_config.TYPE in fields:
            if fields[draft_config.TYPE] == form.method:
                return form, "speculators"
        elif isinstance(names, list) and len(names) == 1 and names[0] in form.classes:
            return form, form.classes[names[0]]
    key = draft_config.TYPE if draft_config.TYPE in fields else "architectures"
    known = (f'"{next(iter(form.classes))}" ({draft_config.TYPE} "{form.method}")' for form in FORMATS)
    raise UserError(f'drafts with "{key}" {fields.get(key)!r} are unknown; the known ones are {", ".join(known)}')


def _vocabulary(
    directory: Path, offsets: Stored | None, to_draft: Stored | None, vocab_size: int
) -> DraftVocabulary | None:
    """The ids of the head's columns, which "d2t" holds as id - column. "t2d" marks the same ids among the target's."""
    if offsets is None:
        return None
    ids = offsets.read().astype(np.int64)
    ids = ids + np.arange(len(ids))
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise UserError(
            f"d2t in {directory} names id {worst}, and the target has the ids 0 .. {vocab_size - 1}; take the draft "
            "of this target"
        )
    with prefixed(f"d2t in {directory}: "):
        vocabulary = draft_vocabulary(ids)
    if to_draft is not None and not np.array_equal(np.flatnonzero(to_draft.read()), ids):
        raise UserError(f"d2t and t2d in {directory} name different ids; copy the draft again")
    return None if len(ids) == vocab_size else vocabulary


def _is_targets(stored: Stored, target_params: Params | None) -> bool:
    """Whether a stored embedding is the target's, in bfloat16, or was never written (all of it is NaN)."""
    if target_params is None or stored.shape != target_params["embedding"].shape:
        return False
    rounded = lambda table: jnp.asarray(table).astype(jnp.bfloat16)
    same = lambda ours, theirs: jnp.all(rounded(ours) == rounded(theirs)) | jnp.all(jnp.isnan(theirs))
    return bool(jax.jit(same)(target_params["embedding"], stored.read()))


def read_arrays(
    directory: Path, form: Format | None, stored: Mapping[str, Stored], shapes: Mapping[str, tuple]
) -> dict[str, np.ndarray]:
    """The values of each array by our path, which is its name in files of our own format (`form` None).

    Raises:
      UserError: for tensors of other names or shapes.
    """
    names = {path: form.tensor_name(path, "speculators") if form else path for path in shapes}
    expected = {names[path]: shape for path, shape in shapes.items()}
    for name in sorted(expected.keys() ^ stored.keys()):
        how = "lack" if name in expected else "also hold"
        raise UserError(f"the weights in {directory} {how} {name}; take the complete directory of the draft")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise UserError(
                f"{name} in {directory} has shape {list(stored[name].shape)} where its config and this target describe "
                f"{list(shape)}; load the target that it was trained for"
            )
    return {path: np.array(stored[name].read()) for path, name in names.items()}


def format_of(network: Attachment) -> Format | None:
    """The format in which other programs load an attachment; None if there is none."""
    return next((form for form in FORMATS if type(network) is form.network), None)
