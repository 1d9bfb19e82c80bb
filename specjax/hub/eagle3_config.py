"""Reads and writes the `config.json` of EAGLE-3 drafts in two published layouts.

"sglang" is the layout of SpecForge and SGLang, "speculators" that of the package of this name; vLLM reads both.

Files list the target's layers whose states a draft reads by "eagle_aux_hidden_state_layer_ids". In some files, id i
means the input of layer i (counted from 0), in others its output. The input of layer i is the state after i layers,
which is what `states_after` lists everywhere in specjax.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from specjax.hub.families import base, llama, qwen
from specjax.hub.json_files import reading
from specjax.models.config import DecoderConfig
from specjax.models.eagle3 import Eagle3Config
from specjax.models.vocabulary import DraftVocabulary
from specjax.runtime.errors import UserError, prefixed

ARCHITECTURES = {"sglang": "LlamaForCausalLMEagle3", "speculators": "Eagle3Speculator"}
IDS = "eagle_aux_hidden_state_layer_ids"
# The key under which our exports hold what no other program reads.
OURS = "specjax"
_TYPE = "speculators_model_type"
# Parts of the class names of drafts that attach to a target.
_DRAFTS = re.compile("Eagle|EAGLE|DFlash|DSpark|Medusa|MTP|Speculator|DraftModel")
# Switches of the architecture that have the same names in the files.
_SWITCHES = ("norm_before_residual", "fc_norm", "norm_output", "norm_before_fc")
_FAMILIES = {"llama": llama.FAMILY, "qwen3": qwen.QWEN3}
_OTHER_TARGET = "load the target that it was trained for"


def is_draft(fields: Mapping[str, Any]) -> bool:
    """Whether a `config.json` describes a draft that attaches to a target, of this or another architecture."""
    names = fields.get("architectures")
    return _TYPE in fields or (isinstance(names, list) and any(_DRAFTS.search(str(name)) for name in names))


def layout_of(fields: Mapping[str, Any]) -> str:
    """The layout of a draft's `config.json`, a key of `ARCHITECTURES`. Raises UserError for another architecture."""
    if fields.get(_TYPE) == "eagle3":
        return "speculators"
    names = fields.get("architectures")
    if _TYPE not in fields and names in ([ARCHITECTURES["sglang"]], ["Eagle3LlamaForCausalLM"]):
        return "sglang"
    kind = f'"{_TYPE}" {fields[_TYPE]!r}' if _TYPE in fields else f'"architectures" {names!r}'
    raise UserError(
        f'drafts with {kind} are unknown; the known ones have "architectures": ["{ARCHITECTURES["sglang"]}"] or '
        f'"{_TYPE}": "eagle3"'
    )


def read(
    fields: Mapping[str, Any],
    target: DecoderConfig,
    *,
    vocab_size: int | None,
    vocabulary: DraftVocabulary | None,
    own_embedding: bool,
    states_after: Sequence[int] = (),
) -> Eagle3Config:
    """The config of a draft for this target.

    Args:
      fields: the `config.json`.
      vocab_size: the number of the target's ids according to the draft's tensors; None if they do not say.
      states_after: see `Eagle3Config`; needed where the files do not say what their layer ids mean.

    Raises:
      UserError: for a draft of another target or of an unsupported architecture, and for ambiguous layer ids.
    """
    layout, ours = layout_of(fields), fields.get(OURS) or {}
    layer = _layer(fields, layout)
    eagle = fields.get("eagle_config") or {}
    width = base.value_of(fields, "target_hidden_size", int, absent=layer.width)
    size = vocab_size or layer.vocab_size
    if width != target.width:
        raise UserError(
            f"the draft reads hidden states of size {width}, this target's have {target.width}; {_OTHER_TARGET}"
        )
    if size != target.vocab_size:
        raise UserError(
            f"the draft is for a tokenizer of {size} ids, and this target has {target.vocab_size}; {_OTHER_TARGET}"
        )
    layers = ours.get("target", {}).get("layers", target.layers)
    if layers != target.layers:
        raise UserError(
            f"the draft is for a target of {layers} layers, and this one has {target.layers}; {_OTHER_TARGET}"
        )
    if eagle.get("use_aux_hidden_state") is False:
        raise UserError('"use_aux_hidden_state" is false, which is not supported; only drafts on several layers are')
    if layout == "speculators" and "norm_before_residual" not in fields:
        raise UserError('"norm_before_residual" is missing, and programs assume different values; add it')
    switches = {name: base.value_of({**eagle, **fields}, name, bool, absent=False) for name in _SWITCHES}
    if switches["fc_norm"] and switches["norm_before_fc"]:
        raise UserError('"fc_norm" and "norm_before_fc" are both true; one of them is wrong')
    after = _states_after(fields, layout, target.layers, tuple(states_after))
    if after[-1] > target.layers:
        raise UserError(f"the draft reads the state after layer {after[-1]} of {target.layers}; {_OTHER_TARGET}")
    config = Eagle3Config(
        target,
        states_after=after,
        steps=ours.get("steps", Eagle3Config.steps),
        vocabulary=vocabulary,
        own_embedding=own_embedding,
        **switches,
    )
    same = {name: getattr(config.inner, name) for name in ("vocab_size", "family", "param_dtype", "compute_dtype")}
    layer = dataclasses.replace(layer, **same)
    return config if layer == config.inner else dataclasses.replace(config, layer=layer)


def _layer(fields: Mapping[str, Any], layout: str) -> DecoderConfig:
    """The draft's layer as a decoder, in arbitrary dtypes."""
    described = fields.get("transformer_layer_config") if layout == "speculators" else fields
    if not isinstance(described, Mapping) or described.get("model_type") not in _FAMILIES:
        kind = described.get("model_type") if isinstance(described, Mapping) else described
        raise UserError(f"a draft's layer of type {kind!r} is not supported; the supported are {', '.join(_FAMILIES)}")
    family = _FAMILIES[described["model_type"]]
    described = {name: value for name, value in described.items() if name != "architectures"}
    layer = family.read_config(
        {**described, "tie_word_embeddings": False}, param_dtype="float32", compute_dtype="float32"
    )
    if layer.layers != 1 or layer.windows:
        raise UserError(f"the draft has {layer.layers} layers or a window, which is not supported; one full layer is")
    return layer


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


def write(
    config: Eagle3Config, layout: str, *, fingerprint: str, target_name: str | None, target_architecture: str
) -> dict[str, Any]:
    """The fields of a `config.json`, the inverse of `read`.

    Args:
      fingerprint: of the target, see `hub.adapter.fingerprint`.
      target_name: path or hub name of the target, for readers of the layout "speculators"; None leaves it open.
      target_architecture: its class in transformers.

    Raises:
      UserError: for an unknown layout, and for a draft that programs reading it would compute differently.
    """
    if layout not in ARCHITECTURES:
        raise UserError(f'the layout must be one of {", ".join(ARCHITECTURES)}, not "{layout}"')
    inner, after = config.inner, config.states_after
    with prefixed("the draft cannot be exported: "):
        if config.target.learned_positions or config.target.embedding_width:
            raise UserError("other programs read token embeddings without learned positions; take another target")
        if layout == "sglang":
            _check_sglang(config)
    layer = _FAMILIES["qwen3" if inner.qk_norm else "llama"].write_config(inner)
    fields = {
        "architectures": [ARCHITECTURES[layout]],
        "draft_vocab_size": len(config.vocabulary or range(inner.vocab_size)),
        **{name: getattr(config, name) for name in _SWITCHES},
        "torch_dtype": inner.param_dtype,
        OURS: {
            "states_after": list(after),
            "steps": config.steps,
            "target": {"fingerprint": fingerprint, "family": config.target.family, "layers": config.target.layers},
        },
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
            _TYPE: "eagle3",
            IDS: list(after),
            "tie_word_embeddings": False,
            "transformer_layer_config": {name: value for name, value in layer.items() if name != "architectures"},
            "speculators_config": {
                "algorithm": "eagle3",
                "proposal_methods": [proposal],
                "default_proposal_method": "greedy",
                "verifier": {"name_or_path": target_name, "architectures": [target_architecture]},
            },
        }
    with prefixed("the draft cannot be exported: "), reading("its description"):
        what = {"vocab_size": None, "vocabulary": config.vocabulary, "own_embedding": config.own_embedding}
        if read(fields, config.target, **what).inner != inner:
            raise RuntimeError(f"The export of {config} reads back differently.")
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
