"""A checkpoint in several dtypes: tokens per second, memory, perplexity, and acceptance as a draft for the target.

    python -m specjax.main --config=configs/benchmark/quantised.py --workdir=DIR --config.target=DIR --config.text=FILE

The target has the first dtype of `dtypes`; in each other one it drafts for it. Dtypes decode in turns, so that a slow
phase of the machine affects all of them, and the figures are medians over the rounds. A run with the same workdir
resumes after the last finished dtype.

Hardware: memory for the checkpoint in two dtypes. Time: minutes for SmolLM2-135M on two cores, most of it compiling.
Expect int8 to have the perplexity of float32. On CPU expect less memory, not more speed: SmolLM2 in int8 took 0.22 in
place of 0.54 GB and decoded at 0.88 of float32's speed on two cores, in bfloat16 at 0.84 (0.8 on a CPU that has no
instructions for it); as drafts, 0.94 and 0.98 of their tokens were accepted. In the TPU compiler's program for a v5e, a
block of one row through layers of Llama 3.1 8B moves 2.01 bytes per number of a kernel in bfloat16, 1.01 in int8 and
3.4 in int4, 5.4 if it verifies three tokens (`tests/test_tpu.py`), so int4 saves memory there and not time. `:smoke`
runs in seconds.
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
