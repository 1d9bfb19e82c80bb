"""Is the advice right? `configs/advise.py` at two temperatures, each checked by decoding with all drafts and without.

    python -m specjax.main --config=configs/draft_design/advice_check.py --workdir=runs/advice_check \\
        --config.target=DIR --config.drafts=DIR,ngram

For each temperature and batch size the table `verdicts` says what was advised, what was fastest, and whether the advice
is within 5% of the fastest (`right`). Nothing else may run on the machine meanwhile.

Stages: `greedy` and `sampled`, at temperatures 0 and 1. Hardware: whatever holds the target. Time: 19 minutes for a
target of 135M parameters with n-gram lookup on two CPU cores, most of it for compiling and for timing batches. Expect
the advice to be right in nine of ten settings or more; README.md of this folder has two checks.
`configs/draft_design/advice_check.py:smoke` checks n-gram drafts of any target.
"""

from ml_collections import ConfigDict

from configs import advise, common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("draft_design/advice_check", variant)
    config = ConfigDict({"stages": ("greedy", "sampled"), "seed": 0})
    config.target = "required:target:the directory of the checkpoint to draft for"
    config.drafts = ("ngram",)  # directories of drafts; "ngram" is n-gram lookup
    config.batch_sizes = (1, 4, 16)
    config.gammas = (2, 4)
    config.task = common.task()
    config.selection = ConfigDict({"count": 16, "length_min": 1, "length_max": 2048, "chat": False})
    if variant == "smoke":
        config.update({"batch_sizes": (2,), "gammas": (2,)})
        config.selection.update({"count": 2, "length_max": 8})
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        section = advise.get_config(variant)
        section.update({"check": True, "temperature": temperature, "layers": (), "thresholds": ()})
        for key in ("seed", "target", "drafts", "batch_sizes", "gammas"):
            section[key] = config.get_ref(key)
        for key in ("task", "selection"):
            section[key] = common.reference(config[key])
        config[name] = section
    return config
