"""Measures how many tokens per target call drafts gain, on text of the target and without decoding.

    python -m specjax.main --config=configs/draft_design/acceptance.py --workdir=runs/acceptance \\
        --config.target=DIR --config.drafts=DIR,DIR --config.prompts=FILE

A draft is a model, or an attachment of the target (an adapter, heads, EAGLE-3 or block-parallel). Its expected tokens
per call follow from the probabilities of the text's tokens, for every rule and gamma at once, so only the choice of
texts makes them uncertain; `block_efficiency_ci` is their 95% interval. `decoded` prompts are also decoded for each of
the numbers: `ratio` is what decoding emitted per call, relative to the expected number on the very same text.

Stages: `greedy` and `sampled` write the target's text at temperatures 0 and 1; `acceptance`. For text that
target_text wrote before, add `--config.stages=acceptance, --config.acceptance.texts=DIR,DIR`.

Hardware: whatever holds the target and the largest draft. Time: 2,725 tokens of SmolLM2-135M, with their prompts, took
about 85 seconds of CPU time for an EAGLE-3 draft, all rules and gammas together; decoding to check takes longer. Expect
a ratio of 1 within the noise of decoding, about 1% for 10,000 decoded tokens.
`configs/draft_design/acceptance.py:smoke` runs in seconds with small checkpoints.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("draft_design/acceptance", variant)
    config = ConfigDict()
    config.stages = ("greedy", "sampled", "acceptance")
    config.seed = 0
    config.target = "required:target:the directory of the checkpoint that the drafts are for"
    config.drafts = ()  # directories of the drafts
    config.prompts = "required:prompts:a file of prompts or questions"
    config.count = 400  # texts at each temperature
    config.max_new_tokens = 128
    config.chat = False  # whether the tokenizer's chat template wraps each prompt as a user's turn
    config.task = common.task("prompt_completion", config.get_ref("prompts"))
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        config[name] = _text(config, temperature)

    config.acceptance = common.acceptance(config.get_ref("target"), config.get_ref("drafts"))
    config.acceptance.decoded = 32
    for name in ("greedy", "sampled", "acceptance"):
        config[name].seed = config.get_ref("seed")
    if variant == "smoke":
        config.update({"count": 4, "max_new_tokens": 10})
        config.acceptance.update({"decoded": 2, "batch_size": 2})
        config.acceptance.rules.update({"lossless": (1, 2), "block": (2,)})
        for name in ("greedy", "sampled"):
            config[name].data.update({"batch_size": 2})
    return config


def _text(config: ConfigDict, temperature: float) -> ConfigDict:
    """A stage that writes the target's text."""
    section = common.target_text(config.get_ref("target"), common.reference(config.task), temperature=temperature)
    section.data.chat = config.get_ref("chat")
    section.data.generation.max_new_tokens = config.get_ref("max_new_tokens")
    section.count = config.get_ref("count")
    return section
