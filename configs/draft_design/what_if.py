"""The throughput model on your own numbers: best gamma, break-even, and when two drafts are equally fast.

    python -m specjax.main --config=configs/draft_design/what_if.py --workdir=runs/what_if \\
        --config.drafts=wide:0.72:6.69,deep:0.73:13.13 --config.target_milliseconds=60,60

No model is loaded and nothing is measured: milliseconds and acceptance are yours, from a profile, a paper or a guess.
The run prints every gamma, and each draft at its best one (0 if speculation does not pay) with the draft step at which
it would be as fast as the best draft. Acceptance is i.i.d., as a share of drafted tokens.

Hardware: any. Time: seconds. Expect about 33 tokens/s for `wide`, the better of the two default drafts.
`configs/draft_design/what_if.py:smoke` is the same.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("draft_design/what_if", variant)
    config = ConfigDict()
    config.binary = "design"
    config.action = "what_if"
    config.seed = 0
    config.drafts = ("wide:0.72:6.69", "deep:0.73:13.13")  # name:acceptance:milliseconds of a step
    config.target_milliseconds = (60.0,)  # on 1, 2, ... tokens per row; the last two are extrapolated linearly
    config.shared_milliseconds = 0.0  # part of them that the draft has run already (Kangaroo: its step is the adapter)
    config.rule_milliseconds = 0.0
    config.longest = 12  # the largest gamma to look at
    return config
