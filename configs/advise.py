"""Which draft to take for your target on this device: shape, gamma, confidence threshold, tokens per second to expect.

    python -m specjax.main --config=configs/advise.py --workdir=runs/advice --config.target=DIR

Shapes that nobody has trained are timed with random weights; their acceptance is a range that you state (`acceptance`).
Drafts that you have (`--config.drafts=DIR,DIR`) are decoded with, or scored against a replay of the target's greedy
text (`replay`). The run prints every candidate at every gamma, what it recommends, the reasons, and the command that
trains the recommended shape; or that speculation does not pay. Intervals come from the acceptance. Tokens per second
are those of decoding, without the prompt's prefill. With `--config.batch_sizes=1,4,16` there is advice for each batch
size: whether to speculate, and how much; texts of different acceptance share a batch, which it takes into account.
`--config.check=True` then measures whether what it advises is within 5% of the fastest.

Drafts are models, or "ngram"; those that attach to the target are measured with configs/evaluate.py. The workload is
Python source unless you name prompts: `--config.task.name=prompts --config.task.path=FILE`, with
`--config.selection.length_max=2048` and for a chat model `--config.selection.chat=true`.

Hardware: whatever holds the target. Time: every candidate compiles once per gamma; two drafts and three shapes took six
minutes on 2 CPU cores with a target of 14M parameters. `configs/advise.py:smoke` times one shape.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("advise", variant)
    config = ConfigDict()
    config.binary = "design"
    config.action = "advise"
    config.seed = 0
    config.target = ""  # directory of the target
    config.drafts = ()  # directories of drafts that you have; "ngram" is n-gram lookup
    config.replay = ""  # directory of a replay of the target, instead of decoding with the drafts; greedy only
    # Shapes to consider: these depths, with this share of the target's parameters, in the target's proportions.
    config.layers = (1, 2, 4)
    config.share = 0.1
    config.acceptance = (0.5, 0.7)  # range of their i.i.d. acceptance, as a share of drafted tokens
    config.gammas = (1, 2, 3, 4, 6)  # each is timed
    config.thresholds = (0.3, 0.5)  # confidence below which a block ends; for `drafts` at batch size 1
    config.batch_sizes = (1,)  # each gets its own advice
    config.check = False  # decode with all `drafts` and gammas, and without, to see whether the advice is right
    config.temperature = 0.0
    config.max_new_tokens = 80
    # The workload: prompts of the task's validation split.
    config.task = common.task()
    config.selection = ConfigDict({"count": 16, "length_min": 16, "length_max": 32, "chat": False})
    config.param_dtype = "auto"
    config.compute_dtype = "auto"  # float32 on CPU, bfloat16 on accelerators
    if variant == "smoke":
        config.layers, config.share, config.gammas, config.thresholds = (1,), 0.8, (1, 2), (0.3,)
        config.max_new_tokens = 8
        config.task.size = 60_000
        config.selection.update({"count": 2, "length_min": 4, "length_max": 8})
    return config
