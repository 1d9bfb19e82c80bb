"""The config of a decoder-only model, with a field for every difference between the supported families."""

import dataclasses

from specjax.models.rotary import Rotary
from specjax.models.vocabulary import DraftVocabulary
from specjax.runtime.dtypes import QUANTISED, check_param_dtype, dtype_named

NORMS = ("rms", "rms_plus_one", "layer")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
ORDERS = ("pre", "post", "both", "output", "parallel")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and architecture of a decoder. Defaults are Llama's.

    Attributes:
      vocab_size: V, number of rows of the embedding.
      width: D, size of the residual stream.
      layers: L, number of blocks.
      heads: N, query heads.
      kv_heads: K, key/value heads; divides `heads` (grouped-query attention).
      head_size: H.
      mlp_width: F, inner width of the MLP.
      max_positions: maximum sequence length of the position encoding (HF `max_position_embeddings`).
      rotary: rotary position embedding of queries and keys; None for learned positions.
      norm_epsilon: added to the mean square (or the variance) in a norm.
      tied_head: whether the output head is the transposed embedding.
      param_dtype: dtype of the parameters. With int8 or int4, the kernels of attention and MLPs are integers, see
        `models.quantised`; the other parameters have `float_dtype`.
      compute_dtype: dtype of activations and caches; logits are always float32, and on CPU bfloat16's caches.
      remat: whether the backward pass computes each layer again instead of holding what is between its operations.
      family: `model_type` of the family in `hub.families` in whose format the model is exported.
      norm: "rms", "rms_plus_one" (Gemma: the gain is 1 + weight) or "layer" (with mean and bias).
      activation: activation function of the MLP: "silu", "gelu", "gelu_tanh" or "relu".
      gated_mlp: whether the MLP has a gate.
      order: "pre" norms each sublayer's input, "post" the sum with the residual (OPT-350M), "both" its input and its
        output (Gemma 2 and 3), "output" its output (OLMo 2), "parallel" runs attention and MLP on the same residual
        (GPT-NeoX).
      final_norm: whether the head is preceded by a norm.
      attention_bias: whether the query, key and value projections have biases.
      output_bias: whether the attention's output projection has a bias.
      mlp_bias: whether the MLP's projections have biases.
      qk_norm: whether each query and key head is normalised (Qwen3, Gemma 3).
      joint_qk_norm: with `qk_norm`, whether all query heads are normalised together, and all key heads (OLMo 2).
      attention_sinks: whether the attention of each head has a sink (gpt-oss), see `attention.attend`.
      learned_positions: number of rows of a learned position table; 0 for none.
      position_offset: row of position 0 in that table (2 in OPT).
      local_rotary: rotary embedding of the layers with a window, if it differs (Gemma 3).
      rotary_layers: for each layer, whether it uses rotary embeddings (SmolLM3); empty: all do.
      windows: for each layer, how many tokens a query attends to, itself included, 0 for all; empty: no windows.
      query_scale: factor on the attention scores; None is head_size ** -0.5.
      attention_softcap: scores are softcap * tanh(scores / softcap); 0 is off.
      final_softcap: the same for logits.
      logit_divisor: the logits are divided by it (Granite).
      residual_scale: with `order` "pre", factor on what each sublayer adds to the residual stream (Granite).
      embedding_scale: factor on the embeddings.
      embedding_width: width of an embedding that is projected to `width` (OPT-350M); 0 without a projection.
      experts: E, number of experts of the MLP in each sparse layer; 0 for dense MLPs in all layers.
      experts_per_token: number of experts that compute each token.
      expert_width: inner width of an expert; `mlp_width` is that of dense layers.
      normalised_experts: whether the weights of a token's experts sum to 1.
      swiglu_limit: if not 0, experts have gpt-oss's clamped SwiGLU: `g * sigmoid(swiglu_alpha * g) * (u + 1)`, where g
        is the gate, at most this limit, and u is clipped to +- this limit.
      swiglu_alpha: see `swiglu_limit`.
      shared_expert_width: inner width of an expert that computes every token (qwen2_moe); 0 for none.
      dense_layers: layers with a dense MLP in a model with experts.
      draft_vocabulary: of a draft, the only ids that its head has; None for all. The embedding has all ids.
      mask_id: of a draft that drafts a block in one forward, the id of a token to draft, see `models.pard`; else None.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    max_positions: int
    rotary: Rotary | None
    norm_epsilon: float
    tied_head: bool
    param_dtype: str
    compute_dtype: str
    remat: bool = False
    family: str = "llama"
    norm: str = "rms"
    activation: str = "silu"
    gated_mlp: bool = True
    order: str = "pre"
    final_norm: bool = True
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    joint_qk_norm: bool = False
    attention_sinks: bool = False
    learned_positions: int = 0
    position_offset: int = 0
    local_rotary: Rotary | None = None
    rotary_layers: tuple[bool, ...] = ()
    windows: tuple[int, ...] = ()
    query_scale: float | None = None
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    logit_divisor: float = 1.0
    residual_scale: float = 1.0
    embedding_scale: float = 1.0
    embedding_width: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    normalised_experts: bool = True
    swiglu_limit: float = 0.0
    swiglu_alpha: float = 1.0
    shared_expert_width: int = 0
    dense_layers: tuple[int, ...] = ()
    draft_vocabulary: DraftVocabulary | None = None
    mask_id: int | None = None

    def __post_init__(self):
        for field in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "mlp_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        for rotary in filter(None, (self.rotary, self.local_rotary)):
            if rotary.size > self.head_size:
                raise ValueError(f"head_size ({self.head_size}) is less than the {rotary.size} channels to rotate")
        for field in ("windows", "rotary_layers"):
            if len(getattr(self, field)) not in (0, self.layers):
                raise ValueError(f"{field} has {len(getattr(self, field))} entries for {self.layers} layers")
        for field, known in (("norm", NORMS), ("activation", ACTIVATIONS), ("order", ORDERS)):
            if getattr(self, field) not in known:
                raise ValueError(f'{field} must be one of {", ".join(known)}, not "{getattr(self, field)}"')
        if self.experts:
            self._check_experts()
        if self.draft_vocabulary is not None:
            self.draft_vocabulary.check(self.vocab_size)
            if self.tied_head:
                raise ValueError("a tied head has all ids; with a draft vocabulary, tied_head must be False")
        if self.mask_id is not None and not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(f"mask_id is {self.mask_id}, and the model has the ids 0 .. {self.vocab_size - 1}")
        check_param_dtype(self.param_dtype), dtype_named(self.compute_dtype)

    @property
    def float_dtype(self) -> str:
        """The dtype of the parameters that are never quantised: embeddings, heads, norms and routers."""
        return self.compute_dtype if self.param_dtype in QUANTISED else self.param_dtype

    @property
    def unquantised(self) -> "DecoderConfig":
        """This config with all parameters in `float_dtype`."""
        return dataclasses.replace(self, param_dtype=self.float_dtype)

    def _check_experts(self) -> None:
        if not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"experts_per_token ({self.experts_per_token}) must be at most experts ({self.experts}) and at least 1"
            )
        if self.expert_width < 1:
            raise ValueError(f"expert_width must be at least 1, not {self.expert_width}")
        if not self.gated_mlp:
            raise ValueError("experts have gated MLPs only; gated_mlp must be True")
        if beyond := [layer for layer in self.dense_layers if not 0 <= layer < self.layers]:
            raise ValueError(f"dense layer {beyond[0]} is not one of {self.layers} layers")

    @classmethod
    def llama(cls, *, rope_theta: float, **fields) -> "DecoderConfig":
        """A Llama with plain rotary embeddings of this base."""
        return cls(rotary=Rotary(rope_theta, fields["head_size"]), **fields)

    def window(self, layer: int) -> int:
        """How many tokens a query of this layer attends to, itself included; 0 for all."""
        return self.windows[layer] if self.windows else 0

    def is_sparse(self, layer: int) -> bool:
        """Whether the MLP of this layer is a mixture of experts."""
        return self.experts > 0 and layer not in self.dense_layers

    def uses_rotary(self, layer: int) -> bool:
        """Whether this layer applies rotary embeddings to queries and keys."""
        return self.rotary is not None and (not self.rotary_layers or self.rotary_layers[layer])
