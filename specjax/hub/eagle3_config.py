"""Reads and writes the `config.json` of EAGLE-3 drafts in two published layouts.

"sglang" is the layout of SpecForge and SGLang, "speculators" that of the package of this name; vLLM reads both.

Files list the target's layers whose states a draft reads by "eagle_aux_hidden_state_layer_ids". In some files, id i
means the input of layer i (counted from 0), in others its output. The input of layer i is the state after i layers,
which is what `states_after` lists everywhere in specjax.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from specjax.hub import draft_config
from specjax.hub.draft_config import FAMILIES, OTHER_TARGET, OURS, TYPE
from specjax.hub.families import base, llama
from specjax.models.config import DecoderConfig
from specjax.models.eagle3 import Eagle3Config, Eagle3Layer
from specjax.models.vocabulary import DraftVocabulary
from specjax.runtime.errors import UserError

ARCHITECTURES = {"sglang": "LlamaForCausalLMEagle3", "speculators": "Eagle3Speculator"}
IDS = "eagle_aux_hidden_state_layer_ids"
# Switches of the architecture that have the same names in the files.
_SWITCHES = ("norm_before_residual", "fc_norm", "norm_output", "norm_before_fc")
# Path of our module -> its name in the layer; of our array outside the layer -> the name of its tensor.
_LAYER = llama.MODULES | {"embedding_norm": "input_layernorm", "hidden_norm": "hidden_norm"}
_OTHERS = {
    "project.kernel": "fc.weight",
    "states_norm.scale": "input_norm.weight",
    "norm.scale": "norm.weight",
    "unembedding.kernel": "lm_head.weight",
    "embedding": "embed_tokens.weight",
}


def tensor_name(path: str, layout: str) -> str:
    """See `draft_config.Format`."""
    if path in _OTHERS:
        return _OTHERS[path]
    if path.startswith("state_norms."):
        return f"fc_norm.{path.split('.')[1]}.weight"
    module, _, kind = path.rpartition(".")
    layer = "midlayer" if layout == "sglang" else "layers.0"
    return f"{layer}.{_LAYER[module]}.{'bias' if kind == 'bias' else 'weight'}"


def read(
    fields: Mapping[str, Any],
    layout: str,
    target: DecoderConfig,
    *,
    vocab_size: int | None = None,
    vocabulary: DraftVocabulary | None = None,
    own_embedding: bool = False,
    states_after: Sequence[int] = (),
) -> Eagle3Config:
    """The config of a draft for this target.

    Args:
      fields: the `config.json`.
      layout: a key of `ARCHITECTURES`.
      vocab_size: the number of the target's ids according to the draft's tensors; None if they do not say.
      states_after: see `Eagle3Config`; needed where the files do not say what their layer ids mean.

    Raises:
      UserError: for a draft of another target or of an unsupported architecture, and for ambiguous layer ids.
    """
    ours = fields.get(OURS) or {}
    layer = draft_config.read_layers(fields.get("transformer_layer_config") if layout == "speculators" else fields)
    if layer.layers != 1 or layer.windows:
        raise UserError(f"the draft has {layer.layers} layers or a window, which is not supported; one full layer is")
    eagle = fields.get("eagle_config") or {}
    width = base.value_of(fields, "target_hidden_size", int, absent=layer.width)
    draft_config.check_target(target, fields, width=width, vocab_size=vocab_size or layer.vocab_size)
    if eagle.get("use_aux_hidden_state") is False:
        raise UserError('"use_aux_hidden_state" is false, which is not supported; only drafts on several layers are')
    if layout == "speculators" and "norm_before_residual" not in fields:
        raise UserError('"norm_before_residual" is missing, and programs assume different values; add it')
    switches = {name: base.value_of({**eagle, **fields}, name, bool, absent=False) for name in _SWITCHES}
    if switches["fc_norm"] and switches["norm_before_fc"]:
        raise UserError('"fc_norm" and "norm_before_fc" are both true; one of them is wrong')
    after = _states_after(fields, layout, target.layers, tuple(states_after))
    if after[-1] > target.layers:
        raise UserError(f"the draft reads the state after layer {after[-1]} of {target.layers}; {OTHER_TARGET}")
    config = Eagle3Config(
        target,
        states_after=after,
        steps=ours.get("steps", Eagle3Config.steps),
        vocabulary=vocabulary,
        own_embedding=own_embedding,
        **switches,
    )
    return draft_config.with_layer(config, layer)


def _states_after(fields: Mapping[str, Any], layout: str, layers: int, asked: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of layers after which the target's states are read. `asked` is the user's answer, () for none."""
    ids = fields.get(IDS) or (fields.get("eagle_config") or {}).get(IDS)
    default = (2, layers // 2, layers - 3)
    if ids and not (isinstance(ids, list) and all(type(index) is int for index in ids)):
        raise UserError(f'"{IDS}" must be a list of layers, not {ids!r}')
    inputs, outputs = tuple(ids or default), tuple(index + 1 for index in ids or default)
    if OURS in fields:
        inputs = outputs = tuple(fields[OURS]["states_after"])
    elif not ids or (layout == "speculators" and outputs != default):
        outputs = inputs
    if asked and asked not in (inputs, outputs):
        meant = f"{inputs}" if inputs == outputs else f"{inputs} or {outputs}"
        raise UserError(f"states_after is {asked}, and the draft's files say {meant}; correct or remove it")
    if not asked and inputs != outputs:
        raise UserError(
            f'"{IDS}" is {list(inputs)}, and the file does not say whether it means inputs or outputs of these layers; '
            f"set states_after to {inputs} for inputs (vLLM's reading) or to {outputs} for outputs"
        )
    return asked or inputs


def write(config: Eagle3Config, layout: str, verifier: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json`, the inverse of `read`.

    Args:
      verifier: what the layout "speculators" says of the target: its class in transformers and its path or name.

    Raises:
      UserError: for a draft that programs reading it would compute differently.
    """
    inner, after = config.inner, config.states_after
    if config.target.learned_positions or config.target.embedding_width:
        raise UserError(draft_config.EMBEDDINGS)
    if layout == "sglang":
        _check_sglang(config)
    layer = FAMILIES["qwen3" if inner.qk_norm else "llama"].write_config(inner)
    fields = {
        "architectures": [ARCHITECTURES[layout]],
        "draft_vocab_size": len(config.vocabulary or range(inner.vocab_size)),
        **{name: getattr(config, name) for name in _SWITCHES},
        "torch_dtype": inner.param_dtype,
        OURS: {"states_after": list(after), "steps": config.steps},
    }
    if inner.width != config.target.width:
        fields["target_hidden_size"] = config.target.width
    if layout == "sglang":
        # Without ids, every program takes the states after these layers; older versions of SGLang add 1 to ids.
        default = after == (2, config.target.layers // 2, config.target.layers - 3)
        eagle = {} if default else {"eagle_config": {"use_aux_hidden_state": True, IDS: list(after)}}
        fields = {**layer, **fields, **eagle}
    else:
        proposal = {"proposal_type": "greedy", "speculative_tokens": config.steps}
        proposal |= {"verifier_accept_k": 1, "accept_tolerance": 0.0}
        fields |= {
            TYPE: "eagle3",
            IDS: list(after),
            "tie_word_embeddings": False,
            "transformer_layer_config": {name: value for name, value in layer.items() if name != "architectures"},
            "speculators_config": {
                "algorithm": "eagle3",
                "proposal_methods": [proposal],
                "default_proposal_method": "greedy",
                "verifier": verifier,
            },
        }
    return fields


def _check_sglang(config: Eagle3Config) -> None:
    """Raises UserError for what SGLang would silently compute differently."""
    inner, wrong = config.inner, ""
    if config.norm_before_residual:
        wrong = "SGLang ignores norm_before_residual; train with eagle3.norm_before_residual=False"
    elif config.states_after[0] == 1:
        wrong = "SGLang reads layer ids that start with 1 as outputs; read states after layer 2 or later"
    elif inner.qk_norm or inner.attention_bias:
        wrong = "SGLang's draft layer has no biases and no norms of queries and keys"
    if wrong:
        raise UserError(f'{wrong}, or export with layout "speculators" for vLLM')


FORMAT = draft_config.Format(
    method="eagle3",
    network=Eagle3Layer,
    classes={"LlamaForCausalLMEagle3": "sglang", "Eagle3LlamaForCausalLM": "sglang"},
    layouts=("speculators", "sglang"),
    read=read,
    write=write,
    tensor_name=tensor_name,
    most=lambda config: config.steps,
)
