"""The linear fit that an EAGLE-3 draft starts from: its sums, its solution, and what it writes into the layer."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh

from configs import common
from specjax.distillation import first_fit, steps, update
from specjax.distillation.trainer import Trainer, TrainingInputs
from specjax.models.attachment import AttachedDraft
from specjax.models.eagle3 import Eagle3Config, Eagle3Layer
from specjax.models.language_model import states_after
from specjax.models.least_squares import Moments, low_rank, ridge
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

VOCAB, LENGTH = 24, 16  # fewer tokens than channels, so that embeddings determine a constant


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def target():
    """Its layers add little to the residual, so its last state is nearly a linear function of the token."""
    model, params = tiny.decoder(1, sharpness=2.0, vocab_size=VOCAB, width=32, heads=2, kv_heads=1, head_size=32)

    def lessened(path, array):
        return array * 0.02 if {entry.key for entry in path} & {"output", "down"} else array

    return model, jax.tree_util.tree_map_with_path(lessened, params)


def texts(count, seed):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (count, LENGTH)).astype(np.int32)
    lengths = np.full(count, LENGTH, np.int32)
    return {"tokens": jnp.asarray(tokens), "lengths": jnp.asarray(lengths), "loss_start": jnp.full(count, 2, np.int32)}


def test_the_sums_of_parts_are_those_of_the_whole_and_uncounted_positions_do_not_matter():
    inputs, goals, weights = random(4, 6, 3), random(4, 6, 2, seed=1), np.ones((4, 6), np.float32)
    weights[:, 0] = 0
    hidden = inputs.copy()
    hidden[:, 0] = np.nan
    whole = Moments.of(jnp.asarray(hidden), jnp.asarray(goals), jnp.asarray(weights))
    parts = [Moments.of(*(jnp.asarray(x[rows]) for x in (inputs, goals, weights))) for rows in (slice(1), slice(1, 4))]
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts[0] + parts[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    x, y = inputs[:, 1:].reshape(-1, 3), goals[:, 1:].reshape(-1, 2)
    for found, right in zip(whole.means(), (x.T @ x, x.T @ y, x.sum(0)), strict=True):
        np.testing.assert_allclose(found, right / len(x), rtol=1e-4, atol=1e-6)


def test_the_fit_finds_a_linear_map_whatever_the_scale_of_a_part():
    x, right = random(500, 5), random(5, 3, seed=1)
    for scale in (1e-3, 1.0, 1e3):
        scaled = x * np.asarray([1, 1, scale, scale, scale])
        found = ridge(scaled.T @ scaled / 500, scaled.T @ (x @ right) / 500, (2, 3))
        np.testing.assert_allclose(scaled @ found, x @ right, atol=0.02)


def test_two_factors_keep_what_matters_for_the_inputs():
    # Inputs along the first two directions are large, so a rank of 2 keeps what the matrix does with them.
    x = random(400, 6) * np.asarray([10, 10, 0.01, 0.01, 0.01, 0.01])
    matrix = random(6, 5, seed=1)
    left, right = low_rank(matrix, x.T @ x / 400, 2)
    assert left.shape == (6, 2) and right.shape == (2, 5)
    np.testing.assert_allclose(x @ left @ right, x @ matrix, atol=0.2)
    whole = low_rank(matrix, x.T @ x / 400, 5)
    np.testing.assert_allclose(whole[0] @ whole[1], matrix, atol=1e-3)


def first_outputs(network, params, target, target_params, tokens):
    """What the head reads for the first drafted token at each position."""
    both = {"attachment": params, "target": target_params}
    return AttachedDraft.of(network).training_states(both, None, tokens)[..., : network.config.inner.width]


@pytest.mark.parametrize("options", [{}, {"fc_norm": True, "states_after": (1, 2)}], ids=["raw", "normed"])
def test_a_fitted_layer_drafts_what_the_linear_map_says(target, options):
    network = Eagle3Layer(Eagle3Config(target[0].config, steps=2, fitted_batches=8, **options))
    start = network.init_on(jax.random.key(0), *target)
    draft, total = AttachedDraft.of(network), None
    for seed in range(8):
        part = first_fit.moments(draft, target[0], start, target[1], texts(64, seed))
        total = part if total is None else total + part
    fitted = jax.tree.map(jnp.asarray, network.fitted(jax.device_get(start), jax.device_get(total)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fitted) == jax.tree.map(lambda x: (x.shape, x.dtype), start)
    tokens = texts(64, 100)["tokens"]
    layers = sorted({*network.taps, 2})
    of_layer = dict(zip(layers, states_after(*target, tokens, layers), strict=True))
    states = tuple(of_layer[layer] for layer in (*network.taps, 2))
    inputs, goals = network.regression(start, *target, states, tokens)
    head = lambda hidden: network.bind(start).unembedding.logits(network.bind(start).norm(hidden))
    np.testing.assert_allclose(head(goals), tiny.full_logits(*target, tokens), rtol=1e-3, atol=1e-3)

    error = lambda outputs: float(jnp.mean((outputs - goals)[:, 2:] ** 2))
    gram, cross, _ = total.means()
    weights = ridge(gram, cross, (32,) * (1 + len(network.taps)))
    linear = error(inputs @ jnp.asarray(weights, jnp.float32))
    before, after = (error(first_outputs(network, params, *target, tokens)) for params in (start, fitted))
    assert linear < 0.5 * before  # the squares of the goals have a mean of 1
    assert linear < 0.5 and after < 1.1 * linear


class Batches(Iterator):
    place = 0

    def __next__(self):
        self.place += 1
        return {name: np.asarray(array) for name, array in texts(4, self.place).items()}

    def get_state(self):
        return self.place

    def set_state(self, place):
        self.place = place


@pytest.mark.slow
def test_training_starts_from_the_fit_and_reads_the_same_batches_after_it(target, tmp_path):
    config = common.distillation("", "eagle3", steps=1)
    config.optimizer.warmup_steps = 0
    config.data.update({"fixed": 1.0, "draft": 0.0, "batch_size": 4, "sequence_length": LENGTH})
    config.train.update({"eval_every": 1, "checkpoint_every": 1, "log_every": 1})
    trained = {}
    for count in (0, 3):
        network = Eagle3Layer(Eagle3Config(target[0].config, steps=2, fitted_batches=count))
        own = network.init_on(jax.random.key(0), *target)
        validation = [{name: np.asarray(array) for name, array in texts(8, 50).items()}]
        batches = Batches()
        inputs = TrainingInputs(AttachedDraft.of(network), own, *target, batches, validation, (), LENGTH)
        mesh = meshes.make_mesh(config.mesh)
        trained[count] = Trainer(config, tmp_path / str(count), inputs, mesh, min_seconds=0.0, evaluator=None).run()
        assert batches.place == 1
    accepted = {count: run.validation[0]["validation_acceptance"] for count, run in trained.items()}
    assert accepted[3] > accepted[0] + 0.1


def test_with_text_of_rollouts_alone_the_target_writes_what_is_fitted(target, tmp_path, monkeypatch):
    config = common.distillation("", "eagle3", steps=30)
    config.data.update({"fixed": 0.0, "draft": 0.0, "assisted": 1.0, "batch_size": 4, "sequence_length": LENGTH})
    network = Eagle3Layer(Eagle3Config(target[0].config, fitted_batches=2))
    own = network.init_on(jax.random.key(0), *target)
    inputs = TrainingInputs(AttachedDraft.of(network), own, *target, Batches(), [], (), LENGTH)
    trainer = Trainer(config, tmp_path, inputs, meshes.make_mesh(config.mesh), min_seconds=0.0, evaluator=None)
    asked = []

    def text(source, batch, step):
        asked.append((source, step))
        return texts(4, step), LENGTH

    monkeypatch.setattr(trainer, "_text", text)
    with meshes.use(trainer.mesh), trainer.clock.running():
        trainer._fit()
    assert asked == [("target", 0), ("target", 1)]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trainer.state.params))


def test_what_cannot_be_fitted_is_refused(target):
    with pytest.raises(UserError, match="fitted_batches is -1; give 0 or more"):
        Eagle3Config(target[0].config, fitted_batches=-1)
    with pytest.raises(UserError, match="set norm_before_residual to False, or fitted_batches to 0"):
        Eagle3Config(target[0].config, fitted_batches=8, norm_before_residual=True)


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_sums_over_rows_and_parameters_on_many_devices_are_those_on_one(target):
    network = Eagle3Layer(Eagle3Config(target[0].config, fitted_batches=1, fc_norm=True))
    draft, batch = AttachedDraft.of(network), texts(8, 0)
    start = network.init_on(jax.random.key(0), *target)
    alone = first_fit.moments(draft, target[0], start, target[1], batch)
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 2, 2), meshes.AXES)
    with meshes.use(mesh):
        place = lambda model, params: jax.tree.map(jax.device_put, params, model.shardings(mesh))
        sums = steps.moments_of(draft, target[0], jax.NamedSharding(mesh, jax.P()))
        rows = update.shard({name: np.asarray(array) for name, array in batch.items()}, mesh)
        sharded = sums(place(draft, start), place(target[0], target[1]), rows)
    assert sharded.gram.sharding.is_fully_replicated
    for found, right in zip(jax.tree.leaves(sharded), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4)
