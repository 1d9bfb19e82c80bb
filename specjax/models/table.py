"""Makes language models from their configs, and attachments by name."""

from collections.abc import Mapping
from typing import Any

from specjax.models.adapters import Adapter
from specjax.models.attachment import Attachment
from specjax.models.block_parallel import BlockParallel
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.eagle3 import Eagle3Layer
from specjax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from specjax.models.language_model import LanguageModel
from specjax.models.medusa import MedusaHeads
from specjax.runtime.errors import UserError, nearest
from specjax.runtime.extensions import named

# Names are values of `model.init`, sections of a training config, and `type` in an exported `adapter_config.json`.
ATTACHMENTS: dict[str, type[Attachment]] = {
    "adapter": Adapter,
    "medusa": MedusaHeads,
    "eagle3": Eagle3Layer,
    "block_parallel": BlockParallel,
}

# Options that may be absent: `confidence` in files of earlier versions.
_OPTIONAL = ("vocabulary", "confidence")


def model_of(config: DecoderConfig) -> LanguageModel:
    """The language model with this config, without parameters."""
    return EncoderDecoder(config) if isinstance(config, EncoderDecoderConfig) else Decoder(config)


def make_attachment(name: str, target: DecoderConfig, options: Mapping[str, Any]) -> Attachment:
    """The attachment called `name`, without parameters, for this target.

    Args:
      name: a key of `ATTACHMENTS`, or "path/to/file.py:Name" of a user's own subclass of Attachment.
      options: every field of its config class but the target; those in `_OPTIONAL` may be absent.

    Raises:
      UserError: for an unknown name, a missing or unknown option, and values out of range.
    """
    attachment = named(name, ATTACHMENTS, "attachment")
    if not (isinstance(attachment, type) and issubclass(attachment, Attachment)):
        raise UserError(f"{name} must be a subclass of specjax.models.attachment.Attachment")
    known = attachment.config_class.options()
    for option in options:
        if option not in known:
            raise UserError(f'{option} is not an option of the attachment "{name}"{nearest(option, known)}')
    for option in known:
        if option not in options and option not in _OPTIONAL:
            raise UserError(f'the attachment "{name}" needs {option}; give it a value')
    return attachment(attachment.config_class(target, **options))


def is_attachment(name: str) -> bool:
    """Whether the value of `model.init` names an attachment, rather than "random", a directory or an earlier stage."""
    place, _, attribute = name.rpartition(":")
    of_user = place.endswith(".py") or (place != "stage" and all(part.isidentifier() for part in place.split(".")))
    return name in ATTACHMENTS or (of_user and attribute.isidentifier())
