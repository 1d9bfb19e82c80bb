"""Distils a draft for your checkpoint on your text, and measures it before and after against plain decoding.

    python -m specjax.main --config=configs/distill.py --workdir=runs/draft \\
        --config.target=DIR --config.draft=DIR --config.text=FILE

Target and draft are Hugging Face checkpoints with the same tokenizer. The text is a file or a folder of files; a tenth
of it is held out for the evaluation. For prompts, with or without answers, set `--config.task.name=prompt_completion`,
with a chat model `--config.chat=true`, and the lengths in tokens `--config.sequence_length` and
`--config.prompt_length_max`; configs/distillspec/README.md lists the layouts (conversations, Alpaca, ...). The draft is
left in
runs/draft/distilled/export, the report in runs/draft/report.html.

`configs/distill.py:new` needs no draft: it trains one of the size `shape` from nothing, first plainly, then as above.

    python -m specjax.main --config=configs/distill.py:new --workdir=runs/draft \\
        --config.target=DIR --config.shape.layers=2 --config.text=FILE

`configs/distill.py:pard` trains a draft to draft a block in one forward with mask tokens (PARD, arXiv 2504.18583), on
the text itself. vLLM serves its export with `"parallel_drafting": true`.

Stages: `supervised` (with `:new` alone); `distilled`, on the draft's own text with the target's probabilities
(DistillSpec, arXiv 2310.08461); `evaluation`.

Hardware: whatever holds both models, the draft with its optimiser; `--config.mesh.fsdp=8` splits them over 8 devices.
Time: not timed; a step costs about as much as writing its batch with the draft. Expect more tokens per target call
(`block_efficiency`) than before, and text identical to plain decoding at temperature 0. If `validation_acceptance`
still rises at the end, take more `--config.distilled.train.steps`.
`configs/distill.py:smoke`, `:new-smoke` and `:pard-smoke` run in seconds with small checkpoints.
"""

from ml_collections import ConfigDict

from configs import common

GAMMAS = (2, 4)  # tokens drafted per block, in the evaluation


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("distill", variant, ("new", "pard", "smoke", "new-smoke", "pard-smoke"))
    new, pard = variant.startswith("new"), variant.startswith("pard")
    config = ConfigDict()
    config.stages = ("supervised", "distilled", "evaluation") if new else ("distilled", "evaluation")
    config.seed = 0
    config.mesh = common.mesh()  # devices along each axis, for all stages
    config.target = "required:target:the directory of the checkpoint to draft for"
    config.text = "required:text:a file or a folder of text to train on"
    config.task = common.task("text", config.get_ref("text"))
    target = config.get_ref("target")
    # Tokens of a row, and of these the most that the draft continues from; whether the tokenizer's chat template wraps
    # prompts and answers.
    config.update({"sequence_length": 128, "prompt_length_max": 32, "chat": False})
    config.vocabulary = ""  # the only ids that the draft can draft: the export of configs/draft_design/vocabulary.py
    if new:
        # Heads are 64 wide; 8/3 of the width is usual for the MLP.
        config.shape = ConfigDict({"layers": 1, "width": 256, "heads": 4, "kv_heads": 4, "mlp_width": 704})
        config.supervised = common.training_to_plateau()
        config.supervised.tokenizer.path = target
        config.supervised.model.update(common.reference(config.shape))
        draft = "stage:supervised"
    else:
        config.draft = "required:draft:the directory of a draft (or train one: --config=configs/distill.py:new)"
        draft = config.get_ref("draft")

    config.distilled = common.distillation(target, draft, steps=200, learning_rate=3e-4)
    if new:
        config.distilled.optimizer.peak_learning_rate = 3e-3  # a small new model learns fast
    config.distilled.train.update({"eval_every": 50, "checkpoint_every": 50})
    config.distilled.data.batch_size = 16
    config.distilled.data.generation.max_new_tokens = 96

    for name in config.stages[:-1]:
        config[name].model.compute_dtype = "fastest"
        config[name].data.update({key: config.get_ref(key) for key in common.LENGTHS})
    if pard:
        config.distilled.pard = common.pard_draft(drafted=2 * max(GAMMAS))
        config.distilled.loss.anchors = 32  # positions of each text that a block is drafted from
        config.distilled.data.update({"fixed": 1.0, "draft": 0.0})

    rules = {"lossless": GAMMAS}
    drafters = {
        "undistilled": {"kind": "model", "path": draft, "rules": rules},
        "distilled": {"kind": "pard" if pard else "model", "path": "stage:distilled", "rules": rules},
    }
    config.evaluation = common.evaluation(target, drafters)
    config.evaluation.compare = (("distilled", "undistilled"),)
    config.evaluation.selection.length_max = config.get_ref("prompt_length_max")
    config.evaluation.selection.chat = config.get_ref("chat")
    for name in config.stages[:-1]:
        config[name].model.vocabulary = config.get_ref("vocabulary")
    for name in config.stages:
        config[name].seed = config.get_ref("seed")
        config[name].mesh = common.reference(config.mesh)
        config[name].task = common.reference(config.task)
    return common.smoke(config) if variant.endswith("smoke") else config
