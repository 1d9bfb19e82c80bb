"""Continues one prompt in the terminal as it is decoded, each token coloured by where it came from.

    python -m specjax.main --config=configs/generate.py --workdir=runs/generate \\
        --config.target=DIR --config.drafter.path=DIR --config.prompt="def main("

Directories are Hugging Face checkpoints of any supported family that share a tokenizer; without a draft's directory set
`--config.drafter.kind=ngram` or `early_exit` (the target alone), or `none` for plain decoding. Statistics come at the
end, and stay in results.json of the workdir. Another prompt wants another workdir.

Hardware: whatever holds both models. Wall-clock time: loading, some seconds of compiling, then the text.
`configs/generate.py:smoke` emits a few tokens.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/generate.py has one variant, smoke; not {variant!r}.")
    config = ConfigDict()
    config.binary = "generate"
    config.seed = 0
    # Devices along each axis; 1, 1, 1 is one device.
    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    config.target = ""  # directory of the target
    # kind: model (path: the draft's directory), kangaroo or medusa (path: the adapter's), ngram, early_exit,
    # skip_layers, "file.py:Class" for one of your own, or none. Options belong to a kind; None is the default value:
    # ngram matches `shortest` .. `longest` tokens (2 .. 4), early_exit drafts after `exit_layer` layers (1),
    # skip_layers leaves out the layers `skipped`; all but ngram end a block where the draft is less sure than
    # `threshold` (0: off).
    drafter = {"kind": "model", "path": "", "threshold": placeholder(float), "exit_layer": placeholder(int)}
    drafter |= {"shortest": placeholder(int), "longest": placeholder(int), "skipped": placeholder(tuple)}
    config.drafter = ConfigDict(drafter)
    config.prompt = ""  # the text to continue
    config.chat = False  # whether the prompt is a user's turn, to be wrapped by the tokenizer's chat template
    config.rule = "lossless"  # or coupled; lossy: lenient_linear, lenient_square, lenient_exp, typical
    config.lenience = placeholder(float)  # of a lossy rule: in (0, 1], smaller accepts more
    config.gamma = 4  # most tokens drafted a block
    config.temperature = 1.0
    config.top_k = 0  # 0 is off
    config.top_p = 1.0  # 1 is off
    config.max_new_tokens = 200
    config.blocks_at_once = 4  # printed after so many blocks; the host is asked nothing in between
    config.colours = "auto"  # always, never, or auto: where the output is a terminal
    config.param_dtype = "float32"  # in which parameters are kept: float32, bfloat16 or float16
    config.compute_dtype = "auto"  # of activations: float32 on CPU, bfloat16 on accelerators
    if variant == "smoke":
        config.max_new_tokens = 12
    return config
