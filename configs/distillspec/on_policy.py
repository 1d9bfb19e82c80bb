"""What drafts on a target's states gain from text on which both decode together, over the target's stored text.

    make checkpoint
    python -m specjax.main --config=configs/distillspec/on_policy.py --workdir=runs/on_policy

The first stages are those of configs/smollm2.py: questions, the target's answers with its states, the vocabulary, and
the draft `eagle3` or, with `configs/distillspec/on_policy.py:block_parallel`, that one. From there on, for each seed,
the draft is trained in three ways, in stages KIND_ARM_forward_kl_SEED:

  `target`    more steps on the stored text;
  `assisted`  as many steps on text on which draft and target decode together, with refused drafts replayed under
              reverse KL (Draft-OPD, arXiv 2605.29343);
  `longer`    steps on the stored text for at least the time that `assisted` took, its decoding included.

`greedy` and `sampled` are the target's answers to questions that were held out, and `acceptance` scores every draft on
these without decoding (configs/draft_design/acceptance.py). For other questions, such as Spec-Bench's:
`--config.held_out=FILE`.

The same command resumes a stopped run. Hardware: 2 CPU cores and 4 GiB. A CPU with AMX is faster in bfloat16, as
configs/smollm2.py says. `configs/distillspec/on_policy.py:smoke` takes a few steps; give it a tiny target.
"""

import itertools

from ml_collections import ConfigDict

from configs import common, smollm2

ARMS = {
    "target": {"target": 1.0},
    "assisted": {"target": 0.0, "assisted": 1.0},
    "longer": {"target": 1.0},
}
# The kinds of draft, and how many tokens each drafts in assisted decoding.
KINDS = {"eagle3": 2, "block_parallel": 3}
SEEDS = (0, 1, 2)


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("distillspec/on_policy", variant, ("smoke", *KINDS))
    smoke = variant == "smoke"
    kind = variant if variant in KINDS else "eagle3"
    config = smollm2.get_config("smoke" if smoke else kind)
    del config.evaluation
    first = [name for name in config.stages if name in ("own_questions", "text", "vocabulary", kind)]
    config.arm_steps = 2 if smoke else 48  # of the arms `target` and `assisted`
    config.held_out = "stage:own_questions/test.jsonl"
    config.update({"greedy_texts": 4 if smoke else 96, "sampled_texts": 4 if smoke else 224})
    stages = {}
    for seed, arm in itertools.product(SEEDS[:1] if smoke else SEEDS, ARMS):
        stages[f"{kind}_{arm}_forward_kl_{seed}"] = _arm(config, kind, arm, seed, smoke)
    drafts = (f"stage:{kind}", *(f"stage:{name}" for name in stages))
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        stages[name] = _held_out(config, temperature, config.get_ref(f"{name}_texts"))
    stages["acceptance"] = common.acceptance(config.get_ref("target"), drafts)
    stages["acceptance"].rules = ConfigDict({"lossless": (1, 2, 4), "block": (2, 4)})
    stages["acceptance"].update(common.reference(config.decoding))
    config.update(stages)
    config.stages = (*first, *stages)
    return config


def _arm(config: ConfigDict, kind: str, arm: str, seed: int, smoke: bool) -> ConfigDict:
    section = smollm2.training(config, f"stage:{kind}", steps="arm_steps")
    section.model.vocabulary = ""  # the draft has its own
    section.update({"seed": seed, "mesh": common.reference(config.mesh), "task": common.reference(config.task)})
    section.data.update(ARMS[arm])
    section.rollouts.gamma = KINDS[kind]
    section.optimizer.peak_learning_rate = 3e-4
    section.optimizer.warmup_steps = min(8, config.arm_steps - 1)
    section.loss.anchors = config[kind].loss.anchors
    if arm == "longer":
        section.train.min_seconds_of = f"workdir:{kind}_assisted_forward_kl_{seed}"
    if smoke:
        section.data.prompt_length_min = 4
        section.data.generation.max_new_tokens = 12
        section.train.eval_batches = 1
    return section


def _held_out(config: ConfigDict, temperature: float, count: int) -> ConfigDict:
    task = common.task("prompt_completion", config.get_ref("held_out"))
    section = common.target_text(config.get_ref("target"), task, temperature=temperature)
    section.update({"count": count, "mesh": common.reference(config.mesh), **common.reference(config.decoding)})
    section.data.update({"batch_size": config.get_ref("writing_batch_size"), "chat": True, "prompt_length_min": 4})
    section.data.update({name: config.get_ref(name) for name in ("sequence_length", "prompt_length_max")})
    section.data.generation.max_new_tokens = 128
    return section
