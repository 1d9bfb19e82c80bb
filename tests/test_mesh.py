"""Eight devices say what one says: generated tokens and validation sums. Training steps: test_trainer.py."""

import functools

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from specjax.decoding import batch, identity
from specjax.decoding.sampling import Sampling
from specjax.distillation import update
from specjax.runtime import mesh as meshes

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (virtual) devices")

MESHES = [(8, 1, 1), (2, 2, 2)]
SLOTS, MAX_NEW, GAMMA, SEED = 8, 16, 3, 5
# Heads and rows that divide over every mesh here.
SHAPE = dict(heads=4, kv_heads=2, vocab_size=32)


@functools.cache
def models():
    return tiny.decoder(0, 2.0, **SHAPE), tiny.decoder(1, 2.0, layers=1, **SHAPE)


def mesh_of(sizes):
    return meshes.make_mesh(ConfigDict(dict(zip(meshes.AXES, sizes, strict=True))))


def texts():
    tokens, lengths = tiny.prompts(0, 8, SLOTS, SHAPE["vocab_size"])
    rows = zip(np.asarray(tokens), np.asarray(lengths), strict=True)
    return [row[:length].tolist() for row, length in rows]


@functools.cache
def generated(sizes, rule):
    """Emitted tokens of every row on the mesh."""
    (target, params), (draft, draft_params) = models()
    plan = tiny.plan(target, "model", {"model": draft}, gamma=GAMMA, slots=SLOTS, max_new=MAX_NEW, rule=rule)
    mesh = mesh_of(sizes)
    with meshes.use(mesh):
        return plan, batch.decode(
            plan,
            meshes.shard(params, target.axes(), mesh),
            meshes.shard(draft_params, draft.axes(), mesh),
            texts(),
            slots=SLOTS,
            indices=range(8),
            seed=SEED,
            sampling=Sampling.of(1.0),
            max_new_tokens=MAX_NEW,
            eos_ids=(3,),
            put=batch.Placer(mesh),
        )


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["coupled", "lossless"])
@pytest.mark.parametrize("sizes", MESHES)
def test_a_mesh_generates_the_tokens_of_one_device(sizes, rule):
    plan, alone = generated((1, 1, 1), rule)
    _, spread = generated(sizes, rule)
    params = models()[0][1]
    settings = dict(slots=plan.capacity, seed=SEED, sampling=Sampling.of(1.0))
    found = identity.compare(plan, params, texts(), alone.tokens, spread.tokens, **settings)
    assert identity.only_ties(found), found
    assert found["equal"] > 0 and any(len(row) > GAMMA + 1 for row in alone.tokens)
    if found["equal"] == found["of"]:
        for name, counts in alone.counts(8).items():
            np.testing.assert_array_equal(spread.counts(8)[name], counts)


@functools.cache
def validation_sums(sizes):
    """The loss of one batch, as the trainer's validation computes it."""
    (target, params), (draft, draft_params) = models()
    tokens, lengths = tiny.prompts(1, 8, 16, SHAPE["vocab_size"])
    starts = np.minimum(2, np.asarray(lengths)).astype(np.int32)
    rows = {"tokens": tokens, "lengths": lengths, "loss_start": starts, "prompt_lengths": starts}
    mesh = mesh_of(sizes)
    loss = update.Loss(draft, target, "forward_kl", 0.5, 1.0, 4)
    with meshes.use(mesh):
        sums = jax.jit(loss, out_shardings=jax.NamedSharding(mesh, jax.P()))(
            meshes.shard(draft_params, draft.axes(), mesh),
            meshes.shard(params, target.axes(), mesh),
            meshes.shard(rows, update.BATCH_AXES, mesh),
        )
    return jax.device_get(sums)


@pytest.mark.parametrize("sizes", MESHES)
def test_a_mesh_validates_as_one_device_does(sizes):
    alone, spread = validation_sums((1, 1, 1)), validation_sums(sizes)
    assert spread.tokens == alone.tokens > 0
    np.testing.assert_allclose(spread.loss, alone.loss, rtol=1e-5)
    np.testing.assert_allclose(spread.acceptance, alone.acceptance, rtol=1e-5)
