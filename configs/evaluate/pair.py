"""Evaluates your own target and draft on your own prompts: exactness, acceptance, speed, and what the parts predict.

    python -m specjax.main --config=configs/evaluate/pair.py --workdir=runs/pair \\
        --config.target=DIR --config.drafter.path=DIR --config.prompts=FILE

Directories are Hugging Face checkpoints of any supported family that share a tokenizer. The file has a prompt a line,
or is JSON lines with "prompt" (and "completion"), "question" and "answer" (GSM8K), or "turns" (Spec-Bench).

Hardware: whatever holds both models; `--config.mesh.tensor=8` spreads them over eight devices, and
`--config.param_dtype=bfloat16` halves their memory. Wall-clock time: every prompt is decoded plainly once and once a
gamma, at each temperature, and every combination compiles for some seconds first. Expect block efficiencies that differ
by temperature, and `identical` equal to the number of prompts; the speed-up is what you came to learn.
Lossy rules run where they are asked for, `--config.drafters.draft.rules.lenient_exp=4 --config.leniences=0.7,0.5`, and
are labelled so; their quality wants prompts with completions. `configs/evaluate/pair.py:smoke` takes four prompts and a
few tokens.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/evaluate/pair.py has one variant, smoke; not {variant!r}.")
    config = ConfigDict()
    config.binary = "evaluate"
    config.seed = 0
    # Devices along each axis; 1, 1, 1 is one device.
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    config.target = ""  # directory of the target
    config.drafter = ConfigDict({"path": ""})  # directory of the draft
    config.prompts = ""  # file of prompts
    # "prompts" tells the layout of the file by itself; the other keys belong to other tasks.
    config.task = ConfigDict({"name": "prompts", "path": config.get_ref("prompts"), "seed": 0, "size": 0})
    config.param_dtype = "float32"  # in which parameters are kept: float32, bfloat16 or float16
    config.compute_dtype = "auto"  # of activations: float32 on CPU, bfloat16 on accelerators
    # How many prompts (0: all), their most tokens, and whether each is wrapped by the tokenizer's chat template.
    config.selection = ConfigDict({"count": 0, "length_min": 1, "length_max": 1_000_000, "chat": False})
    config.max_new_tokens = 128
    config.batch_sizes = (1,)
    config.temperatures = (0.0, 1.0)
    config.top_k = 0  # 0 is off
    config.top_p = 1.0  # 1 is off
    # Gammas at which the lossless rule is run, and the coupled one (at temperatures above 0, where it must repeat plain
    # decoding token for token); then those of lossy rules, which are run at every one of `leniences`. A rule of your
    # own is {"NAME": {"rule": "file.py:Class", "gammas": (4,)}}.
    rules = {"lossless": (2, 4, 6), "coupled": (4,)}
    rules |= {"lenient_linear": (), "lenient_square": (), "lenient_exp": (), "typical": ()}
    draft = {"kind": "model", "path": config.drafter.get_ref("path"), "rules": rules}
    config.leniences = (0.7, 0.5, 0.3)  # in (0, 1]; smaller accepts more
    # Kinds: model (path), ngram (shortest, longest), early_exit (exit_layer), skip_layers (skipped: layers left out, or
    # the workdir of configs/kangaroo/choose_layers.py), kangaroo and medusa (path). Any of them may have a `threshold`
    # (not ngram) and `adaptive: True`, by which each row drafts as many tokens, up to gamma, as have paid so far; by
    # `costs` of a drafted token and of verifying it, relative to a plain step, or measured before decoding: ().
    config.drafters = ConfigDict(
        {
            "draft": draft,
            "ngram": {"kind": "ngram", "shortest": 2, "longest": 4, "rules": {"lossless": (4,)}},
        }
    )
    config.compare = (("draft", "ngram"),)  # block efficiencies, prompt by prompt
    config.samples = 3  # texts shown in the report
    config.measure_parts = True  # draft step, target step, verification, rule: timed apart, for the prediction
    if variant == "smoke":
        config.selection.count = 4
        config.max_new_tokens = 12
        config.drafters.draft.rules.lossless = (2,)
        config.drafters.draft.rules.coupled = (2,)
        config.measure_parts = False
    return config
