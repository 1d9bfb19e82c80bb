"""Checks whether the throughput model gives the numbers that the paper prints, and what the paper's shapes need.

    python -m specjax.main --config=configs/draft_design/published.py --workdir=runs/published

Two rows of "Decoding Speculative Decoding" (arXiv 2402.01528): block efficiency 3.70 at 6.69 ms per draft step gives
32.59 tokens/s, 3.81 at 13.13 ms gives 23.10. The paper prints neither their gamma nor the target's seconds; both are
inferred from these rows, so this checks arithmetic and reproduces nothing. Cache sizes are those of specjax
at 1024 tokens in float16.

Hardware: any. Time: seconds; no model runs. Expect `off by` within 0.005 of 0, caches of 192 and 120 MiB, and parameter
counts that match the shapes' names. `configs/draft_design/published.py:smoke` is the same.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("draft_design/published", variant)
    config = ConfigDict()
    config.binary = "configs.draft_design.paper_check"
    config.seed = 0
    config.gamma = 8  # inferred
    config.target_seconds = 60e-3  # of a verification; inferred
    # What the paper prints of two drafts of LLaMA-65B: name, block efficiency, seconds of a draft step, tokens/s.
    config.published = (("wide-1.3b", 3.70, 6.69e-3, 32.59), ("noft-1.3b", 3.81, 13.13e-3, 23.10))
    config.shapes = ("noft-1.3b", "wide-1.3b", "wide-796m", "wide-543m", "wide-290m")
    config.context = 1024  # tokens in a cache
    return config
