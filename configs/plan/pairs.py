"""Six large pairs of published shape, planned for TPU slices that need not be present: memory, time, what fits.

    python -m specjax.main --config=configs/plan/pairs.py:llama_65b --plan
    python -m specjax.main --config=configs/plan/pairs.py:vicuna_13b --plan
    python -m specjax.main --config=configs/plan/pairs.py:t5_xxl --plan
    python -m specjax.main --config=configs/plan/pairs.py:llama3_70b --plan
    python -m specjax.main --config=configs/plan/pairs.py:qwen3_30b_a3b --plan
    python -m specjax.main --config=configs/plan/pairs.py:gpt_oss_120b --plan

Only the `config.json` of each shape in configs/plan/shapes/ is read. To plan for your own checkpoints give
`--config.target=DIR --config.draft=DIR`; for another slice give `--plan=v5p:2x2x4` and the mesh of each stage, such as
`--config.distilled.mesh.tensor=8`. Without `--plan` this is a config to run, with your checkpoints and data.

Hardware: 2 CPU cores and the TPU compiler. Time: under two minutes each, with experts four; the plan says how long each
step took to compile. Expect the tables of configs/plan/README.md.
"""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from configs import common

SHAPES = pathlib.Path(__file__).with_name("shapes")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A target and its draft, as folders of configs/plan/shapes/, and the sizes to plan for.

    Attributes:
      draft: "" if an adapter drafts.
      sources: where the two shapes are published.
      chip: the chip to plan for.
      training: data, fsdp and tensor axes of the mesh in training; `decoding` those in evaluation.
      rows: rows of a training batch, and tokens of a row.
      prompts: prompts of an evaluation batch, and tokens of a prompt.
      gamma: tokens drafted per block.
    """

    target: str
    draft: str
    sources: tuple[str, ...]
    chip: str
    training: tuple[int, int, int]
    decoding: tuple[int, int, int]
    rows: tuple[int, int]
    prompts: tuple[int, int]
    gamma: int


PAIRS = {
    "llama_65b": Pair(
        "llama_65b",
        "wide_796m",
        ("arXiv 2302.13971, table 2", "arXiv 2402.01528, table 2"),
        "v5p",
        training=(1, 2, 8),
        decoding=(1, 1, 8),
        rows=(16, 1024),
        prompts=(8, 512),
        gamma=4,
    ),
    "vicuna_13b": Pair(
        "vicuna_13b",
        "",
        ("lmsys/vicuna-13b-v1.5, config.json", "arXiv 2404.18911, section 4"),
        "v5e",
        training=(1, 2, 4),
        decoding=(1, 1, 4),
        rows=(8, 1024),
        prompts=(1, 512),
        gamma=6,
    ),
    "t5_xxl": Pair(
        "t5_xxl",
        "t5_small",
        ("google/t5-v1_1-xxl, config.json", "google/t5-v1_1-small, config.json"),
        "v5e",
        training=(2, 4, 2),
        decoding=(4, 1, 2),
        rows=(32, 512),
        prompts=(8, 512),
        gamma=7,
    ),
    "llama3_70b": Pair(
        "llama3_70b",
        "llama3_1b",
        ("meta-llama/Meta-Llama-3-70B, config.json", "meta-llama/Llama-3.2-1B, config.json"),
        "v5p",
        training=(1, 2, 8),
        decoding=(1, 1, 8),
        rows=(16, 1024),
        prompts=(8, 2048),
        gamma=4,
    ),
    "qwen3_30b_a3b": Pair(
        "qwen3_30b_a3b",
        "qwen3_1_7b",
        ("Qwen/Qwen3-30B-A3B, config.json", "Qwen/Qwen3-1.7B, config.json"),
        "v5p",
        training=(1, 2, 4),
        decoding=(1, 1, 4),
        rows=(16, 1024),
        prompts=(8, 2048),
        gamma=4,
    ),
    "gpt_oss_120b": Pair(
        "gpt_oss_120b",
        "wide_5_8b",
        ("openai/gpt-oss-120b, config.json", "a Llama of a twentieth of its parameters, with its vocabulary"),
        "v5p",
        training=(1, 4, 4),
        decoding=(1, 1, 8),
        rows=(16, 1024),
        prompts=(8, 2048),
        gamma=4,
    ),
}


def get_config(pair: str = "llama_65b") -> ConfigDict:
    if pair not in PAIRS:
        raise ValueError(f"configs/plan/pairs.py has the variants {', '.join(PAIRS)}; not {pair!r}.")
    return of_pair(PAIRS[pair])


def of_pair(pair: Pair) -> ConfigDict:
    """On-policy distillation of the draft (training of the adapter where there is none), and an evaluation with it."""
    config = ConfigDict()
    config.seed = 0
    config.chip = pair.chip  # what --plan alone is for
    config.target = str(SHAPES / pair.target)  # directories with config.json at least
    config.draft = str(SHAPES / pair.draft) if pair.draft else ""
    stage = "distilled" if pair.draft else "adapter"
    config[stage] = _training(config, pair)
    config.evaluation = _evaluation(config, pair, stage)
    config.stages = (stage, "evaluation")
    return config


def _training(config: ConfigDict, pair: Pair) -> ConfigDict:
    """On-policy distillation of the draft, or of an adapter, in bfloat16 on the pair's mesh."""
    section = common.distillation(config.get_ref("target"), config.get_ref("draft") if pair.draft else "adapter")
    if not pair.draft:
        section.adapter = common.kangaroo_adapter(exit_layer=3)
    section.mesh = common.mesh(*pair.training)
    section.model.update({"param_dtype": "bfloat16", "compute_dtype": "bfloat16"})
    rows, tokens = pair.rows
    section.data.update({"batch_size": rows, "sequence_length": tokens, "prompt_length_max": tokens // 2})
    section.data.generation.max_new_tokens = tokens // 2
    section.loss.chunk = 2048
    return section


def _evaluation(config: ConfigDict, pair: Pair, stage: str) -> ConfigDict:
    draft = {"kind": "model", "path": f"stage:{stage}", "rules": {"lossless": (pair.gamma,)}}
    if not pair.draft:
        draft |= {"kind": "kangaroo", "threshold": 0.0}
    section = common.evaluation(config.get_ref("target"), {"draft": draft})
    section.mesh = common.mesh(*pair.decoding)
    section.param_dtype = section.compute_dtype = "bfloat16"
    batch, tokens = pair.prompts
    section.selection.update({"count": 80, "length_min": 1, "length_max": tokens})
    section.max_new_tokens = 256
    section.batch_sizes = (batch,)
    section.temperatures = (1.0,)
    section.measure_parts = False
    return section
