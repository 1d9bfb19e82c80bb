"""Recipes of distillation by name and by parts, text that the target wrote before, and the sweep's record."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from configs.distillspec import recipe_sweep
from configs.records import condense, sync
from specjax import api, design, distill, main, target_text
from specjax.decoding import loop, sampling, scheduler
from specjax.distillation import cached_text, recipes
from specjax.distillation.data_sources import fractions_of
from specjax.evaluation.engine import Method
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.language_model import states_after
from specjax.runtime import config as configs
from specjax.runtime import stopping
from specjax.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TEXT = "".join(f"def add_{i}(x):\n    return x + {i}\n\n\n" for i in range(300))


def left_open(recipe):
    """A training stage that leaves its parts to a recipe."""
    config = configs.load(str(ROOT / "configs/quickstart.py:smoke")).distilled
    config.recipe = recipe
    config.data.update({"fixed": 0.0, "draft": 0.0, "target": 0.0})
    config.loss.divergence = ""
    return config


@pytest.mark.parametrize(
    ("name", "fractions", "divergence"),
    [
        ("seqkd", (0, 0, 1, 0), "cross_entropy"),
        ("supervised_kd", (1, 0, 0, 0), "forward_kl"),
        ("imitkd", (0.5, 0.5, 0, 0), "forward_kl"),
        ("f_distill", (0, 0.5, 0.5, 0), "total_variation"),
        ("gkd", (0, 1, 0, 0), "jsd"),
        ("distillspec", (0, 1, 0, 0), "forward_kl"),
        ("draft_opd", (0, 0, 0, 1), "forward_kl"),
    ],
)
def test_a_recipe_is_the_parts_that_the_paper_states(name, fractions, divergence):
    section = left_open(name)
    expanded = recipes.expand(section)
    assert tuple(fractions_of(expanded.data).values()) == fractions
    assert expanded.loss.divergence == divergence
    assert section.loss.divergence == ""  # a copy
    assert recipes.expand(expanded) == expanded  # the same parts, stated, do not contradict it


def test_without_a_recipe_the_parts_stay_as_they_are():
    config = configs.load(str(ROOT / "configs/quickstart.py:smoke")).distilled
    assert recipes.expand(config) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "sekqd"}, 'unknown recipe "sekqd"; did you mean "seqkd"?'),
        ({"loss.divergence": "reverse_kl"}, "means loss.divergence 'jsd' and the config says 'reverse_kl'"),
        ({"loss.beta": 0.1}, "means loss.beta 0.5 and the config says 0.1"),
        ({"data.fixed": 1.0}, "means data.fixed 0.0 and the config says 1.0"),
        ({"data.draft": 0.5}, "means data.draft 1.0 and the config says 0.5"),
    ],
)
def test_an_unknown_recipe_and_parts_that_contradict_one_are_refused(changes, message):
    config = left_open("gkd")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=re.escape(message)):
        recipes.expand(config)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with `target`, another target `other`, and `draft`, and the text that they are to write about."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = train_byte_bpe([TEXT], 280)
    for seed, (name, layers) in enumerate({"target": 2, "other": 2, "draft": 1}.items()):
        decoder, params = tiny.decoder(seed, vocab_size=tokenizer.vocab_size, layers=layers, max_positions=96)
        api.save(api.Model(decoder, params, tokenizer), home / name)
    (home / "text.py").write_text(TEXT)
    return home


def writing(home, **changes):
    """The sweep's stage that writes the target's text, on the models of `home`."""
    config = configs.load(str(ROOT / "configs/distillspec/sweep.py:smoke")).target_text_0
    config.task.update({"name": "text", "path": str(home / "text.py"), "size": 0})
    config.update({"target": str(home / "target"), "count": 5, "measure_batches": 1})
    config.drafter.update({"path": str(home / "draft"), "gamma": 2})
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def written(home, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("written")
    return workdir, target_text.run(writing(home), workdir)["rows"][0]


def learning(home, path, **changes):
    """A training stage on the text in `path`."""
    config = left_open("seqkd")
    config.task.update({"name": "text", "path": str(home / "text.py"), "size": 0})
    config.target = config.tokenizer.path = str(home / "target")
    config.model.init = str(home / "draft")
    config.data.target_path = str(path)
    config.speculative_eval.every = 0
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.slow
def test_a_draft_writes_along_and_the_text_is_still_the_targets(home, written):
    _, row = written
    assert row["same_text"] is True and row["rows"] == 5 and row["tokens"] > 0
    assert row["drafter"] == str(home / "draft") and row["speedup"] > 0 and row["block_efficiency"] >= 1


@pytest.mark.slow
def test_text_on_disk_is_what_plain_sampling_with_the_same_keys_writes(home, tmp_path):
    config = writing(home, **{"drafter.path": "", "drafter.rule": "lossless"})
    target_text.run(config, tmp_path)
    rows = cached_text.load(tmp_path / "export").rows
    target = api.load(home / "target")
    for index, (row, end, start) in enumerate(
        zip(rows["tokens"], rows["lengths"], rows["prompt_lengths"], strict=True)
    ):
        tokens, ends = loop.sample(
            target.decoder,
            target.params,
            jnp.asarray(row[None, :start]),
            jnp.asarray([start]),
            sampling.row_keys(config.seed, np.asarray([index], np.int32)),
            sampling=sampling.Sampling.of(1.0),
            greedy=False,
            max_new_tokens=config.data.generation.max_new_tokens,
            eos_ids=target.tokenizer.eos_ids,
        )
        assert tokens[0, : ends[0]].tolist() == row[:end].tolist()


@pytest.mark.slow
def test_interrupted_writing_resumes_and_ends_with_the_same_text(home, written, tmp_path):
    whole = cached_text.load(written[0] / "export")
    first = cached_text.rows_file(tmp_path / "export", 0)
    target_text.run(writing(home), tmp_path)
    modified = first.stat().st_mtime_ns
    cached_text.rows_file(tmp_path / "export", 1).unlink()
    with pytest.raises(UserError, match="is not finished .*rows-00001.npz is missing.*run its stage again"):
        cached_text.load(tmp_path / "export")
    target_text.run(writing(home), tmp_path)
    assert first.stat().st_mtime_ns == modified
    again = cached_text.load(tmp_path / "export")
    assert all(np.array_equal(again.rows[name], whole.rows[name]) for name in whole.rows)


@pytest.mark.slow
def test_a_stopped_writer_keeps_the_texts_that_ended(home, written, tmp_path, monkeypatch):
    ended, starts = [], []
    monkeypatch.setattr(stopping, "stop_asked", lambda: ended.append(1) or len(ended) == 3)
    with pytest.raises(stopping.Stopped):
        target_text.run(writing(home, measure_batches=1), tmp_path)
    monkeypatch.undo()
    decode = scheduler.decode
    monkeypatch.setattr(scheduler, "decode", lambda *args, **how: starts.append(how["indices"]) or decode(*args, **how))
    target_text.run(writing(home), tmp_path)
    assert len(starts[0]) == 5 - 3, "three texts are not decoded again"
    assert not cached_text.take_unwritten(tmp_path / "export")[0], "a next resumption would count them twice"
    whole, again = (cached_text.load(workdir / "export") for workdir in (written[0], tmp_path))
    assert all(np.array_equal(again.rows[name], whole.rows[name]) for name in whole.rows)


def test_a_draft_learns_on_the_text_on_disk_with_nothing_generated(home, written, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "sample", None)
    row = distill.run(learning(home, written[0] / "export"), tmp_path)["rows"][0]
    assert row["recipe"] == "seqkd" and row["data"]["target"] == 1.0
    assert row["divergence"] == "cross_entropy" and row["steps"] == 4
    saved = json.loads((tmp_path / "results.json").read_text())["config"]
    assert saved["data"]["target"] == 1.0 and saved["loss"]["divergence"] == "cross_entropy"


PLAINLY = {"drafter.path": "", "drafter.rule": "lossless"}
LAYERS = (1, 2)


@pytest.fixture(scope="module")
def with_states(home, tmp_path_factory):
    """Text with the states of the target's layers, written without a draft."""
    workdir = tmp_path_factory.mktemp("states")
    target_text.run(writing(home, states=LAYERS, **PLAINLY), workdir)
    return cached_text.load(workdir / "export")


@pytest.mark.slow
@pytest.mark.parametrize("drafted", [False, True], ids=["plain", "with a draft"])
def test_stored_states_are_those_of_the_target_on_the_text(home, with_states, tmp_path, drafted):
    """Although decoding computed them, with rows that took several prompts and drafted tokens that were refused."""
    text = with_states
    if drafted:
        target_text.run(writing(home, states=LAYERS), tmp_path)
        text = cached_text.load(tmp_path / "export")
    target, rows = api.load(home / "target"), text.batch(0, 0, len(text), LAYERS)
    tokens, index = jnp.asarray(rows["tokens"]), np.arange(rows["tokens"].shape[1])[None]
    whole = jax.jit(lambda x: states_after(target.decoder, target.params, x, LAYERS))(tokens)
    followed = index < rows["lengths"][:, None] - 1
    for layer, hidden in zip(LAYERS, whole, strict=True):
        stored = rows[cached_text.states_name(layer)]
        assert stored.dtype == np.float16 and not stored[~followed].any()
        np.testing.assert_allclose(stored[followed], np.asarray(hidden)[followed], rtol=1e-3, atol=1e-2)
    answered = followed & (index >= rows["loss_start"][:, None] - 1)
    normalisers = jax.nn.logsumexp(target.decoder.head(target.params, jnp.asarray(stored, jnp.float32)), axis=-1)
    assert not rows[cached_text.NORMALISERS][~answered].any()
    np.testing.assert_allclose(rows[cached_text.NORMALISERS][answered], np.asarray(normalisers)[answered], rtol=1e-5)


def test_recording_states_does_not_change_the_text(home, with_states, tmp_path):
    target_text.run(writing(home, **PLAINLY), tmp_path)
    plain = cached_text.load(tmp_path / "export")
    assert all(np.array_equal(with_states.rows[name], plain.rows[name]) for name in plain.rows)


def test_text_in_several_parts_is_the_same_and_counts_each_second_once(home, with_states, tmp_path, monkeypatch):
    results, decode = [], Method.decode
    monkeypatch.setattr(target_text, "_TEXTS_AT_ONCE", 1)
    monkeypatch.setattr(Method, "decode", lambda *args, **how: results.append(decode(*args, **how)) or results[-1])
    target_text.run(writing(home, **PLAINLY), tmp_path)
    parts = cached_text.load(tmp_path / "export")
    assert all(np.array_equal(with_states.rows[name], parts.rows[name]) for name in parts.rows)
    assert len(results) > 1 and 0 < parts.seconds < 1.001 * sum(result.seconds for result in results)


def test_a_stopped_writer_keeps_the_states_of_texts_that_ended(home, with_states, tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(stopping, "stop_asked", lambda: ended.append(1) or len(ended) == 3)
    with pytest.raises(stopping.Stopped):
        target_text.run(writing(home, states=LAYERS, **PLAINLY), tmp_path)
    monkeypatch.undo()
    assert cached_text.take_unwritten(tmp_path / "export")[0], "a text of a batch that is not complete"
    target_text.run(writing(home, states=LAYERS, **PLAINLY), tmp_path)
    again = cached_text.load(tmp_path / "export")
    assert all(np.array_equal(again.rows[name], with_states.rows[name]) for name in with_states.rows)
    for layer in LAYERS:
        for row, expected in zip(again.states[layer], with_states.states[layer], strict=True):
            np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-2)
    for row, expected in zip(again.normalisers, with_states.normalisers, strict=True):
        np.testing.assert_allclose(row, expected, rtol=1e-3)


def test_states_that_float16_cannot_hold_are_refused():
    states = np.full((2, 3), 6e4, np.float32)
    assert cached_text.rounded(states, 7).dtype == np.float16
    states[1, 2] = 1e5
    with pytest.raises(UserError, match="after layer 7 are not finite in float16; take this layer out of `states`"):
        cached_text.rounded(states, 7)


def test_states_of_another_target_are_refused(home, with_states, tmp_path):
    directory, named = with_states.directory, {"target": str(home / "other"), "loss.divergence": "forward_kl"}
    with pytest.raises(UserError, match="is of another target than this run's; write it again"):
        distill.run(learning(home, directory, recipe="", **{"data.target": 1.0}, **named), tmp_path)
    config = configs.load(str(ROOT / "configs/draft_design/acceptance.py:smoke")).acceptance
    config.update({"target": str(home / "other"), "drafts": (str(home / "draft"),), "texts": (str(directory),)})
    with pytest.raises(UserError, match="of another target .*write it again, or name text of this target in texts"):
        design.run(config, tmp_path)


def test_every_pass_over_the_text_meets_each_row_once_and_a_step_is_the_same_again(written):
    text = cached_text.load(written[0] / "export")
    steps = [text.batch(3, step, 2)["tokens"] for step in range(5)]
    assert np.array_equal(np.sort(np.concatenate(steps), axis=0), np.sort(np.repeat(text.rows["tokens"], 2, 0), axis=0))
    assert np.array_equal(text.batch(3, 4, 2)["tokens"], steps[4])
    orders = np.concatenate(steps).reshape(2, 5, -1)
    assert not np.array_equal(orders[0], orders[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "{home}/other"}, "is of another target than this run's; write it again"),
        ({"data.generation.temperature": 0.5}, "with other settings than this run's: temperature 1.0 there, 0.5 here"),
        ({"data.sequence_length": 24}, "of other prompts than this run's: sequence_length 32 there, 24 here"),
        ({"task.size": 5000}, "of other prompts than this run's: task.size 0 there, 5000 here"),
        ({"target": "", "loss.divergence": "", "train.best_metric": "validation_loss"}, "there is none: set `target`"),
        ({"data.target_path": "{home}"}, "there is no .*about.json; name a folder that the binary target_text wrote"),
    ],
)
def test_text_of_another_origin_is_refused(home, written, tmp_path, changes, message):
    changes = {key: value.format(home=home) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(UserError, match=message):
        distill.run(learning(home, written[0] / "export", **changes), tmp_path)


def test_prompts_count_by_their_content_and_not_by_their_folder(tmp_path):
    data = configs.load(str(ROOT / "configs/quickstart.py:smoke")).distilled.data

    def prompts(folder, content):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "prompts.txt").write_text(content)
        task = ConfigDict({"name": "prompts", "path": str(tmp_path / folder / "prompts.txt"), "seed": 0, "size": 0})
        return cached_text.provenance("", "", task, data)["prompts"]

    assert prompts("before", "one\ntwo\n") == prompts("after", "one\ntwo\n") != prompts("after", "one\ntoo\n")


def test_rows_of_a_batch_have_similar_lengths_and_no_needless_columns():
    lengths = np.random.default_rng(0).integers(10, 500, 64).astype(np.int32)
    tokens = np.repeat(np.arange(64, dtype=np.int32)[:, None], 500, 1)
    text = cached_text.CachedText(Path(), {}, {"tokens": tokens, "lengths": lengths}, 0.0)
    batches = [text.batch(0, step, 4) for step in range(64)]  # four passes
    rows = np.concatenate([batch["tokens"][:, 0] for batch in batches]).reshape(4, 64)
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(64), (4, 1)))
    widths = {batch["tokens"].shape[1] for batch in batches}
    assert widths <= {*range(64, 500, 64), 500} and len(widths) > 1
    assert all(batch["tokens"].shape[1] >= batch["lengths"].max() for batch in batches)
    spread = np.mean([np.ptp(batch["lengths"]) for batch in batches])
    assert spread < 0.6 * np.mean([np.ptp(np.random.default_rng(n).choice(lengths, 4)) for n in range(64)])


def test_held_out_rows_are_not_trained_on(with_states):
    text, last = with_states, LAYERS[-1]
    rest, (batch,) = text.held_out(1, 2)
    assert len(rest) == len(text) - 2 == len(rest.states[last]) == len(rest.normalisers)
    held = {row.tobytes() for row in text.rows["tokens"][-2:]}
    assert {row.tobytes() for row in batch["tokens"]} == held
    assert batch[cached_text.states_name(last)].shape[:2] == batch["tokens"].shape
    assert not held & {row.tobytes() for step in range(3) for row in rest.batch(0, step, 1)["tokens"]}
    with pytest.raises(UserError, match="has 5 rows, and 1 are left .* = 4 rows\\); lower train.eval_batches"):
        text.held_out(2, 2)


def test_other_answers_to_the_prompts_of_validation_are_not_trained_on():
    prompts, tokens = [1, 2, 3, 4, 5, 6, 1, 2], np.zeros((8, 5), np.int32)
    tokens[:, 0], tokens[:, 1] = prompts, range(10, 18)
    starts = np.ones(8, np.int32)
    rows = {"tokens": tokens, "lengths": np.full(8, 5, np.int32), "loss_start": starts}
    rest, (batch,) = cached_text.CachedText(Path(), {}, rows, 0.0).held_out(1, 2)
    assert sorted(batch["tokens"][:, 1].tolist()) == [16, 17]
    assert rest.rows["tokens"][:, 0].tolist() == [3, 4, 5, 6]
    # Every text of an encoder-decoder begins with the same token; its prompt is what it reads.
    sources = {"sources": tokens[:, :3], "prompt_lengths": starts}
    rows = {**rows, "tokens": np.where(np.arange(5) > 0, tokens, 0), **sources}
    rest, _ = cached_text.CachedText(Path(), {}, rows, 0.0).held_out(1, 2)
    assert rest.rows["sources"][:, 0].tolist() == [3, 4, 5, 6]


def test_text_of_another_tokenizer_is_refused(written):
    text = cached_text.load(written[0] / "export")
    with pytest.raises(UserError, match="is of another tokenizer than this run's"):
        text.check({**text.about, "tokenizer": "another"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drafter.rule": "lenient_exp"}, "lenient_exp is lossy and would change the text"),
        ({"count": 0}, "count is 0; it must be 1 or more"),
        ({"states": (99,)}, "states has the layer 99; this target's layers are 1 .. "),
        ({"states": (-99,)}, "states has the layer -99; this target's layers are 1 .. "),
        ({"states": (0,)}, "states has the layer 0; this target's layers are 1 .. "),
        ({"states": (1.5,)}, "states has the layer 1.5; this target's layers are 1 .. "),
        ({"seed": 7}, "contains text written with other settings; choose another --workdir"),
    ],
)
def test_writing_that_makes_no_sense_is_refused(home, written, changes, message):
    with pytest.raises(UserError, match=message):
        target_text.run(writing(home, **changes), written[0])


def test_damaged_text_is_refused(home, written, tmp_path):
    target_text.run(writing(home), tmp_path)
    cached_text.rows_file(tmp_path / "export", 0).write_bytes(b"PK")
    with pytest.raises(UserError, match="rows-00000.npz is damaged .*delete it and run its stage again"):
        cached_text.load(tmp_path / "export")
    (tmp_path / "export" / "about.json").write_text("{")
    with pytest.raises(UserError, match="about.json is damaged .*write the text again"):
        cached_text.load(tmp_path / "export")


@pytest.mark.slow
def test_an_encoder_decoder_is_made_in_the_manner_of_t5(tmp_path):
    config = configs.load(str(ROOT / "configs/distillspec/sweep.py:encoder_decoder-smoke")).target
    tokenizer = train_byte_bpe([TEXT], 280)
    model = distill.random_model(config.model, tokenizer.vocab_size, tokenizer.pad_id)
    assert model.is_encoder_decoder and model.config.start_token == tokenizer.pad_id
    params = model.init(jax.random.key(0))
    api.save(api.Model(model, params, tokenizer), tmp_path / "t5")
    assert api.load(tmp_path / "t5").decoder.config == model.config
    config.model.kv_heads = 1
    with pytest.raises(UserError, match="as many kv_heads"):
        distill.random_model(config.model, tokenizer.vocab_size, tokenizer.pad_id)


def stages_of(**names):
    from ml_collections import ConfigDict

    sections = {name: {"binary": "distill", "steps": steps} for name, steps in names.items()}
    return ConfigDict({"seed": 0, "stages": tuple(names), **sections})


def test_a_run_of_stages_may_grow_but_finished_stages_may_not_change(tmp_path):
    configs.assert_same_run(stages_of(target=1, draft=2), tmp_path)
    configs.assert_same_run(stages_of(target=1, between=5, draft=2, last=3), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["stages"] == ["target", "between", "draft", "last"]
    before = (tmp_path / "config.json").read_bytes()
    for changed, message in [
        (stages_of(target=1, between=5, draft=3, last=3, more=1), "draft.steps: 2 -> 3"),
        (stages_of(target=1, draft=2), 'between.binary: "distill" -> absent'),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            configs.assert_same_run(changed, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def made_up(seeds=(0, 1, 2)):
    """A sweep's record in which the draft's text with JSD is best, and fixed text adds half as much."""
    worth = {"fixed": 0.1, "draft": 0.2, "target": 0.15, "mixed": 0.18}
    cells = {f"{text}_{d}": w + (d == "jsd") * 0.01 for text, w in worth.items() for d in recipe_sweep.DIVERGENCES}
    cells |= {"supervised": 0.0, "plain_steps": 0.02, "plain_clock": 0.05, "target_forward_kl_clock": 0.16}
    rows = [{"stage": "target", "steps": 5, "train_seconds": 9.0}]
    for seed in seeds:
        for cell, gain in cells.items():
            name = f"{cell}_{seed}"
            rows.append({"stage": name, "steps": 40, "train_seconds": 20.0})
            for temperature in (0.0, 1.0):
                value = 2 * (1 + gain) * (1 + 0.01 * seed * (cell != "supervised"))
                rows.append({"stage": "e", "drafter": name, "temperature": temperature, "block_efficiency": value})
    environment = {"jax": "0.1", "python": "3.12", "device_kind": "cpu", "git_commit": "0123456789abcdef"}
    return {"config": {"stages": ["a"] * 99}, "environment": environment, "rows": rows}


def test_the_sweeps_table_gives_paired_gains_with_intervals_over_seeds():
    text = recipe_sweep.table(made_up())
    # Gains of 20, 21.2 and 22.4%, whose standard deviation is 1.2.
    assert "| draft forward kl | 3 | 40 | 20 | 2.42 | +21.2% [+18.2, +24.2] |" in text
    assert "| best (draft jsd) over plain clock | 0 | 3 | +15.2% [+15.2, +15.2] |" in text
    assert "62 of 99 stages finished; jax 0.1" in text and "commit 0123456789ab" in text
    assert "+20.0% (1 seed)" in recipe_sweep.table(made_up(seeds=(0,)))


def test_the_heat_map_has_a_field_for_each_text_and_divergence_and_leaves_out_what_is_not_there(tmp_path):
    record = made_up(seeds=(0,))
    record["rows"] = [row for row in record["rows"] if row.get("drafter") != "mixed_jsd_0"]
    matrix = recipe_sweep.matrix(recipe_sweep.efficiencies(record)[1.0])
    assert matrix[0] == pytest.approx([10, 10, 11, 10]) and matrix[1] == pytest.approx([20, 20, 21, 20])
    assert matrix[3][2] is None
    recipe_sweep.heat_map(record, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000 and (tmp_path / "map.dark.png").exists()
    with pytest.raises(ValueError, match="nothing to draw"):
        recipe_sweep.heat_map({**record, "rows": record["rows"][:2]}, tmp_path / "none.png")


def test_a_pages_figure_is_drawn_with_its_table(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("<!-- table:sweep -->\n<!-- /table -->\n")
    (tmp_path / "sweep.json").write_text(json.dumps(made_up(seeds=(0,))))
    assert sync.main([str(page), str(tmp_path)]) == 0
    assert (tmp_path / "sweep.png").exists() and "draft jsd" in page.read_text()


def test_a_record_of_a_sweep_says_of_a_stage_which_it_is_like():
    config = configs.to_plain(configs.load(str(ROOT / "configs/distillspec/sweep.py")))
    brief = condense.brief(config)
    assert brief["draft_jsd_2"]["like"] == "draft_forward_kl_2" and brief["draft_jsd_2"]["loss.divergence"] == "jsd"
    assert len(brief["draft_jsd_2"]) == 2
    assert brief["target"] == config["target"] and brief["stages"] == config["stages"]
    assert len(json.dumps(brief)) < 0.25 * len(json.dumps(config))


def test_a_record_keeps_what_is_read_of_written_text(written):
    workdir = written[0].parent
    (workdir / "config.json").write_text(
        json.dumps({"seed": 0, "stages": [written[0].name, "later"], written[0].name: {}, "later": {}})
    )
    (row,) = condense.condensed([workdir])["rows"]
    assert row["same_text"] is True and row["drafted_tokens_per_second"] > 0 and "target" not in row


@pytest.mark.parametrize("variant", ["", "encoder_decoder", "smoke", "encoder_decoder-smoke", "5"])
def test_every_variant_of_the_sweep_names_only_earlier_stages_and_more_seeds_only_add_some(variant, tmp_path):
    path = ROOT / "configs/distillspec/sweep.py"
    config = configs.load(f"{path}:{variant}")
    main._check_stages(config)
    texts, divergences, newer = recipe_sweep.TEXTS, recipe_sweep.DIVERGENCES, recipe_sweep.NEWER
    if "smoke" in variant:  # has a few of each
        texts, divergences, newer = ("fixed", "draft"), divergences[:1], newer[:1]
    cells = {f"{text}_{divergence}_0" for text in texts for divergence in divergences}
    assert cells | {f"draft_{divergence}_0" for divergence in newer} < set(config.stages)
    configs.assert_same_run(config, tmp_path)
    words = [word for word in variant.split("-") if word and not word.isdigit()]
    configs.assert_same_run(configs.load(f"{path}:{'-'.join([*words, '7'])}"), tmp_path)


@pytest.mark.parametrize("variant", ["encoder", "0", "3-4"])
def test_a_variant_that_the_sweep_lacks_is_refused(variant):
    with pytest.raises(UserError, match="variants are encoder_decoder, smoke and a number of seeds; not"):
        configs.load(f"{ROOT / 'configs/distillspec/sweep.py'}:{variant}")
