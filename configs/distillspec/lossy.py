"""What lossy rules cost and gain: quality against block efficiency and latency, before and after distillation.

    python -m specjax.main --config=configs/distillspec/lossy.py --workdir=runs/lossy_0 --config.seed=0

One run is one seed of the draft's training and of decoding, on problems of its own; the target is the same in all runs.
`python -m configs.records.condense configs/records/lossy.json runs/lossy_0 runs/lossy_1 runs/lossy_2` joins them.

Stages: `target`; `supervised`, a draft trained plainly; `distilled`, the same draft trained further on its own text
with the target's probabilities; `quality`, every rule at every lenience on many prompts; `latency`, the same one
prompt at a time, on an otherwise idle machine.

Hardware: 2 CPU cores. Time: about eleven minutes per seed, mostly on one core; eight if the target is copied from
another seed's workdir. Expect, as in DistillSpec's figure 6, more tokens per target call and lower quality as lenience
falls: the tables of configs/distillspec/README.md. `configs/distillspec/lossy.py:smoke` uses tiny models.
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
    rules = dict.fromkeys(("lossless", *(LOSSY[-2:] if smoke else LOSSY)), (stages.GAMMA,))
    drafters = {
        draft: {"kind": "model", "path": f"stage:{draft}", "rules": rules} for draft in ("supervised", "distilled")
    }
    # The draft as its own target, decoded plainly.
    alone = {"kind": "model", "path": "stage:distilled", "target": "stage:distilled", "rules": {"lossless": (0,)}}
    temperatures = (0.0,) if smoke else (0.0, 1.0)
    drafters["draft_alone"] = alone
    # Enough prompts to see a loss of one answer in a hundred.
    how = {"timed": timed, "temperatures": temperatures, "smoke": smoke, "prompts": 384}
    section = stages.evaluation(seed, "stage:target", drafters, **how)
    section.leniences = (0.5,) if smoke else (0.6, 0.3, 0.1)
    return section
