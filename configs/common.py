"""Sections that the configs share, with every key explained once, and one way to shrink a config for a smoke run.

A config calls these functions and changes what it has an opinion on. Sizes are for 2 CPU cores and a model that learns
the Python standard library; a config for larger models says its own.
"""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

# A decoder that learns in seconds, for smoke runs.
TINY_MODEL = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "head_size": 16, "mlp_width": 64}


def check_variant(name: str, variant: str, variants: Iterable[str] = ("smoke",)) -> None:
    """Raises ValueError, which the command line reports, if `name` has no such variant."""
    if variant and variant not in variants:
        raise ValueError(f"configs/{name}.py has no variant {variant!r}; it has {', '.join(variants)}")


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> ConfigDict:
    """Devices along each axis; 1, 1, 1 is one device."""
    return ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})


def task(name: str = "stdlib_code", path: Any = "", seed: Any = 0, size: int = 0) -> ConfigDict:
    """The data of training and evaluation; configs/distillspec/README.md lists the tasks.

    Args:
      path: file or folder of the data; "" where the task needs none.
      seed: chooses examples, in tasks that make them up.
      size: the most training data, in bytes of text or in examples; 0 takes all.
    """
    return ConfigDict({"name": name, "path": path, "seed": seed, "size": size})


def reference(section: ConfigDict) -> ConfigDict:
    """A copy that follows `section`: a key changed there, such as on the command line, changes here as well."""
    return ConfigDict({key: section.get_ref(key) for key in section})


def training(steps: int, learning_rate: float, *, seed: int = 0) -> ConfigDict:
    """Every key of a training stage, set to plain training of a small draft on the text of the task."""
    config = ConfigDict({"binary": "distill", "seed": seed, "mesh": mesh(), "task": task()})
    # path: a checkpoint whose tokenizer to use; "" trains a byte-level BPE of vocab_size on the task's text.
    config.tokenizer = ConfigDict({"path": "stage:target", "vocab_size": 1024})
    config.model = ConfigDict(
        {
            # "random", or a checkpoint to continue from (its config.json then gives the shape). "adapter" and "medusa"
            # train what a section `adapter` or `medusa` describes, attached to the target.
            "init": "random",
            "encoder_layers": 0,  # above 0: an encoder-decoder like T5, without rope_theta and max_positions
            "layers": 1,
            "width": 256,
            "heads": 4,
            "kv_heads": 2,
            "head_size": 64,
            "mlp_width": 352,
            "max_positions": 1024,
            "rope_theta": 10000.0,
            "norm_epsilon": 1e-5,
            "tied_head": True,
            "param_dtype": "float32",
            "compute_dtype": "auto",  # float32 on CPU, bfloat16 on accelerators
            "replicate": False,  # True: every device of the tensor axis holds the model in full (a small draft)
        }
    )
    config.target = ""  # checkpoint of the model to learn from; "" trains on the text alone
    # A recipe of specjax/distillation/recipes.py by name; then fixed, draft and target below are 0, divergence is "".
    config.recipe = ""
    config.data = ConfigDict(
        {
            "batch_size": 16,
            "sequence_length": 128,
            # Tokens of a row that a model receives as its prompt before it continues the row itself.
            "prompt_length_min": 8,
            "prompt_length_max": 32,
            # Shares of the steps: on the corpus, on text that the draft writes (on-policy), on text of the target.
            "fixed": 1.0,
            "draft": 0.0,
            "target": 0.0,
            # Folder of text that the binary target_text wrote with the target; "" writes it during training.
            "target_path": "",
            "generation": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 96},
        }
    )
    config.loss = ConfigDict(
        {
            "divergence": "cross_entropy",  # or one of specjax/distillation/divergences.py, from the target
            "beta": 0.5,  # of jsd
            "temperature": 1.0,  # of both models' probabilities in the loss; not that of generation
            "chunk": 512,  # positions, per device, whose logits exist at one time
        }
    )
    config.optimizer = ConfigDict(
        {
            "peak_learning_rate": learning_rate,
            "final_fraction": 0.05,  # of the peak, at the end of the cosine
            "hold_fraction": 0.0,  # of the steps, at the end, at that final rate
            "warmup_steps": 20,
            "weight_decay": 0.05,
            "beta1": 0.9,
            "beta2": 0.95,
            "clip_norm": 1.0,
            "accumulation": 1,  # batches per update
        }
    )
    config.train = ConfigDict(
        {
            "steps": steps,
            "min_seconds_of": "",  # train on, at the final rate, for at least as long as this stage took
            "log_every": 10,
            "eval_every": 45,
            "eval_batches": 8,
            "checkpoint_every": 90,
            "keep_last": 2,  # checkpoints, in addition to the best one
            "best_metric": "validation_loss",
        }
    )
    # Speculative decoding with the draft during training: every so many steps; 0 is never.
    config.speculative_eval = ConfigDict(
        {"every": 0, "prompts": 8, "gamma": 4, "temperature": 1.0, "max_new_tokens": 48}
    )
    return config


def training_to_plateau(steps: int = 420, learning_rate: float = 4e-3, *, seed: int = 0) -> ConfigDict:
    """Plain training whose last quarter runs at a low rate: there the validation loss falls by less than 1%."""
    config = training(steps, learning_rate, seed=seed)
    config.optimizer.update({"final_fraction": 0.01, "hold_fraction": 0.25})
    config.train.update({"eval_every": 60, "checkpoint_every": 120})
    return config


def distillation(target: Any, init: Any, *, steps: int = 60, learning_rate: float = 3e-3, seed: int = 0) -> ConfigDict:
    """On-policy distillation (DistillSpec, arXiv 2310.08461): forward KL from the target on text of the draft."""
    config = training(steps, learning_rate, seed=seed)
    config.tokenizer.path = config.target = target
    config.model.init = init
    config.data.update({"batch_size": 24, "fixed": 0.0, "draft": 1.0})
    config.loss.divergence = "forward_kl"
    config.train.update({"eval_every": 30, "eval_batches": 4, "checkpoint_every": 30})
    config.train.best_metric = "validation_acceptance"
    return config


def kangaroo_adapter(exit_layer: Any, kind: str = "attention", own_head: bool = False) -> ConfigDict:
    """An adapter on the target's first `exit_layer` layers, as `adapter` of a training stage (arXiv 2404.18911).

    Args:
      kind: "attention" (the paper's), or "layer", "mlp" or "none", with which the paper compares it.
      own_head: whether it trains a head of its own, in place of the target's frozen one.
    """
    return ConfigDict({"exit_layer": exit_layer, "kind": kind, "own_head": own_head})


def medusa_heads(heads: int = 4, own_head: bool = True) -> ConfigDict:
    """Medusa-1's heads on the target's last hidden state, as `medusa` of a training stage (arXiv 2401.10774)."""
    return ConfigDict({"heads": heads, "own_head": own_head})


def evaluation(target: Any, drafters: dict, *, seed: int = 1) -> ConfigDict:
    """Plain decoding and every drafter on the same prompts: exactness, acceptance, speed, quality.

    Args:
      target: directory with config.json, *.safetensors and a tokenizer.
      drafters: sections by name. `kind` and that kind's options (specjax/decoding/drafters/), and `rules`: the gammas
        to run under each rule. `coupled` runs at temperatures above 0 only, where it must repeat plain decoding token
        for token. A drafter may have a `target` of its own; gamma 0 is then plain decoding with that target.
    """
    config = ConfigDict({"binary": "evaluate", "seed": seed, "mesh": mesh(), "task": task()})
    config.target = target
    config.param_dtype = "float32"  # in which parameters are stored: float32, bfloat16 or float16
    config.compute_dtype = "auto"  # of activations: float32 on CPU, bfloat16 on accelerators
    # Prompts of the task's validation split: how many (0: all), their tokens (for tasks with prompts of their own, the
    # most allowed), and whether the tokenizer's chat template wraps each as a user's turn.
    config.selection = ConfigDict({"count": 16, "length_min": 16, "length_max": 32, "chat": False})
    config.max_new_tokens = 96
    config.batch_sizes = (1,)
    config.temperatures = (0.0, 1.0)
    config.top_k = 0  # 0 is off
    config.top_p = 1.0  # 1 is off
    config.drafters = ConfigDict(drafters)
    config.leniences = ()  # in (0, 1]; every lossy rule under `rules` is run at each of these; smaller accepts more
    config.compare = ()  # pairs of drafters whose block efficiencies are compared prompt by prompt
    config.samples = 3  # texts in the report
    config.measure_parts = True  # time draft step, target step, verification and rule separately, to predict the speed
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """Shrinks each training and evaluation stage to seconds, in place: a tiny model, few steps, few prompts."""
    for section in [config[name] for name in config.stages] if "stages" in config else [config]:
        if section.binary == "distill":
            _shrink_training(section)
        elif section.binary == "evaluate":
            _shrink_evaluation(section)
    return config


def _shrink_training(section: ConfigDict) -> None:
    section.task.size = 60_000
    section.tokenizer.vocab_size = 300
    section.model.update(TINY_MODEL)
    section.data.update({"batch_size": 2, "sequence_length": 32, "prompt_length_min": 4, "prompt_length_max": 8})
    section.data.generation.max_new_tokens = 16
    section.loss.chunk = 16
    section.train.update({"steps": 4, "log_every": 2, "eval_every": 2, "eval_batches": 1, "checkpoint_every": 2})
    section.optimizer.warmup_steps = 1
    section.speculative_eval.update({"prompts": 2, "gamma": 2, "max_new_tokens": 8})


def _shrink_evaluation(section: ConfigDict) -> None:
    section.task.size = 60_000
    section.selection.update({"count": 3, "length_min": 4, "length_max": 8})
    section.max_new_tokens = 12
    section.measure_parts = False
