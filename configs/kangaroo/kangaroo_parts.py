"""Sections that the configs of this folder share: the target, the training of an adapter, an evaluation."""

import importlib.util
import pathlib

from ml_collections import ConfigDict

# Where configs/kangaroo/tiny.py leaves its target when it is run as its docstring says.
TARGET = "runs/kangaroo/target/export"


def quickstart(variant: str) -> ConfigDict:
    """The quickstart's own config, which these vary."""
    path = pathlib.Path(__file__).parents[1] / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def target(variant: str) -> ConfigDict:
    """Plain training of the target: 16 layers, wide enough that verification is cheap on a CPU."""
    section = quickstart(variant).target
    if not variant:
        section.model.update({"layers": 16, "width": 384, "heads": 6, "kv_heads": 6, "mlp_width": 1024})
        # Spec-Bench has long prompts; rotary positions cost nothing.
        section.model.max_positions = 8192
        section.optimizer.warmup_steps = 40
        section.train.update({"steps": 560, "eval_every": 140, "checkpoint_every": 140})
    return section


def adapter(
    variant: str,
    target: str,
    *,
    exit_layer: int,
    kind: str = "attention",
    own_head: bool = False,
    steps: int,
    divergence: str = "forward_kl",
    on_policy: float = 0.0,
    seed: int = 0,
) -> ConfigDict:
    """Trains an adapter: the quickstart's distillation, with the adapter as what is trained.

    Args:
      target: directory of the target, or the stage that trains it.
      kind: "attention" (the paper's), "layer", "mlp" or "none"; `own_head` a trained head in place of the frozen one.
      on_policy: share of steps on text that the draft writes itself; the others are on the corpus.
    """
    section = quickstart(variant).distilled.copy_and_resolve_references()
    section.seed = seed
    section.target = target
    section.tokenizer.path = target
    # The shape is the target's: of `model` only the dtypes are read.
    section.model.init = "adapter"
    section.adapter = ConfigDict({"exit_layer": exit_layer, "kind": kind, "own_head": own_head})
    section.data.update({"fixed": 1.0 - on_policy, "draft": on_policy})
    section.loss.divergence = divergence
    section.speculative_eval.every = 0
    if not variant:
        section.data.batch_size = 8
        section.optimizer.peak_learning_rate = 3e-3
        section.train.update({"steps": steps, "eval_every": steps // 2, "checkpoint_every": steps // 2})
    return section
