"""Every drafter decodes, and every kind of draft is trained, on TPU slices; no cache is copied. No TPU is needed.

All that is compiled for a slice is compiled in one process of its own: the TPU plugin must not disturb tests on the
CPU. By hand, for one case or for all of them:

    python tests/test_tpu.py v5e:2x2 kangaroo
"""

import collections
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
import tiny

from configs import common
from specjax.decoding import loop, rules
from specjax.decoding.sampling import Sampling
from specjax.models import kv_cache
from specjax.models.adapters import Adapter, AdapterConfig
from specjax.models.block_parallel import BlockParallel, BlockParallelConfig
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.eagle3 import Eagle3Config, Eagle3Layer
from specjax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from specjax.models.medusa import MedusaConfig, MedusaHeads
from specjax.planning import account, chips, executables, hlo
from specjax.planning.models import ModelCatalog
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes

ROOT = Path(__file__).resolve().parents[1]
SLICES = ("v5e:2x2", "v5p:2x2x1")
MESH = {"data": 1, "fsdp": 2, "tensor": 2}
# The vocabulary is a size that nothing else has.
BATCH, PROMPT, CHUNK, CAPACITY, GAMMA, VOCABULARY = 4, 32, 16, 256, 2, 1536
pytestmark = [pytest.mark.slow, pytest.mark.thorough]


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


def decoder(layers: int, **changes) -> Decoder:
    values = dict(
        vocab_size=VOCABULARY,
        width=256,
        layers=layers,
        heads=4,
        kv_heads=2,
        head_size=128,
        mlp_width=512,
        max_positions=2048,
        rope_theta=1e4,
        norm_epsilon=1e-5,
        tied_head=True,
        param_dtype="bfloat16",
        compute_dtype="bfloat16",
    )
    return Decoder(DecoderConfig.llama(**{**values, **changes}))


def gpt_oss(layers: int) -> Decoder:
    """Experts, a window in every other layer, and sinks."""
    sparse = {"experts": 4, "experts_per_token": 2, "expert_width": 512, "mlp_bias": True, "swiglu_limit": 7.0}
    windows = tuple(64 * (layer % 2 == 0) for layer in range(layers))
    return decoder(layers, **sparse, attention_bias=True, attention_sinks=True, windows=windows)


def encoder_decoder(layers: int) -> EncoderDecoder:
    fields = {
        name: getattr(decoder(layers).config, name)
        for name in ("vocab_size", "width", "layers", "heads", "head_size", "mlp_width", "param_dtype", "compute_dtype")
    }
    fields |= {"kv_heads": 4, "encoder_layers": layers, "norm_epsilon": 1e-6, "tied_head": False, "start_token": 0}
    return EncoderDecoder(EncoderDecoderConfig.t5(**fields))


def options(target: Decoder) -> dict[str, tuple[str, dict]]:
    """The kind and the options of every drafter that is compiled, by name."""
    of_target = target.config
    confident = BlockParallel(BlockParallelConfig(of_target, confidence=True))
    return {
        "model": ("model", {"model": decoder(1)}),
        "stopping": ("model", {"model": decoder(1), "threshold": 0.5}),
        "adaptive": ("model", {"model": decoder(1), "adaptive": True}),
        "lookup_first": ("model", {"model": decoder(1), "lookup": 0.3, "head_gamma": 1}),
        "ngram": ("ngram", {"shortest": 1, "longest": 2}),
        "early_exit": ("early_exit", {"exit_layer": 1}),
        "skip_layers": ("skip_layers", {"skipped": (1,)}),
        "kangaroo": ("kangaroo", {"adapter": Adapter(AdapterConfig(of_target, 1))}),
        "medusa": ("medusa", {"adapter": MedusaHeads(MedusaConfig(of_target, GAMMA, own_head=False))}),
        "eagle3": ("eagle3", {"adapter": Eagle3Layer(Eagle3Config(of_target))}),
        "block_parallel": ("block_parallel", {"adapter": BlockParallel(BlockParallelConfig(of_target))}),
        "confident": ("block_parallel", {"adapter": confident, "threshold": 0.5}),
        "pard": ("pard", {"model": tiny.masked(decoder(1))}),
    }


DRAFTERS = (*options(decoder(2)), "t5", "one_row", "gpt_oss")
# What is compiled for both slices, whose chips differ. The others have their code in common with these.
ON_BOTH = ("model", "ngram", "t5", "one_row", "distilled")
# Compiled as a run is; the others with the least effort, in a fifth of the time.
THOROUGHLY = ("model", "planted", "rows", "scattered")
# Dtypes of kernels, compiled for one chip.
KERNELS = ("bfloat16", "int8", "int4")
TRAINED = ("supervised", "distilled", "adapter", "t5_distilled", "gpt_oss_distilled")
TRAINED += ("block_parallel_trained", "pard_trained")


def decoding(name: str, mesh) -> executables.DecodingStage:
    target, gamma = (ReadsTheOldCache(decoder(1).config) if name == "planted" else decoder(2)), GAMMA
    batch = {"rows": 4 * BATCH, "scattered": 4 * BATCH, "one_row": MESH["fsdp"]}.get(name, BATCH)
    if name in ("planted", "rows", "scattered"):
        kind, how = "ngram", {"shortest": 1, "longest": 2}
    elif name == "one_row":  # of a batch on each device, and of queries for each key head
        target = decoder(2, kv_heads=4)
        kind, how = "model", {"model": decoder(1, kv_heads=4)}
    elif name in KERNELS:  # of Llama 3.1 8B, so that there is little else to read
        batch, target = 1, decoder(2, width=4096, heads=32, kv_heads=8, mlp_width=14336, param_dtype=name)
        kind, how = "ngram", {"shortest": 1, "longest": 2}
    elif name == "gpt_oss":
        target = gpt_oss(2)
        kind, how = "model", {"model": gpt_oss(1)}
    elif name == "t5":
        target = encoder_decoder(1)
        kind, how = "model", {"model": encoder_decoder(1)}
    else:
        kind, how = options(target)[name]
    drafter = tiny.make_drafter(kind, target, gamma, how)
    sizes = {"chunk": CHUNK, "prompt_slots": PROMPT}
    plan = loop.Plan(target, drafter, rules.rule_named("lossless"), gamma, CAPACITY, False, **sizes)
    sampling = Sampling.of(1.0, block_costs=(1.0,) * (gamma + 1) if how.get("adaptive") else None)
    own = how.get("model", how.get("adapter"))
    return executables.DecodingStage(name, plan, own, sampling, mesh, batch, PROMPT)


def training(name: str, mesh) -> executables.TrainingStage:
    """A stage of the quickstart with these models in the place of its own."""
    section = configs.load(f"{ROOT}/configs/quickstart.py:smoke")[name if name == "supervised" else "distilled"]
    section.mesh.update(MESH)
    section.data.batch_size = BATCH
    target, draft = {
        "t5_distilled": (encoder_decoder(1), encoder_decoder(1)),
        "gpt_oss_distilled": (gpt_oss(2), gpt_oss(1)),
    }.get(name, (decoder(2), decoder(1)))
    shelf = ModelCatalog({"target": target, "supervised": decoder(1)})
    shelf.made["draft"] = draft
    section.model.update({"init": "stage:draft", "param_dtype": "bfloat16"})
    if name == "adapter":
        section = configs.load(f"{ROOT}/configs/plan/pairs.py:vicuna_13b").adapter.copy_and_resolve_references()
        section.target, section.tokenizer.path, section.adapter.exit_layer = "stage:target", "stage:target", 1
        section.mesh.update(MESH)
        section.data.update({"batch_size": BATCH, "sequence_length": 32, "prompt_length_max": 16})
        section.data.generation.max_new_tokens = 16
        section.loss.chunk = 32
    section.unlock()
    if name in ("block_parallel_trained", "pard_trained"):
        section.data.update({"fixed": 1.0, "draft": 0.0, "sequence_length": 64})
        section.loss.anchors = 8
        if name == "pard_trained":
            section.pard = common.pard_draft(drafted=4)
        else:
            section.block_parallel = common.block_parallel_draft(block_size=4)
            section.block_parallel.confidence = True
            section.model.init = "block_parallel"
    return executables.training(section, shelf, mesh)


def everywhere(program: hlo.Program) -> list[hlo.Instruction]:
    return [line for part in program.computations.values() for line in part.values()]


def cache_shapes(stage: executables.DecodingStage) -> set[str]:
    """The caches of one chip as the compiled text writes them, such as "bf16[2,1,1024,128]"."""
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    return {
        f"{short[x.dtype.name]}[{','.join(map(str, x.sharding.shard_shape(x.shape)))}]"
        for x in stage.caches_on(stage.mesh)
    }


# Instructions that write a complete array again. A fusion that reads the cache, or updates a slice in place, does not.
REWRITES = ("copy", "copy-start", "select", "scatter", "transpose")


def cache_copies(program: hlo.Program, shapes: set[str]) -> list[str]:
    """Instructions inside loops that write a complete cache array again.

    A copy-start of which only one side is on-chip memory, S(1), is a prefetch and no copy.
    """
    return [
        f"{line.name} = {line.type} {line.op}"[:200]
        for line in program.inside_loops()
        if line.op in REWRITES and line.type.lstrip("(").startswith(tuple(shapes))
        if not (line.op == "copy-start" and line.type.count("S(1)") == 1)
    ]


def decode_report(name: str, mesh) -> dict:
    """Compiles prefill and loop; says what the loop aliases, copies and gathers."""
    described, seconds = decoding(name, mesh), []
    for step in executables.decoding_executables(described):
        compiled, took, reason = account.compiled_on(mesh, step)
        assert compiled is not None, reason
        seconds.append(took)
    program = account.program_of(compiled)
    executions = program.iteration(step.loop, step.trip_counts)
    block, products = hlo.total(executions), collections.Counter()
    for execution in executions:
        if einsum := re.search(r"\b[A-Z]+,[A-Z]+->[A-Z]+\b", execution.source):
            products[einsum.group()] += execution.work.flops
    return {
        "aliased": account.Memory.of(compiled).aliased,
        "cache_bytes": meshes.local_bytes(described.caches_on(mesh)),
        "planned_cache_bytes": described.resident_on(mesh)["cache"],
        "caches": sorted(cache_shapes(described)),
        "copies": cache_copies(program, cache_shapes(described)),
        "vocabulary": [shape for shape in hlo.gathered(everywhere(program)) if VOCABULARY in shape],
        "scatters": sorted({line.source for line in program.inside_loops() if "scatter" in line.source}),
        "weights": account.gathered_weights(program, step),
        "parts": {scope: dataclasses.asdict(work) for scope, work in account.parts_of(program, step).items()},
        "products": products,
        "bytes": block.bytes,
        "cycles": block.cycles,
        "outside": account.outside_loop(program, step).bytes,
        "all_bytes": program.work(step.trip_counts).bytes,
        "memory": dataclasses.asdict(account.Memory.of(compiled)),
        "text": hashlib.sha256(compiled.as_text().encode()).hexdigest(),
        "seconds": seconds,
    }


def train_report(name: str, mesh) -> dict:
    """Compiles what writes the text and the update; says what is updated in place and gathered."""
    stage, seconds = training(name, mesh), {}
    for step in executables.training_executables(stage):
        compiled, seconds[step.name], reason = account.compiled_on(mesh, step)
        assert compiled is not None, reason
    program = account.program_of(compiled)
    arrays = [x for x in jax.tree.leaves(stage.state) if x.ndim]
    return {
        "aliased": account.Memory.of(compiled).aliased,
        "state_bytes": meshes.local_bytes(arrays),
        "vocabulary": [shape for shape in hlo.gathered(everywhere(program)) if VOCABULARY in shape],
        "seconds": seconds,
    }


def report(part: str, names: list[str]) -> dict:
    chips.compile_only()
    sizes = MESH if part in SLICES else dict.fromkeys(MESH, 1)
    mesh, result = chips.make_mesh(chips.slice_named(part, math.prod(sizes.values())), sizes), {}
    for name in names:
        jax.config.update("jax_optimization_level", "UNKNOWN" if name in THOROUGHLY else "O0")
        jax.clear_caches()  # "scattered" differs in this number alone
        with mock.patch.object(kv_cache, "_UNROLLED", 0 if name == "scattered" else kv_cache._UNROLLED):
            result[name] = (train_report if name in TRAINED else decode_report)(name, mesh)
        print(name, result[name]["seconds"], file=sys.stderr, flush=True)
    return result


def run_apart(*command: str, flags: str = "") -> str:
    """What Python says, run so; `flags` are the TPU compiler's, and have the last word."""
    # In a folder outside the environment, where it would have every run look for a TPU.
    compiler = Path(sys.prefix) / "tpu-compiler"
    if not (compiler / "libtpu").exists() and importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: make .venv/.installed-tpu-compiler")
    environment = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu", XLA_FLAGS="", LIBTPU_INIT_ARGS=flags)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@functools.cache
def in_a_process_of_its_own(part: str, *names: str, flags: str = "") -> dict:
    """The reports of these cases."""
    result = json.loads(run_apart(__file__, part, *names, flags=flags).splitlines()[-1])
    print(json.dumps(result, indent=1))
    return result


def compiled_for(part: str) -> dict:
    """The reports of all cases, which are compiled in one process."""
    return in_a_process_of_its_own(part, *compiled_names(part))


def compiled_names(part: str) -> list[str]:
    return [name for name in (*DRAFTERS, *TRAINED) if part == SLICES[0] or name in ON_BOTH]


def cases(names) -> list[tuple[str, str]]:
    return [(part, name) for part in SLICES for name in names if name in compiled_names(part)]


@pytest.mark.parametrize(("part", "name"), cases(DRAFTERS))
def test_a_drafter_decodes_on_a_slice_without_copying_a_cache_or_gathering_logits(part, name):
    result = compiled_for(part)[name]
    assert result["copies"] == result["scatters"] == []
    assert result["aliased"] >= result["cache_bytes"] > 0  # donated: there is one cache, not two
    assert result["planned_cache_bytes"] == result["cache_bytes"]
    assert result["vocabulary"] == result["weights"] == []  # nothing whole is put together, turn by turn
    # All are matrix products. One of a single row would be multiplied and summed by vector instructions.
    assert min(result["products"].values()) > 0
    assert all(seconds > 0 for seconds in result["seconds"])
    assert {"propose", "verify", "rule"} <= set(result["parts"])
    assert sum(of["bytes"] for of in result["parts"].values()) == pytest.approx(result["bytes"])
    assert result["bytes"] + result["outside"] == pytest.approx(result["all_bytes"])


@pytest.mark.parametrize(("part", "name"), cases(TRAINED))
def test_a_draft_is_trained_on_a_slice_in_place_without_gathering_logits(part, name):
    result = compiled_for(part)[name]
    assert result["aliased"] >= result["state_bytes"]
    assert result["vocabulary"] == []
    writes = name not in ("supervised", "block_parallel_trained", "pard_trained")
    assert set(result["seconds"]) == ({"draft text", "update"} if writes else {"update"})


def test_machine_code_that_equal_parts_share_changes_nothing_that_a_plan_tells():
    flags = {"shared": "", "separate": "--xla_tpu_enable_deduplicated_calls=false"}
    result = {name: in_a_process_of_its_own("v5e:2x2", "ngram", flags=of)["ngram"] for name, of in flags.items()}
    separate, shared = result["separate"], result["shared"]
    assert {**separate, "seconds": shared["seconds"]} == shared


def test_stages_are_planned_each_for_the_slice_of_its_mesh_one_chip_or_four():
    # As in the README.
    arguments = ["--config=configs/quickstart.py:smoke", "--plan=v5e", "--config.distilled.mesh.data=2"]
    arguments += ["--config.distilled.mesh.fsdp=2", "--config.distilled.data.batch_size=4"]
    message = run_apart("-m", "specjax.main", *arguments)
    assert "distilled fits v5e:2x2" in message and "evaluation fits v5e:1x1" in message


def test_a_loop_that_keeps_the_old_cache_is_seen_to_copy_it():
    assert in_a_process_of_its_own("v5e:2x2", "planted")["planted"]["copies"]


def test_rows_written_one_by_one_take_half_the_cycles_of_a_scatter():
    """The compiler's estimate for a block of two narrow layers and eight rows on each device."""
    result = in_a_process_of_its_own("v5e:2x2", "rows", "scattered")
    assert result["scattered"]["scatters"] and not result["rows"]["scatters"]
    assert result["rows"]["cycles"] < 0.5 * result["scattered"]["cycles"]
    assert result["rows"]["copies"] == result["scattered"]["copies"] == []


def test_int8_kernels_are_half_of_bfloat16s_bytes_and_int4_kernels_are_written_again():
    """In a block of one row; cycles are the compiler's estimate."""
    result = in_a_process_of_its_own("v5e:1x1", *KERNELS)
    full, eight, four = (result[name] for name in KERNELS)
    assert 0.5 < eight["bytes"] / full["bytes"] < 0.52 and eight["cycles"] < 0.8 * full["cycles"]
    assert full["bytes"] < four["bytes"] < 3 * full["bytes"]  # so that int4 saves memory there, not time


def test_copies_are_distinguished_from_prefetches_and_from_what_is_outside_loops():
    text = """
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
    names = {line.split(" = ")[0] for line in cache_copies(hlo.Program(text), {"bf16[2,4]"})}
    assert names == {"a", "e"}


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1], sys.argv[2:] or [*DRAFTERS, *TRAINED])))
