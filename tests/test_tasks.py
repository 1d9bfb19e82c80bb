"""Tasks of known data sets, from TFDS and from JSON lines; docstrings to write; metrics over a whole set."""

import json
import sys
import sysconfig

import numpy as np
import pytest
import tiny
import toy_tokenizers
from absl import logging as absl_logging
from helpers import write_jsonl
from ml_collections import ConfigDict

from specjax import api, evaluate
from specjax.data import corpora
from specjax.data import quality as qualities
from specjax.data.batches import RowLayout, evaluation_prompts, training_batches, validation_batches
from specjax.data.docstrings import stdlib_docstrings
from specjax.data.tasks import Example, Task, load_task, quality
from specjax.hub.tokenizer import Tokenizer, train_byte_bpe
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError

# name -> (name with TFDS, the split that is evaluated on, a record, its example)
LAYOUTS = {
    "xsum": (
        "xsum",
        "validation",
        lambda i: {"document": f"Article {i}.\nIt ends.", "summary": f"Summary {i}."},
        lambda i: Example(f"summarize: Article {i}.\nIt ends.", f"\nSummary {i}."),
    ),
    "cnn_dailymail": (
        "cnn_dailymail",
        "validation",
        lambda i: {"article": f"News {i}.", "highlights": f"One {i} .\nTwo ."},
        lambda i: Example(f"summarize: News {i}.", f"\nOne {i} .\nTwo ."),
    ),
    "wmt14_en_de": (
        "wmt14_translate/de-en",
        "validation",
        lambda i: {"en": f"House {i}", "de": f"Häuser {i}"},
        lambda i: Example(f"translate English to German: House {i}", f"\nHäuser {i}"),
    ),
    "gsm8k": (
        "gsm8k",
        "test",
        lambda i: {"question": f"What is {i}?", "answer": f"It is {i}.\n#### {i}"},
        lambda i: Example(f"Question: What is {i}?\nAnswer:", f" It is {i}.\n#### {i}"),
    ),
    "lm1b": ("lm1b", "test", lambda i: {"text": f"Sentence {i:03} ."}, lambda i: Example("", f"Sentence {i:03} .")),
}
METRICS = {"xsum": "rouge", "cnn_dailymail": "rouge", "wmt14_en_de": "bleu", "gsm8k": "exact_match", "lm1b": None}
TRAIN, EVALUATED = range(40), range(100, 105)


def config(name, path="", size=0):
    return ConfigDict({"name": name, "path": str(path), "seed": 0, "size": size})


def prepare(data_dir, dataset, splits):
    """Writes a data set of TFDS with records of texts, as its own builder would lie there."""
    import tensorflow_datasets as tfds

    called, _, variant = dataset.partition("/")
    fields = sorted({field for records in splits.values() for record in records for field in record})

    # Not registered: TFDS has builders of these names, which ask for the network.
    class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = called
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=variant)] if variant else []

        def _info(self):
            features = tfds.features.FeaturesDict({field: tfds.features.Text() for field in fields})
            if fields == ["de", "en"]:
                features = tfds.features.Translation(fields)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {split: enumerate(records) for split, records in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Prepared(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
    return data_dir


def as_set(examples):
    return sorted((example.prompt, example.completion) for example in examples)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with all data sets, prepared."""
    data_dir = tmp_path_factory.mktemp("tfds")
    for dataset, held_out, record, _ in LAYOUTS.values():
        prepare(data_dir, dataset, {"train": [*map(record, TRAIN)], held_out: [*map(record, EVALUATED)]})
    return data_dir


# Data sets of TFDS


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_prepared_data_set_gives_its_prompts_and_references_without_tensorflow(prepared, name):
    task = load_task(config(name, prepared))
    example = LAYOUTS[name][3]
    assert as_set(task.train) == as_set(map(example, TRAIN))
    assert as_set(task.validation) == as_set(map(example, EVALUATED))
    assert task.metric == METRICS[name]
    assert task.is_language_modelling == (name == "lm1b")
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("name", LAYOUTS)
def test_json_lines_of_the_same_layout_are_the_same_task(prepared, tmp_path, name):
    _, _, record, example = LAYOUTS[name]
    write_jsonl(tmp_path / "train.jsonl", map(record, TRAIN))
    write_jsonl(tmp_path / "test.jsonl", map(record, EVALUATED))
    task, other = load_task(config(name, tmp_path)), load_task(config(name, prepared))
    assert as_set(task.train) == as_set(other.train) and as_set(task.validation) == as_set(other.validation)
    assert (task.metric, task.cuts_prompts) == (other.metric, other.cuts_prompts)
    single = load_task(config(name, tmp_path / "train.jsonl"))
    assert as_set(single.train + single.validation) == as_set(map(example, TRAIN)) and single.validation


def test_size_limits_training_alone_in_examples_or_bytes(prepared):
    whole, part = (load_task(config("xsum", prepared, size)) for size in (0, 7))
    assert part.train == whole.train[:7] and part.validation == whole.validation
    whole, part = (load_task(config("lm1b", prepared, size)) for size in (0, 5 * len("Sentence 000 .") + 13))
    assert part.train == whole.train[:5] and part.validation == whole.validation
    with pytest.raises(UserError, match="task.size is 5, which leaves nothing"):
        load_task(config("lm1b", prepared, 5))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_data_set_that_is_not_prepared_names_the_place_and_the_command(tmp_path, monkeypatch, name):
    import tensorflow_datasets as tfds

    dataset, default = LAYOUTS[name][0], tmp_path / "default"
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(default))
    for path, place in ((tmp_path, tmp_path), ("", default)):
        with pytest.raises(UserError) as raised:
            load_task(config(name, path))
        assert f'"{dataset}" is not prepared in {place};' in str(raised.value)
        command = f"`tfds build {dataset} --file_format=array_record --data_dir={place}`"
        assert command in str(raised.value)


def test_a_data_set_of_another_format_is_refused_with_how_to_convert_it(tmp_path):
    prepare(tmp_path, "xsum", {"train": [LAYOUTS["xsum"][2](0)]})
    folder = tmp_path / "xsum" / "1.0.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    (folder / "xsum-train.array_record-00000-of-00001").rename(folder / "xsum-train.tfrecord-00000-of-00001")
    with pytest.raises(UserError) as raised:
        load_task(config("xsum", tmp_path))
    assert f"`tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record`" in str(raised.value)


def test_a_data_set_without_the_split_or_the_field_is_refused(tmp_path):
    prepare(tmp_path / "a", "xsum", {"train": [LAYOUTS["xsum"][2](0)]})
    with pytest.raises(UserError, match=r'"xsum" in .* has no split "validation", only train'):
        load_task(config("xsum", tmp_path / "a"))
    records = [{"document": "d", "title": "t"}]
    prepare(tmp_path / "b", "xsum", {"train": records, "validation": records})
    with pytest.raises(UserError, match=r'xsum in .*, train, example 0 lacks the field "summary", the reference'):
        load_task(config("xsum", tmp_path / "b"))


def test_examples_of_a_data_set_whose_text_is_empty_are_left_out_and_counted(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(absl_logging, "warning", lambda message, *values: lines.append(message % values))
    record = LAYOUTS["xsum"][2]
    blank = [{"document": "", "summary": "s"}, {"document": "d", "summary": " \n"}]
    prepare(tmp_path, "xsum", {"train": [record(0), *blank], "validation": [record(1)]})
    task = load_task(config("xsum", tmp_path))
    assert len(task.train) == len(task.validation) == 1
    assert [line.split(", train: ")[1] for line in lines] == ["2 examples left out, one of their texts is empty"]
    prepare(tmp_path / "blank", "xsum", {"train": [record(0)], "validation": blank})
    with pytest.raises(UserError, match='"xsum" has no examples to validate on'):
        load_task(config("xsum", tmp_path / "blank"))


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("xsum", {"document": "d"}, 'lacks the field "summary", the reference that the quality metric needs'),
        ("cnn_dailymail", {"article": "d"}, 'lacks the field "highlights", the reference'),
        ("wmt14_en_de", {"en": "d"}, 'lacks the field "de", the reference'),
        ("gsm8k", {"question": "d"}, 'lacks the field "answer", the reference'),
        ("xsum", {"summary": "s"}, 'lacks the field "document"'),
        ("wmt14_en_de", {"en": 5, "de": "d"}, '"en" is int, not text'),
        ("xsum", {"document": "d", "summary": " "}, 'the field "summary" is empty'),
        ("lm1b", {"text": ""}, 'the field "text" is empty'),
    ],
)
def test_a_line_without_what_the_task_needs_is_named(tmp_path, task, record, message):
    path = write_jsonl(tmp_path / "data.jsonl", [LAYOUTS[task][2](0), record])
    with pytest.raises(UserError, match=rf"data\.jsonl, line 2.*{message}"):
        load_task(config(task, path))
    with pytest.raises(UserError, match="there is no file .*none.jsonl"):
        load_task(config(task, tmp_path / "none.jsonl"))


# Docstrings


MODULE = '''"""Of the module."""
import os\x0c

class Thing:
    """Of the class."""

    @property
    def size(self,
             unit=1):
        """How big   it is.

        In units.
        """
        text = """
    kept"""
        return len(text)

    def nothing(self):
        """Does nothing."""

    async def wait(self): "Waits."; return 1

    def blank(self):
        """   """
        return 0

    def bare(self):
        return 0


async def outer():
    """
    Runs inner.
    """
    def inner(): # of one
        r"""Is \\d inner."""
        return 2
    return inner
'''


def test_docstrings_are_taken_out_of_the_source_that_they_describe(tmp_path, monkeypatch):
    (tmp_path / "module.py").write_text(MODULE.replace("\n", "\r\n"), newline="")
    (tmp_path / "other.py").write_text('def f():\n    "Of f."\n    return "\\d"\n')
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(corpora, "validation_mask", lambda names: [name == "other.py" for name in names])
    training, validation = stdlib_docstrings()
    assert validation == (('def f():\n    return "\\d"', "Of f."),)
    assert sorted(training, key=lambda pair: pair[1]) == [
        (
            'def size(self,\n         unit=1):\n    text = """\nkept"""\n    return len(text)',
            "How big   it is.",
        ),
        ("def inner(): # of one\n    return 2", "Is \\d inner."),
        (
            'async def outer():\n    def inner(): # of one\n        r"""Is \\d inner."""\n        return 2\n'
            "    return inner",
            "Runs inner.",
        ),
    ]


def test_no_function_is_on_both_sides_and_a_library_without_docstrings_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    for i in range(40):
        own = f'def f{i}():\n    "Own."\n    return {i}\n'
        (tmp_path / f"m{i}.py").write_text('def shared():\n    "Shared."\n    return 1\n' + own)
    task = load_task(config("stdlib_docstrings"))
    sources = [example.prompt for example in task.train + task.validation]
    assert len(sources) == len(set(sources)) == 41
    assert Example("summarize: def shared():\n    return 1", "\nShared.") in task.validation
    assert (task.metric, task.cuts_prompts) == ("rouge", True)
    part = load_task(config("stdlib_docstrings", size=3))
    assert part.train == task.train[:3] and part.validation == task.validation
    assert task == load_task(config("stdlib_docstrings"))
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in list(tmp_path.glob("*.py")):
        (bare / path.name).write_text("x = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(bare))
    with pytest.raises(UserError, match="hold no docstrings"):
        load_task(config("stdlib_docstrings"))


@pytest.mark.slow
def test_this_machines_library_holds_thousands_of_docstrings_that_a_copy_of_the_name_does_not_explain():
    task = load_task(config("stdlib_docstrings"))
    assert len(task.train) > 3000 and len(task.validation) > 200
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.validation}
    references = [example.completion for example in task.validation]
    names = [example.prompt.split("(")[0].split()[-1].replace("_", " ") for example in task.validation]
    assert quality(task, references, references).values()["rougeL"] > 0.99
    assert quality(task, names, references).values()["rougeL"] < 0.3


# Metrics


@pytest.mark.slow
def test_rouge_is_worked_by_hand():
    predictions, references = ["The cat sat", "a dog", ""], ["the cat sat down", "no match here", "x"]
    result = qualities.rouge(predictions, references).values()
    # 3 of 3 and 3 of 4 unigrams; 2 of 2 and 2 of 3 bigrams; a common subsequence of 3.
    one = [2 * 1 * 0.75 / 1.75, 2 * 1 * (2 / 3) / (5 / 3), 2 * 1 * 0.75 / 1.75]
    np.testing.assert_allclose([result[name] for name in ("rouge1", "rouge2", "rougeL")], np.asarray(one) / 3)


def random_texts(seed, count):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(list("abcd"), draw.integers(4, 12))) for _ in range(count)]


def test_bleu_is_that_of_the_whole_set_as_sacrebleu_has_it():
    import sacrebleu

    predictions, references = ["", *random_texts(0, 30)], ["a b", *random_texts(1, 30)]
    result = qualities.bleu(predictions, references).values()["bleu"]
    assert result == pytest.approx(sacrebleu.corpus_bleu(predictions, [references]).score / 100)
    alone = [
        qualities.bleu([prediction], [reference]).values()["bleu"]
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    assert abs(np.mean(alone) - result) > 0.01
    # Smoothed where an order has no match.
    some = sacrebleu.corpus_bleu(["a b c d e"], [["a b x c y"]]).score / 100
    assert 0 < qualities.bleu(["a b c d e"], ["a b x c y"]).values()["bleu"] == pytest.approx(some)


@pytest.mark.parametrize("name", qualities.METRICS)
def test_a_prediction_that_counts_twice_is_one_that_is_there_twice(name):
    predictions, references = random_texts(2, 6), random_texts(3, 6)
    predictions[0], references[0] = "#### 3", "#### 3"
    measure = qualities.METRICS[name]
    weights = np.asarray([2.0, 0, 1, 0, 3, 1])
    repeated = [index for index, weight in enumerate(weights) for _ in range(int(weight))]
    there = measure([predictions[i] for i in repeated], [references[i] for i in repeated]).values()
    counted = measure(predictions, references).values(weights)
    assert counted == pytest.approx(there) and any(counted.values())
    with pytest.raises(ValueError, match="zip"):
        measure(predictions, references[1:])


# Batches


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe(["summarize: Article It ends. Summary\n"], 280)


LONG = tuple(Example(f"summarize: {i} " + "abcdefgh" * 20, f"\nend {i}") for i in range(3))


def test_a_text_to_summarise_is_cut_at_its_end_so_that_the_summary_fits(tokenizer, monkeypatch):
    lines = []
    monkeypatch.setattr(absl_logging, "info", lambda message, *values: lines.append(message % values))
    task = Task("long", LONG, LONG, "rouge", cuts_prompts=True)
    batch = next(training_batches(task, tokenizer, RowLayout(3, 64, (1, 9), seed=0)))
    for tokens, length, start in zip(batch["tokens"], batch["lengths"], batch["loss_start"], strict=True):
        prompt, completion = (tokenizer.decode(part.tolist()) for part in (tokens[:start], tokens[start:length]))
        example = LONG[int(prompt.split()[1])]
        assert length == 64 and tokens[-1] == tokenizer.eos_ids[0]
        assert example.prompt.startswith(prompt) and completion == example.completion
    assert lines == ["long: 3 of 3 prompts were cut at their end to fit rows of 64 tokens"]
    # No more than half a row is left to a completion.
    batch = next(training_batches(task, tokenizer, RowLayout(3, 8, (1, 9), seed=0)))
    assert batch["loss_start"].tolist() == [4, 4, 4]
    prompts = evaluation_prompts(task, tokenizer, count=3, prompt_length=(1, 32), seed=0)
    for prompt, example in zip(prompts, LONG, strict=True):
        assert prompt.tokens == tuple(tokenizer.encode(example.prompt)[:32])
        assert prompt.text == tokenizer.decode(prompt.tokens) and prompt.reference == example.completion
    assert lines[-1] == "long: 3 of 3 prompts were cut at their end to fit the limit of 32 tokens"
    with pytest.raises(UserError, match="more than the limit of 32"):
        evaluation_prompts(Task("long", LONG, LONG, "rouge"), tokenizer, count=3, prompt_length=(1, 32), seed=0)


def test_the_first_prompts_are_of_all_categories(tokenizer):
    categories = ["writing", "writing", "math", "writing", "math", "coding"]
    examples = [Example(f"question {number}", "", category=name) for number, name in enumerate(categories)]
    task = Task("questions", (), tuple(examples), "")
    chosen = lambda count: [
        prompt.text.split()[1]
        for prompt in evaluation_prompts(task, tokenizer, count=count, prompt_length=(1, 32), seed=0)
    ]
    assert chosen(4) == ["0", "2", "5", "1"]
    assert chosen(6) == ["0", "2", "5", "1", "4", "3"]
    assert chosen(0) == list("012345")


def test_a_cut_prompt_keeps_the_end_that_its_model_expects(tmp_path):
    toy_tokenizers.t5(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    task = Task("long", LONG, LONG, "rouge", cuts_prompts=True)
    whole = tokenizer.encode_prompt(LONG[0].prompt)
    assert whole[-1] == tokenizer.eos_ids[0] and len(whole) > 12
    (prompt,) = evaluation_prompts(task, tokenizer, count=1, prompt_length=(1, 12), seed=0)
    assert prompt.tokens == (*whole[:11], tokenizer.eos_ids[0])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_data_set_makes_rows_for_both_kinds_of_model(prepared, tokenizer, name):
    task = load_task(config(name, prepared))
    layouts = RowLayout(2, 48, (3, 9), seed=0), RowLayout(2, 48, (3, 9), seed=0, start_token=0)
    alone, separate = (next(training_batches(task, tokenizer, layout)) for layout in layouts)
    for row in range(2):
        tokens, prompt = alone["tokens"][row, : alone["lengths"][row]], alone["prompt_lengths"][row]
        np.testing.assert_array_equal(separate["sources"][row, :prompt], tokens[:prompt])
        np.testing.assert_array_equal(separate["tokens"][row, : separate["lengths"][row]], [0, *tokens[prompt:]])


def test_validation_rows_of_language_modelling_give_an_encoder_prompts_as_training_does(prepared, tokenizer):
    task = load_task(config("lm1b", prepared))
    layouts = [RowLayout(4, 16, (3, 9), seed=0, start_token=token) for token in (0, None)]
    separate, alone = (validation_batches(task, tokenizer, layout, count=4) for layout in layouts)
    lengths = {int(length) for batch in separate for length in batch["prompt_lengths"]}
    assert lengths <= set(range(3, 10)) and len(lengths) > 2
    assert all((batch["prompt_lengths"] == 1).all() for batch in alone)


@pytest.mark.slow
def test_an_evaluation_measures_the_tasks_quality_with_an_interval(tmp_path):
    record = LAYOUTS["xsum"][2]
    texts = [json.dumps(record(i)) for i in TRAIN]
    tokenizer = train_byte_bpe(texts, 280)
    made, params = tiny.decoder(0, vocab_size=tokenizer.vocab_size)
    api.save(api.Model(made, params, tokenizer), tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", map(record, TRAIN))
    write_jsonl(tmp_path / "test.jsonl", map(record, EVALUATED))
    chosen = configs.load("configs/evaluate.py:smoke")
    chosen.target = chosen.drafter.path = str(tmp_path / "model")
    chosen.task.update({"name": "xsum", "path": str(tmp_path)})
    chosen.drafters.draft.rules.coupled, chosen.temperatures, chosen.max_new_tokens = (), (0.0,), 8
    chosen.selection.length_max = 12
    rows = evaluate.run(chosen, tmp_path / "run")["rows"]
    for row in rows:
        assert set(row["quality"]) == set(row["quality_ci"]) == {"rouge1", "rouge2", "rougeL"}
        assert row["quality"] == rows[0]["quality"]
        for name, (low, high) in row["quality_ci"].items():
            assert 0 <= low <= row["quality"][name] <= high <= 1
