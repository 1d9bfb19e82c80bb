"""Bad input at the public doors: one sentence with the thing and the remedy, exit code 2, nothing begun.

What belongs to one room alone is tested there: damaged checkpoints in test_checkpoint.py, malformed lines and
files in test_data.py, missing and extra tensors in test_hub.py, the loss that is no longer finite in
test_trainer.py.
"""

import inspect
import pathlib
import shutil

import numpy as np
import pytest
import tiny

from specjax import api, distill, evaluate, main
from specjax.hub.tokenizer import train_byte_bpe
from specjax.runtime import cli
from specjax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
POSITIONS = 96
TEXT = "".join(f"def add_{i}(x):\n    return x + {i}\n\n\n" for i in range(300))

EVALUATION = """
from specjax.runtime import config as configs

def get_config():
    config = configs.load("{root}/configs/quickstart.py:smoke").evaluation
    config.task.update({{"name": "text", "path": "{home}/text.py", "size": 0}})
    config.target = "{home}/target"
    config.drafters = {{
        "draft": {{"kind": "model", "path": "{home}/draft", "rules": {{"lossless": (2,)}}}},
        "ngram": {{"kind": "ngram", "shortest": 1, "longest": 2, "rules": {{"lossless": (2,), "coupled": (2,)}}}},
        "early_exit": {{"kind": "early_exit", "exit_layer": 1, "rules": {{"lossless": (2,)}}}},
    }}
    config.compare = (("draft", "ngram"),)
    return config
"""

TRAINING = """
from specjax.runtime import config as configs

def get_config():
    config = configs.load("{root}/configs/quickstart.py:smoke").distilled
    config.task.update({{"name": "text", "path": "{home}/text.py", "size": 0}})
    config.tokenizer.path = config.target = "{home}/target"
    config.model.init = "{home}/draft"
    config.adapter = {{"exit_layer": 2, "kind": "attention", "own_head": False}}
    return config
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with `target` and `draft`, which fit, `narrow` and `foreign`, which do not, two configs."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = train_byte_bpe([TEXT], 280)
    foreign = train_byte_bpe([TEXT.upper()], 280)
    assert foreign.vocab_size == tokenizer.vocab_size
    narrow = train_byte_bpe([TEXT], 270)
    models = {
        "target": (tokenizer, 2),
        "draft": (tokenizer, 1),
        "foreign": (foreign, 1),
        "narrow": (narrow, 1),
    }
    for seed, (name, (tokens, layers)) in enumerate(models.items()):
        shape = dict(vocab_size=tokens.vocab_size, layers=layers, max_positions=POSITIONS)
        decoder, params = tiny.decoder(seed, **shape)
        api.save(api.Model(decoder, params, tokens), home / name)
    (home / "text.py").write_text(TEXT)
    (home / "evaluation.py").write_text(EVALUATION.format(root=ROOT, home=home))
    (home / "training.py").write_text(TRAINING.format(root=ROOT, home=home))
    return home


@pytest.fixture(scope="module")
def target(home):
    return api.load(home / "target")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drafter": "ngrma"}, 'there is no drafter "ngrma"; did you mean "ngram"'),
        ({"rule": "losless"}, 'there is no rule "losless"; did you mean "lossless"'),
        ({"drafter": "ngram", "gamma": -1}, "gamma must be 0 .* or more, not -1"),
        ({"drafter": api.EarlyExit(exit_layer=2)}, "exit_layer must lie in 1 .. 1 .* not 2"),
        ({"drafter": api.NGram(shortest=3, longest=2)}, "1 <= shortest <= longest, not shortest=3"),
        ({"drafter": api.EarlyExit(threshold=1.5)}, r"threshold must lie in \[0, 1\] .*, not 1\.5"),
        ({"drafter": api.NGram(adaptive=True)}, r"adaptive needs costs=\(of a drafted token"),
        ({"drafter": "model"}, r"ModelDraft drafts with a trained model; write drafter=api.Draft\(api.load"),
        ({"drafter": "runs/draft"}, r'drafter is the path "runs/draft"; load it: drafter=api.load\("runs/draft"\)'),
        ({"drafter": 4}, "drafter must be a loaded model or adapter, options, a name or None, not 4"),
        ({"gamma": "4"}, "gamma must be a whole number, not '4'"),
        ({"gamma": True}, "gamma must be a whole number, not True"),
        ({"max_new_tokens": 3.5}, r"max_new_tokens must be a whole number, not 3\.5"),
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"temperature": None}, "temperature must be a number, not None"),
        ({"temperature": "1"}, "temperature must be a number, not '1'"),
        ({"top_k": 1.0}, r"top_k must be a whole number, not 1\.0"),
        ({"eos_ids": 5}, r"eos_ids must be a list of token ids, such as \(2,\), not 5"),
        ({"eos_ids": (280,)}, "eos_ids has 280, outside the vocabulary of 280"),
        ({"eos_ids": (1.0,)}, r"a token id of eos_ids must be a whole number, not 1\.0"),
        ({"exit_layer": 2}, r"exit_layer is no longer an argument of api.generate; write drafter=api.EarlyExit\("),
        ({"threshold": 0.6}, r"threshold is no longer .*; write drafter=api.Draft\(draft, threshold=0.6\) or"),
        ({"adaptive": (0.1, 0.1)}, r"adaptive is no longer .*adaptive=True, costs="),
        ({"skipped": (1,)}, r"skipped is no longer .*api.SkipLayers\("),
        ({"shortest": 2}, r"shortest is no longer .*api.NGram\("),
        ({"longest": 2}, r"longest is no longer .*api.NGram\("),
        ({"lenience": 0.5}, r'lenience is no longer .*; write rule=api.Lossy\("typical", 0.3\)'),
        ({"temprature": 1.0}, 'api.generate has no argument temprature; did you mean "temperature"'),
        ({"rule": "typical"}, r"the rule typical is lossy; write rule=api.Lossy\('typical', LENIENCE\)"),
        ({"rule": 3}, r"rule must be a name, api.Lossy\(...\) or a Rule, not 3"),
        ({"temperature": -0.5}, r"temperature must be 0 .* or a positive number, not -0\.5"),
        ({"temperature": float("nan")}, "temperature must be 0 .* not nan"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], not 0\.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], not 1\.5"),
        ({"top_k": -2}, "top_k must be 0 .* or a positive number of tokens, not -2"),
        ({"rule": api.Lossy("lenient_exp", 0.0)}, r"lenience must lie in \(0, 1\], not 0\.0"),
        ({"rule": api.Lossy("lenient_exp", 1.5)}, r"lenience must lie in \(0, 1\], not 1\.5"),
        ({"rule": api.Lossy("typical", float("nan"))}, r"lenience must lie in \(0, 1\], not nan"),
        (
            {"rule": api.Lossy("lossless", 0.5)},
            "the rule lossless is exact; write rule='lossless', or take lenient_linear, lenient_square",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(target, settings, message):
    with pytest.raises(UserError, match=f"(?i){message}"):
        untyped(api.generate)(target, ["def"], **{"max_new_tokens": 4, **settings})


def untyped(function):
    """A function as users call it, without the type checks that the tests add, which would refuse wrong types first."""
    return inspect.unwrap(function)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "There are no prompts to continue; give at least one"),
        ("def", r"prompts must be a list of strings or of lists of token ids, not 'def'; write \[prompt\]"),
        (None, "prompts must be a list .*, not None"),
        ([1, 2], "prompt 0 is the number 1; give a list of prompts, each a list of token ids"),
        ([[{"role": "user", "content": "hi"}]], r"prompt 0 is a chat; write target.tokenizer.apply_chat\(messages\)"),
        ([{"role": "user", "content": "hi"}], "prompt 0 is a chat"),
        ([[1.0, 2.0]], r"a token id of prompt 0 must be a whole number, not 1\.0"),
        ([None], "a token id of prompt 0 must be a whole number, not None"),
        (["def", ""], "Prompt 1 is empty; decoding starts from at least one token"),
        ([[]], "Prompt 0 is empty"),
        ([[1, 280]], "Prompt 0 has token id 280, outside the vocabulary of 280; encode it"),
        ([[1, -1]], "Prompt 0 has token id -1, outside the vocabulary"),
        (
            [[1] * 93],
            "Prompt 0 has 93 tokens, .* exceed the model's 96 positions; shorten the prompt or lower max_new",
        ),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(target, prompts, message):
    with pytest.raises(UserError, match=f"(?i){message}"):
        untyped(api.generate)(target, prompts, max_new_tokens=4)


def test_numpy_prompts_are_read_as_lists_are(target):
    how = dict(max_new_tokens=3, temperature=0.0, eos_ids=np.asarray([1]))
    write = untyped(api.generate)
    lists = write(target, [[1, 2, 3], [4, 5]], **how).tokens
    assert write(target, [np.asarray([1, 2, 3]), np.asarray([4, 5])], **how).tokens == lists
    with pytest.raises(UserError, match="api.Draft takes what api.load or api.load_adapter returned, not 'runs/draft'"):
        untyped(api.Draft.__init__)(object.__new__(api.Draft), "runs/draft")


def test_logits_of_ids_outside_the_vocabulary_are_refused(target):
    with pytest.raises(UserError, match=r"token ids must lie in 0 \.\. 279"):
        target.logits([[0, 280]])


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("narrow", "different tokenizers; take a draft trained with the target's"),
        ("foreign", "different tokenizers; take a draft trained with the target's"),
    ],
)
def test_a_draft_of_another_vocabulary_is_refused(target, home, draft, message):
    with pytest.raises(UserError, match=f"(?i){message}"):
        api.generate(target, ["def"], drafter=api.load(home / draft), max_new_tokens=4)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", pathlib.Path.unlink, "neither model.safetensors nor .*index.json"),
        ("model.safetensors", cut, "model.safetensors is damaged or cut short"),
        ("config.json", pathlib.Path.unlink, "there is no .*config.json; name the directory"),
        ("tokenizer.json", pathlib.Path.unlink, "there is no .*tokenizer.json; name the directory"),
    ],
)
def test_a_damaged_model_directory_is_named(home, tmp_path, name, damage, message):
    directory = shutil.copytree(home / "target", tmp_path / "damaged")
    damage(directory / name)
    with pytest.raises(UserError, match=f"(?i){message}"):
        api.load(directory)


def refused(run, config, workdir, capsys, *overrides):
    """The one line that the command line prints; asserts exit code 2 and that no result was written."""
    argv = [f"--config={config}", f"--workdir={workdir}", *(f"--config.{change}" for change in overrides)]
    assert cli.launch(run, "specjax.main", argv) == 2
    line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(line) == 1
    assert not (workdir / "results.json").exists()
    return line[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("drafters.ngram.kind=ngrma", 'there is no drafter "ngrma"; did you mean "ngram"'),
        ("drafters.ngram.rules.lossless=-1", "gamma must be 0 (plain decoding) or more, not -1"),
        ("drafters.ngram.rules.coupled=-1", "gamma must be 0 (plain decoding) or more, not -1"),
        ("drafters.early_exit.exit_layer=7", "exit_layer must lie in 1 .. 1 for this target, not 7"),
        ("drafters.draft.path={home}/narrow", "different tokenizers; take a draft"),
        ("drafters.draft.path={home}/foreign", "different tokenizers; take a draft"),
        ("drafters.draft.path={home}/nowhere", "there is no {home}/nowhere/config.json; name the directory"),
        ("target={home}/nowhere", "there is no {home}/nowhere/config.json; name the directory"),
        ("drafters.draft.kind=kangaroo", "there is no {home}/draft/adapter_config.json"),
        ("task.name=txt", 'there is no task "txt"; did you mean "text"'),
        ("task.path={home}/nowhere.py", "{home}/nowhere.py"),
        ("temperatures=1.0,-1.0", "temperature must be 0 (greedy) or a positive number, not -1.0"),
        ("temperatures=()", "config.temperatures is empty; give one or more"),
        ("batch_sizes=", "config.batch_sizes is empty; give one or more"),
        ("top_p=0.0", "top_p must lie in (0, 1], not 0.0"),
        ("top_k=-1", "top_k must be 0 (off) or a positive number of tokens, not -1"),
        ("max_new_tokens=90", "exceed the model's 96 positions; shorten the prompt or lower max_new_tokens"),
        ("batch_sizes=5", "A batch size must lie in 1 .. 3, the number of prompts, not 5"),
        ("compute_dtype=float23", "float23"),
        ("compare=('draft',),", "compare has ('draft',); give pairs of drafters, as in (('draft', 'ngram'),)"),
        ("compare=(('draft','nowhere'),)", "compare names no drafter of this config: 'nowhere'"),
        ("mesh.tensor=3", "a mesh of data 1 x fsdp 1 x tensor 3 needs 3 devices and there are"),
        ("max_new_tokns=4", 'config.max_new_tokns does not exist; did you mean "max_new_tokens"?'),
        ("max_new_tokens=four", 'config.max_new_tokens is of type int, such as 12, and "four" is not'),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_anything_is_decoded(
    home, tmp_path, capsys, monkeypatch, change, message
):
    monkeypatch.setattr(evaluate, "_decode_all", lambda *_: pytest.fail("decoded"))
    line = refused(evaluate.run, home / "evaluation.py", tmp_path / "w", capsys, change.format(home=home))
    assert message.format(home=home).lower() in line.lower()


def test_a_comparison_of_a_drafter_that_is_not_there_is_refused(home, tmp_path, capsys):
    written = (home / "evaluation.py").read_text().replace('(("draft", ', '(("drfat", ')
    (tmp_path / "evaluation.py").write_text(written)
    line = refused(evaluate.run, tmp_path / "evaluation.py", tmp_path / "w", capsys)
    assert "'drfat'; did you mean \"draft\"" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loss.divergence=forward_lk", 'there is no divergence "forward_lk"; did you mean "forward_kl"'),
        ("task.name=txt", 'there is no task "txt"; did you mean "text"'),
        ("target={home}/foreign", "another tokenizer"),
        ("target={home}/nowhere", "there is no {home}/nowhere/"),
        ("data.draft=0.5", "must sum to 1"),
        ("model.init=adapter", "exit_layer must lie in 1 .. 1 for this target, not 2"),
        ("data.generation.temperature=-1.0", "temperature must be 0 (greedy) or a positive number, not -1.0"),
        ("loss.temperature=0.0", "loss.temperature is 0.0; it must be above 0"),
        ("train.min_seconds_of={home}", "{home}/results.json does not exist; run the stage that writes it"),
    ],
)
def test_a_training_that_cannot_be_is_refused_before_its_first_step(home, tmp_path, capsys, change, message):
    run = distill.run
    line = refused(run, home / "training.py", tmp_path / "w", capsys, change.format(home=home))
    assert message.format(home=home).lower() in line.lower()


def test_a_variant_that_a_config_lacks_is_refused(tmp_path, capsys):
    line = refused(main.run, ROOT / "configs/quickstart.py:smkoe", tmp_path / "w", capsys)
    assert "smkoe" in line and "smoke" in line
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("name", ["xsum", "cnndm", "wmt", "gsm8k"])
def test_a_checkpoint_that_only_the_command_line_can_name_is_asked_for_by_its_key(tmp_path, capsys, name):
    path = f"configs/distillspec/{name}.py"
    line = refused(main.run, path, tmp_path / "w", capsys, "target.path=somewhere")
    assert "config.draft.path is not set; give --config.draft.path=..., the directory of a Hugging Face" in line
    assert not (tmp_path / "w").exists()


def test_a_workdir_of_another_config_is_refused_and_left_alone(tmp_path, capsys):
    config, workdir = ROOT / "configs/quickstart.py:smoke", tmp_path / "w"
    assert cli.launch(lambda *_: None, "specjax.main", [f"--config={config}", f"--workdir={workdir}"]) == 0
    before = (workdir / "config.json").read_bytes()
    line = refused(main.run, config, workdir, capsys, "supervised.train.steps=5")
    assert "supervised.train.steps: 4 -> 5" in line and "choose another --workdir" in line
    assert (workdir / "config.json").read_bytes() == before
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_an_old_key_is_refused_with_its_new_name(home, tmp_path, capsys):
    command = [f"--config={home}/training.py", f"--workdir={tmp_path}/run", "--config.model.whole=True"]
    assert cli.launch(distill.run, "specjax.distill", command) == 2
    assert "config.model.whole is an old name; it is now model.replicate" in capsys.readouterr().err
    old = tmp_path / "old.py"
    old.write_text("""
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({"evaluation": {"drafters": {"small": {"whole": True}}}})
""")
    assert cli.launch(evaluate.run, "specjax.evaluate", [f"--config={old}", f"--workdir={tmp_path}/run"]) == 2
    assert "config.evaluation.drafters.small.whole is an old name" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
