"""DistillSpec on LM1B: language modelling with decoder-only models, trained from nothing.

    python -m specjax.main --config=configs/distillspec/lm1b.py --workdir=runs/lm1b

Stages: `target` (and its tokenizer), `draft`, `distilled`, `evaluation`. The data set is read from TFDS
(`--config.task.path=DIR` where it is not in TFDS's default folder), or from JSON lines.

Hardware: 8 accelerators (`--config.mesh.fsdp=N` for another number). Time: not timed; it was never run at full size.
Expect, by the paper, a gain of 10 to 45% over decoding with the undistilled draft. What is the paper's and what is ours
is marked in `real_scale.py` and below. `:smoke` takes a file of JSON lines.
"""

from ml_collections import ConfigDict

from configs import common
from configs.distillspec import real_scale

# The paper's sizes: 234M and 33M parameters. The shapes that have them are ours.
SHAPES = {
    "target": {"layers": 16, "width": 1024, "heads": 16, "kv_heads": 16, "head_size": 64, "mlp_width": 2816},
    "draft": {"layers": 5, "width": 512, "heads": 8, "kv_heads": 8, "head_size": 64, "mlp_width": 1408},
}


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("distillspec/lm1b", variant)
    config = ConfigDict()
    config.stages = ("target", "draft", "distilled", "evaluation")
    config.seed = 0
    config.mesh = ConfigDict({"data": 1, "fsdp": 8, "tensor": 1})
    # size: bytes of text, ours; a tenth of the data set or so, all of which is held in memory.
    config.task = ConfigDict({"name": "lm1b", "path": "", "seed": 0, "size": 500_000_000})
    for name in ("target", "draft"):
        config[name] = real_scale.training(config, tokenizer="stage:target" if name == "draft" else "", init="random")
        config[name].tokenizer.vocab_size = 32_000  # ours
        config[name].model.update(common.TINY_MODEL if variant else SHAPES[name])
    # The paper's default: the draft's own text. The divergence is ours.
    on_policy = {"fixed": 0.0, "draft": 1.0, "target": 0.0}
    config.distilled = real_scale.distillation(config, "stage:target", "stage:draft", on_policy, "forward_kl")
    config.evaluation = real_scale.evaluation(config, "stage:target", "stage:draft")
    for name in config.stages[:-1]:
        config[name].data.update({"sequence_length": 128, "prompt_length_min": 8, "prompt_length_max": 32})  # ours
    config.evaluation.selection.update({"length_min": 16, "length_max": 32})  # ours
    config.evaluation.max_new_tokens = 80  # ours
    if variant:
        real_scale.shrink(config)
        config.target.tokenizer.vocab_size = 300
        config.evaluation.selection.update({"length_min": 2, "length_max": 8})
    return config
