"""What lossy rules cost and bring: quality against block efficiency and latency, before and after distillation.

    python -m specjax.main --config=configs/distillspec/lossy.py --workdir=runs/lossy_0 --config.seed=0

One run is one seed of the draft's training and of decoding, on problems of its own; the target is the same in all.
`python -m configs.records.condense configs/records/lossy.json runs/lossy_0 runs/lossy_1 runs/lossy_2` joins them.

Stages: `target`; `supervised`, a draft trained plainly; `distilled`, the same on its own text by the target's
probabilities; `quality`, every rule at every lenience over many prompts; `latency`, the same one prompt at a time, to
be run on a machine with nothing else to do.

Hardware: 2 CPU cores. Time: about eleven minutes a seed, eight where the target is copied from another seed's workdir;
most of it uses one core. Expect, as in DistillSpec's figure 6, more tokens a target call and lower quality the smaller
the lenience: the tables of configs/distillspec/README.md. `configs/distillspec/lossy.py:smoke` takes tiny models.
"""

from ml_collections import ConfigDict

from configs import common
from configs.distillspec import stages

LOSSY = ("lenient_linear", "lenient_square", "lenient_exp", "typical")


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("distillspec/lossy", variant)
    smoke = variant == "smoke"
    config = ConfigDict()
    config.stages = ("target", "supervised", "distilled", "quality", "latency")
    config.seed = 0  # of everything but the target
    seed = config.get_ref("seed")
    config.target = stages.trained(0, "large", steps=500, rate=1.5e-3, tokenizer="", smoke=smoke)
    plain = {"steps": 300, "rate": 4e-3, "tokenizer": "stage:target"}
    config.supervised = stages.trained(seed, "draft", **plain, smoke=smoke)
    source = {"init": "stage:supervised", "target": "stage:target"}
    config.distilled = stages.taught(seed, "draft", **source, steps=100, rate=3e-3, on_policy=True, smoke=smoke)
    for name in ("quality", "latency"):
        config[name] = _evaluation(seed, timed=name == "latency", smoke=smoke)
    return config


def _evaluation(seed, *, timed: bool, smoke: bool) -> ConfigDict:
    rules = {"lossless": (stages.GAMMA,), **dict.fromkeys(LOSSY, (stages.GAMMA,))}
    drafters = {
        draft: {"kind": "model", "path": f"stage:{draft}", "rules": rules} for draft in ("supervised", "distilled")
    }
    # The draft by itself: its own target, decoded plainly.
    alone = {"kind": "model", "path": "stage:distilled", "target": "stage:distilled", "rules": {"lossless": (0,)}}
    temperatures = (0.0,) if smoke else (0.0, 1.0)
    drafters["draft_alone"] = alone
    # A loss of one in a hundred answers is to be seen.
    how = {"timed": timed, "temperatures": temperatures, "smoke": smoke, "prompts": 384}
    section = stages.evaluation(seed, "stage:target", drafters, **how)
    section.leniences = (0.5,) if smoke else (0.6, 0.3, 0.1)
    return section
