"""Evaluates your target and draft on your prompts: exactness, acceptance, speed, and the speed that the parts predict.

    python -m specjax.main --config=configs/evaluate.py --workdir=runs/pair \\
        --config.target=DIR --config.drafter.path=DIR --config.prompts=FILE

Target and draft are Hugging Face checkpoints of any supported family with the same tokenizer. The file has one prompt
per line, or records in a layout of configs/distillspec/README.md (prompts, questions, conversations, Alpaca, ...).
The report is runs/pair/report.html; configs/evaluate/README.md defines every metric and rule.
For a draft of another kind, such as EAGLE-3, add its kind: `--config.drafters.draft.kind=eagle3` (the kinds and options
are listed below). A chat model needs `--config.selection.chat=true`.

Hardware: whatever holds both models; `--config.mesh.tensor=8` splits them over 8 devices, and
`--config.param_dtype=bfloat16` halves their memory. Time: at each temperature, every prompt is decoded once plainly and
once per gamma and rule; each combination compiles for some seconds first. Expect `identical` equal to the number of
prompts, and a speed-up that differs by temperature.
Lossy rules run on request and are labelled: `--config.drafters.draft.rules.lenient_exp=4 --config.leniences=0.7,0.5`.
They change the text, so give prompts with completions to measure its quality.
`configs/evaluate.py:ngram` needs no draft: it evaluates n-gram lookup alone. `configs/evaluate.py:smoke` and
`:ngram-smoke` take four prompts and a few tokens.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("evaluate", variant, ("ngram", "smoke", "ngram-smoke"))
    config = ConfigDict()
    config.binary = "evaluate"
    config.seed = 0
    config.mesh = common.mesh()  # devices along each axis; 1, 1, 1 is one device
    config.target = ""  # directory of the target
    # Directory of the draft, and the dtype of its parameters; "" is param_dtype. The target itself in int8 is a draft.
    config.drafter = ConfigDict({"path": "", "param_dtype": ""})
    config.prompts = ""  # file of prompts
    # "prompts" recognises the layout of the file; any other task evaluates on its own data.
    config.task = common.task("prompts", config.get_ref("prompts"))
    config.param_dtype = "auto"  # of parameters in memory: float32, bfloat16, float16, int8, int4 or auto
    config.compute_dtype = "auto"  # of activations: float32 on CPU, bfloat16 on accelerators
    # How many prompts (0: all), their most tokens, and whether the tokenizer's chat template wraps each of them.
    config.selection = ConfigDict({"count": 0, "length_min": 1, "length_max": 1_000_000, "chat": False})
    config.max_new_tokens = 128
    config.batch_sizes = (1,)  # several, such as 1,2,4,8,16,32, give a table by concurrency
    config.temperatures = (0.0, 1.0)
    config.top_k = 0  # 0 is off
    config.top_p = 1.0  # 1 is off
    config.min_p = 0.0  # 0 is off
    config.stop = ()  # strings before which texts end: '["\n\n", "Q:"]'
    # Gammas to run under each rule. `block` is exact like `lossless` and accepts more when sampling. `coupled` runs at
    # temperatures above 0, where it must repeat plain decoding token for token. Lossy rules run at every one of
    # `leniences`. A rule of your own is {"NAME": {"rule": "file.py:Class", "gammas": (4,)}}.
    rules = {"lossless": (2, 4, 6), "block": (), "coupled": (4,)}
    rules |= {"lenient_linear": (), "lenient_square": (), "lenient_exp": (), "typical": ()}
    config.leniences = (0.7, 0.5, 0.3)  # in (0, 1]; smaller accepts more
    # Kinds: model, pard, kangaroo, medusa, eagle3, block_parallel (with a path), ngram (shortest, longest), early_exit
    # (exit_layer), skip_layers (skipped: layers left out, or the workdir of configs/kangaroo/choose_layers.py), or
    # "file.py:Class". eagle3 and block_parallel read published drafts too, see configs/export/README.md.
    # Each may have a `threshold`: drafting stops after a token of which the draft is less sure. `leave_unsure: True`
    # leaves that token out, which pays where verifying the first token costs time, as on a CPU. With `lookup: 0.35` a
    # draft that does not share the target's layers looks up tokens first, as ngram does, and its head drafts, at most
    # `head_gamma` tokens, where the text has no match.
    # With `adaptive: True` each block drafts as many tokens, up to gamma, as pay in the batch by its acceptance so far
    # and `costs` of a drafted token and of verifying it, relative to a plain step; () measures them first.
    config.drafters = ConfigDict(
        {
            "draft": {
                "kind": "model",
                "path": config.drafter.get_ref("path"),
                "param_dtype": config.drafter.get_ref("param_dtype"),
                "threshold": 0.0,
                "leave_unsure": False,
                "lookup": 0.0,
                "head_gamma": 0,
                "adaptive": False,
                "draft_sample_method": "probabilistic",  # or "greedy"
                "rules": rules,
            },
            "ngram": {"kind": "ngram", "shortest": 1, "longest": 16, "rules": {"lossless": (4,)}},
        }
    )
    config.compare = (("draft", "ngram"),)  # pairs whose block efficiencies are compared prompt by prompt
    if variant.startswith("ngram"):
        del config.drafters.draft
        config.compare = ()
    config.samples = 3  # texts in the report
    config.measure_parts = True  # time drafting and rules for some of the run's seconds, to predict the speed
    if variant.endswith("smoke"):
        config.selection.count = 4
        config.max_new_tokens = 12
        for drafter in config.drafters.values():
            drafter.rules.update({"lossless": (2,), "coupled": (2,)})
        config.measure_parts = False
    return config
