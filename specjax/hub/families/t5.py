"""The T5 family (T5 v1.0 and v1.1, FLAN-T5): `config.json` and tensor names as `T5ForConditionalGeneration` has them.

v1.0 has an MLP without a gate (ReLU) and a tied head on scaled hidden states, v1.1 and FLAN-T5 a gate (GELU) and a head
of their own.
"""

from typing import Any

from specjax.hub.families import base
from specjax.models.encoder_decoder import UNLIMITED, EncoderDecoderConfig
from specjax.runtime.errors import UserError

MODEL_TYPE = "t5"
ARCHITECTURE = "T5ForConditionalGeneration"
HEAD = "lm_head.weight"
EMBEDDING = "shared.weight"
# The embedding again; and a bias that early versions stored and nothing read.
IGNORED = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)

_ATTENTION = (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output"))
_MLP = (("wi", "up"), ("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))


def _sublayers(stack: str, attentions: tuple[tuple[str, str], ...]):
    """Names of one layer: its attentions in order, then its MLP, each behind its norm."""
    names = []
    for index, (theirs, ours) in enumerate(attentions):
        at = f"{stack}.block.{{}}.layer.{index}"
        names.append((f"{at}.layer_norm.weight", (f"{ours}_norm", "scale")))
        names += [(f"{at}.{theirs}.{name}.weight", (ours, path, "kernel")) for name, path in _ATTENTION]
    at = f"{stack}.block.{{}}.layer.{len(attentions)}"
    names.append((f"{at}.layer_norm.weight", ("mlp_norm", "scale")))
    return names + [(f"{at}.DenseReluDense.{name}.weight", ("mlp", path, "kernel")) for name, path in _MLP]


_ENCODER = _sublayers("encoder", (("SelfAttention", "attention"),))
_DECODER = _sublayers("decoder", (("SelfAttention", "attention"), ("EncDecAttention", "cross")))
_BIAS = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_ONLY = {"is_decoder": (False, None), "layer_norm_epsilon_type": (None,)}


def tensors(config: EncoderDecoderConfig) -> list[base.Tensor]:
    """Every learned array of such a model, in the order of computation; without the head where it is tied."""
    other = "wi." if config.gated_mlp else "wi_"
    keep = lambda names: [entry for entry in names if f"DenseReluDense.{other}" not in entry[0]]
    entries = [(EMBEDDING, ("embedding",)), (_BIAS.format("encoder"), ("encoder_bias", "table"))]
    entries += base.numbered(keep(_ENCODER), "encoder_blocks", config.encoder_layers)
    entries += [("encoder.final_layer_norm.weight", ("encoder_norm", "scale"))]
    entries += [(_BIAS.format("decoder"), ("bias", "table"))]
    entries += base.numbered(keep(_DECODER), "blocks", config.layers)
    entries += [("decoder.final_layer_norm.weight", ("norm", "scale")), (HEAD, ("unembedding", "kernel"))]
    return base.match_tensors(config, entries)


def read_config(fields: dict[str, Any], *, param_dtype: str, compute_dtype: str) -> EncoderDecoderConfig:
    """The encoder-decoder that a `config.json` describes.

    Raises:
      UserError: for a field that is missing or of the wrong type, or that asks for arithmetic we do not have.
    """
    base.refuse_other_arithmetic({**fields, "is_encoder_decoder": False}, ARCHITECTURE, _ONLY)
    gated, activation = _feed_forward(fields)
    width = base.number(fields, "d_model", int)
    heads = base.number(fields, "num_heads", int)
    layers = base.number(fields, "num_layers", int)
    tied = base.flag(fields, "tie_word_embeddings", absent=True)
    start = fields.get("decoder_start_token_id", fields.get("pad_token_id"))
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise UserError(f'"decoder_start_token_id" must be a token id, not {start!r}')
    return base.build(
        MODEL_TYPE,
        config_type=EncoderDecoderConfig,
        vocab_size=base.number(fields, "vocab_size", int),
        width=width,
        encoder_layers=layers,
        layers=base.number(fields, "num_decoder_layers", int, absent=layers),
        heads=heads,
        kv_heads=heads,
        head_size=base.number(fields, "d_kv", int, absent=64),
        mlp_width=base.number(fields, "d_ff", int),
        max_positions=UNLIMITED,  # "n_positions" is the length that the checkpoint was trained with
        rotary=None,
        norm_epsilon=base.number(fields, "layer_norm_epsilon", float, absent=1e-6),
        tied_head=tied,
        activation=activation,
        gated_mlp=gated,
        query_scale=1.0,
        relative_buckets=base.number(fields, "relative_attention_num_buckets", int, absent=32),
        relative_distance=base.number(fields, "relative_attention_max_distance", int, absent=128),
        head_scale=width**-0.5 if base.flag(fields, "scale_decoder_outputs", absent=tied) else 1.0,
        start_token=start,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )


def _feed_forward(fields: dict[str, Any]) -> tuple[bool, str]:
    """Whether the MLP has a gate, and its activation: "relu", "gated-gelu", ..."""
    kind = fields.get("feed_forward_proj", "relu")
    gated, _, name = str(kind).rpartition("-")
    # The paper's "gated-gelu" is the approximation by tanh, and is written without saying so.
    name = "gelu_new" if kind == "gated-gelu" else name
    if gated not in ("", "gated"):
        raise UserError(f'"feed_forward_proj" is {kind!r}, which is not supported')
    stated = fields.get("dense_act_fn")
    if stated is not None and kind != "gated-gelu" and stated != name:
        raise UserError(f'"feed_forward_proj" {kind!r} and "dense_act_fn" {stated!r} disagree; keep one')
    return bool(gated), base.activation({"feed_forward_proj": name}, "feed_forward_proj", absent="relu")


def write_config(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The fields of `config.json` that describe this model; the inverse of `read_config`, dtypes apart."""
    name = {"gelu_tanh": "gelu" if config.gated_mlp else "gelu_new"}.get(config.activation, config.activation)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_size,
        "d_ff": config.mlp_width,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.layers,
        "num_heads": config.heads,
        "feed_forward_proj": f"gated-{name}" if config.gated_mlp else name,
        "layer_norm_epsilon": config.norm_epsilon,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "decoder_start_token_id": config.start_token,
        "tie_word_embeddings": config.tied_head,
        "scale_decoder_outputs": config.head_scale != 1,
        "is_encoder_decoder": True,
    }
