"""A checkpoint in several dtypes: tokens per second, memory, perplexity, and acceptance as a draft for the target.

    python -m specjax.main --config=configs/benchmark/quantised.py --workdir=DIR --config.target=DIR --config.text=FILE

The target has the first dtype of `dtypes`; in each other one it drafts for it. Dtypes decode in turns, so that a slow
phase of the machine affects all of them, and the figures are medians over the rounds. A run with the same workdir
resumes after the last finished dtype.

Hardware: memory for the checkpoint in two dtypes. Time on two cores: 7 minutes for SmolLM2-135M with `prompts=2` and
`rounds=3`; 25 minutes and 16 GB for Qwen2.5-Coder-1.5B with 24 new tokens. Expect int8 to have the perplexity of
float32. On a CPU expect less memory, not more speed; the figures are in README.md of this folder. `:smoke` runs in
seconds.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("benchmark/quantised", variant)
    config = ConfigDict()
    config.binary = "configs.benchmark.measure_quantised"
    config.seed = 0
    config.target = ""  # directory or GGUF file of the checkpoint
    config.text = ""  # a text file: its start is the prompts, and what perplexity is measured on
    config.dtypes = ("float32", "bfloat16", "int8", "int4")  # of parameters; the first is the target's
    config.compute_dtype = "float32"
    config.prompts = 4  # number of prompts, each decoded alone
    config.prompt_length = 32  # tokens of a prompt
    config.max_new_tokens = 64
    config.perplexity_length = 256  # tokens of a text whose perplexity is measured; there are as many as prompts
    config.gamma = 4
    config.rounds = 5
    if variant == "smoke":
        config.dtypes = ("float32", "int8")
        config.update({"prompts": 2, "prompt_length": 4, "max_new_tokens": 8, "perplexity_length": 16, "rounds": 1})
    return config
