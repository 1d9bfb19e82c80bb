"""Continues a prompt, or keeps a conversation, in the terminal, each token coloured by where it came from.

    python -m specjax.main --config=configs/generate.py --workdir=runs/generate \\
        --config.target=DIR --config.drafter.path=DIR --config.prompt="def main("

    python -m specjax.main --config=configs/generate.py --workdir=runs/chat \\
        --config.target=DIR --config.drafter.kind=ngram --config.chat=true

Target and draft are Hugging Face checkpoints of any supported family with the same tokenizer. Without a draft set
`--config.drafter.kind=ngram` or `early_exit` (the target drafts for itself), or `none` for plain decoding. Statistics
follow the text and are written to results.json in the workdir. Each prompt needs a workdir of its own.

A chat without a prompt answers each line of stdin. The caches of earlier turns are kept: only new text is prefilled.
Ctrl-C ends an answer, /reset the conversation, Ctrl-D the program.

Hardware: whatever holds both models. Time: loading, some seconds of compiling, then the text.
`configs/generate.py:smoke` emits a few tokens.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("generate", variant)
    config = ConfigDict()
    config.binary = "generate"
    config.seed = 0
    config.mesh = common.mesh()  # devices along each axis; 1, 1, 1 is one device
    config.target = ""  # directory of the target
    # kind: model or pard (path: the draft's directory), kangaroo, medusa, eagle3, block_parallel (path: the adapter's),
    # ngram, early_exit, skip_layers, "file.py:Class" for one of your own, or none. The other options belong to one kind
    # each; 0 and () take their default. ngram matches `shortest` to `longest` tokens (1 to 16), early_exit drafts after
    # `exit_layer` layers (1), skip_layers leaves out the layers `skipped`. A block ends where the draft is less sure
    # than `threshold` (0: never). All but ngram can be cut to the ids in `vocabulary`, the folder that
    # configs/draft_design/vocabulary.py exports ("": all). A draft model may have its own param_dtype ("": as below).
    drafter = {"kind": "model", "path": "", "param_dtype": "", "threshold": 0.0, "exit_layer": 0}
    drafter |= {"shortest": 0, "longest": 0, "skipped": (), "vocabulary": "", "states_after": ()}
    config.drafter = ConfigDict(drafter)
    config.prompt = ""  # the text to continue
    config.chat = False  # the chat template wraps the prompt as a user's turn; without a prompt, a conversation
    config.system = ""  # the system message of a chat
    config.rule = "lossless"  # or block, coupled; lossy: lenient_linear, lenient_square, lenient_exp, typical
    config.lenience = 0.0  # of a lossy rule: in (0, 1], smaller accepts more; 0 for an exact rule
    config.gamma = 4  # most tokens drafted per block
    config.temperature = 1.0
    config.top_k = 0  # 0 is off
    config.top_p = 1.0  # 1 is off
    config.min_p = 0.0  # 0 is off
    # "checkpoint" takes temperature, top_k and top_p from the target's generation_config.json; leave them as they are.
    config.sampling = ""
    config.stop = ()  # strings before which the text ends: '["\n\n", "Q:"]'
    config.samples = 1  # number of texts; the first one is printed while it is decoded
    config.logprobs = False  # whether results.json has the target's log-probability of every token
    config.compare = False  # whether to decode as many tokens plainly afterwards, for the speed-up
    config.max_new_tokens = 200
    config.blocks_at_once = 4  # print after so many blocks; the device is not interrupted in between
    config.colours = "auto"  # always, never, or auto: where the output is a terminal
    config.param_dtype = "auto"  # of parameters in memory: float32, bfloat16, float16, int8, int4 or auto
    config.compute_dtype = "auto"  # of activations: float32 on CPU, bfloat16 on accelerators
    if variant == "smoke":
        config.max_new_tokens = 12
    return config
