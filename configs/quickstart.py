"""From nothing to a draft that pays: train a target on real text, distil a draft on its own text, prove and measure.

    make quickstart
    python -m specjax.main --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: 2 CPU cores. Time: under ten minutes. Expect the distilled draft to decode about one and a half times as fast
as plain decoding; the tables of configs/benchmark/README.md have every number.
`configs/quickstart.py:smoke` runs every stage in under a minute.

Stages: `target` (and its tokenizer); `supervised`, a draft trained plainly to its plateau; `distilled`, the same draft
trained further on its own text with the target's probabilities; `control`, trained further without the target for at
least as long by the clock; `evaluation` of both.

The keys of each section are explained in configs/common.py.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("quickstart", variant)
    config = ConfigDict()
    # Stages run in this order, each in its own folder of the workdir; a finished one is skipped.
    config.stages = ("target", "supervised", "distilled", "control", "evaluation")
    config.seed = 0

    # Wide, so that verifying five tokens costs little more than one step on a CPU, and no deeper than time allows.
    config.target = common.training(steps=290, learning_rate=1.5e-3)
    config.target.tokenizer.path = ""  # train one
    config.target.model.update({"layers": 2, "width": 640, "heads": 10, "kv_heads": 5, "mlp_width": 1760})
    config.target.data.batch_size = 8
    config.target.train.update({"eval_every": 145, "eval_batches": 4, "checkpoint_every": 145})

    config.supervised = common.training_to_plateau()

    config.distilled = common.distillation("stage:target", "stage:supervised")
    config.distilled.speculative_eval.every = 30

    config.control = common.training(steps=120, learning_rate=3e-3)
    config.control.model.init = "stage:supervised"
    config.control.train.min_seconds_of = "workdir:distilled"

    config.evaluation = common.evaluation(
        "stage:target",
        {
            "control": {"kind": "model", "path": "stage:control", "rules": {"lossless": (4,)}},
            "distilled": {
                "kind": "model",
                "path": "stage:distilled",
                "rules": {"lossless": (2, 3, 4), "coupled": (3,)},
            },
            "ngram": {"kind": "ngram", "shortest": 2, "longest": 4, "rules": {"lossless": (3,), "coupled": (3,)}},
            "early_exit": {"kind": "early_exit", "exit_layer": 1, "rules": {"lossless": (2,)}},
        },
    )
    config.evaluation.compare = (("distilled", "control"),)

    if variant == "smoke":
        common.smoke(config)
        config.target.model.layers = 2
        config.distilled.speculative_eval.every = 2
        config.evaluation.temperatures = (0.0, 1.0)
        config.evaluation.drafters.distilled.rules.lossless = (2,)
    return config
