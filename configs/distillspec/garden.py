"""A model garden: which size, distilled from the largest or not, decoded with which draft, has the lowest latency?

    python -m specjax.main --config=configs/distillspec/garden.py --workdir=runs/garden_0 --config.seed=0

One run is one seed; `python -m configs.records.condense configs/records/garden.json runs/garden_0 ...` joins them.
The largest model is exactly that of `lossy.py`: copy its finished stage `target` to the workdir as `large` to save its
training.

Stages: `large`; `medium` and `small`, each `_raw` (trained on the data) and `_kd` (trained as long on the largest
model's probabilities); `draft`, trained plainly; `for_MODEL`, that draft distilled for each of them; `quality`, every
model decoded plainly, with the plain draft (`MODEL_sd`) and with its own (`MODEL_distillspec`); `latency`, the same
one prompt at a time, all models in turn, on an otherwise idle machine.

Hardware: 2 CPU cores. Time: four minutes per seed if the largest model is there. Expect the tables of
configs/distillspec/README.md. `configs/distillspec/garden.py:smoke` uses tiny models.
"""

from ml_collections import ConfigDict

from configs import common
from configs.distillspec import stages

SIZES = ("medium", "small")


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("distillspec/garden", variant)
    smoke = variant == "smoke"
    sizes = SIZES[:1] if smoke else SIZES
    models = ("large", *(f"{size}_{how}" for size in sizes for how in ("raw", "kd")))
    config = ConfigDict()
    config.stages = (*models, "draft", *(f"for_{model}" for model in models), "quality", "latency")
    config.seed = 0  # of everything but the largest model
    seed = config.get_ref("seed")
    config.large = stages.trained(0, "large", steps=500, rate=1.5e-3, tokenizer="", smoke=smoke)
    for size in sizes:
        settings = {"steps": 300, "rate": 2e-3, "smoke": smoke}
        config[f"{size}_raw"] = stages.trained(seed, size, tokenizer="stage:large", **settings)
        config[f"{size}_kd"] = stages.taught(
            seed, size, init="random", target="stage:large", on_policy=False, **settings
        )
    config.draft = stages.trained(seed, "draft", steps=300, rate=4e-3, tokenizer="stage:large", smoke=smoke)
    for model in models:
        source = {"init": "stage:draft", "target": f"stage:{model}"}
        config[f"for_{model}"] = stages.taught(
            seed, "draft", **source, steps=80, rate=3e-3, on_policy=True, smoke=smoke
        )
    for name in ("quality", "latency"):
        config[name] = stages.evaluation(
            seed, "stage:large", _drafters(models), timed=name == "latency", temperatures=(0.0,), smoke=smoke
        )
    return config


def _drafters(models: tuple[str, ...]) -> dict[str, dict]:
    """Every model with the plain draft and with its own draft; gamma 0 decodes the model plainly."""
    drafters = {}
    for model in models:
        target = {} if model == "large" else {"target": f"stage:{model}"}
        settings = {"kind": "model", **target}
        plainly = () if model == "large" else (0,)  # plain decoding of the largest is everyone's baseline
        drafters[f"{model}_sd"] = {**settings, "path": "stage:draft", "rules": {"lossless": (*plainly, stages.GAMMA)}}
        drafters[f"{model}_distillspec"] = {
            **settings,
            "path": f"stage:for_{model}",
            "rules": {"lossless": (stages.GAMMA,)},
        }
    return drafters
