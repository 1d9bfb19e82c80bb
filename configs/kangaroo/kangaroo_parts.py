"""Sections that the configs of this folder share: the target, the training of an adapter, an evaluation."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from configs import common
from configs.kangaroo import choose_layers

# Where configs/kangaroo/tiny.py exports its target, run as in its docstring.
TARGET = "runs/kangaroo/target/export"


def target(variant: str) -> ConfigDict:
    """Plain training of the target: 16 layers, wide enough that verification is cheap on a CPU.

    Few rows per step, hence many steps, and a small vocabulary: if the target is unsure of every token, stopping by
    confidence cannot be studied.
    """
    section = common.training(steps=1600, learning_rate=1.2e-3)
    section.tokenizer.update({"path": "", "vocab_size": 512})
    section.data.batch_size = 4
    section.model.update({"layers": 16, "width": 384, "heads": 6, "kv_heads": 6, "mlp_width": 1024})
    section.model.max_positions = 8192  # Spec-Bench has long prompts; rotary positions cost nothing
    section.optimizer.warmup_steps = 40
    section.train.update({"eval_every": 400, "checkpoint_every": 400})
    if variant:
        common.smoke(section)
        section.model.layers = 2
    return section


def given_target(config: ConfigDict, variant: str) -> tuple[list[str], Any]:
    """Adds the trained target to a config and returns (its stages, its reference); a smoke run trains a tiny one."""
    if variant:
        config.target = target(variant)
        return ["target"], "stage:target"
    config.target = TARGET  # directory of the target
    return [], config.get_ref("target")


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
    """Trains an adapter by distillation from its own target.

    Args:
      target: directory of the target, or the stage that trains it.
      kind: "attention" (the paper's), "layer", "mlp" or "none".
      own_head: train a head, in place of the target's frozen one.
      steps: of training.
      on_policy: share of steps on text that the draft writes itself; the others use the corpus.
    """
    # The shape is the target's: of `model` only the dtypes are read.
    section = common.distillation(target, "adapter", steps=steps, seed=seed)
    section.adapter = common.kangaroo_adapter(exit_layer, kind, own_head)
    section.data.update({"fixed": 1.0 - on_policy, "draft": on_policy})
    section.loss.divergence = divergence
    # A step costs the target's forward; an adapter is small and gains more from many steps than from large ones.
    section.data.batch_size = 4
    section.train.update({"eval_every": steps // 2, "checkpoint_every": steps // 2})
    return common.smoke(section) if variant else section


def medusa(variant: str, target: str, *, steps: int) -> ConfigDict:
    """Trains Medusa-1's heads: hard labels of the corpus, the target frozen (arXiv 2401.10774)."""
    section = adapter(variant, target, exit_layer=1, steps=steps, divergence="cross_entropy")
    section.model.init = "medusa"
    del section["adapter"]
    section.medusa = common.medusa_heads()
    return section


def layers(variant: str, target: str) -> ConfigDict:
    """The search for layers to skip, as configs/kangaroo/choose_layers.py has it."""
    section = choose_layers.get_config(variant)
    section.target = target
    return section


def kangaroo(path: str, gammas: tuple[int, ...], threshold: float, *, adjusted: bool = False) -> dict:
    """A drafter's section; drafting stops after a token whose largest probability is below the threshold.

    With `adjusted`, confidence is measured after temperature, not at temperature 1.
    """
    rules = {"lossless": gammas}
    return {"kind": "kangaroo", "path": path, "threshold": threshold, "adjusted": adjusted, "rules": rules}


def evaluation(variant: str, target: str, drafters: dict, *, temperatures=(0.0,), compare=()) -> ConfigDict:
    """Batch 1, on prompts of the validation files; parts are not timed."""
    section = common.evaluation(target, drafters)
    section.max_new_tokens = 80
    section.temperatures = temperatures
    section.compare = compare
    section.measure_parts = False
    return common.smoke(section) if variant else section


def spec_bench(variant: str, target: str, questions: str, drafters: dict) -> ConfigDict:
    """A run of Spec-Bench: plain decoding and these drafters on every question, one at a time."""
    section = common.evaluation(target, drafters, seed=0)
    section.binary = "spec_bench"
    section.task = common.task("spec_bench", questions)
    # The first so many questions of each category (0: all); whether the tokenizer's chat template writes the turns.
    section.selection = ConfigDict({"per_category": 0, "chat": False})
    section.max_new_tokens = 16 if variant else 1024  # per turn; the paper's
    section.temperatures = (0.0,)
    for key in ("compare", "samples", "measure_parts"):
        del section[key]  # keys of `evaluate` alone
    return section


def sample_questions() -> str:
    """A few invented questions in Spec-Bench's format, for smoke runs."""
    return str(pathlib.Path(__file__).with_name("sample_questions.jsonl"))


def real_scale(variant: str, *, exit_layer: int, learning_rate: float) -> ConfigDict:
    """An adapter for a user's checkpoint, and Spec-Bench with it, with prompt lookup and with plain early exit."""
    config = ConfigDict()
    config.seed = 0
    stages = []
    if variant:
        config.target, directory = target(variant), "stage:target"
        corpus, questions = None, sample_questions()
        stages.append("target")
        exit_layer = 1
    else:
        config.target = ""  # directory of the target
        config.text = ""  # conversations, or prompts with completions; loss on the answers alone
        config.questions = ""  # Spec-Bench's question.jsonl
        directory, corpus, questions = (config.get_ref(key) for key in ("target", "text", "questions"))
    config.adapter = _real_adapter(variant, directory, corpus, exit_layer=exit_layer, learning_rate=learning_rate)
    gammas = (2,) if variant else (6,)  # the paper's gamma
    drafters = {
        "kangaroo": kangaroo("stage:adapter", gammas, 0.6),  # the paper's threshold
        "kangaroo_fixed": kangaroo("stage:adapter", gammas, 0.0),
        "early_exit": {"kind": "early_exit", "exit_layer": exit_layer, "threshold": 0.6, "rules": {"lossless": gammas}},
        "ngram": {"kind": "ngram", "shortest": 2, "longest": 4, "rules": {"lossless": gammas}},
    }
    config.spec_bench = spec_bench(variant, directory, questions, drafters)
    if not variant:
        config.spec_bench.param_dtype = "bfloat16"
        config.spec_bench.selection.chat = True
        config.spec_bench.mesh.tensor = 8
    config.stages = (*stages, "adapter", "spec_bench")
    return config


def _real_adapter(variant: str, directory, corpus, *, exit_layer: int, learning_rate: float) -> ConfigDict:
    """Marked: (paper) is arXiv 2404.18911 or its repository; the rest is ours."""
    section = adapter(variant, directory, exit_layer=exit_layer, steps=40_000)  # about 20 epochs (paper) of 68k rows
    if variant:
        return section
    section.task = common.task("prompt_completion", corpus)
    section.mesh.fsdp = 8
    section.model.update({"param_dtype": "bfloat16", "compute_dtype": "bfloat16"})  # the paper: float16
    # (paper) rows of 2048 tokens, 4 on each of 8 devices.
    section.data.update({"batch_size": 32, "sequence_length": 2048})
    section.data.update({"prompt_length_min": 1, "prompt_length_max": 1024})
    section.loss.chunk = 1024
    # (paper) the rate, 2000 steps of warm-up, betas 0.9 and 0.95; the paper clips values at 0.5, this the norm.
    section.optimizer.update({"peak_learning_rate": learning_rate, "warmup_steps": 2000, "weight_decay": 0.0})
    section.optimizer.clip_norm = 0.5
    section.train.update({"eval_every": 2000, "checkpoint_every": 2000, "eval_batches": 16, "log_every": 50})
    section.train.best_metric = "validation_acceptance"
    return section
