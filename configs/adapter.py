"""Trains a Kangaroo adapter, Medusa heads, an EAGLE-3 or a block-parallel draft for your checkpoint, on its states.

    python -m specjax.main --config=configs/adapter.py --workdir=runs/adapter \\
        --config.target=DIR --config.text=FILE

`configs/adapter.py:medusa` trains Medusa heads in place of the adapter, `configs/adapter.py:eagle3` an EAGLE-3 draft,
and `configs/adapter.py:block_parallel` a draft that writes a block in one forward, as DFlash does.
The target is a Hugging Face checkpoint of a decoder-only family; it is not changed. The text is a file or a folder of
files. For prompts with answers, or conversations, set `--config.task.name=prompt_completion`, with a chat model
`--config.chat=true`, and the lengths in tokens `--config.sequence_length` and `--config.prompt_length_max`;
configs/distillspec/README.md lists the layouts (conversations, Alpaca, ...).

Kangaroo (arXiv 2404.18911) puts an adapter on the first `exit_layer` layers; Medusa-1 (arXiv 2401.10774, without its
tree) puts heads on the last hidden state; EAGLE-3 (arXiv 2503.01840, as a chain) puts a layer on three of its states,
which drafts token by token; the block-parallel draft has layers of its own that read five of them. The result is in
runs/adapter/adapter/export: small files that work with this target only (`api.load_adapter(DIR, target)`); vLLM serves
those of EAGLE-3 (configs/export/README.md).

Stages: `adapter`, and `evaluation`, which compares with plain decoding, and Kangaroo with the same exit without an
adapter.

Hardware: whatever holds the target; `--config.mesh.fsdp=8` splits it over 8 devices. Time: not timed. Expect text
identical to plain decoding at temperature 0, and a speed-up if the target is deep: the paper exits after 1/16 to 1/10
of the layers.
`configs/adapter.py:smoke`, `:medusa-smoke`, `:eagle3-smoke` and `:block_parallel-smoke` run in seconds with a small
checkpoint.
"""

from ml_collections import ConfigDict

from configs import common

STEPS = 300


def get_config(variant: str = "") -> ConfigDict:
    kinds = ("medusa", "eagle3", "block_parallel")
    common.check_variant("adapter", variant, (*kinds, "smoke", *(f"{kind}-smoke" for kind in kinds)))
    kind = variant.removesuffix("smoke").rstrip("-") or "adapter"
    config = ConfigDict()
    config.stages = ("adapter", "evaluation")
    config.seed = 0
    config.mesh = common.mesh()  # devices along each axis, for both stages
    config.target = "required:target:the directory of the checkpoint to train for"
    config.text = "required:text:a file or a folder of text to train on"
    config.task = common.task("text", config.get_ref("text"))
    target = config.get_ref("target")
    # Tokens of a row and of a prompt, and whether the tokenizer's chat template wraps prompts and answers.
    config.update({"sequence_length": 128, "prompt_length_max": 32, "chat": False})
    config.vocabulary = ""  # the only ids that the draft can draft: the export of configs/draft_design/vocabulary.py

    # On the corpus, with the target's probabilities. Of `model` only the dtypes are read: the shape is the target's.
    config.adapter = common.distillation(target, kind, steps=STEPS)
    config.adapter.model.compute_dtype = "fastest"
    config.adapter.model.vocabulary = config.get_ref("vocabulary")
    config.adapter.data.update({"batch_size": 8, "fixed": 1.0, "draft": 0.0})
    config.adapter.data.update({name: config.get_ref(name) for name in common.LENGTHS})
    config.adapter.train.update({"eval_every": STEPS // 2, "checkpoint_every": STEPS // 2})
    if kind == "eagle3":
        config.adapter.eagle3 = common.eagle3_draft()
        drafters = {"eagle3": {"kind": "eagle3", "path": "stage:adapter", "rules": {"lossless": (2, 4)}}}
    elif kind == "block_parallel":
        config.adapter.block_parallel = common.block_parallel_draft()
        drafters = {kind: {"kind": kind, "path": "stage:adapter", "rules": {"lossless": (3, 7)}}}
    elif kind == "medusa":
        config.adapter.medusa = common.medusa_heads()
        drafters = {"medusa": {"kind": "medusa", "path": "stage:adapter", "rules": {"lossless": (2, 4)}}}
    else:
        config.exit_layer = 1  # layers that draft and target share
        config.adapter.adapter = common.kangaroo_adapter(config.get_ref("exit_layer"))
        # A block ends after a token of which the draft was less sure than the threshold. The paper's is 0.6; small
        # targets are less sure of most tokens.
        drafters = {
            "kangaroo": {"kind": "kangaroo", "path": "stage:adapter", "threshold": 0.3, "rules": {"lossless": (4, 6)}},
            "early_exit": {
                "kind": "early_exit",
                "exit_layer": config.get_ref("exit_layer"),
                "vocabulary": config.get_ref("vocabulary"),
                "threshold": 0.3,
                "rules": {"lossless": (4,)},
            },
        }
    config.evaluation = common.evaluation(target, drafters)
    config.evaluation.selection.length_max = config.get_ref("prompt_length_max")
    config.evaluation.selection.chat = config.get_ref("chat")
    for name in config.stages:
        config[name].seed = config.get_ref("seed")
        config[name].mesh = common.reference(config.mesh)
        config[name].task = common.reference(config.task)
    return common.smoke(config) if variant.endswith("smoke") else config
