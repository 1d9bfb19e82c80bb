"""The loop and the training step compile for a TPU slice, and decoding copies no cache. No TPU is needed.

Each compilation runs in a process of its own: the TPU plugin must not disturb tests on the CPU. By hand:

    python tests/test_tpu.py decode
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from specjax.decoding import loop, rules
from specjax.decoding.drafters.table import make_drafter
from specjax.decoding.sampling import Sampling
from specjax.distillation import update
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.rotary import Rotary
from specjax.runtime import mesh as meshes

ROOT = Path(__file__).resolve().parents[1]
TOPOLOGY = "v5e:2x2"
BATCH, PROMPT, CAPACITY = 4, 64, 1024
pytestmark = pytest.mark.slow

# What writes a whole array again. A fusion that only reads the cache, or a slice update in place, does not.
REWRITES = r"(?:copy|copy-start|select|scatter|transpose)\("


def computations(hlo: str) -> dict[str, list[str]]:
    """Instructions by computation."""
    found, name = {}, None
    for line in hlo.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name = head.group(1)
            found[name] = []
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name].append(line.strip())
    return found


def inside_loops(hlo: str) -> list[str]:
    """Instructions of every while body, and of whatever is called from one."""
    parts = computations(hlo)
    waiting = [name for lines in parts.values() for line in lines for name in re.findall(r"\bbody=%?([\w.\-]+)", line)]
    reached = set()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            calls = r"\b(?:body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
            for called in re.findall(calls, "\n".join(parts[name])):
                waiting += re.findall(r"[\w.\-]+", called)
    return [line for name in reached for line in parts[name]]


def cache_copies(hlo: str, shapes: set[str]) -> list[str]:
    """Instructions inside loops that write a whole cache array again.

    A copy-start between memory spaces, S(1) on one side alone, is the compiler's prefetch of what fits on-chip
    memory, and no copy.
    """
    copies = []
    for line in inside_loops(hlo):
        _, _, right = line.partition(" = ")
        operation = re.search(REWRITES, right)
        if not operation or not right.lstrip("(").startswith(tuple(shapes)):
            continue
        if operation.group() == "copy-start(" and right[: operation.start()].count("S(1)") == 1:
            continue
        copies.append(line[:200])
    return copies


@dataclasses.dataclass(frozen=True)
class ReadsTheOldCache(Decoder):
    """The planted fault: looks up a slot of the old cache after the new one is written, so both must exist."""

    def extend(self, params, cache, inputs, positions, mask=None, *, layers=None):
        hidden, new = super().extend(params, cache, inputs, positions, mask, layers=layers)
        if cache is not None:
            slot = jnp.argmax(jnp.sum(hidden, axis=(0, 1))).astype(jnp.int32)
            old = jax.lax.dynamic_index_in_dim(cache.keys[0], slot, axis=2)
            hidden = hidden + jnp.sum(old).astype(hidden.dtype)
        return hidden, new


def model_config(layers: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=512,
        width=256,
        layers=layers,
        heads=4,
        kv_heads=2,
        head_size=128,
        mlp_width=512,
        max_positions=2048,
        rotary=Rotary(1e4, 128),
        norm_epsilon=1e-5,
        tied_head=True,
        param_dtype="bfloat16",
        compute_dtype="bfloat16",
    )


def placed(shapes, axes, mesh):
    """Abstract arrays with the layout that the mesh rules give them."""
    layout = meshes.shardings(axes, mesh, shapes=shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)


def whole(tree, mesh):
    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, jax.P()))
    return jax.tree.map(put, tree)


def rows(mesh, *shape):
    return placed(jax.ShapeDtypeStruct(shape, jnp.int32), ("batch", *[None] * (len(shape) - 1)), mesh)


def slice_of_tpus():
    from jax.experimental import topologies

    devices = np.array(topologies.get_topology_desc(TOPOLOGY, "tpu").devices).reshape(1, 2, 2)
    return jax.sharding.Mesh(devices, meshes.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def memory_of(compiled) -> dict[str, int]:
    analysis = compiled.memory_analysis()
    parts = ("argument", "output", "alias", "temp")
    return {part: getattr(analysis, f"{part}_size_in_bytes") for part in parts}


def decode_report(mesh, target: Decoder, draft: Decoder, gamma: int) -> dict:
    """Compiles prefill and loop for the mesh; says what they use and which caches the loop copies."""
    drafter = make_drafter("model", target, gamma, {"model": draft})
    plan = loop.Plan(target, drafter, rules.rule_named("lossless"), gamma, CAPACITY, False)
    params = placed(target.abstract_params(), target.axes(), mesh)
    draft_params = placed(draft.abstract_params(), draft.axes(), mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH))
    keys = placed(keys, ("batch",), mesh)
    given = (params, draft_params, rows(mesh, BATCH, PROMPT), rows(mesh, BATCH), keys)
    begin = loop.prefill.lower(plan, *given).compile()
    shapes = jax.eval_shape(lambda *given: loop.begin(plan, *given), *given)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, begin.output_shardings
    )
    sampling = whole(jax.eval_shape(lambda: Sampling.of(1.0)), mesh)
    limits = loop.Limits(rows(mesh, BATCH), whole(jax.ShapeDtypeStruct((1,), jnp.int32), mesh))
    compiled = loop.run.lower(plan, params, draft_params, state, sampling, limits).compile()
    caches = [x for x in jax.tree.leaves((state.target_cache, state.drafter_state)) if x.ndim == 4]
    local = [x.sharding.shard_shape(x.shape) for x in caches]
    names = {f"bf16[{','.join(map(str, shape))}]" for shape in local}
    return {
        "begin": memory_of(begin),
        "run": memory_of(compiled),
        "caches": sorted(names),
        "cache_bytes": sum(2 * int(np.prod(shape)) for shape in local),
        "copies": cache_copies(compiled.as_text(), names),
    }


def train_report(mesh) -> dict:
    """Compiles one distillation step for the mesh."""
    target, draft = Decoder(model_config(2)), Decoder(model_config(1))
    optimizer = optax.adamw(1e-3)
    params = placed(draft.abstract_params(), draft.axes(), mesh)
    place = lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding)
    moments = optax.tree.map_params(
        optimizer,
        place,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda x: whole(x, mesh),
    )
    state = update.TrainState(params, moments, whole(jax.ShapeDtypeStruct((), jnp.int32), mesh))
    batch = {name: rows(mesh, BATCH) for name in update.BATCH_AXES} | {"tokens": rows(mesh, BATCH, 128)}
    loss = update.Loss(draft, target, "forward_kl", 0.5, 1.0, 32)
    step = jax.jit(update.make_step(loss, optimizer, lambda step: step, 1), donate_argnums=0)
    teacher = placed(target.abstract_params(), target.axes(), mesh)
    with meshes.use(mesh):  # not before: optax makes small arrays, which no device of this mesh could hold
        compiled = step.lower(state, teacher, batch).compile()
    kept = [x for x in jax.tree.leaves(state) if x.ndim]
    size = lambda x: int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
    return {"step": memory_of(compiled), "state_bytes": sum(map(size, kept))}


def report(what: str) -> dict:
    mesh = slice_of_tpus()
    if what == "train":
        return train_report(mesh)
    with meshes.use(mesh):
        if what == "decode":
            return decode_report(mesh, Decoder(model_config(2)), Decoder(model_config(1)), 2)
        return decode_report(mesh, ReadsTheOldCache(model_config(1)), Decoder(model_config(1)), 0)


def in_a_process_of_its_own(what: str) -> dict:
    # Kept apart from the environment, where it would have every run look for a TPU.
    compiler = Path(sys.prefix) / "tpu-compiler"
    if not (compiler / "libtpu").exists() and importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: make .venv/.installed-tpu-compiler")
    path = os.pathsep.join([str(ROOT), str(compiler)])
    environment = dict(os.environ, PYTHONPATH=path, JAX_PLATFORMS="cpu", XLA_FLAGS="")
    # No TPU is looked for, and none is locked against another process.
    environment |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, __file__, what]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    return found


def test_decoding_on_a_tpu_slice_copies_no_cache_in_its_loop():
    found = in_a_process_of_its_own("decode")
    assert found["caches"] == [f"bf16[2,1,{CAPACITY},128]"]  # rows over fsdp, key heads over tensor
    assert found["copies"] == []
    assert found["run"]["alias"] >= found["cache_bytes"]  # donated: there is one cache, not two


def test_a_loop_that_keeps_the_old_cache_is_seen_to_copy_it():
    assert in_a_process_of_its_own("planted")["copies"]


def test_a_training_step_compiles_for_a_tpu_slice_and_updates_in_place():
    found = in_a_process_of_its_own("train")
    assert found["step"]["alias"] >= found["state_bytes"]


def test_copies_are_told_from_prefetches_and_from_what_is_outside_loops():
    hlo = """
%body (p: bf16[2,4]) -> bf16[2,4] {
  %a = bf16[2,4]{1,0} copy(%p)
  %b = (bf16[2,4]{1,0:S(1)}, bf16[2,4]{1,0}, u32[]{:S(2)}) copy-start(%p)
  %c = bf16[2,8]{1,0} copy(%q)
  %d = bf16[2,4]{1,0} fusion(%p), kind=kLoop, calls=%fused.1
}
%fused.1 (p: bf16[2,4]) -> bf16[2,4] {
  ROOT %e = bf16[2,4]{0,1} copy(%p)
}
ENTRY %main (p: bf16[2,4]) -> bf16[2,4] {
  %f = bf16[2,4]{1,0} copy(%p)
  ROOT %w = bf16[2,4]{1,0} while(%f), condition=%condition, body=%body
}
%condition (p: bf16[2,4]) -> pred[] {
  ROOT %g = pred[] constant(true)
}
"""
    names = {re.search(r"%(\w+) =", line).group(1) for line in cache_copies(hlo, {"bf16[2,4]"})}
    assert names == {"a", "e"}


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1])))
