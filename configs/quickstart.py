"""From nothing to a draft that pays: train a target on real text, align a draft with it on-policy, prove and measure.

    make quickstart
    python -m specjax.main --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: 2 CPU cores. Wall-clock time, what to expect and its spread over three seeds: the tables in README.md, which
are written from the records beside this file. `configs/quickstart.py:smoke` runs every stage in under a minute.

Stages: `target` (and its tokenizer), `supervised` (the draft, plainly, to its plateau), `distilled` (on its own text,
by the target's probabilities), `control` (plainly further, for at least as long by the clock as `distilled` took),
`evaluation`.
"""

from ml_collections import ConfigDict

SEED = 0


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/quickstart.py has one variant, smoke; not {variant!r}.")
    config = ConfigDict()
    # Stages run in this order, each in its own folder of the workdir; a finished one is skipped.
    config.stages = ("target", "supervised", "distilled", "control", "evaluation")
    config.seed = SEED
    config.target = _target()
    config.supervised = _supervised()
    config.distilled = _distilled()
    config.control = _control()
    config.evaluation = _evaluation()
    if variant == "smoke":
        _shrink(config)
    return config


def _mesh() -> ConfigDict:
    # Devices along each axis; 1, 1, 1 is one device.
    return ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})


def _task() -> ConfigDict:
    # The Python standard library's own sources; size: bytes of training text, 0 takes all.
    return ConfigDict({"name": "stdlib_code", "path": "", "seed": 0, "size": 0})


def _training(steps: int, learning_rate: float) -> ConfigDict:
    """Every key of a training stage, set for plain training of the draft."""
    config = ConfigDict()
    config.binary = "distill"
    config.seed = SEED
    config.mesh = _mesh()
    config.task = _task()
    # path: an export whose tokenizer to take; "" trains a byte-level BPE of vocab_size on the task's text.
    config.tokenizer = ConfigDict({"path": "stage:target", "vocab_size": 1024})
    # init: "random", or an export to go on from (then its own config.json gives the shape); encoder_layers: above 0 it
    # is an encoder-decoder in the manner of T5, and rope_theta and max_positions are not read.
    config.model = ConfigDict(
        {
            "init": "random",
            "encoder_layers": 0,
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
            "replicate": False,  # True: every device of the tensor axis holds all of it (a small draft)
        }
    )
    # The model to learn from; "" trains on the text alone.
    config.target = ""
    # A recipe by name (distillation/recipes.py), in place of the fractions (then all 0) and the divergence (then "").
    config.recipe = ""
    config.data = ConfigDict(
        {
            "batch_size": 16,
            "sequence_length": 128,
            # Tokens of a row that a model is given before it continues the row itself.
            "prompt_length_min": 8,
            "prompt_length_max": 32,
            # Share of steps on the corpus, on text the draft writes (on-policy), on text the target writes.
            "fixed": 1.0,
            "draft": 0.0,
            "target": 0.0,
            # A folder of text that the target wrote before, by the binary target_text; "" has it write in training.
            "target_path": "",
            "generation": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 96},
        }
    )
    # chunk: predictions of one device whose logits exist at one time; temperature: of the loss, not of generation.
    config.loss = ConfigDict({"divergence": "cross_entropy", "beta": 0.5, "temperature": 1.0, "chunk": 512})
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
            "accumulation": 1,
        }
    )
    config.train = ConfigDict(
        {
            "steps": steps,
            "min_seconds_of": "",  # train on, at the final rate, for at least this stage's seconds
            "log_every": 10,
            "eval_every": 45,
            "eval_batches": 8,
            "checkpoint_every": 90,
            "keep_last": 2,
            "best_metric": "validation_loss",
        }
    )
    # Speculative decoding of the draft in training: every so many steps, 0 is never.
    config.speculative_eval = ConfigDict(
        {"every": 0, "prompts": 8, "gamma": 4, "temperature": 1.0, "max_new_tokens": 48}
    )
    return config


def _supervised() -> ConfigDict:
    config = _training(steps=420, learning_rate=4e-3)
    # At the plateau the validation loss falls by less than 1% over the last quarter of the steps.
    config.optimizer.update({"final_fraction": 0.01, "hold_fraction": 0.25})
    config.train.update({"eval_every": 60, "checkpoint_every": 120})
    return config


def _target() -> ConfigDict:
    config = _training(steps=290, learning_rate=1.5e-3)
    config.tokenizer.path = ""
    # Wide enough that verifying five tokens costs little more than one step on a CPU, and no deeper than time allows.
    # At width 512 or 768 they cost a tenth more than at this one.
    config.model.update({"layers": 2, "width": 640, "heads": 10, "kv_heads": 5, "mlp_width": 1760})
    config.data.batch_size = 8
    config.train.update({"eval_every": 145, "eval_batches": 4, "checkpoint_every": 145})
    return config


def _distilled() -> ConfigDict:
    config = _training(steps=60, learning_rate=3e-3)
    config.model.init = "stage:supervised"
    config.target = "stage:target"
    config.data.update({"batch_size": 24, "fixed": 0.0, "draft": 1.0})
    config.loss.divergence = "forward_kl"
    config.train.update({"eval_every": 30, "eval_batches": 4, "checkpoint_every": 30})
    config.train.best_metric = "validation_acceptance"
    config.speculative_eval.every = 30
    return config


def _control() -> ConfigDict:
    config = _training(steps=120, learning_rate=3e-3)
    config.model.init = "stage:supervised"
    config.train.min_seconds_of = "workdir:distilled"
    return config


def _evaluation() -> ConfigDict:
    config = ConfigDict()
    config.binary = "evaluate"
    config.seed = SEED + 1
    config.mesh = _mesh()
    config.task = _task()
    # Directories with config.json, model.safetensors and tokenizer.json.
    config.target = "stage:target"
    config.param_dtype = "float32"
    config.compute_dtype = "auto"
    # Of the task's validation split: how many prompts (0: all), their tokens (of prompt tasks, the most allowed), and
    # whether each is wrapped as a user's turn by the tokenizer's chat template.
    config.selection = ConfigDict({"count": 16, "length_min": 16, "length_max": 32, "chat": False})
    config.max_new_tokens = 96
    config.batch_sizes = (1,)
    config.temperatures = (0.0, 1.0)
    config.top_k = 0
    config.top_p = 1.0
    # Each drafter: kind, what its kind needs, and the gammas at which the lossless and the coupled rule are run
    # (coupled at temperatures above 0 only; there it must repeat plain decoding token for token). A `target` beside
    # them is another model than the config's to draft for, and gamma 0 its plain decoding, all in one interleaved run.
    config.drafters = ConfigDict(
        {
            "control": _model_drafter("control", lossless=(4,)),
            "distilled": _model_drafter("distilled", lossless=(2, 3, 4), coupled=(3,)),
            "ngram": {"kind": "ngram", "shortest": 2, "longest": 4, "lossless": (3,), "coupled": (3,)},
            "early_exit": {"kind": "early_exit", "exit_layer": 1, "lossless": (2,), "coupled": ()},
        }
    )
    # Leniences of lossy rules (rules.RULES); a drafter's section that names one would be run under it at each of these.
    config.leniences = ()
    # Pairs whose block efficiencies are compared prompt by prompt, at equal settings.
    config.compare = (("distilled", "control"),)
    config.samples = 3  # texts shown in the report
    config.measure_parts = True  # draft step, target step, verification, rule: timed apart, for the prediction
    return config


def _model_drafter(stage: str, lossless: tuple[int, ...], coupled: tuple[int, ...] = ()) -> dict:
    return {"kind": "model", "path": f"stage:{stage}", "lossless": lossless, "coupled": coupled}


def _shrink(config: ConfigDict) -> None:
    """The same stages in seconds: tiny models, a few steps, two prompts."""
    for stage in ("target", "supervised", "distilled", "control"):
        section = config[stage]
        section.task.size = 60_000
        section.tokenizer.vocab_size = 300
        section.model.update({"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "head_size": 16, "mlp_width": 64})
        section.data.update({"batch_size": 2, "sequence_length": 32, "prompt_length_min": 4, "prompt_length_max": 8})
        section.data.generation.max_new_tokens = 16
        section.loss.chunk = 16
        section.train.update({"steps": 4, "log_every": 2, "eval_every": 2, "eval_batches": 1, "checkpoint_every": 2})
        section.optimizer.warmup_steps = 1
        section.speculative_eval.update({"prompts": 2, "gamma": 2, "max_new_tokens": 8})
    config.target.model.layers = 2
    config.distilled.speculative_eval.every = 2
    evaluation = config.evaluation
    evaluation.task.size = 60_000
    evaluation.selection.update({"count": 3, "length_min": 4, "length_max": 8})
    evaluation.max_new_tokens = 12
    evaluation.drafters.distilled.lossless = (2,)
    evaluation.measure_parts = False
