"""Weak scaling on paper: on-policy distillation of a draft with the same number of rows per chip, from 8 to 256 chips.

    python -m specjax.main --config=configs/plan/scaling.py --plan

Every stage is the same step on a larger mesh: the 796M draft of arXiv 2402.01528 on its own text, with the
probabilities of a target of LLaMA-7B's shape (arXiv 2302.13971, table 2). The tensor axis stays and `fsdp` grows, so
the work per chip stays, and what a chip sends approaches a full copy of the parameters.

Hardware: none but the TPU compiler. Time: some minutes. Expect the last table of configs/plan/README.md.
"""

from ml_collections import ConfigDict

from configs.plan import pairs

CHIPS = (8, 16, 32, 64, 128, 256)
TENSOR = 4
ROWS = 4  # of a batch, on each chip of the data axes


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.chip = "v5e"  # what --plan alone is for
    for chips in CHIPS:
        ways = chips // TENSOR
        pair = pairs.Pair(
            "llama_7b",
            "wide_796m",
            ("arXiv 2302.13971, table 2", "arXiv 2402.01528, table 2"),
            "v5e",
            training=(1, ways, TENSOR),
            decoding=(1, 1, TENSOR),
            rows=(ROWS * ways, 1024),
            prompts=(8, 512),
            gamma=4,
        )
        config[f"chips_{chips}"] = pairs.of_pair(pair).distilled.copy_and_resolve_references()
    config.stages = tuple(f"chips_{chips}" for chips in CHIPS)
    return config
