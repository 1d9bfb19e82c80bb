"""Every config's smoke run, from the command line: what it leaves, what is skipped, what is refused."""

import json
import shutil
from pathlib import Path

import flags
import forked
import pytest
import tiny
from ml_collections import ConfigDict

from specjax import api, main
from specjax.hub.tokenizer import train_byte_bpe
from specjax.reporting import tables
from specjax.runtime import cli
from specjax.runtime import config as configs

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.py")) if "def get_config(variant" in path.read_text()]
# Configs whose smoke run is that of another one, but for the name of a task, which tests/test_tasks.py reads.
SAME = {
    "configs/kangaroo/vicuna_13b.py": "configs/kangaroo/vicuna_7b.py",
    "configs/kangaroo/llama3_8b.py": "configs/kangaroo/vicuna_7b.py",
    "configs/distillspec/wmt.py": "configs/distillspec/cnndm.py",
}
RUNS = [f"{name}:smoke" for name in (str(path.relative_to(ROOT)) for path in CONFIGS) if name not in SAME]
RUNS += ["configs/distill.py:new-smoke", "configs/evaluate.py:ngram-smoke", "configs/adapter.py:medusa-smoke"]
RUNS += ["configs/adapter.py:eagle3-smoke", "configs/adapter.py:block_parallel-smoke", "configs/distill.py:pard-smoke"]


# Records of the paper's data sets, by config.
DATA = {
    "xsum": {"document": "the text number {}", "summary": "text {}"},
    "cnndm": {"article": "the text number {}", "highlights": "text {}"},
    "wmt": {"en": "the text {}", "de": "der Text {}"},
    "gsm8k": {"question": "How many are {}?", "answer": "So many.\n#### {}"},
    "lm1b": {"text": "A sentence that is number {} of them all, and ends here."},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Where the configs find what a user would have to name: the overrides, by config."""
    home = tmp_path_factory.mktemp("models")
    tokenizer = train_byte_bpe([Path(__file__).read_text()], 280)
    for name, layers in (("target", 2), ("draft", 1)):
        decoder, params = tiny.decoder(layers, layers=layers, vocab_size=tokenizer.vocab_size)
        api.save(api.Model(decoder, params, tokenizer), home / name)
    (home / "prompts.txt").write_text("def main(\nimport os\nclass A:\nx = 1\n")
    shutil.copytree(home / "target", home / "chat")
    settings = json.loads((home / "chat/tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for message in messages %}# {{ message['content'] }}\n{% endfor %}"
    (home / "chat/tokenizer_config.json").write_text(json.dumps(settings))
    (home / "questions.txt").write_text("".join(f"What is {i} + {i}?\n" for i in range(30)))
    for name, layers in (("t5_target", 2), ("t5_draft", 1)):
        made, params = tiny.encoder_decoder(layers, layers=layers, vocab_size=tokenizer.vocab_size)
        api.save(api.Model(made, params, tokenizer), home / name)
    for name, fields in DATA.items():
        lines = [json.dumps({field: text.format(i) for field, text in fields.items()}) for i in range(60)]
        (home / f"{name}.jsonl").write_text("\n".join(lines))
    target, text = f"--config.target={home}/target", f"--config.text={ROOT}/tests/test_loop.py"
    pair = (target, f"--config.drafter.path={home}/draft")
    checkpoints = lambda kind: tuple(f"--config.{role}.path={home}/{kind}{role}" for role in ("target", "draft"))
    kinds = {"xsum": "t5_", "cnndm": "t5_", "wmt": "t5_", "gsm8k": ""}
    data = {name: f"--config.task.path={home}/{name}.jsonl" for name in DATA}
    return {
        **{f"configs/distillspec/{name}.py": (*checkpoints(kind), data[name]) for name, kind in kinds.items()},
        "configs/distillspec/lm1b.py": (data["lm1b"],),
        "configs/benchmark/quantised.py": (target, f"--config.text={ROOT}/tests/test_loop.py"),
        "configs/distill.py": (target, f"--config.draft={home}/draft", text),
        "configs/distill.py:new-smoke": (target, text),
        "configs/distill.py:pard-smoke": (target, f"--config.draft={home}/draft", text),
        "configs/smollm2.py": (f"--config.target={home}/chat",),
        "configs/distillspec/on_policy.py": (f"--config.target={home}/chat",),
        "configs/adapter.py": (target, text),
        "configs/adapter.py:medusa-smoke": (target, text),
        "configs/adapter.py:eagle3-smoke": (target, text),
        "configs/adapter.py:block_parallel-smoke": (target, text),
        "configs/evaluate.py": (*pair, f"--config.prompts={home}/prompts.txt"),
        "configs/evaluate.py:ngram-smoke": (target, f"--config.prompts={home}/prompts.txt"),
        "configs/distillspec/real.py": (
            f"--config.target={home}/chat",
            f"--config.prompts={home}/gsm8k.jsonl",
            f"--config.held_out={home}/questions.txt",
        ),
        "configs/kangaroo/choose_layers.py": (f"--config.target={home}/target",),
        "configs/generate.py": (*pair, "--config.prompt=def main("),
        "configs/advise.py": (
            pair[0],
            f"--config.drafts={home}/draft,ngram",
            "--config.batch_sizes=2",
            "--config.check=True",
        ),
        "configs/draft_design/advice_check.py": (pair[0],),
        "configs/draft_design/build.py": (pair[0],),
        "configs/draft_design/prune.py": (pair[0], "--config.shape.mlp_width=8"),
        "configs/draft_design/vocabulary.py": (pair[0],),
        "configs/draft_design/replay.py": (pair[0], f"--config.drafts={home}/draft"),
        "configs/draft_design/acceptance.py": (
            pair[0],
            f"--config.drafts={home}/draft",
            f"--config.prompts={home}/questions.txt",
        ),
        "configs/draft_design/train.py": (pair[0], f"--config.tokenizer.path={home}/target"),
    }


def run(config, workdir, *overrides):
    """(exit code, what was printed) as from the command line, on one device."""
    log = workdir.with_suffix(".log")
    code = forked.run(arguments(config, workdir, *overrides), log, {"XLA_FLAGS": flags.QUICK})
    return code, log.read_text()


def run_again(capsys, config, workdir, *overrides):
    """(exit code, what was printed) of the same command in this process, which spares it the start."""
    capsys.readouterr()
    code = cli.launch(main.run, "specjax.main", arguments(config, workdir, *overrides))
    return code, capsys.readouterr().err


def arguments(config, workdir, *overrides):
    return [f"--config={config}", f"--workdir={workdir}", *overrides]


def check_rows(config, rows):
    """A benchmark has a row for every setting of every table."""
    of = lambda name: [row for row in rows if row["benchmark"] == name]
    assert {row["benchmark"] for row in rows} == set(config.tables)
    if "plain_decoding" in config.tables:
        assert all(value > 0 for row in rows for key, value in row.items() if "second" in key)
        assert [row["model"] for row in of("plain_decoding")] == list(config.plain.models)
        assert [row["gamma"] for row in of("verification")] == list(config.verification.gammas)
        settings = [(row["batch_size"], row["gamma"]) for row in of("blocks")]
        assert settings == [(b, g) for b in config.blocks.batch_sizes for g in config.blocks.gammas]
        assert len(of("context")) == len(config.context.contexts) + len(config.context.capacities)
    for row in of("greedy_identity"):
        assert row["equal"] == row["of"]


def sections(config, workdir):
    """(section, its folder) of each stage, or of the config where it has no stages."""
    return [(config[name], workdir / name) for name in config.stages] if "stages" in config else [(config, workdir)]


@pytest.mark.parametrize("name", SAME)
def test_a_config_without_a_smoke_run_of_its_own_differs_from_one_with_it_in_the_task_alone(name):
    compared = []
    for each in (name, SAME[name]):
        config = configs.load(f"{ROOT}/{each}:smoke").copy_and_resolve_references()
        for section in (config, *(value for value in config.values() if isinstance(value, ConfigDict))):
            if "task" in section:
                section.task.name = ""
        compared.append(config.to_dict())
    assert compared[0] == compared[1] and f"{SAME[name]}:smoke" in RUNS


# The papers' reproductions and benchmarks take half of the time, and run what a user's configs run. These attachments
# are trained by smollm2.py too.
REPEATED = tuple(f"configs/{name}" for name in ("benchmark", "distillspec", "draft_design", "kangaroo", "quickstart_c"))
REPEATED += tuple(f"configs/adapter.py:{kind}" for kind in ("smoke", "eagle3", "block_parallel"))
REPEATED += ("configs/distill.py:new", "configs/evaluate.py:ngram")
thorough = lambda name: [pytest.mark.thorough] if name.startswith(REPEATED) else []


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=thorough(name)) for name in RUNS])
def test_a_smoke_run_leaves_its_results_is_skipped_when_finished_and_keeps_its_config(name, tmp_path, models, capsys):
    path, workdir = ROOT / name, tmp_path / "w"
    config = configs.load(str(path))
    named = models.get(name, models.get(name.removesuffix(":smoke"), ()))
    code, first = run(path, workdir, *named)
    assert code == 0, first
    left = {}
    for section, folder in [*sections(config, workdir), (config, workdir)]:
        left[folder / "results.json"] = (folder / "results.json").read_bytes()
        if "binary" in section and section.binary == "evaluate":
            assert (folder / "report.html").stat().st_size > 0
    if config.get("binary") == "configs.benchmark.measure":
        check_rows(config, json.loads((workdir / "results.json").read_text())["rows"])
        assert all(tables.heading(name) in first for name in config.tables)
    if sections(config, workdir)[-1][0].binary == "evaluate":
        assert (workdir / "report.html").stat().st_size > 0

    if "stages" in config:
        code, message = run_again(capsys, path, workdir, *named)
        assert code == 0, message
        count = len(config.stages)
        assert [f"[{i + 1}/{count}]" in first for i in range(count)] == [True] * count
        assert not any(f"[{i + 1}/{count}]" in message for i in range(count))
        assert {file: file.read_bytes() for file in left} == left

    code, message = run_again(capsys, path, workdir, *named, f"--config.seed={config.seed + 1}")
    assert code == 2
    assert f"seed: {config.seed} -> {config.seed + 1}" in message
    assert "choose another --workdir" in message
    assert {file: file.read_bytes() for file in left} == left
