"""A grid of drafts with equal parameters: depth, recipe, task, seed, gamma, temperature, batch; 384 configurations.

    python -m specjax.main --config=configs/draft_design/study.py --workdir=runs/study

For each task one target. For each depth and seed, one draft of two million parameters trained plainly
(`supervised_TASK_LAYERS_SEED`) and one distilled from there (`distilled_...`): 48 trainings. For each task one
evaluation of every draft with separately timed parts, and `checked_TASK`: for the drafts of two seeds, the model's
advice against the fastest configuration, three times on other prompts. The stage `study` combines everything:
configurations.csv, report.html, and tables of predicted against measured speed, of depth at equal parameters, of
perplexity against acceptance, and of the advice. The same command resumes at the unfinished stage; a changed grid is
refused in an old workdir.

Hardware: 2 CPU cores. Time: an hour and a half of training, then 50 minutes of timing on an otherwise idle machine.
Expect at least nine of ten throughputs at batch size 1 predicted within 10%: the tables in
configs/draft_design/README.md. `configs/draft_design/study.py:smoke` runs one task, two depths and one seed.
"""

from ml_collections import ConfigDict

from configs import common

TASKS = {"code": {"name": "stdlib_code", "size": 0}, "arithmetic": {"name": "arithmetic", "size": 20_000}}
SEEDS = (0, 1, 2)
ADVISED = (0, 1)  # with the drafts of these seeds the advice is checked: 16 settings
# Two million parameters each, by draft_design.shapes.at_parameters: layers -> width, heads, key heads, MLP width.
SHAPES = {
    1: (384, 12, 6, 1008),
    2: (256, 8, 4, 872),
    4: (192, 6, 3, 592),
    8: (128, 4, 2, 480),
}
HEAD_SIZE = 32
# Wide enough that verifying several tokens costs little more than one step on a CPU.
TARGET = {"layers": 4, "width": 640, "heads": 10, "kv_heads": 5, "mlp_width": 1792}
# How a draft is evaluated, by its recipe.
GAMMAS = {"supervised": (4,), "distilled": (2, 4, 6)}


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("draft_design/study", variant)
    base = _base(variant)
    config = ConfigDict()
    config.seed = 0
    stages, timed, trained = [], [], []
    tasks = tuple(TASKS) if not variant else ("code",)
    for task in tasks:
        target = f"target_{task}"
        config[target] = _on_task(base.target, task, variant)
        stages.append(target)
        drafters: dict[str, dict] = {}
        for seed in SEEDS if not variant else SEEDS[:1]:
            for layers in SHAPES if not variant else (1, 2):
                for recipe, gammas in GAMMAS.items():
                    stage = f"{recipe}_{task}_{layers}_{seed}"
                    config[stage] = _draft(base, recipe, task, layers, seed, variant)
                    drafters[stage] = {"kind": "model", "path": f"stage:{stage}", "rules": {"lossless": gammas}}
                    stages.append(stage)
                    trained.append(f"workdir:{stage}")
        config[f"evaluation_{task}"] = _evaluation(base, task, drafters, variant)
        config[f"checked_{task}"] = _checked(task, tuple(drafters), variant)
        timed += [f"evaluation_{task}", f"checked_{task}"]
    config.study = _study(tuple(trained), tasks)
    config.study.gamma = 4 if not variant else 2
    config.stages = (*stages, *timed, "study")
    return config


def _base(variant: str) -> ConfigDict:
    """A target, a plain and a distilled draft, and an evaluation, before they get their task and shape."""
    base = ConfigDict()
    base.target = common.training(steps=290, learning_rate=1.5e-3)
    base.target.tokenizer.path = ""  # train one
    base.target.model.update(TARGET)
    base.target.data.batch_size = 8
    base.target.train.update({"eval_every": 145, "eval_batches": 4, "checkpoint_every": 145})
    base.supervised = common.training_to_plateau()
    base.distilled = common.distillation("stage:target", "stage:supervised")
    base.evaluation = common.evaluation("stage:target", {})
    if variant:
        for section in base.values():
            common.smoke(section)
        base.target.model.layers = 2
    return base


def _on_task(section: ConfigDict, task: str, variant: str) -> ConfigDict:
    section = section.copy_and_resolve_references()
    if variant:
        return section
    section.task.update(TASKS[task])
    if task == "arithmetic":
        # Questions have up to 75 tokens; nine of ten answers then fit the row.
        if section.binary == "evaluate":
            section.selection.length_max = 80
        else:
            section.data.update({"sequence_length": 144, "prompt_length_max": 80})
            section.data.generation.max_new_tokens = 64
    return section


def _draft(base: ConfigDict, recipe: str, task: str, layers: int, seed: int, variant: str) -> ConfigDict:
    section = _on_task(base[recipe], task, variant)
    section.seed = seed
    section.tokenizer.path = f"stage:target_{task}"
    if recipe == "distilled":
        section.target = f"stage:target_{task}"
        section.model.init = f"stage:supervised_{task}_{layers}_{seed}"
    section.model.layers = layers
    if not variant:
        # None of 48 trainings can be long; shapes are compared at equal steps.
        steps = {"supervised": 210, "distilled": 30}[recipe]
        section.train.update({"steps": steps, "eval_every": steps // 2, "checkpoint_every": steps // 2})
        section.optimizer.warmup_steps = steps // 6
        section.data.batch_size = 16
        width, heads, kv_heads, mlp_width = SHAPES[layers]
        section.model.update({"width": width, "heads": heads, "kv_heads": kv_heads, "mlp_width": mlp_width})
        section.model.head_size = HEAD_SIZE
    return section


def _evaluation(base: ConfigDict, task: str, drafters: dict, variant: str) -> ConfigDict:
    section = _on_task(base.evaluation, task, variant)
    section.target = f"stage:target_{task}"
    section.drafters = ConfigDict(drafters)
    section.batch_sizes = (1, 4) if not variant else (1,)
    if not variant:
        # Few texts suffice to time a configuration, and there are 384 runs.
        section.selection.count = 8
        section.max_new_tokens = 64
    if variant:
        section.temperatures = (1.0,)
        for drafter in section.drafters.values():
            drafter.rules.lossless = (2,)
    section.measure_parts = True
    return section


def _checked(task: str, drafters: tuple, variant: str) -> ConfigDict:
    section = ConfigDict()
    section.binary = "configs.draft_design.contest"
    section.seed = 0
    section.evaluation = f"workdir:evaluation_{task}"
    section.trained = tuple(f"workdir:{stage}" for stage in drafters)
    section.seeds = ADVISED if not variant else ADVISED[:1]
    section.repeats = 3 if not variant else 1
    section.count = 16 if not variant else 2  # prompts of each repeat
    return section


def _study(trained: tuple, tasks: tuple) -> ConfigDict:
    section = ConfigDict()
    section.binary = "configs.draft_design.summary"
    section.seed = 0
    section.trained = trained  # the drafts' trainings; a drafter has its training's name
    section.evaluations = tuple(f"workdir:evaluation_{task}" for task in tasks)
    section.checked = tuple(f"workdir:checked_{task}" for task in tasks)
    section.gamma = 4  # at which shapes are compared
    return section
