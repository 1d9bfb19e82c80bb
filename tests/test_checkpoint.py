"""Checkpoints give back what they were given, on any mesh, or say why; meshes refuse what does not fit."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits
from ml_collections import ConfigDict

from specjax.runtime import checkpoint
from specjax.runtime import mesh as meshes
from specjax.runtime.checkpoint import Checkpointer
from specjax.runtime.errors import UserError


class Moments(NamedTuple):
    mean: jax.Array
    empty: tuple


AXES = {"kernel": ("embed", "mlp"), "moments": Moments((None,), ()), "step": ()}


def state(seed=0):
    return {
        "kernel": jax.random.normal(jax.random.key(seed), (64, 128)),
        "moments": Moments(jnp.arange(5, dtype=jnp.bfloat16) / 3, ()),
        "step": jnp.array(seed, jnp.int32),
    }


def shaped(shape, dtype):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=device)


def abstract(tree):
    return jax.tree.map(lambda x: shaped(x.shape, x.dtype), tree)


def opened(path):
    return Checkpointer(path, keep_last=2, best_metric="loss", best_mode="min")


def save(checkpointer, step, seed=None):
    host = {"batches": {"position": 7 * step}, "seconds": 0.1}
    checkpointer.save(step, state(step if seed is None else seed), host=host, metrics={"loss": abs(step - 2.0)})


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoint of step 3."""
    with opened(tmp_path / "checkpoints") as checkpointer:
        save(checkpointer, 3)
    return tmp_path / "checkpoints"


def test_what_is_restored_is_bit_for_bit_what_was_saved(saved):
    with opened(saved) as checkpointer:
        restored, host, step = checkpointer.restore(abstract(state()))
    assert step == 3
    assert host == {"batches": {"position": 21}, "seconds": 0.1}
    assert jax.tree.structure(restored) == jax.tree.structure(state())
    for left, right in zip(jax.tree.leaves(restored), jax.tree.leaves(state(3)), strict=True):
        assert left.dtype == right.dtype
        assert bits(left) == bits(right)


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    with opened(tmp_path / "new") as checkpointer:
        assert checkpointer.restore(abstract(state())) is None


def test_the_last_two_and_the_best_are_kept(tmp_path):
    with opened(tmp_path) as checkpointer:
        for step in range(1, 7):
            save(checkpointer, step)
    with opened(tmp_path) as checkpointer:
        assert checkpointer.steps() == [2, 5, 6]  # 2 is the best


def test_saving_does_not_see_what_happens_to_the_state_afterwards(tmp_path):
    donating = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.arange(100_000.0)
    before = np.array(x)
    with Checkpointer(tmp_path, keep_last=1, best_metric="loss", best_mode="min") as checkpointer:
        checkpointer.save(1, {"x": x}, host={}, metrics={})
        for _ in range(5):
            x = donating(x)
        restored, _, _ = checkpointer.restore({"x": shaped(x.shape, x.dtype)})
    np.testing.assert_array_equal(restored["x"], before)


def test_a_checkpoint_that_does_not_fit_the_disk_is_refused_before_it_is_written(tmp_path, monkeypatch):
    with opened(tmp_path) as checkpointer:
        save(checkpointer, 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 30_000))
        with pytest.raises(UserError, match="which has 30000 bytes left; make room, and the same command resumes"):
            save(checkpointer, 2)
    with opened(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1]


def test_a_step_is_not_saved_twice(saved):
    with opened(saved) as checkpointer, pytest.raises(ValueError, match="step 3"):
        save(checkpointer, 3)


def mesh_of(data, fsdp, tensor):
    return meshes.make_mesh(ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor}))


@pytest.mark.skipif(len(jax.devices()) != 8, reason="needs the eight virtual devices of the CPU backend")
def test_a_checkpoint_of_one_mesh_is_restored_onto_another(tmp_path):
    here, there = mesh_of(1, 2, 4), mesh_of(2, 4, 1)
    with opened(tmp_path) as checkpointer:
        sharded = meshes.shard(state(5), AXES, here)
        checkpointer.save(5, sharded, host={}, metrics={"loss": 1.0})
        shapes = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            state(5),
            meshes.shardings(AXES, there, shapes=state(5)),
        )
        restored, _, _ = checkpointer.restore(shapes)
    assert sharded["kernel"].addressable_shards[0].data.shape == (32, 32)
    assert restored["kernel"].addressable_shards[0].data.shape == (16, 128)
    for left, right in zip(jax.tree.leaves(restored), jax.tree.leaves(state(5)), strict=True):
        assert bits(left) == bits(right)


@pytest.mark.skipif(len(jax.devices()) != 8, reason="needs the eight virtual devices of the CPU backend")
def test_a_mesh_that_does_not_fit_is_refused_with_its_numbers():
    with pytest.raises(UserError, match="data 2 x fsdp 2 x tensor 1 needs 4 devices and there are 8"):
        mesh_of(2, 2, 1)
    with pytest.raises(UserError, match="every axis needs at least 1"):
        mesh_of(0, 8, 1)
    mesh = mesh_of(1, 2, 4)
    with pytest.raises(UserError, match=r'"embed" of size 9 .* mesh.fsdp = 2; let that be one of 1, 3, 9'):
        meshes.shard({"kernel": jnp.zeros((9, 8))}, {"kernel": ("embed", "mlp")}, mesh)
    with pytest.raises(KeyError, match="width"):
        meshes.spec(("width",))


@pytest.mark.skipif(len(jax.devices()) != 8, reason="needs the eight virtual devices of the CPU backend")
def test_constrain_pins_a_layout_under_a_mesh_and_does_nothing_without():
    double = jax.jit(lambda x: meshes.constrain(2 * x, ("batch", "vocab")))
    x = jnp.ones((4, 8))
    assert len(double(x).sharding.device_set) == 1
    with meshes.use(mesh_of(2, 1, 4)):
        assert double(x).addressable_shards[0].data.shape == (2, 2)
        with pytest.raises(UserError, match='axis "batch" of size 3'):
            double(jnp.ones((3, 8)))


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(checkpoint):
    path = largest_file(checkpoint)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(checkpoint):
    path = largest_file(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_the_arrays(checkpoint):
    shutil.rmtree(checkpoint / "state")


def spoil_the_note(checkpoint):
    (checkpoint / "host" / "metadata").write_text('{"format": ')


def forge_the_note(checkpoint):
    (checkpoint / "host" / "metadata").write_text('{"format": "another program"}')


def empty_it(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_the_arrays, spoil_the_note, forge_the_note, empty_it])
def test_a_damaged_or_foreign_checkpoint_is_named_and_not_read(saved, damage):
    damage(saved / "3")
    with opened(saved) as checkpointer, pytest.raises(UserError) as caught:
        checkpointer.restore(abstract(state()))
    message = str(caught.value)
    assert str(saved / "3") in message
    assert "\n" not in message and "--workdir" in message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_digest_sees_values_that_changed_places(dtype):
    values = jnp.arange(48).reshape(2, 4, 6).astype(dtype)
    swapped = [values[::-1], values[:, ::-1], values[:, :, ::-1], values.at[0, 0].set(values[1, 0])]
    digests = {checkpoint._digest(array) for array in (values, *swapped)}
    assert len(digests) == 5
    assert checkpoint._digest(values) == checkpoint._digest(values + 0)


def test_damaged_metrics_are_named(saved):
    (saved / "3" / "metrics" / "metrics").write_text("{")
    with pytest.raises(UserError, match="cannot be read .*delete the damaged one"):
        opened(saved)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kernel": shaped((64, 64), jnp.float32)}, r"kernel is float32\[64, 128\] in the checkpoint"),
        ({"kernel": shaped((64, 128), jnp.bfloat16)}, r"bfloat16\[64, 128\] in this model"),
        ({"more": shaped((1,), jnp.float32)}, "more is only in this model"),
        ({"step": None}, "step is only in the checkpoint"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(saved, change, named):
    wanted = {name: x for name, x in (abstract(state()) | change).items() if x is not None}
    with opened(saved) as checkpointer, pytest.raises(UserError, match=named):
        checkpointer.restore(wanted)


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from specjax.runtime.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep_last=1, best_metric="loss", best_mode="min")
checkpointer.save(1, {"x": jnp.full((2_000_000,), 1.0)}, host={}, metrics={})
checkpointer._manager.wait_until_finished()
checkpointer.save(2, {"x": jnp.full((2_000_000,), 2.0)}, host={}, metrics={})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_kill_while_saving_costs_no_finished_checkpoint(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[1])
    assert killed.returncode == -signal.SIGKILL
    unfinished = [path for path in tmp_path.iterdir() if path.name not in ("1", "2")]
    with Checkpointer(tmp_path, keep_last=1, best_metric="loss", best_mode="min") as checkpointer:
        restored, _, step = checkpointer.restore({"x": shaped((2_000_000,), jnp.float32)})
        assert np.all(np.asarray(restored["x"]) == step)
        assert not any(path.exists() for path in unfinished)
        # The run continues over what was left.
        checkpointer.save(3, {"x": jnp.zeros(2)}, host={}, metrics={})
    assert [path.name for path in tmp_path.iterdir() if path.name.isdigit()] == ["3"]


def test_a_half_written_checkpoint_is_ignored(saved):
    shutil.copytree(saved / "3", saved / "4.orbax-checkpoint-tmp")
    with opened(saved) as checkpointer:
        assert checkpointer.steps() == [3]


def test_the_note_of_a_checkpoint_is_readable_json(saved):
    note = json.loads((saved / "3" / "host" / "metadata").read_text())
    assert note["host"]["batches"] == {"position": 21}
    assert note["arrays"]["moments.mean"]["shape"] == [5]
