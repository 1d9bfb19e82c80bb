"""Drafts for a real chat model, learnt from its own answers to your questions, and what each of them gains.

    make checkpoint
    python -m specjax.main --config=configs/smollm2.py --workdir=runs/smollm2 --config.questions=FILE

The target is SmolLM2-135M-Instruct, which `make checkpoint` fetches; `--config.target=DIR` names another chat model.
The file holds questions in a layout of configs/distillspec/README.md, such as Spec-Bench's question.jsonl; a tenth of
them is kept for the evaluation. Other questions for it: `--config.evaluation.task.path=FILE` with
`--config.evaluation.task.name=prompts`.

Stages: `text`, the target's answers with its hidden states, written once; `vocabulary`, the ids that it wrote most;
`eagle3`, an EAGLE-3 draft (arXiv 2503.01840) on the answers and their hidden states; `pruned`, the target cut to
`shape` with a head of these ids; `draft`, this draft distilled on the answers and on text of its own; `adapter`, a
Kangaroo adapter (arXiv 2404.18911) on the same text; `medusa`, heads (arXiv 2401.10774); and `evaluation`, which
compares plain decoding with all of these, with n-gram lookup and with early exit. The report is
runs/smollm2/report.html.

Hardware: 2 CPU cores and 4 GiB, or a GPU. The same command resumes a stopped run. Time: hours on two cores, where a
step of `draft` takes 6 s and one of `eagle3` 9 s; on an H200, `text` with 3,000 answers took 112 s, and `eagle3` with
400 steps of 64 rows 61 s, of which 14 s were training.

Expect text identical to plain decoding. On 20 other questions of Spec-Bench (13 at temperature 1) and two CPU cores,
that EAGLE-3 draft, which had learnt from questions of Spec-Bench and 2,000 of GSM8K, was 1.12 [1.07, 1.17] times as
fast as plain decoding at temperature 0 (gamma 1) and 1.15 [1.09, 1.22] at 1 (gamma 2). N-gram lookup with a threshold
of 0.35, which learns nothing, was 1.31 [1.19, 1.48] and 1.00 [0.97, 1.03] times as fast. All greedy texts were equal.
The draft's acceptance was 0.45 on held-out answers and 0.51 on those that it learnt, and both were still rising, so it
wants more text and more steps.
`configs/smollm2.py:smoke` takes a few questions and steps; give it a tiny target.
"""

from ml_collections import ConfigDict

from configs import common

TARGET = "checkpoints/smollm2-135m-instruct.gguf"
STATES = (2, 15, 30)  # of the 30 layers


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("smollm2", variant)
    config = ConfigDict()
    config.stages = ("text", "vocabulary", "eagle3", "pruned", "draft", "adapter", "medusa", "evaluation")
    config.seed = 0
    config.mesh = common.mesh()  # devices along each axis, for all stages
    config.target = TARGET
    config.questions = "required:questions:a file of questions to answer, such as Spec-Bench's question.jsonl"
    config.exit_layer = 2  # layers that the adapter shares with the target
    # What is left of the target in the draft; 0 is as in the target.
    config.shape = ConfigDict({"layers": 2, "width": 0, "heads": 0, "kv_heads": 0, "mlp_width": 0})
    config.task = common.task("prompt_completion", config.get_ref("questions"))
    target, exit_layer = config.get_ref("target"), config.get_ref("exit_layer")

    config.draft = _training(target, "stage:pruned", steps=400, learning_rate=1e-3)
    config.draft.data.update({"draft": 0.05, "target": 0.95})
    config.adapter = _training(target, "adapter", steps=400, learning_rate=1e-3)
    config.adapter.adapter = common.kangaroo_adapter(exit_layer)
    config.medusa = _training(target, "medusa", steps=200, learning_rate=1e-3)
    config.medusa.medusa = common.medusa_heads(heads=3)
    config.eagle3 = _training(target, "eagle3", steps=400, learning_rate=1e-3)
    config.eagle3.eagle3 = common.eagle3_draft(STATES, steps=3)

    config.text = ConfigDict({"binary": "target_text", "param_dtype": "float32", "compute_dtype": "auto"})
    config.text.update({"target": target, "mesh": common.mesh()})
    config.text.drafter = ConfigDict({"path": "", "gamma": 0, "rule": "lossless"})
    keys = ("batch_size", "sequence_length", "prompt_length_min", "prompt_length_max", "chat", "generation")
    config.text.data = ConfigDict({key: config.draft.data[key] for key in keys})
    config.text.count = 1280  # answers; questions are asked several times, with other random numbers
    config.text.states = STATES  # layers whose states are stored for training, the adapter's exit among them
    config.text.measure_batches = 1
    config.vocabulary = common.draft_vocabulary(target, 8192, "stage:text")
    config.pruned = ConfigDict(
        {"binary": "design", "action": "prune", "source": target, "vocabulary": "stage:vocabulary"}
    )
    config.pruned.update({"param_dtype": "float32", "compute_dtype": "auto", "shape": common.reference(config.shape)})
    config.pruned.calibration = ConfigDict(
        {"text": "stage:text", "batches": 4, "batch_size": 16, "sequence_length": 384}
    )
    config.evaluation = _evaluation(target, exit_layer)
    for name in config.stages:
        config[name].seed = config.get_ref("seed")
        if "mesh" in config[name]:
            config[name].mesh = common.reference(config.mesh)
        config[name].task = common.reference(config.task)
    # Questions for the evaluation: a tenth of the same. For another file, name "prompts" and its path.
    config.evaluation.task = common.task("prompt_completion", config.get_ref("questions"))
    return _smoke(config) if variant else config


def _training(target, init, *, steps: int, learning_rate: float) -> ConfigDict:
    """Distillation on the stored answers, by the forward KL given the ids of the vocabulary."""
    section = common.distillation(target, init, steps=steps, learning_rate=learning_rate)
    section.model.vocabulary = "stage:vocabulary"
    section.data.update({"batch_size": 16, "sequence_length": 384, "prompt_length_max": 320, "chat": True})
    section.data.update({"draft": 0.0, "target": 1.0, "target_path": "stage:text"})
    section.data.generation.max_new_tokens = 128
    section.train.update({"eval_every": 100, "eval_batches": 2, "checkpoint_every": 100})
    return section


def _evaluation(target, exit_layer) -> ConfigDict:
    reduced = {"vocabulary": "stage:vocabulary"}
    kinds = {
        "draft": {"kind": "model", "path": "stage:draft", "rules": {"lossless": (2, 3, 4)}},
        "eagle3": {"kind": "eagle3", "path": "stage:eagle3", "rules": {"lossless": (1, 2, 3)}},
        "adapter": {"kind": "kangaroo", "path": "stage:adapter", "threshold": 0.3, "rules": {"lossless": (3, 5)}},
        "medusa": {"kind": "medusa", "path": "stage:medusa", "rules": {"lossless": (2,)}},
        "ngram": {"kind": "ngram", "threshold": 0.35, "rules": {"lossless": (4,)}},
        "early_exit": {"kind": "early_exit", "exit_layer": exit_layer, "rules": {"lossless": (2,)}} | reduced,
    }
    section = common.evaluation(target, kinds)
    section.selection.update({"count": 16, "length_min": 1, "length_max": 320, "chat": True})
    section.compare = (("eagle3", "draft"), ("eagle3", "adapter"), ("eagle3", "ngram"))
    return section


def _smoke(config: ConfigDict) -> ConfigDict:
    common.smoke(config)
    for name in ("text", "eagle3", "draft", "adapter", "medusa"):
        lengths = {"sequence_length": 128, "prompt_length_min": 4, "prompt_length_max": 96}
        config[name].data.update({"batch_size": 2, **lengths})
        config[name].data.generation.max_new_tokens = 12
    config.text.update({"count": 6, "states": (1, -1)})
    config.update({"exit_layer": 1})
    config.eagle3.eagle3.update({"states_after": (1,), "steps": 2})
    config.shape.layers = 1
    config.vocabulary.size = 64
    config.pruned.calibration.update({"batches": 1, "batch_size": 2})
    config.evaluation.selection.update({"count": 1, "length_max": 96})
    config.evaluation.temperatures = (0.0,)
    for name in ("draft", "eagle3"):
        config.evaluation.drafters[name].rules.lossless = (2,)
    for name in ("medusa", "early_exit"):
        del config.evaluation.drafters[name]
    config.stages = tuple(name for name in config.stages if name != "medusa")
    return config
