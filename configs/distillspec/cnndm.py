"""DistillSpec on CNN/DailyMail: highlights of articles, ROUGE-2.

    python -m specjax.main --config=configs/distillspec/cnndm.py --workdir=runs/cnndm \\
        --config.target.path=DIR --config.draft.path=DIR

Stages: `tune_target` and `tune_draft` on the task's own answers; `distilled`; `evaluation`, with quality, block
efficiency and latency of the draft before and after distillation. The variants `cnndm.py:llama` and `cnndm.py:qwen`
take instruction-tuned checkpoints and skip the tuning. The data set is read from TFDS (`--config.task.path=DIR` where
it is not in TFDS's default folder), or from JSON lines.

Hardware: 16 accelerators (`--config.mesh.fsdp=N` for another number). Time: not timed; it was not run at full size.
According to the paper, expect a gain of 10 to 45% over decoding with the undistilled draft. `real_scale.py` and the
comments below mark which settings are the paper's and which are ours. `:smoke` takes tiny checkpoints and a file of
JSON lines.
"""

from ml_collections import ConfigDict

from configs.distillspec import real_scale


def get_config(variant: str = "") -> ConfigDict:
    return real_scale.recipe(
        "cnndm",
        variant,
        task="cnn_dailymail",
        # The paper's default: the draft's own text. The divergence is ours; the paper calls it a choice to validate.
        data={"fixed": 0.0, "draft": 1.0, "target": 0.0},
        divergence="forward_kl",
        sequence_length=1024,
        max_new_tokens=128,
    )
