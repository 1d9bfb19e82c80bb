"""What a user adds in a file of their own, outside the package, works from a config and from Python."""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import pytest
import tiny
from ml_collections import ConfigDict

from specjax import api, evaluate, main
from specjax.data import tasks
from specjax.decoding import rules, scheduler
from specjax.distillation import divergences
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.table import make_attachment
from specjax.runtime import config as configs
from specjax.runtime import stopping
from specjax.runtime.errors import InexactText, UserError

ROOT = Path(__file__).resolve().parents[1]

TASK = '''
from specjax.data import quality
from specjax.data.tasks import Example, Task


def length(predictions, references):
    """The share of predictions that are shorter than their reference."""
    return quality.mean({"shorter": [len(p) < len(r) for p, r in zip(predictions, references, strict=True)]})


def spelling(config):
    """Words, and their letters one by one; `size` words to train on."""
    word = lambda number: "".join(chr(97 + number // 26**place % 26) for place in range(3))
    examples = [Example(word(number), "-".join(word(number)) * 20) for number in range(config.size + 20)]
    return Task("spelling", examples[20:], examples[:20], length)


FEW = Task("few", (), (Example("a", "b"),), "exact_match")
UNKNOWN_METRIC = Task("few", (), (Example("a", "b"),), "exact")
PAIRS = Task("few", (), (Example("a", "b"),))
vars(PAIRS)["validation"] = (("a", "b"),)  # past the type checker of the tests
NOTHING = 3
'''


@pytest.fixture
def task_file(tmp_path):
    path = tmp_path / "my_tasks.py"
    path.write_text(TASK)
    return path


def load_task(path, name, **keys):
    return tasks.load_task(ConfigDict({"name": f"{path}:{name}", "path": "", "size": 0, "seed": 0, **keys}))


def test_a_users_task_is_loaded_by_its_place(task_file):
    task = load_task(task_file, "spelling", size=30)
    assert (len(task.train), len(task.validation)) == (30, 20)
    assert tasks.quality(task, ["x", "x" * 99], ["ab", "a"]).values() == {"shorter": 0.5}
    few = load_task(task_file, "FEW")
    assert few.train == () and tasks.quality(few, ["7"], ["#### 7"]).values() == {"exact_match": 1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("speling", 'has no task "speling"; did you mean "spelling"'),
        ("NOTHING", "is int, not a specjax.data.tasks.Task"),
        ("PAIRS", "has an example of type tuple; make it an Example"),
        ("UNKNOWN_METRIC", 'has the metric "exact"; did you mean "exact_match"'),
    ],
)
def test_a_users_task_that_is_none_is_refused(task_file, name, message):
    with pytest.raises(UserError, match=message):
        load_task(task_file, name)


@pytest.mark.slow
def test_a_users_task_trains_and_evaluates_a_model_from_a_config(task_file, tmp_path):
    config = configs.load(f"{ROOT}/configs/quickstart.py:smoke")
    config.stages = ("target", "evaluation")
    for section in (config.target, config.evaluation):
        section.task.update({"name": f"{task_file}:spelling", "size": 200})
    config.target.train.update({"steps": 2, "eval_every": 2})
    config.evaluation.drafters = {"ngram": {"kind": "ngram", "rules": {"lossless": (2,)}}}
    config.evaluation.temperatures, config.evaluation.compare = (0.0,), ()
    main.run(config, tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())["rows"]
    assert rows and all(set(row["quality"]) == {"shorter"} for row in rows)


# --- drafters and rules --------------------------------------------------------------------------------------------

DECODING = """
import dataclasses

import jax.numpy as jnp

from specjax.decoding.drafters.base import Drafter, DrafterOptions, Proposal
from specjax.decoding.rules import Lossless, Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repeat(DrafterOptions):
    times: int = 3

    def build(self, target, gamma, loaded):
        return RepeatDrafter(gamma, min(gamma, self.times))


@dataclasses.dataclass(frozen=True)
class RepeatDrafter(Drafter):
    gamma: int
    times: int

    def propose(self, params, target_params, state, target_cache, context):
        tokens = jnp.tile(context.last_two_tokens[:, 1:], (1, self.gamma))
        return Proposal(tokens, None, jnp.full_like(context.lengths, self.times)), state, target_cache


@dataclasses.dataclass(frozen=True)
class RejectAll(Rule):
    def __call__(self, noise, proposal, target_probs, inputs):
        nothing = dataclasses.replace(proposal, num_drafted=jnp.zeros_like(proposal.num_drafted))
        return Lossless()(noise, nothing, target_probs, None)


@dataclasses.dataclass(frozen=True)
class AcceptAll(Rule):
    def __call__(self, noise, proposal, target_probs, inputs):
        return proposal.num_drafted, jnp.argmax(target_probs[:, -1], axis=-1).astype(jnp.int32)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("extensions")
    text = "".join(f"def add_{i}(x):\n    return x + {i}\n" for i in range(60))
    tokenizer = train_byte_bpe([text], 265)
    decoder, params = tiny.decoder(1, vocab_size=tokenizer.vocab_size)
    api.save(api.Model(decoder, params, tokenizer), home / "target")
    (home / "mine.py").write_text(DECODING)
    (home / "prompts.txt").write_text("def add_1\nreturn x\n")
    return home


def test_a_users_drafter_and_rule_decode_from_python(home):
    target = api.load(home / "target")
    settings = dict(temperature=0.0, max_new_tokens=16, eos_ids=())  # the same programs as in the evaluations
    plain = api.generate(target, ["def"], **settings)
    drafted = api.generate(target, ["def"], drafter=f"{home}/mine.py:Repeat", gamma=2, **settings)
    assert drafted.tokens == plain.tokens and drafted.stats.counts.drafted.sum() > 0
    rule = rules.rule_named(f"{home}/mine.py:RejectAll")
    rejected = api.generate(target, ["def"], drafter=f"{home}/mine.py:Repeat", gamma=2, rule=rule, **settings)
    assert rejected.tokens == plain.tokens and rejected.stats.acceptance_rate == 0


def evaluation(home, drafter):
    config = configs.load(f"{ROOT}/configs/evaluate.py:smoke")
    config.target, config.prompts = str(home / "target"), str(home / "prompts.txt")
    config.temperatures, config.selection.count, config.compare = (0.0,), 2, ()
    config.drafters = {"mine": drafter}
    return config


@pytest.mark.slow
def test_a_users_drafter_and_rule_are_evaluated_from_a_config(home, tmp_path):
    gammas = {"lossless": (2,), "none": {"rule": f"{home}/mine.py:RejectAll", "gammas": (2,)}}
    section = {"kind": f"{home}/mine.py:Repeat", "times": 2, "rules": gammas}
    rows = evaluate.run(evaluation(home, section), tmp_path)["rows"]
    assert [(row["drafter"], row["rule"]) for row in rows] == [
        ("none", "lossless"),
        ("mine", "lossless"),
        ("mine", "none"),
    ]
    assert all(row["identical_to_baseline"]["equal"] == 2 for row in rows[1:]) and rows[2]["acceptance_rate"] == 0


@pytest.mark.slow
def test_a_rule_that_claims_to_be_exact_and_is_not_ends_the_run_after_its_records(home, tmp_path, capsys):
    rule = {"wrong": {"rule": f"{home}/mine.py:AcceptAll", "gammas": (2,)}}
    config = evaluation(home, {"kind": f"{home}/mine.py:Repeat", "times": 2, "rules": rule})
    config.selection.count = 1
    with pytest.raises(InexactText, match=r"1 of 1 texts of mine \(rule wrong, gamma 2, temperature 0\) differ"):
        main.run(config, tmp_path)
    (difference,) = json.loads((tmp_path / "results.json").read_text())["rows"][1]["identical_to_baseline"][
        "differences"
    ]
    assert not difference["tie"] and difference["tie_bound"] < 1e-3
    assert "0/1 (1 different)" in capsys.readouterr().out
    assert 'class=" different"' in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_a_stopped_evaluation_keeps_its_finished_batches(home, tmp_path, monkeypatch):
    config = evaluation(home, {"kind": f"{home}/mine.py:Repeat", "rules": {"lossless": (2,)}})
    whole = evaluate.run(config, tmp_path / "whole")["rows"]
    decode, decoded = scheduler.decode, []

    def stopped(*arguments, **settings):  # SIGTERM while the second batch is decoded
        decoded.append(settings["indices"])
        if len(decoded) == 6:
            raise stopping.Stopped
        return decode(*arguments, **settings)

    monkeypatch.setattr(scheduler, "decode", stopped)
    with pytest.raises(stopping.Stopped):
        evaluate.run(config, tmp_path / "run")
    decoded[:] = range(10)
    rows = evaluate.run(config, tmp_path / "run")["rows"]
    assert len(decoded) == 10 + 4, "two compile, two decode the second batch"
    names = (
        "emitted_tokens",
        "accepted_at",
        "acceptance_by_position",
        "target_layers_per_token",
        "identical_to_baseline",
    )
    for row, expected in zip(rows, whole, strict=True):
        assert [row.get(name) for name in names] == [expected.get(name) for name in names]
    assert not (tmp_path / "run" / "batches").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "{home}/mine.py:Repeet"}, 'mine.py has no drafter "Repeet"; did you mean "Repeat"'),
        ({"kind": "{home}/mine.py:RejectAll"}, "must be a subclass of specjax.decoding.drafters.base.DrafterOptions"),
        ({"kind": "{home}/mine.py:Repeat", "tmes": 1}, 'drafters.mine.tmes does not exist; did you mean "times"'),
        ({"kind": "ngram", "longst": 1}, 'drafters.mine.longst does not exist; did you mean "longest"'),
        ({"kind": "ngram", "exit_layer": 1}, 'drafters.mine.exit_layer is an option of "early_exit", not of "ngram"'),
        ({"kind": "ngram", "path": "runs"}, 'drafters.mine.path is "runs", and drafter "ngram" loads nothing'),
        ({"kind": "model"}, "drafters.mine.path is empty; name the directory of the model"),
        ({"kind": "skip_layers"}, 'drafters.mine.skipped is missing, and drafter "skip_layers" needs it'),
        ({"kind": "ngram", "lossless": (2,)}, "drafters.mine.lossless is now drafters.mine.rules.lossless"),
        ({"kind": "ngram", "rules": (2,)}, "drafters.mine.rules must hold gammas by rule"),
        ({"kind": "ngram", "rules": {"losless": (2,)}}, 'rules.losless: there is no rule "losless"; did you mean'),
        ({"kind": "ngram", "rules": {"lossless": "2"}}, r"rules.lossless must be gammas, such as \(2, 4\)"),
    ],
)
def test_a_drafters_section_that_cannot_be_read_is_refused(home, tmp_path, section, message):
    section = {"rules": {"lossless": (2,)}, **section, "kind": section["kind"].format(home=home)}
    with pytest.raises(UserError, match=message):
        evaluate.run(evaluation(home, section), tmp_path)


def test_a_section_of_an_earlier_version_says_what_its_keys_are_called_now(home, tmp_path):
    with pytest.raises(UserError, match="drafters.mine.lossless is now drafters.mine.rules.lossless"):
        evaluate.run(evaluation(home, {"kind": "ngram", "lossless": (2,), "coupled": ()}), tmp_path)


# --- an attachment with its drafter, and a divergence ----------------------------------------------------------------

ATTACHMENT = '''
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from specjax.decoding.drafters.base import Drafter, DrafterOptions, Proposal
from specjax.models import layers
from specjax.models.attachment import Attachment, AttachmentConfig
from specjax.models.language_model import Prediction


def alpha_divergence(target_logits, draft_logits, *, alpha):
    """(1 - sum_v P^alpha Q^(1 - alpha)) / (alpha (1 - alpha))."""
    log_p, log_q = jax.nn.log_softmax(target_logits), jax.nn.log_softmax(draft_logits)
    return (1 - jnp.exp(alpha * log_p + (1 - alpha) * log_q).sum(-1)) / (alpha * (1 - alpha))


def of_whole_batch(target_logits, draft_logits):
    return jnp.sum(target_logits - draft_logits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guess(DrafterOptions):
    """Drafts one token from two states."""

    loads = "attachment"

    def build(self, target, gamma, loaded):
        return GuessDrafter(target, loaded, gamma)


@dataclasses.dataclass(frozen=True)
class GuessDrafter(Drafter):
    target: object
    attachment: object
    gamma: int

    @property
    def taps(self):
        return self.attachment.taps

    def start(self, params, target_params, prompts):
        config = self.target.config
        none = jnp.zeros((prompts.lengths.shape[0], 1, config.width), config.compute_dtype)
        return (none,) * len(self.taps)

    def prefill(self, params, target_params, state, chunk):
        return tuple(map(chunk.at_second_last, chunk.tap_states, state))

    def propose(self, params, target_params, state, target_cache, context):
        hidden, _ = self.attachment.extend(params, None, state, None)
        logits = self.attachment.head(params, self.target, target_params, hidden)[:, 0]
        token, probs = context.draw(logits, 0)
        probs = None if probs is None else probs[:, None]
        return Proposal(token[:, None], probs, jnp.ones_like(token)), state, target_cache

    def commit(self, params, state, outcome):
        return at(outcome.tap_states, outcome.num_emitted - 1)


def at(states, index):
    return tuple(jnp.take_along_axis(x, jnp.maximum(index, 0)[:, None, None], axis=1) for x in states)


@dataclasses.dataclass(frozen=True)
class TwoStatesConfig(AttachmentConfig):
    layer: int


class TwoStatesModule(nnx.Module):
    def __init__(self, config, rngs):
        width, dtype = config.target.width, config.target.param_dtype
        self.mix = layers.Linear(2 * width, width, ("embed", None), 0.02, dtype, rngs)


@dataclasses.dataclass(frozen=True)
class TwoStates(Attachment):
    """Predicts the token after the next from the states after an early and the last layer."""

    config: TwoStatesConfig
    config_class = TwoStatesConfig
    module = TwoStatesModule
    drafter = Guess
    predicts = (Prediction(1, 1.0),)

    @property
    def taps(self):
        return (self.config.layer, self.config.target.layers)

    def extend(self, params, cache, states, positions):
        return states[-1] + self.bind(params).mix(jnp.concatenate(states, axis=-1)), cache
'''


@pytest.fixture
def attachment_file(tmp_path):
    path = tmp_path / "my_attachment.py"
    path.write_text(ATTACHMENT)
    return path


@pytest.mark.slow
def test_a_users_attachment_is_trained_by_a_users_divergence_and_decoded_by_its_drafter(attachment_file, tmp_path):
    config = configs.load(f"{ROOT}/configs/quickstart.py:smoke")
    config.stages = ("target", "mine", "evaluation")
    config.mine = config.supervised.copy_and_resolve_references()
    config.mine.target = "stage:target"
    config.mine.model.init = f"{attachment_file}:TwoStates"
    config.mine.attachment = ConfigDict({"layer": 1})
    config.mine.loss.update({"divergence": f"{attachment_file}:alpha_divergence", "alpha": 0.3})
    section = {"kind": f"{attachment_file}:Guess", "path": "stage:mine", "rules": {"lossless": (1,)}}
    config.evaluation.drafters = ConfigDict({"mine": section})
    config.evaluation.compare = ()
    main.run(config, tmp_path / "run")
    (trained,) = json.loads((tmp_path / "run" / "mine" / "results.json").read_text())["rows"]
    assert trained["validation_loss"] < trained["validation"][0]["validation_loss"]
    rows = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())["rows"]
    assert {row["drafter"] for row in rows} == {"none", "mine"}
    # From Python; the exported file remembers where the class is.
    target = api.load(tmp_path / "run" / "target" / "export")
    attachment = api.load_adapter(tmp_path / "run" / "mine" / "export", target)
    assert type(attachment.network).__name__ == "TwoStates" and attachment.network.config.layer == 1
    generate = functools.partial(api.generate, target, ["a b", "c"], gamma=1, temperature=0.0, max_new_tokens=12)
    assert generate(drafter=attachment).tokens == generate().tokens
    attachment_file.unlink()
    with pytest.raises(UserError, match="the attachment is in .*my_attachment.py, and there is no such file"):
        api.load_adapter(tmp_path / "run" / "mine" / "export", target)


def test_an_attachment_that_is_none_is_refused(attachment_file):
    target = tiny.config()
    make = lambda name, **options: make_attachment(f"{attachment_file}:{name}", target, options)
    assert make("TwoStates", layer=1).taps == (1, 2)
    for name, options, message in (
        ("TwoState", {}, 'has no attachment "TwoState"; did you mean "TwoStates"'),
        ("at", {}, "must be a subclass of specjax.models.attachment.Attachment"),
        ("TwoStates", {}, "needs layer; give it a value"),
        ("TwoStates", {"layers": 1}, 'layers is not an option of the attachment .*did you mean "layer"'),
    ):
        with pytest.raises(UserError, match=message):
            make(name, **options)


def test_a_users_divergence_takes_its_parameter_from_python_and_from_a_config(attachment_file):
    name = f"{attachment_file}:alpha_divergence"
    target, draft = jnp.log(jnp.asarray([[[0.5, 0.5]]])), jnp.log(jnp.asarray([[[0.9, 0.1]]]))
    section = {"divergence": name, "beta": 0.5, "alpha": 0.5, "temperature": 1.0, "chunk": 4}
    section |= {"refused": "reverse_kl", "selected": 1.0, "reference": "", "balance": 0.0, "anchors": 0}
    expected = (1 - (0.5 * 0.9) ** 0.5 - (0.5 * 0.1) ** 0.5) / 0.25
    for made in (divergences.divergence(name, alpha=0.5), divergences.of_config(section)):
        assert float(made(target, draft)[0, 0]) == pytest.approx(expected, rel=1e-5)
    for parameters, message in (({}, "needs alpha; set loss.alpha"), ({"alfa": 1}, 'did you mean "alpha"')):
        with pytest.raises(UserError, match=message):
            divergences.divergence(name, **parameters)
    with pytest.raises(UserError, match=r"must return an array \[B, T\]"):
        divergences.divergence(f"{attachment_file}:of_whole_batch")
