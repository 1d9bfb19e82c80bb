"""Drafts of every kind for a real chat model, learnt from its own answers to its own questions, and what they gain.

    make checkpoint
    python -m specjax.main --config=configs/smollm2.py --workdir=runs/smollm2

The target is SmolLM2-135M-Instruct, which `make checkpoint` fetches; `--config.target=DIR` names another chat model. No
data is needed: the target writes the questions too. `configs/smollm2.py:eagle3` trains and compares this draft alone,
`configs/smollm2.py:eagle3+adapter` these two; others are `block_parallel`, `draft`, `pard` and `medusa`.
`configs/smollm2.py:file` takes the questions in `--config.questions=FILE` (layouts: configs/distillspec/README.md). The
evaluation asks questions that were held out; others, such as Spec-Bench's:
`--config.evaluation.task.name=prompts --config.evaluation.task.path=FILE`.

Stages: `own_questions` (Magpie, arXiv 2406.08464); `text`, the target's answers with its hidden states, written once;
`vocabulary`, the ids that it wrote most; `eagle3` (arXiv 2503.01840) and `block_parallel` (DFlash), which read the
target's hidden states; `pruned`, the target cut to `shape` with a head of these ids; `draft`, this draft distilled on
the answers and on text of its own; `pard` (arXiv 2504.18583), which continues `draft` with mask tokens; `adapter`,
Kangaroo's (arXiv 2404.18911); `medusa` (arXiv 2401.10774); and `evaluation`, which compares plain decoding with all of
these, with n-gram lookup and with early exit. All drafts see the same number of rows. The report is
runs/smollm2/report.html.

Hardware: 2 CPU cores and 4 GiB, or with `configs/smollm2.py:accelerator` a GPU of 40 GiB, where batches are larger and
there are more answers and steps. The same command resumes a stopped run. Time: on an H200, 16,384 questions took three
minutes, 2.5 of them compiling, while other processes compiled too; 14,244 were kept. On two cores with AVX2, 128
answers with their states took 2.4 minutes (36 for the 1,920 of this config), and 500 steps of `eagle3` 37 while tests
ran too for much of the time. A CPU with AMX is faster in bfloat16, also where it decodes if you add
`--config.decoding.param_dtype=bfloat16 --config.decoding.compute_dtype=bfloat16`: on two such cores the questions took
10 minutes, the answers about 35 and 500 steps of `eagle3` 14.

Expect text identical to plain decoding. The mean acceptance of two tokens drafted by `eagle3` on held-out answers was
0.28 after the least-squares fit, 0.40 after 200 steps and 0.45 after 500; that of `adapter` 0.32 and of `medusa` 0.20.
On 80 short questions of Spec-Bench `eagle3_lookup` was 1.12 times as fast as plain decoding at temperature 0 and 1.02
times at temperature 1; the others gained less or lost (configs/kangaroo/README.md). In bfloat16 with AMX, where five
tokens are verified in 1.1 times the time of one, it was 1.31 and 1.19 times as fast; there, greedy texts may
differ where two candidates tie within bfloat16's rounding.
`configs/smollm2.py:smoke` takes a few questions and steps; give it a tiny target.
"""

from ml_collections import ConfigDict

from configs import common

TARGET = "checkpoints/smollm2-135m-instruct.gguf"
STATES = (2, 0.5, -1)  # the second layer, that after half of them, and the last
# The stages that train each kind of draft.
KINDS = {
    "eagle3": ("eagle3",),
    "block_parallel": ("block_parallel",),
    "draft": ("pruned", "draft"),
    "pard": ("pruned", "draft", "pard"),
    "adapter": ("adapter",),
    "medusa": ("medusa",),
}


def get_config(variant: str = "") -> ConfigDict:
    kinds = variant.split("+")
    trained = kinds if set(kinds) <= set(KINDS) else list(KINDS)
    if trained != kinds:
        common.check_variant("smollm2", variant, ("accelerator", "file", "smoke", *KINDS))
    config = ConfigDict()
    first = ("text", "vocabulary") if variant == "file" else ("own_questions", "text", "vocabulary")
    of_kinds = [stage for kind in trained for stage in KINDS[kind]]
    config.stages = tuple(dict.fromkeys((*first, *of_kinds, "evaluation")))
    config.seed = 0
    config.mesh = common.mesh()  # devices along each axis, for all stages
    config.target = TARGET
    # Longest rows and prompts in tokens: longer prompts are left out, and answers end where the row does.
    config.update({"sequence_length": 256, "prompt_length_max": 128})
    config.questions = "stage:own_questions"  # a file, or a folder with train.jsonl and test.jsonl
    if variant == "file":
        config.update({"sequence_length": 384, "prompt_length_max": 320})
        config.questions = "required:questions:a file of questions to answer, such as Spec-Bench's question.jsonl"
    # Steps and rows of a step in training, and the number of predictions whose logits are in memory at one time.
    config.update({"steps": 500, "batch_size": 16, "chunk": 512})
    config.param_dtype = "float32"  # of the target in training, and of the exported drafts
    # Of the target where it decodes, and of the drafts there: in `own_questions`, `text` and `evaluation`.
    config.decoding = ConfigDict({"param_dtype": "auto", "compute_dtype": "auto"})
    config.eval_every = 100  # steps between two validations, and two checkpoints
    # Questions that the target writes, and answers: a question is asked several times, with other random numbers.
    config.update({"asked": 1280, "answers": 1920})
    config.writing_batch_size = 32  # rows in which questions and answers are written
    config.stored_states = STATES  # of the answers, so that training need not run the target; () stores none
    config.exit_layer = 2  # layers that the adapter shares with the target
    # What is left of the target in the draft; 0 is as in the target.
    config.shape = ConfigDict({"layers": 2, "width": 0, "heads": 0, "kv_heads": 0, "mlp_width": 0})
    config.task = common.task("prompt_completion", config.get_ref("questions"))
    target, exit_layer = config.get_ref("target"), config.get_ref("exit_layer")

    config.own_questions = _questions(config)
    config.draft = training(config, "stage:pruned")
    config.draft.data.update({"draft": 0.05, "target": 0.95})
    config.pard = training(config, "stage:draft")
    config.pard.update({"pard": common.pard_draft(drafted=8)})
    config.adapter = training(config, "adapter")
    config.adapter.adapter = common.kangaroo_adapter(exit_layer)
    config.medusa = training(config, "medusa")
    config.medusa.medusa = common.medusa_heads(heads=3)
    config.eagle3 = training(config, "eagle3")
    config.eagle3.eagle3 = common.eagle3_draft(STATES, steps=2)
    config.block_parallel = training(config, "block_parallel")
    config.block_parallel.block_parallel = common.block_parallel_draft(STATES)
    for name in ("pard", "block_parallel"):
        config[name].loss.anchors = 32

    config.text = _text(config)
    config.vocabulary = common.draft_vocabulary(target, 8192, "stage:text")
    config.pruned = ConfigDict(
        {"binary": "design", "action": "prune", "source": target, "vocabulary": "stage:vocabulary"}
    )
    config.pruned.update({"param_dtype": "float32", "compute_dtype": "auto", "shape": common.reference(config.shape)})
    config.pruned.calibration = ConfigDict(
        {"text": "stage:text", "batches": 4, "batch_size": 16, "sequence_length": config.get_ref("sequence_length")}
    )
    config.evaluation = _evaluation(target, exit_layer, trained)
    config.evaluation.update(common.reference(config.decoding))
    for name in config.stages:
        config[name].seed = config.get_ref("seed")
        if "mesh" in config[name]:
            config[name].mesh = common.reference(config.mesh)
        if name != "own_questions":
            config[name].task = common.reference(config.task)
    # Questions for the evaluation: a tenth of the same. For another file, name "prompts" and its path.
    config.evaluation.task = common.task("prompt_completion", config.get_ref("questions"))
    if variant == "accelerator":
        config.update({"steps": 2000, "batch_size": 64, "chunk": 8192, "eval_every": 500})
        config.param_dtype = config.decoding.param_dtype = "bfloat16"
        config.update({"asked": 16384, "answers": 16384, "writing_batch_size": 256, "stored_states": ()})
    return _smoke(config) if variant == "smoke" else config


def _questions(config: ConfigDict) -> ConfigDict:
    section = ConfigDict({"binary": "questions", "target": config.get_ref("target"), "mesh": common.mesh()})
    section.update(common.reference(config.decoding))
    section.count = config.get_ref("asked")
    section.batch_size = config.get_ref("writing_batch_size")
    section.generation = ConfigDict({"temperature": 1.0, "top_k": 0, "top_p": 0.9, "max_new_tokens": 96})
    return section


def _text(config: ConfigDict) -> ConfigDict:
    section = common.target_text(config.get_ref("target"), common.reference(config.task))
    shared = {key: config.draft.data.get_ref(key) for key in section.data}
    section.data = ConfigDict({**shared, "batch_size": config.get_ref("writing_batch_size")})
    section.update(common.reference(config.decoding))
    section.update({"count": config.get_ref("answers"), "states": config.get_ref("stored_states")})
    return section


def training(config: ConfigDict, init: str, steps: str = "steps") -> ConfigDict:
    """Distillation on the stored answers, by the forward KL given the ids of the vocabulary."""
    section = common.distillation(config.get_ref("target"), init, steps=config.get_ref(steps), learning_rate=1e-3)
    section.model.vocabulary, section.model.param_dtype = "stage:vocabulary", config.get_ref("param_dtype")
    section.loss.chunk, section.model.compute_dtype = config.get_ref("chunk"), "fastest"
    section.data.update({"prompt_length_max": config.get_ref("prompt_length_max"), "chat": True})
    section.data.sequence_length = config.get_ref("sequence_length")
    section.data.batch_size = config.get_ref("batch_size")
    section.data.update({"draft": 0.0, "target": 1.0, "target_path": "stage:text"})
    section.data.generation.max_new_tokens = 128
    every = config.get_ref("eval_every")
    section.train.update({"eval_every": every, "eval_batches": 2, "checkpoint_every": every})
    return section


def _evaluation(target, exit_layer, trained: list[str]) -> ConfigDict:
    reduced = {"vocabulary": "stage:vocabulary"}
    kinds = {
        "draft": {"kind": "model", "path": "stage:draft", "rules": {"lossless": (2, 3)}},
        "pard": {"kind": "pard", "path": "stage:pard", "rules": {"lossless": (3, 5)}},
        "eagle3": {"kind": "eagle3", "path": "stage:eagle3", "rules": {"lossless": (2,)}},
        "eagle3_lookup": {"kind": "eagle3", "path": "stage:eagle3", "rules": {"lossless": (4,)}}
        | {"lookup": 0.35, "head_gamma": 2},
        "block_parallel": {"kind": "block_parallel", "path": "stage:block_parallel", "rules": {"lossless": (2, 3, 4)}},
        "adapter": {"kind": "kangaroo", "path": "stage:adapter", "threshold": 0.3, "rules": {"lossless": (3,)}},
        "medusa": {"kind": "medusa", "path": "stage:medusa", "rules": {"lossless": (2,)}},
        "ngram": {"kind": "ngram", "threshold": 0.35, "rules": {"lossless": (4,)}},
        "early_exit": {"kind": "early_exit", "exit_layer": exit_layer, "rules": {"lossless": (2,)}} | reduced,
    }
    untrained = ("ngram", "early_exit") if len(trained) == len(KINDS) else ("ngram",)
    variants = ("eagle3_lookup",) if "eagle3" in trained else ()
    section = common.evaluation(target, {name: kinds[name] for name in (*trained, *variants, *untrained)})
    section.selection.update({"count": 16, "length_min": 1, "length_max": 2048, "chat": True})
    first, *others = dict.fromkeys((*variants, *trained, "ngram"))
    section.compare = tuple((first, name) for name in others)
    return section


def _smoke(config: ConfigDict) -> ConfigDict:
    common.smoke(config)
    config.update({"asked": 64, "answers": 64, "writing_batch_size": 32, "stored_states": (1, -1), "eval_every": 2})
    config.update({"steps": 4, "batch_size": 2, "chunk": 16, "exit_layer": 1})
    config.own_questions.generation.max_new_tokens = 32
    config.update({"sequence_length": 128, "prompt_length_max": 96})
    for name in ("eagle3", "block_parallel", "draft", "adapter"):
        config[name].data.prompt_length_min = 4
        config[name].data.generation.max_new_tokens = 12
    config.eagle3.eagle3.update({"states_after": (1,), "steps": 2})
    config.block_parallel.block_parallel.update({"states_after": (1,), "layers": 1, "block_size": 3})
    config.shape.layers = 1
    config.vocabulary.size = 64
    config.pruned.calibration.update({"batches": 1, "batch_size": 2})
    config.evaluation.selection.update({"count": 1, "length_max": 96})
    config.evaluation.temperatures = (0.0,)
    for name in ("draft", "block_parallel"):
        config.evaluation.drafters[name].rules.lossless = (2,)
    config.evaluation.compare = (("eagle3", "draft"),)
    for name in ("medusa", "early_exit", "pard"):
        del config.evaluation.drafters[name]
    config.stages = tuple(name for name in config.stages if name not in ("medusa", "pard"))
    return config
