"""Kangaroo for Llama-3-8B-Instruct: an adapter after 2 of 32 layers (ours; the paper has no Llama 3), and Spec-Bench.

    python -m specjax.main --config=configs/kangaroo/llama3_8b.py --workdir=runs/llama3_8b \\
        --config.target=DIR --config.text=FILE --config.questions=FILE

The directory is the Hugging Face checkpoint, the text a file of conversations in the layout of ShareGPT (or another of
configs/distillspec/README.md), the questions Spec-Bench's question.jsonl. The paper trains on ShareGPT; to train on
text of the target itself set `--config.adapter.data.target=1 --config.adapter.data.fixed=0`.
The vocabulary of 128,256 makes the head the dearest part of a draft step.

Hardware: eight accelerators that hold the target together. Not timed: only
`configs/kangaroo/llama3_8b.py:smoke` (a tiny target, a few steps, made-up questions) has been run.
configs/kangaroo/kangaroo_parts.py marks the paper's settings.
"""

from ml_collections import ConfigDict

from configs import common
from configs.kangaroo import kangaroo_parts as parts


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("kangaroo/llama3_8b", variant)
    return parts.real_scale(variant, exit_layer=2, learning_rate=5e-5)
