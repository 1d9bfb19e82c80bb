"""The kind of model that a config describes."""

from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from specjax.models.language_model import LanguageModel


def model_of(config: DecoderConfig) -> LanguageModel:
    """The model, static, without parameters."""
    return EncoderDecoder(config) if isinstance(config, EncoderDecoderConfig) else Decoder(config)
