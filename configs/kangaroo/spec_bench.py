"""Spec-Bench with any drafters, and plain decoding: compression rate, CTAR and speed-up by subtask.

    python -m specjax.main --config=configs/kangaroo/spec_bench.py --workdir=runs/spec_bench \\
        --config.target=DIR --config.adapter=DIR --config.questions=FILE

The target is a Hugging Face directory, the adapter one that was trained for it (configs/adapter.py), the file
Spec-Bench's question.jsonl: 480 questions; those of MT-bench have two turns, and the second prompt contains the first
answer. `--config.selection.per_category=5` takes the first few of each category, `--config.selection.chat=true` writes
turns with the tokenizer's chat template. `drafters` takes any kind of specjax/decoding/drafters/table.py. Every drafter
decodes each prompt right after plain decoding, and both count tokens the same way.

Hardware: whatever holds the target. Time: every drafter answers every question once.
`configs/kangaroo/spec_bench.py:smoke` trains a tiny target and adapter and asks a few made-up questions.
"""

from ml_collections import ConfigDict

from configs import common
from configs.kangaroo import kangaroo_parts as parts


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("kangaroo/spec_bench", variant)
    if variant:
        config = parts.real_scale(variant, exit_layer=1, learning_rate=1e-3)
        config.spec_bench.selection.per_category = 1
        return config
    config = parts.spec_bench(variant, "", "", {})
    config.adapter = ""  # directory of an adapter of this target
    config.questions = ""  # Spec-Bench's question.jsonl, or the folder that holds it
    config.task.path = config.get_ref("questions")
    adapter = lambda threshold: parts.kangaroo(config.get_ref("adapter"), (6,), threshold)
    config.drafters = ConfigDict(
        {
            "kangaroo": adapter(0.6),
            "kangaroo_fixed": adapter(0.0),
            "ngram": {"kind": "ngram", "shortest": 2, "longest": 4, "rules": {"lossless": (6,)}},
        }
    )
    return config
