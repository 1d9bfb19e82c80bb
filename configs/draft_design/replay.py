"""Records the greedy text of a target, and scores drafts against it without the target in memory.

    python -m specjax.main --config=configs/draft_design/replay.py --workdir=runs/replay --config.target=DIR
    python -m specjax.main --config=configs/draft_design/replay.py --workdir=runs/scores \\
        --config.replay=runs/replay/replay --config.drafts=DIR,DIR

The first command writes runs/replay/replay: tokens and, if `top_k` is above 0, the most probable tokens at each
position. The second decodes with every draft, gamma and threshold as if the target were there; its counts equal those
of a live greedy run. A draft with another tokenizer is refused. The table `agreement` compares each draft with the
text given everything before each position: how often its best token is the target's, its perplexity, and a lower bound
of the acceptance at temperature 1 (the probability that both give to the stored tokens).

Hardware: whatever holds the larger of both models. Time: not timed. `configs/draft_design/replay.py:smoke` records two
prompts.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("draft_design/replay", variant)
    config = ConfigDict()
    config.binary = "design"
    config.action = "replay"
    config.seed = 0
    config.target = ""  # directory of the target to record
    config.replay = ""  # directory of a replay to score against, in place of recording one
    config.drafts = ()  # directories of the drafts to score
    config.gammas = (1, 2, 4, 6)
    config.thresholds = (0.3, 0.5)  # confidence below which a block ends, in addition to no threshold
    config.batch_size = 8
    config.max_new_tokens = 128
    config.top_k = 32  # most probable tokens stored per position; 0 stores none
    # The prompts: of the task's validation split.
    config.task = common.task()
    config.selection = ConfigDict({"count": 40, "length_min": 16, "length_max": 32, "chat": False})
    config.param_dtype = "float32"
    config.compute_dtype = "auto"  # float32 on CPU, bfloat16 on accelerators
    if variant == "smoke":
        config.gammas, config.thresholds, config.batch_size, config.max_new_tokens = (2,), (0.3,), 2, 8
        config.top_k, config.task.size = 4, 60_000
        config.selection.update({"count": 2, "length_min": 4, "length_max": 8})
    return config
