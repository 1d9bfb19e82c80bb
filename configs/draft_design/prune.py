"""Cuts a draft out of a larger checkpoint of yours, then has that checkpoint teach it.

    python -m specjax.main --config=configs/draft_design/prune.py --workdir=runs/pruned --config.target=DIR \\
        --config.shape.layers=1 --config.shape.mlp_width=704

What matters is judged by activations on the task's text: whole layers, heads with their key heads, channels of the MLP
and of the residual stream; then `recovered` is distilled on that text, forward KL, for a few steps. Both stages export
the family's own layout: runs/pruned/recovered/export is the draft, and `configs/evaluate/pair.py` measures it.

Hardware: whatever holds the checkpoint twice; with a target of the study two and a half minutes on 2 busy CPU cores. In
configs/draft_design/README.md such drafts are ahead of equally trained ones from scratch.
`configs/draft_design/prune.py:smoke` takes a few steps.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.draft_design import pruning


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/draft_design/prune.py has one variant, smoke; not {variant!r}.")
    base = quickstart.get_config(variant)
    config = ConfigDict()
    config.seed = base.seed
    config.target = "required:target:the directory of the checkpoint to prune"
    # What is left; 0 is as in the checkpoint.
    config.shape = ConfigDict({"layers": 1, "width": 0, "heads": 0, "kv_heads": 0, "mlp_width": 0})
    config.task = base.target.task.copy_and_resolve_references()
    config.pruned = pruning.pruned(base, {}, variant)
    config.pruned.source = config.get_ref("target")
    config.recovered = pruning.trained(base, "stage:pruned")
    config.recovered.target = config.get_ref("target")
    config.recovered.tokenizer.path = config.get_ref("target")
    config.recovered.seed = config.get_ref("seed")
    config.pruned.seed = config.get_ref("seed")
    config.pruned.shape = ConfigDict({key: config.shape.get_ref(key) for key in config.shape})
    for section in (config.pruned, config.recovered):
        section.task = ConfigDict({key: config.task.get_ref(key) for key in config.task})
    config.stages = ("pruned", "recovered")
    return config
