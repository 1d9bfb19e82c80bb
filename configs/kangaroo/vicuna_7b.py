"""Kangaroo for Vicuna-7B: an adapter after 2 of 32 layers (paper), and Spec-Bench with it.

    python -m specjax.main --config=configs/kangaroo/vicuna_7b.py --workdir=runs/vicuna_7b \\
        --config.target=DIR --config.text=FILE --config.questions=FILE

The directory is the Hugging Face checkpoint, the text a file of conversations in the layout of ShareGPT (or another of
configs/distillspec/README.md), the questions Spec-Bench's question.jsonl. The paper trains on ShareGPT; to train on
text of the target itself set `--config.adapter.data.target=1 --config.adapter.data.fixed=0`.
Vicuna's checkpoints bring no chat template: put FastChat's, as Jinja, into their tokenizer_config.json first.

Hardware: eight accelerators that hold the target together. Not timed: only
`configs/kangaroo/vicuna_7b.py:smoke` (a tiny target, a few steps, made-up questions) has been run.
configs/kangaroo/kangaroo_parts.py marks the paper's settings.
"""

from ml_collections import ConfigDict

from configs import common
from configs.kangaroo import kangaroo_parts as parts


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("kangaroo/vicuna_7b", variant)
    return parts.real_scale(variant, exit_layer=2, learning_rate=5e-5)
