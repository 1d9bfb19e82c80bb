"""A pruned draft against one from scratch, of the same shape and trained on as many tokens, both distilled.

    python -m specjax.main --config=configs/draft_design/pruning.py --workdir=runs/pruning

Stages: `target` (as in the quickstart); `pruned_N` for each shape N, the target cut to it by importance on the corpus;
then for every seed `recovered_N_S` (the pruned draft, distilled on the corpus) and `scratch_N_S` (a random one,
distilled on the same batches for as many steps); and `evaluation`. `wide` has one layer of the target's width,
`narrow` two of a little more than half of it.

Hardware: 2 CPU cores. Time: about half an hour. Expect higher block efficiency of the pruned draft: the comparisons in
configs/draft_design/README.md. `configs/draft_design/pruning.py:smoke` takes a minute.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common

SEEDS = (0, 1, 2)
# 0 keeps the target's value. Heads are 64 wide, with two query heads per key head.
SHAPES = {
    "wide": {"layers": 1, "width": 0, "heads": 4, "kv_heads": 2, "mlp_width": 704},
    "narrow": {"layers": 2, "width": 320, "heads": 4, "kv_heads": 2, "mlp_width": 704},
}


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("draft_design/pruning", variant)
    config = ConfigDict()
    config.seed = 0
    config.target = common.training(steps=290, learning_rate=1.5e-3)
    config.target.tokenizer.path = ""  # train one
    config.target.model.update({"layers": 2, "width": 640, "heads": 10, "kv_heads": 5, "mlp_width": 1760})
    config.target.data.batch_size = 8
    config.target.train.update({"eval_every": 145, "eval_batches": 4, "checkpoint_every": 145})
    if variant:
        common.smoke(config.target)
        config.target.model.layers = 2
    like = config.target.model
    stages, drafters, pairs = ["target"], {}, []
    for name, shape in SHAPES.items() if not variant else (("wide", {"layers": 1, "mlp_width": 32}),):
        config[f"pruned_{name}"] = pruned(shape, variant)
        stages.append(f"pruned_{name}")
        for seed in SEEDS if not variant else SEEDS[:1]:
            for recipe in ("recovered", "scratch"):
                stage = f"{recipe}_{name}_{seed}"
                config[stage] = trained(
                    "stage:target", f"stage:pruned_{name}" if recipe == "recovered" else "random", variant
                )
                config[stage].seed = seed
                config[stage].model.update({key: value or like[key] for key, value in shape.items()})
                config[stage].model.head_size = like.head_size
                stages.append(stage)
                drafters[stage] = {"kind": "model", "path": f"stage:{stage}", "rules": {"lossless": (4,)}}
            pairs.append((f"recovered_{name}_{seed}", f"scratch_{name}_{seed}"))
    config.evaluation = common.evaluation("stage:target", drafters)
    config.evaluation.compare = tuple(pairs)
    config.evaluation.measure_parts = False
    if variant:
        common.smoke(config.evaluation)
    config.stages = (*stages, "evaluation")
    return config


def pruned(shape: dict, variant: str) -> ConfigDict:
    """The target cut to a shape."""
    section = ConfigDict()
    section.binary = "design"
    section.action = "prune"
    section.seed = 0
    section.source = "stage:target"  # the checkpoint to prune
    section.param_dtype = "float32"
    section.compute_dtype = "auto"
    section.task = common.task(size=60_000 if variant else 0)  # whose training text decides what matters
    section.vocabulary = ""  # the only ids that the draft can draft, see common.draft_vocabulary; "" for all
    # text: a folder of text that the binary target_text wrote, to use in place of the task's.
    section.calibration = ConfigDict({"text": "", "batches": 8, "batch_size": 8, "sequence_length": 128})
    section.shape = ConfigDict(shape)  # what is left; 0, or a missing key, keeps the source's value
    if variant:
        section.calibration.update({"batches": 1, "batch_size": 2, "sequence_length": 32})
    return section


def trained(target: Any, init: Any, variant: str) -> ConfigDict:
    """Distillation on the corpus: of the pruned model, or of a random one."""
    section = common.distillation(target, init)
    section.data.update({"fixed": 1.0, "draft": 0.0})
    return common.smoke(section) if variant else section
