"""The optimiser step, the sources of text, and the loop: equal however it is cut, spread, or interrupted.

Run as a program (`python tests/test_trainer.py WORKDIR`) it is the process that the test of SIGKILL kills.
"""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny as tiny_models

from configs import common
from specjax import api, distill
from specjax.distillation import data_sources, meter, objective, trainer, update
from specjax.hub import adapter as hub_adapter
from specjax.hub import load as hub_load
from specjax.hub import save as hub_save
from specjax.hub import weights
from specjax.hub.tokenizer import Tokenizer
from specjax.models.attachment import AttachedDraft
from specjax.models.decoder import Decoder
from specjax.models.table import make_attachment
from specjax.models.vocabulary import draft_vocabulary
from specjax.reporting import records
from specjax.runtime import mesh as meshes
from specjax.runtime import stopping
from specjax.runtime.errors import UserError

VOCAB, BATCH, LENGTH = 16, 4, 12


TINY = {
    "data.batch_size": BATCH,
    "data.sequence_length": LENGTH,
    "data.prompt_length_min": 2,
    "data.prompt_length_max": 4,
    "data.generation.max_new_tokens": 8,
    "rollouts.gamma": 3,
    "rollouts.replays": 2,
    "loss.divergence": "forward_kl",
    "loss.chunk": 20,
    "loss.balance": 0.0,
    "optimizer.final_fraction": 0.1,
    "optimizer.warmup_steps": 2,
    "optimizer.weight_decay": 0.1,
    "train.log_every": 2,
    "train.eval_every": 4,
    "train.eval_batches": 2,
    "train.checkpoint_every": 4,
    "speculative_eval.prompts": 4,
    "speculative_eval.gamma": 2,
    "speculative_eval.max_new_tokens": 8,
}


def make_config(**overrides):
    """A training stage of 12 steps on few short texts."""
    config = common.training(12, 0.01)
    config.update_from_flattened_dict(TINY | overrides)
    return config


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Trainers of one config are compiled once: nearly all the time of these tests is the compiler's."""
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


MIXTURE = {"data.fixed": 0.3, "data.draft": 0.4, "data.target": 0.3}
HALF_ON_POLICY = {"data.fixed": 0.5, "data.draft": 0.5}


class Rows:
    """An endless iterator over random rows that can be set back, like the one of `data.batches`."""

    def __init__(self, seed=0):
        self.position, self.seed = 0, seed

    def __iter__(self):
        return self

    def __next__(self):
        draw = np.random.default_rng([self.seed, self.position])
        self.position += 1
        return {
            # Skewed, so that there is something to learn.
            "tokens": np.minimum(draw.geometric(0.3, (BATCH, LENGTH)), VOCAB - 1).astype(np.int32),
            "lengths": draw.integers(6, LENGTH + 1, BATCH, dtype=np.int32),
            "loss_start": draw.integers(1, 4, BATCH, dtype=np.int32),
            "prompt_lengths": draw.integers(2, 5, BATCH, dtype=np.int32),
        }

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def tiny(width, layers=1):
    shape = dict(vocab_size=VOCAB, width=width, layers=layers, kv_heads=2, head_size=4, mlp_width=2 * width)
    return Decoder(tiny_models.config(**shape, max_positions=32, tied_head=False))


@functools.cache
def parameters(width, layers, seed):
    return tiny_models.on_device(tiny_models.drawn(tiny(width, layers), seed))


def make_inputs(config, with_target=True):
    mesh = meshes.make_mesh(config.mesh)
    target = tiny(16, 2)
    placed = meshes.shard(parameters(16, 2, 1), target.axes(), mesh)
    return trainer.TrainingInputs(
        draft=tiny(8),
        params=parameters(8, 1, 0),
        target=target if with_target else None,
        target_params=placed if with_target else None,
        batches=Rows(),
        validation=[next(Rows(seed)) for seed in (1, 2)],
        eos_ids=(0,),
        longest_prompt=config.data.prompt_length_max,
    )


def make_trainer(config, workdir, *, inputs=None, min_seconds=0.0, evaluator=None):
    inputs = make_inputs(config) if inputs is None else inputs
    mesh = meshes.make_mesh(config.mesh)
    return trainer.Trainer(config, workdir, inputs, mesh, min_seconds=min_seconds, evaluator=evaluator)


def assert_same_bits(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


# The optimiser step.


def test_the_learning_rate_warms_up_falls_as_a_cosine_and_stays():
    config = make_config(**{"optimizer.peak_learning_rate": 2.0, "optimizer.warmup_steps": 4}).optimizer
    rate = update.learning_rate(config, 12)
    values = [float(rate(jnp.int32(step))) for step in (0, 1, 3, 4, 8, 12, 1000)]
    # Halfway through the cosine: the mean of 2 and a tenth of it.
    np.testing.assert_allclose(values, [0.5, 1.0, 2.0, 2.0, 1.1, 0.2, 0.2], rtol=1e-6)


def test_the_final_rate_is_held_for_the_last_fraction_of_the_steps():
    overrides = {"optimizer.peak_learning_rate": 2.0, "optimizer.warmup_steps": 0, "optimizer.hold_fraction": 0.25}
    rate = update.learning_rate(make_config(**overrides).optimizer, 16)
    values = [float(rate(jnp.int32(step))) for step in (0, 6, 12, 15, 16)]
    np.testing.assert_allclose(values, [2.0, 1.1, 0.2, 0.2, 0.2], rtol=1e-6)


def test_weights_decay_in_matrices_alone():
    optimizer = update.make_optimizer(make_config(**{"optimizer.warmup_steps": 0}).optimizer, 12)
    params = {"matrix": jnp.ones((2, 2)), "gain": jnp.ones((2,))}
    zeros = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["matrix"], -0.01 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["gain"], 0)


def one_step(config, batch):
    """The state and metrics after one step on the config's mesh."""
    mesh = meshes.make_mesh(config.mesh)
    inputs = make_inputs(config)
    loss = objective.Loss.of_config(config.loss, inputs.draft, inputs.target)
    optimizer = update.make_optimizer(config.optimizer, 12)
    state = update.initial_state(inputs.params, inputs.draft.axes(), optimizer, mesh)
    rate = update.learning_rate(config.optimizer, 12)
    step = jax.jit(update.make_step(loss, optimizer, rate, config.optimizer.accumulation))
    with meshes.use(mesh):
        return step(state, inputs.target_params, meshes.shard(batch, update.BATCH_AXES, mesh))


def doubled():
    """A batch of twice as many rows."""
    first, second = (next(Rows(seed)) for seed in (0, 1))
    return {name: np.concatenate([first[name], second[name]]) for name in first}


@pytest.fixture(scope="module")
def whole_step():
    """One step on such a batch, on one device."""
    with jax.numpy_dtype_promotion("strict"):
        return one_step(make_config(), doubled())


def norm(tree):
    return math.sqrt(sum(float(np.sum(np.square(np.asarray(leaf, np.float64)))) for leaf in jax.tree.leaves(tree)))


def assert_close(left, right):
    """Parameters and the optimiser's state agree to 1e-5 of their global norm."""
    left, right = (jax.tree.map(np.asarray, tree) for tree in (left, right))
    for part in ("params", "optimizer_state"):
        a, b = getattr(left, part), getattr(right, part)
        assert norm(jax.tree.map(lambda x, y: x - y, a, b)) < 1e-5 * norm(a)


@pytest.mark.slow
def test_accumulated_microbatches_are_one_big_batch(whole_step):
    batch = doubled()
    assert len(set(batch["lengths"] - batch["loss_start"])) > 1  # a mean of means would differ
    whole, whole_metrics = whole_step
    cut, metrics = one_step(make_config(**{"optimizer.accumulation": 4}), batch)
    assert_close(cut, whole)
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_a_step_on_eight_devices_is_the_step_on_one(sizes, whole_step):
    if jax.device_count() < 8:
        pytest.skip("needs 8 (virtual) devices")
    alone, metrics = whole_step
    data, fsdp, tensor = sizes
    config = make_config(**{"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor})
    spread, spread_metrics = one_step(config, doubled())
    assert_close(spread, alone)
    np.testing.assert_allclose(spread_metrics["loss"], metrics["loss"], rtol=1e-5)


def test_the_state_of_the_optimiser_lies_where_its_parameters_do():
    if jax.device_count() < 8:
        pytest.skip("needs 8 (virtual) devices")
    config = make_config(**{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    inputs = make_inputs(config)
    optimizer = update.make_optimizer(config.optimizer, 12)
    mesh = meshes.make_mesh(config.mesh)
    state = update.initial_state(inputs.params, inputs.draft.axes(), optimizer, mesh)
    layout = [leaf.sharding for leaf in jax.tree.leaves(state.params)]
    assert not all(sharding.is_fully_replicated for sharding in layout)
    kept = [leaf.sharding for leaf in jax.tree.leaves(state.optimizer_state) if leaf.ndim]
    assert kept == layout + layout  # both moments


# Sources of text.


def test_sources_are_drawn_in_their_fractions_and_the_same_again():
    fractions = {"fixed": 0.5, "draft": 0.3, "target": 0.1, "assisted": 0.1}
    drawn = [data_sources.source_of_step(fractions, 7, step) for step in range(4000)]
    for name, fraction in fractions.items():
        assert abs(drawn.count(name) / 4000 - fraction) < 0.03
    assert drawn == [data_sources.source_of_step(fractions, 7, step) for step in range(4000)]
    assert drawn != [data_sources.source_of_step(fractions, 8, step) for step in range(4000)]


@pytest.mark.parametrize("only", data_sources.SOURCES)
def test_a_source_of_fraction_zero_is_never_drawn(only):
    fractions = {name: float(name == only) for name in data_sources.SOURCES}
    assert {data_sources.source_of_step(fractions, 0, step) for step in range(500)} == {only}


@pytest.mark.parametrize(
    "fractions, message",
    [
        ((0.5, 0.4, 0.0, 0.0), "must sum to 1"),
        ((1.5, -0.5, 0.0, 0.0), "must not be negative"),
        ((float("nan"), 0.5, 0.5, 0.0), "must not be negative"),
        ((0.5, 0.0, 0.5, 0.0), "data.target is 0.5 but there is no target"),
        ((0.5, 0.0, 0.0, 0.5), "data.assisted is 0.5 but there is no target"),
    ],
)
def test_fractions_that_are_no_mixture_are_refused(fractions, message):
    with pytest.raises(UserError, match=message):
        data_sources.check_fractions(dict(zip(data_sources.SOURCES, fractions, strict=True)), has_target=False)


def generated(step, seed=0, temperature=1.0):
    prompts = jnp.asarray(np.random.default_rng(0).integers(1, VOCAB, (BATCH, 4)), jnp.int32)
    lengths = jnp.asarray([2, 3, 4, 4], jnp.int32)
    generate = data_sources.Generation(temperature, 0, 1.0, 6, (0,), seed)
    batch = jax.jit(generate, static_argnums=4)(parameters(8, 1, 0), prompts, lengths, step, tiny(8))
    return prompts, lengths, batch


def test_generated_rows_continue_their_prompts_and_are_judged_after_them():
    prompts, lengths, batch = generated(np.int32(3))
    assert batch["tokens"].shape == (BATCH, 4 + 6)
    np.testing.assert_array_equal(batch["loss_start"], lengths)
    np.testing.assert_array_equal(batch["prompt_lengths"], lengths)
    for row in range(BATCH):
        length = int(lengths[row])
        np.testing.assert_array_equal(batch["tokens"][row, :length], prompts[row, :length])
        new = batch["tokens"][row, length : int(batch["lengths"][row])].tolist()
        assert len(new) == 6 or new[-1] == 0
        assert 0 not in new[:-1]


@pytest.mark.slow
def test_generated_text_is_a_function_of_seed_and_step():
    same, again = (generated(np.int32(3))[2]["tokens"] for _ in range(2))
    np.testing.assert_array_equal(same, again)
    assert (generated(np.int32(4))[2]["tokens"] != same).any()
    assert (generated(np.int32(3), seed=1)[2]["tokens"] != same).any()
    greedy = [generated(np.int32(step), temperature=0.0)[2]["tokens"] for step in (3, 4)]
    np.testing.assert_array_equal(*greedy)


def test_prompt_widths_double():
    widths = [data_sources.prompt_width(np.asarray([1, longest]), 4, 20) for longest in (2, 4, 5, 9, 17, 20)]
    assert widths == [4, 4, 8, 16, 20, 20]


# The loop.


@pytest.mark.slow
def test_a_run_of_all_sources_compiles_once_for_each_shape_and_logs_what_it_did(tmp_path):
    config = make_config(**MIXTURE)
    run = make_trainer(config, tmp_path)
    outcome = run.run()
    # Text is written by two models; rows from the data and generated ones (4 + 8) are equally wide.
    assert sorted(run._executables) == ["draft 4", "target 4", "update {'tokens': (4, 12)} 0"]
    assert run._functions.validation_loss._cache_size() == 1
    assert outcome.steps == 12 and outcome.train_seconds > 0
    assert [line["step"] for line in outcome.validation] == [0, 4, 8, 12]
    assert outcome.validation[-1]["validation_loss"] < outcome.validation[0]["validation_loss"]
    assert outcome.validation[-1]["validation_acceptance"] > outcome.validation[0]["validation_acceptance"]
    lines = records.read_metrics(tmp_path / "metrics.jsonl")
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [2, 4, 6, 8, 10, 12]
    for name in ("grad_norm", "learning_rate", "acceptance", "tokens_per_second", "train_seconds"):
        assert all(line[name] > 0 for line in trained)
    assert outcome.loss == trained[-1]["loss"]


@pytest.mark.slow
def test_plain_training_needs_no_target_but_measures_acceptance_with_one(tmp_path):
    config = make_config(**{"loss.divergence": "cross_entropy", "train.steps": 8})
    alone = make_trainer(config, tmp_path / "alone", inputs=make_inputs(config, with_target=False)).run()
    measured = make_trainer(config, tmp_path / "measured").run()
    assert_same_bits(alone.params, measured.params)
    assert "validation_acceptance" not in alone.validation[-1]
    assert 0 < measured.validation[-1]["validation_acceptance"] < 1
    assert alone.validation[-1]["validation_loss"] == pytest.approx(measured.validation[-1]["validation_loss"])


class Interruption(Exception):
    pass


def interrupt_at(step):
    def evaluator(params, at):
        if at == step:
            raise Interruption
        return {}

    return evaluator


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A config, the folder of a run of it that nothing interrupted, and its result."""
    config = make_config(**HALF_ON_POLICY, **{"speculative_eval.every": 8, "optimizer.accumulation": 2})
    folder = tmp_path_factory.mktemp("straight")
    with jax.numpy_dtype_promotion("strict"):  # as the other runs, or it would be compiled again
        return config, folder, make_trainer(config, folder).run()


def untimed(folder):
    """What a run logged, without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name not in ("tokens_per_second", "train_seconds")}
        for line in records.read_metrics(folder / "metrics.jsonl")
    ]


def test_an_interrupted_run_arrives_at_the_same_bits(tmp_path, straight):
    config, folder, straight = straight
    with pytest.raises(Interruption):  # at step 8, before its checkpoint: the one of step 4 is the last
        make_trainer(config, tmp_path / "cut", evaluator=interrupt_at(8)).run()
    resumed = make_trainer(config, tmp_path / "cut").run()
    assert_same_bits(resumed.params, straight.params)
    assert resumed.validation == straight.validation
    assert resumed.tokens == straight.tokens and resumed.loss == straight.loss
    assert untimed(tmp_path / "cut") == untimed(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A config of 4 steps, the folder of its run, and the result."""
    config, folder = make_config(**{"train.steps": 4}), tmp_path_factory.mktemp("finished")
    with jax.numpy_dtype_promotion("strict"):
        return config, folder, make_trainer(config, folder).run()


def test_a_finished_run_is_not_trained_further(finished):
    config, folder, first = finished
    again = make_trainer(config, folder)
    outcome = again.run()
    assert_same_bits(outcome.params, first.params)
    assert not again._executables
    assert (outcome.train_seconds, outcome.tokens) == (first.train_seconds, first.tokens)
    assert outcome.validation == first.validation


def test_the_evaluator_is_asked_every_so_often_and_its_numbers_are_logged(tmp_path):
    asked = []

    def evaluator(params, step):
        asked.append(step)
        return {"block_efficiency": 1.5 + step}

    make_trainer(make_config(**{"speculative_eval.every": 8}), tmp_path, evaluator=evaluator).run()
    assert asked == [0, 8]
    lines = records.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["block_efficiency"] for line in lines if "block_efficiency" in line] == [1.5, 9.5]


def narrow_inputs(config, dtype, options=None):
    """The inputs in this dtype; with options of an adapter, the adapter is trained."""
    inputs = make_inputs(config)
    narrowed = lambda model: Decoder(dataclasses.replace(model.config, param_dtype=dtype, compute_dtype=dtype))
    target, target_params = narrowed(inputs.target), update.cast(inputs.target_params, dtype=dtype)
    draft, params = narrowed(inputs.draft), update.cast(inputs.params, dtype=dtype)
    if options is not None:
        draft = AttachedDraft.of(make_attachment("adapter", target.config, options))
        params = draft.init(jax.random.key(0))
    return dataclasses.replace(inputs, draft=draft, params=params, target=target, target_params=target_params)


@pytest.mark.slow
def test_training_in_bfloat16_reaches_the_loss_of_float32(tmp_path):
    steps = {f"train.{name}": 100 for name in ("steps", "eval_every", "checkpoint_every")}
    config = make_config(**steps, **{"optimizer.peak_learning_rate": 2e-3})
    losses = {}
    for dtype in ("float32", "bfloat16"):
        inputs = narrow_inputs(config, dtype, {"exit_layer": 1, "kind": "attention", "own_head": False})
        outcome = make_trainer(config, tmp_path / dtype, inputs=inputs).run()
        assert {leaf.dtype for leaf in jax.tree.leaves(outcome.params)} == {np.dtype("float32")}
        losses[dtype] = [line["validation_loss"] for line in outcome.validation]
    (before, wide), (_, narrow) = losses["float32"], losses["bfloat16"]
    assert wide < 0.5 * before  # there is something to learn
    assert narrow == pytest.approx(wide, rel=0.02)


def test_what_is_trained_and_the_optimisers_moments_are_float32_whatever_the_model_is_stored_in():
    config = make_config()
    inputs, mesh = narrow_inputs(config, "bfloat16"), meshes.make_mesh(config.mesh)
    optimizer = update.make_optimizer(config.optimizer, 12)
    state = update.initial_state(inputs.params, inputs.draft.axes(), optimizer, mesh)
    abstract = update.abstract_state(inputs.draft.abstract_params(), inputs.draft.axes(), optimizer, mesh)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state)]
    assert {str(dtype) for dtype in dtypes} == {"float32", "int32"}  # counters are integers
    assert dtypes == [leaf.dtype for leaf in jax.tree.leaves(abstract)]


def test_a_model_that_computes_in_float16_is_refused(tmp_path):
    config = make_config()
    with pytest.raises(UserError, match="the model computes in float16.*bfloat16 or float32"):
        make_trainer(config, tmp_path, inputs=narrow_inputs(config, "float16"))


def test_a_loss_that_is_not_finite_before_the_first_step_is_not_the_learning_rates_fault(tmp_path):
    config = make_config()
    inputs = make_inputs(config)
    inputs = dataclasses.replace(inputs, target_params=jax.tree.map(lambda x: x * np.nan, inputs.target_params))
    with pytest.raises(UserError, match=r"not finite at step 0 in float32 .*check the weights of model.init"):
        make_trainer(config, tmp_path, inputs=inputs).run()


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_checkpoint(finished, tmp_path):
    good, folder, outcome = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    wild = make_config(**{"train.steps": 12, "optimizer.peak_learning_rate": 1e38})
    with pytest.raises(UserError, match=r"not finite at step [56] .*the checkpoint of step 4 remains.*lower"):
        make_trainer(wild, tmp_path).run()
    restored = make_trainer(good, tmp_path).run()
    assert restored.steps == 4
    assert_same_bits(restored.params, outcome.params)


@pytest.mark.slow
def test_training_continues_at_the_final_rate_until_the_time_is_reached(tmp_path):
    outcome = make_trainer(make_config(**{"train.steps": 4}), tmp_path, min_seconds=2.5).run()
    assert outcome.train_seconds >= 2.5 and outcome.steps > 4
    assert outcome.validation[-1]["step"] == outcome.steps
    lines = [line for line in records.read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    late = [line["learning_rate"] for line in lines if line["step"] > 4]
    np.testing.assert_allclose(late, 0.01 * 0.1, rtol=1e-5)
    again = make_trainer(make_config(**{"train.steps": 4}), tmp_path, min_seconds=2.5).run()
    assert again.steps == outcome.steps


def test_the_clock_stops_while_paused():
    clock = meter.Clock(10.0)
    with clock.running():
        with clock.paused():
            before = clock.seconds
            time.sleep(0.02)
            assert clock.seconds == before
        time.sleep(0.01)
        assert clock.seconds >= before + 0.01
    assert clock.seconds == clock.seconds >= 10.01


def test_the_state_of_an_interval_stays_as_it_was_taken():
    values = {"loss": 6.0, "grad_norm": 1.0, "learning_rate": 0.5, "tokens": 4.0}
    interval = meter.Interval(10.0)
    interval.add(values)
    taken = dataclasses.asdict(interval)
    as_json = json.dumps(taken)
    interval.add({name: 3 * value for name, value in values.items()})
    assert json.dumps(taken) == as_json, "a checkpoint is written while training continues"
    resumed = meter.Interval(**taken)
    assert resumed.line(12.0, False)["loss"] == 1.5 and resumed.line(12.0, False)["tokens_per_second"] == 2.0


def outcome_of(*losses, steps):
    validation = [{"step": step, "validation_loss": loss} for step, loss in losses]
    return trainer.TrainingResult({}, steps, 1.0, 1.0, 1.0, validation)


def test_the_plateau_is_judged_by_the_last_quarter_of_the_steps():
    history = ((0, 8.0), (50, 4.0), (75, 2.0), (100, 1.9))
    assert outcome_of(*history, steps=100).last_quarter_improvement == pytest.approx(0.05)
    # Without an evaluation at three quarters the one before it counts: never flatter than it was.
    assert outcome_of((0, 8.0), (50, 4.0), (100, 3.0), steps=100).last_quarter_improvement == pytest.approx(0.25)
    assert outcome_of((100, 1.9), steps=100).last_quarter_improvement is None


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"loss.divergence": "forward_lk"}, 'did you mean "forward_kl"'),
        ({"loss.divergence": "jsd", "loss.beta": 1.0}, "reverse_kl"),
        ({"loss.temperature": 0.0}, "loss.temperature is 0.0"),
        ({"loss.chunk": 0}, "loss.chunk is 0"),
        ({"loss.anchors": -1}, "loss.anchors is -1; it must be 0 or more"),
        ({"loss.selected": 0.0}, "loss.selected is 0.0; it must be above 0 and at most 1"),
        ({"data.fixed": 0.5}, "must sum to 1"),
        ({"data.batch_size": 3, "optimizer.accumulation": 2}, r"data.batch_size \(3\) must be a multiple"),
        ({"data.generation.temperature": -1.0}, "temperature"),
        ({"data.generation.max_new_tokens": 0}, "max_new_tokens"),
        ({"data.generation.max_new_tokens": 60, **MIXTURE}, "rows of 64 tokens do not fit the model's 32"),
        ({"optimizer.peak_learning_rate": 0.0}, "peak_learning_rate is 0.0"),
        ({"optimizer.clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"optimizer.warmup_steps": 12}, "warmup_steps is 12"),
        ({"optimizer.hold_fraction": 1.0}, "hold_fraction is 1.0"),
        ({"train.steps": 0}, "train.steps is 0"),
        ({"data.prompt_length_max": 0, "data.prompt_length_min": 0, **HALF_ON_POLICY}, "data.prompt_length_min is 0"),
        ({"data.prompt_length_max": 0, **HALF_ON_POLICY}, "data.prompt_length_max is 0; it must be 1 or more"),
        ({"data.prompt_length_min": 5}, r"data.prompt_length_min is 5; it must be at most .* \(4\)"),
        ({"data.batch_size": 0}, "data.batch_size is 0"),
        ({"optimizer.accumulation": 0}, "optimizer.accumulation is 0"),
        ({"optimizer.peak_learning_rate": math.nan}, "peak_learning_rate is nan"),
        ({"optimizer.beta2": 1.0}, "beta2 is 1.0; it must be 0 or more and below 1"),
        ({"speculative_eval.every": -1}, "speculative_eval.every is -1"),
        ({"train.eval_every": 3}, r"checkpoint_every \(4\) must be a multiple of train.eval_every \(3\)"),
        ({"train.best_metric": "validation_los"}, 'did you mean "validation_loss"'),
    ],
)
def test_senseless_settings_are_refused_before_training(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        make_trainer(make_config(**overrides), tmp_path)


def test_without_a_target_what_needs_one_is_refused(tmp_path):
    plain = {"loss.divergence": "cross_entropy"}
    for overrides, message in (
        ({}, '"forward_kl" compares with a target'),
        ({**plain, **MIXTURE}, "there is no target"),
        ({**plain, "train.best_metric": "validation_acceptance"}, "is not measured"),
    ):
        config = make_config(**overrides)
        with pytest.raises(UserError, match=message):
            make_trainer(config, tmp_path, inputs=make_inputs(config, with_target=False))


@pytest.mark.slow
def test_a_stopped_run_saves_its_step_and_resumes_to_the_same_end(tmp_path, monkeypatch, straight):
    config, folder, straight = straight
    answers = iter([False] * 6 + [True])
    with monkeypatch.context() as patched:
        patched.setattr(stopping, "stop_asked", lambda: next(answers))
        with pytest.raises(stopping.Stopped):
            make_trainer(config, tmp_path / "stopped").run()
    kept = {int(path.name) for path in (tmp_path / "stopped" / "checkpoints").iterdir()}
    assert kept == {4, 6}, "the step it was at, in addition to those of the schedule"
    resumed = make_trainer(config, tmp_path / "stopped").run()
    assert_same_bits(resumed.params, straight.params)
    assert resumed.validation == straight.validation and resumed.loss == straight.loss
    assert untimed(tmp_path / "stopped") == untimed(folder)


# A real process, really killed, or asked to stop.


def train_in_process(workdir):
    config = make_config(**{**HALF_ON_POLICY, "train.steps": 240, "train.checkpoint_every": 20, "train.log_every": 1})
    with stopping.stoppable():
        outcome = make_trainer(config, workdir).run()
    np.savez(Path(workdir) / "params.npz", *map(np.asarray, jax.tree.leaves(outcome.params)))


def start(workdir):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "XLA_FLAGS": flags.QUICK}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # what one process compiles, the others load
    return subprocess.Popen([sys.executable, __file__, str(workdir)], env=environment)


def logged_step(workdir):
    try:
        return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (FileNotFoundError, IndexError, json.JSONDecodeError):
        return -1


@pytest.mark.slow
def test_a_run_killed_at_any_moment_arrives_at_the_same_bits(tmp_path):
    straight = start(tmp_path / "straight")
    for step, how, code in ((50, signal.SIGKILL, -signal.SIGKILL), (115, signal.SIGTERM, stopping.STOPPED)):
        process = start(tmp_path / "killed")
        while logged_step(tmp_path / "killed") < step:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(how)
        assert process.wait(timeout=300) == code
        assert not (tmp_path / "killed" / "params.npz").exists()
    last = start(tmp_path / "killed")
    assert last.wait(timeout=300) == 0 and straight.wait(timeout=300) == 0
    killed, unharmed = (np.load(tmp_path / name / "params.npz") for name in ("killed", "straight"))
    assert sorted(killed) == sorted(unharmed)
    for name in killed:
        np.testing.assert_array_equal(killed[name], unharmed[name])


# The binary.


def distill_config(**overrides):
    """A stage that trains a tiny model on arithmetic, with a tokenizer of its own."""
    changes = {
        "task.name": "arithmetic",
        "task.size": 60,
        "tokenizer.path": "",
        "tokenizer.vocab_size": 300,
        "data.sequence_length": 192,
        "data.prompt_length_max": 64,
        "loss.chunk": 64,
        "loss.divergence": "cross_entropy",
        "train.steps": 4,
        "train.eval_every": 1,
    }
    config = make_config(**changes)
    config.model.update({"width": 16, "heads": 2, "kv_heads": 1, "head_size": 8, "mlp_width": 32})
    config.model.max_positions = 256
    config.update_from_flattened_dict(overrides)
    return config


@pytest.fixture(scope="module")
def trained_target(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("target")
    return workdir, distill.run(distill_config(), workdir)


@pytest.mark.slow
def test_a_run_leaves_an_export_and_results_that_tell_how_it_went(trained_target):
    workdir, results = trained_target
    assert results == records.read_results(workdir / "results.json")
    assert results["binary"] == "distill" and results["config"]["task"]["name"] == "arithmetic"
    (row,) = results["rows"]
    decoder, params = hub_load.load(workdir / "export")
    assert row["params"] == decoder.num_params == sum(x.size for x in jax.tree.leaves(params))
    assert row["steps"] == 4 and row["train_seconds"] > 0 and row["tokens"] > 0
    assert row["validation_loss"] < row["validation"][0]["validation_loss"]
    assert row["validation_acceptance"] is None
    fall = 1 - row["validation"][4]["validation_loss"] / row["validation"][3]["validation_loss"]
    assert row["last_quarter_improvement"] == pytest.approx(fall)


@pytest.mark.slow
def test_a_draft_is_distilled_on_its_own_text_for_at_least_the_time_of_another_stage(trained_target, tmp_path):
    workdir, results = trained_target
    overrides = {
        "target": str(workdir / "export"),
        "tokenizer.path": str(workdir / "export"),
        "model.width": 8,
        "loss.divergence": "jsd",
        "data.fixed": 0.0,
        "data.draft": 1.0,
        "train.min_seconds_of": str(workdir),
        "train.best_metric": "validation_acceptance",
    }
    (row,) = distill.run(distill_config(**overrides), tmp_path)["rows"]
    assert row["train_seconds"] >= results["rows"][0]["train_seconds"]
    assert row["validation_acceptance"] > row["validation"][0]["validation_acceptance"]


@pytest.mark.slow
def test_an_export_has_the_dtype_that_was_asked_for(trained_target, tmp_path):
    export = str(trained_target[0] / "export")
    overrides = {"model.init": export, "target": export, "tokenizer.path": export, "model.param_dtype": "bfloat16"}
    distill.run(distill_config(**overrides, target_param_dtype="float32"), tmp_path)
    assert {tensor.dtype for tensor in weights.stored_in(tmp_path / "export").values()} == {"BF16"}


@pytest.mark.slow
def test_an_attachment_that_is_trained_further_unrolls_the_steps_of_the_config_and_keeps_its_ids(
    trained_target, tmp_path
):
    export, ids = str(trained_target[0] / "export"), draft_vocabulary(range(290))
    target = api.load(export)
    network, params = tiny_models.eagle3(target.decoder, steps=2, states_after=(1,), vocabulary=ids)
    hub_adapter.save(tmp_path / "draft", hub_adapter.LoadedAttachment(network, params, target.fingerprint))
    config = distill_config(**{"model.init": str(tmp_path / "draft"), "target": export, "tokenizer.path": export})
    config.eagle3 = common.eagle3_draft(steps=3)
    draft = lambda: distill._Models(config, target.tokenizer, meshes.make_mesh(config.mesh)).with_target().draft()[0]
    assert len(draft().predicts) == 3 and draft().vocabulary == ids
    (tmp_path / "ids.json").write_text(json.dumps(list(range(280))))
    config.model.vocabulary = str(tmp_path / "ids.json")
    with pytest.raises(UserError, match="model.vocabulary has other ids than the draft in .*; leave it out"):
        draft()


@pytest.mark.slow
def test_training_starts_from_an_export_also_if_the_tokenizer_differs_in_an_unused_token(trained_target, tmp_path):
    workdir, results = trained_target
    export = workdir / "export"
    more = shutil.copytree(export, tmp_path / "more")
    fields = json.loads((more / "tokenizer.json").read_text())
    token = {**fields["added_tokens"][0], "id": 300, "content": "<|more|>"}
    (more / "tokenizer.json").write_text(json.dumps({**fields, "added_tokens": [*fields["added_tokens"], token]}))
    overrides = {"model.init": str(export), "tokenizer.path": str(more), "model.width": 999}
    (row,) = distill.run(distill_config(**overrides), tmp_path / "run")["rows"]
    assert row["steps"] == 4 and row["params"] == results["rows"][0]["params"]
    assert row["validation"][0]["validation_loss"] == pytest.approx(results["rows"][0]["validation_loss"])


def test_models_of_other_vocabularies_are_refused(trained_target, tmp_path):
    export = str(trained_target[0] / "export")
    with pytest.raises(UserError, match="another tokenizer.*set tokenizer.path"):
        distill.run(distill_config(**{"target": export, "tokenizer.vocab_size": 290}), tmp_path)
    with pytest.raises(UserError, match="another tokenizer.*set tokenizer.path"):
        distill.run(distill_config(**{"model.init": export, "tokenizer.vocab_size": 290}), tmp_path)


def resized(export, directory, rows):
    """The export again, its embedding padded with random rows or cut."""
    decoder, params = hub_load.load(export)
    table = np.asarray(params["embedding"])
    more = np.random.default_rng(0).normal(size=(max(rows - len(table), 0), table.shape[1]))
    config = dataclasses.replace(decoder.config, vocab_size=rows)
    params = {**params, "embedding": jnp.asarray(np.concatenate([table, more])[:rows], jnp.float32)}
    hub_save.save(directory, Decoder(config), params, Tokenizer.load(export))
    return str(directory)


@pytest.mark.slow
@pytest.mark.parametrize("target_rows, draft_rows", [(304, 300), (300, 304)])
def test_models_padded_to_other_vocabularies_distil_with_one_tokenizer(
    trained_target, tmp_path, target_rows, draft_rows
):
    export = str(trained_target[0] / "export")
    overrides = {
        "target": resized(export, tmp_path / "target", target_rows),
        "model.init": resized(export, tmp_path / "draft", draft_rows),
        "tokenizer.path": export,
        "loss.divergence": "forward_kl",
        "data.fixed": 0.0,
        "data.draft": 0.5,
        "data.target": 0.5,
        "train.best_metric": "validation_acceptance",
    }
    (row,) = distill.run(distill_config(**overrides), tmp_path / "run")["rows"]
    assert row["validation_acceptance"] > 0.5
    assert hub_load.load(tmp_path / "run" / "export")[0].vocab_size == draft_rows


def test_a_model_with_fewer_rows_than_its_tokenizer_has_ids_is_refused(trained_target, tmp_path):
    export = trained_target[0] / "export"
    config = json.loads((export / "config.json").read_text())
    small = shutil.copytree(export, tmp_path / "cut")
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 299}))
    for key in ("target", "model.init"):
        overrides = {key: str(small), "tokenizer.path": str(export)}
        with pytest.raises(UserError, match="has 300 ids and the model in .*cut only 299"):
            distill.run(distill_config(**overrides), tmp_path / "run")


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"model.heads": 3, "model.kv_heads": 2}, "config.model: heads"),
        ({"model.param_dtype": "float31"}, "float31"),
        ({"train.min_seconds_of": "nowhere"}, "nowhere.*does not exist"),
        ({"speculative_eval.every": 2}, "speculative_eval.every needs a target"),
        ({"model.init": "nowhere"}, "nowhere"),
    ],
)
def test_a_run_that_cannot_be_is_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        distill.run(distill_config(**overrides), tmp_path)


if __name__ == "__main__":
    try:
        train_in_process(sys.argv[1])
    except stopping.Stopped:
        sys.exit(stopping.STOPPED)
