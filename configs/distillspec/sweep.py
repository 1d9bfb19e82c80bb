"""DistillSpec's recipe sweep: whose text x which divergence x decoding temperature x seeds, with controls.

    python -m specjax.main --config=configs/distillspec/sweep.py --workdir=runs/sweep
    python -m specjax.main --config=configs/distillspec/sweep.py:encoder_decoder --workdir=runs/sweep_encoder_decoder

Variants are words joined by "-", such as `sweep.py:encoder_decoder-5`: `encoder_decoder` (a pair like T5 on
`stdlib_docstrings`, instead of a decoder-only pair on `stdlib_code`), a number of seeds (default 3; a workdir with
fewer seeds continues with more), and `smoke`.

Stages: `target`. Then for each seed: `supervised`, a draft trained plainly to its plateau, from which all others
continue; `target_text`, text that the target writes once, by speculative decoding with that draft; a draft for each of
the 16 cells {fixed, draft, target, mixed} x {forward_kl, reverse_kl, jsd, total_variation} of the paper's tables; the
newer losses on the draft's text; SeqKD; controls; and `evaluation_*` at temperatures 0 and 1 once the drafts of a row
are finished. Mixed text is half the draft's and half the target's. The controls `plain_steps` and `plain_clock` are
trained plainly for as many steps, and for as long, as `draft_forward_kl`; `target_forward_kl_clock` learns on the
target's text for as long. Last, for the decoder-only pair: `little_*`, trained on a few pages of the corpus, or on the
draft's text after prompts from these pages; and transfer, where some drafts decode two tasks that neither they nor the
target were trained on, and draft for a `large_target` that none of them was distilled from.

Each training is a stage, so an interrupted sweep repeats no finished one and resumes the current one at its last
checkpoint. `python -m configs.records.condense configs/records/sweep.json WORKDIR` makes a small record of all finished
stages; `make tables` then writes the tables and the heat map of configs/distillspec/README.md.

Hardware: one CPU core. Time and outcome: configs/distillspec/README.md.
"""

from ml_collections import ConfigDict

from configs import common

SEEDS = 3
GAMMA = 4
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "total_variation")
# Whose text: shares of the corpus, of the draft's and of the target's text.
TEXTS = {
    "fixed": (1.0, 0.0, 0.0),
    "draft": (0.0, 1.0, 0.0),
    "target": (0.0, 0.0, 1.0),
    "mixed": (0.0, 0.5, 0.5),
}
NEWER = ("negative_log_acceptance", "lk_hybrid")
# Bytes of text: some forty rows, each of which training repeats many times.
LITTLE = 16_000
# Tasks on which no draft was trained: code in another form, and text that is not code.
OTHER_TASKS = {"docstrings": ("stdlib_docstrings", 0), "arithmetic": ("arithmetic", 8)}
TRANSFERRED = ("supervised", "plain_steps", "fixed_forward_kl", "draft_forward_kl", "target_forward_kl")


def get_config(variant: str = "") -> ConfigDict:
    words = set(filter(None, variant.split("-")))
    numbers = [word for word in words if word.isdigit() and int(word)]
    unknown = words - {"encoder_decoder", "smoke", *numbers[:1]}
    if unknown:
        raise ValueError(f"variants are encoder_decoder, smoke and a number of seeds; not {', '.join(sorted(unknown))}")
    smoke, encoder_decoder = "smoke" in words, "encoder_decoder" in words
    seeds = int(numbers[0]) if numbers else 1 if smoke else SEEDS
    base = _base(smoke, encoder_decoder)
    config = ConfigDict({"seed": base.seed, "target": base.target})
    stages = ["target"]
    for seed in range(seeds):
        for name, section in _seed(base, seed, smoke):
            config[name] = section
            stages.append(name)
    for name, section in () if encoder_decoder else (*_little_data(base, seeds, smoke), *_transfer(base, seeds, smoke)):
        config[name] = section
        stages.append(name)
    config.stages = tuple(stages)
    config.report = "configs.distillspec.recipe_sweep"  # writes report.html
    return config


def _seed(base: ConfigDict, seed: int, smoke: bool):
    """Yields the stages of one seed in order, as (name, section).

    A smoke run has one divergence for two texts, and one control.
    """
    yield f"supervised_{seed}", _seeded(base.supervised, seed)
    text = _text(base, seed)
    yield f"target_text_{seed}", text
    for source in list(TEXTS)[:2] if smoke else TEXTS:
        names = [f"supervised_{seed}"] if source == "fixed" else []
        for divergence in DIVERGENCES[:1] if smoke else DIVERGENCES:
            names.append(f"{source}_{divergence}_{seed}")
            yield names[-1], _distilled(base, seed, source, divergence)
        yield f"evaluation_{source}_{seed}", _evaluation(base, seed, names)
    names = [f"seqkd_{seed}"]
    yield names[-1], _by_name(base, seed, "seqkd")
    for divergence in NEWER[:1] if smoke else NEWER:
        names.append(f"draft_{divergence}_{seed}")
        yield names[-1], _distilled(base, seed, "draft", divergence)
    clock = f"workdir:draft_forward_kl_{seed}"
    controls = {"plain_clock": _plain(base, seed, clock)}
    if not smoke:
        controls = {"plain_steps": _plain(base, seed, ""), **controls}
        controls["target_forward_kl_clock"] = _distilled(base, seed, "target", "forward_kl", clock)
    for name, section in controls.items():
        names.append(f"{name}_{seed}")
        yield names[-1], section
    yield f"evaluation_controls_{seed}", _evaluation(base, seed, names)


def _little_data(base: ConfigDict, seeds: int, smoke: bool):
    """The same from LITTLE bytes: is the corpus as good as any text only because there is so much of it?"""
    for seed in range(seeds):
        names = []
        for source in ("fixed", "draft")[: 1 if smoke else 2]:
            section = _distilled(base, seed, source, "forward_kl")
            section.task.size = LITTLE
            names.append(f"little_{source}_forward_kl_{seed}")
            yield names[-1], section
        yield f"evaluation_little_{seed}", _evaluation(base, seed, names)


def _transfer(base: ConfigDict, seeds: int, smoke: bool):
    """Drafts on tasks that they never saw, and with a larger target that they never saw."""
    large = base.target.copy_and_resolve_references()
    large.tokenizer.path = "stage:target"
    large.model.update({"width": 2 * large.model.width, "heads": 2 * large.model.heads})
    large.model.update({"kv_heads": 2 * large.model.kv_heads, "mlp_width": 2 * large.model.mlp_width})
    yield "large_target", large
    for seed in range(seeds):
        drafts = ("supervised", "fixed_forward_kl") if smoke else TRANSFERRED
        names = [f"{name}_{seed}" for name in drafts]
        for task, (name, size) in list(OTHER_TASKS.items())[-1 if smoke else 0 :]:
            section = _evaluation(base, seed, names)
            section.task.update({"name": name, "size": size})
            section.selection.length_max = 512  # these prompts have a length of their own; this is the most allowed
            yield f"transfer_{task}_{seed}", section
        section = _evaluation(base, seed, names)
        section.target = "stage:large_target"
        yield f"transfer_large_target_{seed}", section


def _seeded(section: ConfigDict, seed: int) -> ConfigDict:
    section = section.copy_and_resolve_references()
    section.seed = seed
    return section


def _distilled(base: ConfigDict, seed: int, source: str, divergence: str, clock: str = "") -> ConfigDict:
    section = _seeded(base.distilled, seed)
    section.model.init = f"stage:supervised_{seed}"
    section.data.update(dict(zip(("fixed", "draft", "target"), TEXTS[source], strict=True)))
    section.data.target_path = f"stage:target_text_{seed}" if section.data.target else ""
    section.loss.divergence = divergence
    section.train.min_seconds_of = clock
    return section


def _by_name(base: ConfigDict, seed: int, recipe: str) -> ConfigDict:
    """A recipe of specjax/distillation/recipes.py, which sets text and divergence."""
    section = _distilled(base, seed, "target", "")
    section.data.target = 0.0
    section.recipe = recipe
    return section


def _plain(base: ConfigDict, seed: int, clock: str) -> ConfigDict:
    """Plain training on the corpus; the target only measures the acceptance on held-out text."""
    return _distilled(base, seed, "fixed", "cross_entropy", clock)


def _text(base: ConfigDict, seed: int) -> ConfigDict:
    section, data = common.target_text("stage:target", base.target.task), base.distilled.data
    section.update({"seed": seed, "mesh": base.mesh, "measure_batches": 3})
    section.drafter.update({"path": f"stage:supervised_{seed}", "gamma": GAMMA, "rule": "coupled"})
    for key in section.data:
        section.data[key] = data[key]
    section.count = base.distilled.train.steps * data.batch_size  # as many prompts as training uses
    return section.copy_and_resolve_references()


def _evaluation(base: ConfigDict, seed: int, names: list[str]) -> ConfigDict:
    section = base.evaluation.copy_and_resolve_references()
    section.seed = seed + 1
    section.drafters = ConfigDict(
        {name: {"kind": "model", "path": f"stage:{name}", "rules": {"lossless": (GAMMA,)}} for name in names}
    )
    return section


def _base(smoke: bool, encoder_decoder: bool) -> ConfigDict:
    """The sections that the sweep varies. Small enough that a draft learns in some twenty seconds on one core."""
    base = ConfigDict({"seed": 0, "mesh": common.mesh()})
    base.target = common.training(steps=240, learning_rate=3e-3)
    base.target.tokenizer.path = ""  # train one
    base.target.model.update({"layers": 4, "width": 256, "heads": 4, "kv_heads": 4, "mlp_width": 704})
    base.target.train.update({"eval_every": 80, "checkpoint_every": 80})
    base.supervised = common.training_to_plateau(steps=400)
    base.supervised.train.update({"eval_every": 50, "checkpoint_every": 100})
    base.distilled = common.distillation("stage:target", "stage:supervised", steps=48)
    base.distilled.train.update({"eval_every": 24, "checkpoint_every": 24, "keep_last": 1, "eval_batches": 2})
    base.distilled.optimizer.warmup_steps = 5
    for section in (base.target, base.supervised, base.distilled):
        section.task.size = 2_000_000
        section.data.update({"sequence_length": 96, "prompt_length_min": 8, "prompt_length_max": 32})
        section.data.generation.max_new_tokens = 64
        section.data.batch_size = 8  # few rows: on a CPU the number of steps counts
    for section in (base.supervised, base.distilled):
        section.model.update({"layers": 1, "width": 128, "heads": 2, "kv_heads": 2, "mlp_width": 352})
    base.evaluation = common.evaluation("stage:target", {})
    base.evaluation.task.size = 2_000_000
    base.evaluation.selection.count = 24
    base.evaluation.max_new_tokens = 64
    base.evaluation.samples = 1
    base.evaluation.measure_parts = False
    if smoke:
        for name in ("target", "supervised", "distilled", "evaluation"):
            common.smoke(base[name])
        base.target.model.layers = 2
    if encoder_decoder:
        _encoder_decoder(base, smoke)
    return base


def _encoder_decoder(base: ConfigDict, smoke: bool) -> None:
    for section in (base.target, base.supervised, base.distilled):
        section.task.update({"name": "stdlib_docstrings", "size": 60 if smoke else 0})
        section.model.update({"encoder_layers": -(-section.model.layers // 2), "kv_heads": section.model.heads})
        section.data.update({"prompt_length_min": 1, "sequence_length": 64 if smoke else 96})
        section.data.prompt_length_max = section.data.sequence_length - 1
        section.data.generation.max_new_tokens = 8 if smoke else 24
    base.evaluation.task.update({"name": "stdlib_docstrings", "size": 60 if smoke else 0})
    base.evaluation.selection.update({"length_min": 1, "length_max": 48 if smoke else 64})
    base.evaluation.max_new_tokens = 8 if smoke else 24
