"""Which text and which divergence: DistillSpec's arms on a real model, judged on tens of thousands of tokens.

    python -m specjax.main --config=configs/distillspec/real.py --workdir=runs/real --config.target=DIR \\
        --config.prompts=FILE --config.held_out=FILE

Both files hold prompts; those of `prompts` need answers that the target did not write, such as GSM8K's train.jsonl and
test.jsonl (layouts: README.md of this folder). The sizes in `drafts` are those of SmolLM2-135M-Instruct; for another
target change them.

Stages: `text`, the target's answers; `cut_NAME`, two drafts cut from the target, with 1/6 and 1/20 of its parameters
without the embedding; `start_NAME`, these trained on the answers of the file, since what a cut draft writes is no text
yet; for each seed, divergence, arm and draft one of training, `NAME_ARM_DIVERGENCE_SEED`, from there on; `greedy`
and `sampled`, the target's answers to the held-out prompts; `acceptance`, where every draft is scored on these without
decoding (configs/draft_design/acceptance.py). The arms: the answers of the file (`ground_truth`), the target's
(`target`), the draft's own (`draft`), half of the file's and half of its own (`mixed`), and text on which both decode
together, with refused drafts replayed (`assisted`). All arms train for equal steps; their `train_seconds`, generation
included, are in results.json.

The same command resumes a stopped run. `:screen` runs one seed and forward KL alone, `:small` three arms of the smaller
draft with fewer steps, `:smoke` takes seconds with a small target. Hardware: one accelerator with 16 GiB, or two CPU
cores for `:small`. Time: 75 minutes for `:small` on two cores with AMX, which were not idle; the whole has not been
run. Expect `:small` to find the target's text better than the file's, by 5.5% at temperature 0 and by 2.6% at
temperature 1, and the draft's own text worse, by 12 and 14% (README.md of this folder).
"""

import itertools

from ml_collections import ConfigDict

from configs import common

ARMS = {
    "ground_truth": {"fixed": 1.0},
    "target": {"target": 1.0},
    "draft": {"draft": 1.0},
    "mixed": {"fixed": 0.5, "draft": 0.5},
    "assisted": {"assisted": 1.0},
}
SMALL_ARMS = ("ground_truth", "target", "draft")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "total_variation", "lk_hybrid")
SEEDS = (0, 1, 2)
# What is left of SmolLM2-135M (30 layers): 5 whole layers are 1/6 of 106 million parameters, and these 2 are 1/20.
DRAFTS = {"sixth": {"layers": 5}, "twentieth": {"layers": 2, "mlp_width": 1024}}
WHOLE = {"layers": 0, "width": 0, "heads": 0, "kv_heads": 0, "mlp_width": 0}  # 0: as in the target


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("distillspec/real", variant, ("screen", "small", "smoke"))
    config = ConfigDict({"seed": 0, "mesh": common.mesh()})
    config.target = "required:target:the directory of the checkpoint to draft for"
    config.prompts = "required:prompts:a file of prompts and their answers, to train on"
    config.held_out = "required:held_out:a file of other prompts, to measure on"
    config.chat = True  # whether the tokenizer's chat template wraps prompts and answers
    config.size = 0  # prompts to train on; 0 takes all. Each is seen steps * batch_size / size times
    config.update({"start_steps": 480, "steps": 480, "batch_size": 32, "max_new_tokens": 192})
    config.chunk = 512  # predictions whose logits are in memory at one time; more is faster on a GPU
    config.anchors = 0  # positions of each text to learn from in a step, drawn at random; 0 for all
    config.writing_batch_size = 32  # rows in which the target's answers are written
    config.answers = 7000  # of the target, for the arm `target`
    config.texts = 512  # held-out texts at each temperature, of about 100 tokens
    config.drafts = ConfigDict({name: dict(WHOLE, **shape) for name, shape in DRAFTS.items()})
    config.update({"prompt_length_max": 256, "sequence_length": 384})
    if variant == "small":
        config.update({"start_steps": 144, "steps": 48, "batch_size": 8, "max_new_tokens": 96})
        config.update({"answers": 400, "texts": 224, "prompt_length_max": 160, "sequence_length": 256})
        config.anchors = 64
        del config.drafts["sixth"]
    if variant == "smoke":
        config.update({"steps": 2, "batch_size": 2, "size": 24, "answers": 4, "max_new_tokens": 8, "texts": 4})
        config.update({"start_steps": 2, "writing_batch_size": 2})
        config.drafts = ConfigDict({"sixth": dict(WHOLE, layers=1, mlp_width=8)})
    task = common.task("prompt_completion", config.get_ref("prompts"), size=config.get_ref("size"))
    held_out = common.task("prompt_completion", config.get_ref("held_out"))
    seeds = SEEDS[:1] if variant in ("screen", "smoke") else SEEDS
    divergences = DIVERGENCES[:1] if variant else DIVERGENCES
    arms = SMALL_ARMS if variant == "small" else tuple(ARMS)

    stages = {"text": _text(config, task, 1.0, config.get_ref("answers"))}
    for name, shape in config.drafts.items():
        stages[f"cut_{name}"] = _cut(config, task, shape)
        stages[f"start_{name}"] = _training(config, task, f"stage:cut_{name}", ARMS["ground_truth"], "start_steps")
    for seed, divergence, arm, name in itertools.product(seeds, divergences, arms, config.drafts):
        section = _training(config, task, f"stage:start_{name}", ARMS[arm], "steps")
        section.seed, section.loss.divergence = seed, divergence
        stages[f"{name}_{arm}_{divergence}_{seed}"] = section
    drafts = tuple(f"stage:{name}" for name in stages if name != "text")
    stages["greedy"] = _text(config, held_out, 0.0, config.get_ref("texts"))
    stages["sampled"] = _text(config, held_out, 1.0, config.get_ref("texts"))
    stages["acceptance"] = common.acceptance(config.get_ref("target"), drafts)
    config.stages = tuple(stages)
    config.update(stages)
    return config


def _training(config: ConfigDict, task: ConfigDict, init: str, shares: dict, steps: str) -> ConfigDict:
    section = common.distillation(config.get_ref("target"), init, learning_rate=1e-3)
    section.mesh, section.task = common.reference(config.mesh), common.reference(task)
    section.data.update({"fixed": 0.0, "draft": 0.0, **shares, "target_path": "stage:text", **_lengths(config)})
    section.data.generation.max_new_tokens = config.get_ref("max_new_tokens")
    section.loss.chunk, section.model.compute_dtype = config.get_ref("chunk"), "fastest"
    section.train.update({"steps": config.get_ref(steps), "eval_every": 120, "checkpoint_every": 120})
    section.loss.anchors = config.get_ref("anchors")
    section.optimizer.warmup_steps = min(20, config.steps - 1)
    return section


def _lengths(config: ConfigDict, rows: str = "batch_size") -> dict:
    shared = {"batch_size": config.get_ref(rows), "chat": config.get_ref("chat"), "prompt_length_min": 8}
    return {**shared, **{name: config.get_ref(name) for name in ("sequence_length", "prompt_length_max")}}


def _text(config: ConfigDict, task: ConfigDict, temperature: float, count: int) -> ConfigDict:
    section = common.target_text(config.get_ref("target"), common.reference(task), temperature=temperature)
    section.update({"count": count, "mesh": common.reference(config.mesh)})
    section.data.update(_lengths(config, "writing_batch_size"))
    section.data.generation.max_new_tokens = config.get_ref("max_new_tokens")
    return section


def _cut(config: ConfigDict, task: ConfigDict, shape: ConfigDict) -> ConfigDict:
    section = ConfigDict({"binary": "design", "action": "prune", "seed": 0, "vocabulary": "", "param_dtype": "float32"})
    section.update({"source": config.get_ref("target"), "shape": common.reference(shape), "compute_dtype": "auto"})
    section.calibration = ConfigDict({"text": "stage:text", "batches": 2, "batch_size": 2})
    section.calibration.sequence_length = config.get_ref("sequence_length")
    section.task = common.reference(task)
    return section
