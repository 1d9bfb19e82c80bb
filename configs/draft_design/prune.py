"""Cuts a draft out of your checkpoint, then distils it from that checkpoint.

    python -m specjax.main --config=configs/draft_design/prune.py --workdir=runs/pruned --config.target=DIR \\
        --config.shape.layers=1 --config.shape.mlp_width=704

Stage `pruned` keeps what matters most by activations on the task's text: whole layers, query heads with their key
heads, channels of the MLP and of the residual stream. Stage `recovered` distils the result on that text, by forward KL,
for a few steps. Both export the family's own layout: runs/pruned/recovered/export is the draft, and configs/evaluate.py
measures it.

Hardware: whatever holds the checkpoint twice. Time: two and a half minutes on 2 busy CPU cores, with a target of 14M
parameters. Expect such drafts to be better than equally trained ones from scratch: configs/draft_design/README.md.
`configs/draft_design/prune.py:smoke` takes a few steps.
"""

from ml_collections import ConfigDict

from configs import common
from configs.draft_design import pruning


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("draft_design/prune", variant)
    config = ConfigDict()
    config.seed = 0
    config.target = "required:target:the directory of the checkpoint to prune"
    # What is left; 0 is as in the checkpoint.
    config.shape = ConfigDict({"layers": 1, "width": 0, "heads": 0, "kv_heads": 0, "mlp_width": 0})
    config.vocabulary = ""  # the only ids that the draft can draft: the export of configs/draft_design/vocabulary.py
    config.task = common.task(size=60_000 if variant else 0)
    config.pruned = pruning.pruned({}, variant)
    config.pruned.source = config.get_ref("target")
    config.pruned.shape = common.reference(config.shape)
    config.pruned.vocabulary = config.get_ref("vocabulary")
    config.recovered = pruning.trained(config.get_ref("target"), "stage:pruned", variant)
    for section in (config.pruned, config.recovered):
        section.seed = config.get_ref("seed")
        section.task = common.reference(config.task)
    config.stages = ("pruned", "recovered")
    return config
