"""DistillSpec on XSum: one-sentence summaries, ROUGE-2.

    python -m specjax.main --config=configs/distillspec/xsum.py --workdir=runs/xsum \\
        --config.target.path=DIR --config.draft.path=DIR

Stages: `tune_target` and `tune_draft` on the task's own answers; `distilled`; `evaluation`, with quality, block
efficiency and latency of the draft before and after distillation. The variants `xsum.py:llama` and `xsum.py:qwen` take
instruction-tuned checkpoints and skip the tuning. The data set is read from TFDS (`--config.task.path=DIR` where
it is not in TFDS's default folder), or from JSON lines.

Hardware: 16 accelerators (`--config.mesh.fsdp=N` for another number). Time: not timed; it was not run at full size.
Expect, by the paper, about half a token more a target call for the distilled draft when greedy, at gamma 7.
`real_scale.py` and the comments below mark which settings are the paper's and which are ours. `:smoke` takes tiny
checkpoints and a file of JSON lines.
"""

from ml_collections import ConfigDict

from configs.distillspec import real_scale


def get_config(variant: str = "") -> ConfigDict:
    return real_scale.recipe(
        "xsum",
        variant,
        task="xsum",
        # The paper's best for greedy decoding: text of both models, JSD. Equal halves are ours.
        data={"fixed": 0.0, "draft": 0.5, "target": 0.5},
        divergence="jsd",
        sequence_length=1024,
        max_new_tokens=64,
    )
