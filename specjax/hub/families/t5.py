"""The T5 family (T5 v1.0 and v1.1, FLAN-T5): `config.json` and tensor names as `T5ForConditionalGeneration` has them.

v1.0 has an MLP without a gate (ReLU) and a tied head on scaled hidden states. v1.1 and FLAN-T5 have a gate (GELU) and a
head of their own.
"""

from typing import Any

from specjax.hub import file_layout
from specjax.hub.families import base
from specjax.hub.families.base import Field
from specjax.models.encoder_decoder import UNLIMITED, EncoderDecoderConfig
from specjax.runtime.errors import UserError

_ATTENTION = {"query": "q", "key": "k", "value": "v", "output": "o"}
_MLP = {"mlp.gate": "wi_0", "mlp.up": "wi_1", "mlp.down": "wo"}


def _modules(**attentions: str) -> dict[str, str]:
    """A layer's modules: its attentions in order, then its MLP, each preceded by its norm."""
    names = {}
    for index, (path, module) in enumerate(attentions.items()):
        names[f"{path}_norm"] = f"layer.{index}.layer_norm"
        names |= {f"{path}.{ours}": f"layer.{index}.{module}.{name}" for ours, name in _ATTENTION.items()}
    last = f"layer.{len(attentions)}"
    return names | {"mlp_norm": f"{last}.layer_norm"} | {path: f"{last}.DenseReluDense.{n}" for path, n in _MLP.items()}


_BIAS = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


class _T5(base.Family):
    def tensors(self, config: EncoderDecoderConfig) -> list[file_layout.Tensor]:
        """Every parameter array, in the order of computation; the MLP's up projection is called "wi" without a gate."""
        up = "wi_1" if config.gated_mlp else "wi"
        return [tensor._replace(name=tensor.name.replace("wi_1", up)) for tensor in super().tensors(config)]


# Value of "feed_forward_proj" -> the activation, and whether there is a gate.
_FEED_FORWARD = {
    **{name: (activation, False) for name, activation in base.ACTIVATIONS.items()},
    **{f"gated-{name}": (activation, True) for name, activation in base.ACTIVATIONS.items()},
    "gated-gelu": ("gelu_tanh", True),  # the approximation, although the name does not say so
}


def _read(fields: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    activation, gated = base.value_of(fields, "feed_forward_proj", _FEED_FORWARD, absent=("relu", False))
    stated = base.value_of(fields, "dense_act_fn", base.ACTIVATIONS, absent=activation)
    if stated != activation and fields.get("feed_forward_proj") != "gated-gelu":
        raise UserError(
            f'"feed_forward_proj" means {activation}, and "dense_act_fn" is {fields["dense_act_fn"]!r}; keep one'
        )
    start = fields.get("decoder_start_token_id", fields.get("pad_token_id"))
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise UserError(f'"decoder_start_token_id" must be a token id, not {start!r}')
    scaled = base.value_of(fields, "scale_decoder_outputs", bool, absent=values["tied_head"])
    return {
        "activation": activation,
        "gated_mlp": gated,
        "head_scale": values["width"] ** -0.5 if scaled else 1.0,
        "start_token": start,
    }


def _write(config: EncoderDecoderConfig) -> dict[str, Any]:
    kind = (config.activation, config.gated_mlp)
    return {
        "feed_forward_proj": next(name for name, meaning in _FEED_FORWARD.items() if meaning == kind),
        "decoder_start_token_id": config.start_token,
        "scale_decoder_outputs": config.head_scale != 1,
    }


FAMILY = _T5(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("width", "d_model"),
        Field("head_size", "d_kv", absent=64),
        Field("mlp_width", "d_ff"),
        Field("encoder_layers", "num_layers"),
        Field("layers", "num_decoder_layers", absent=lambda values: values["encoder_layers"]),
        Field("heads", "num_heads"),
        base.derived(lambda values: {"kv_heads": values["heads"]}),
        Field("norm_epsilon", "layer_norm_epsilon", float, 1e-6),
        Field("relative_buckets", "relative_attention_num_buckets", absent=32),
        Field("relative_distance", "relative_attention_max_distance", absent=128),
        Field("tied_head", "tie_word_embeddings", bool, True),
        base.Group(_read, _write),
    ),
    names={
        "embedding": "shared.weight",
        "encoder_bias.table": _BIAS.format("encoder"),
        **file_layout.layer_names("encoder.block", _modules(attention="SelfAttention"), "encoder_blocks"),
        "encoder_norm.scale": "encoder.final_layer_norm.weight",
        "bias.table": _BIAS.format("decoder"),
        **file_layout.layer_names("decoder.block", _modules(attention="SelfAttention", cross="EncDecAttention")),
        "norm.scale": "decoder.final_layer_norm.weight",
        "unembedding.kernel": "lm_head.weight",
    },
    # Copies of the embedding, and a bias that early versions stored but never read.
    ignored=(
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    ),
    only={"is_encoder_decoder": (True, False, None), "is_decoder": (False, None), "layer_norm_epsilon_type": (None,)},
    always={
        "max_positions": UNLIMITED,  # "n_positions" is only the training length
        "rotary": None,
        "query_scale": 1.0,
    },
    written={"is_encoder_decoder": True},
    config_type=EncoderDecoderConfig,
)
