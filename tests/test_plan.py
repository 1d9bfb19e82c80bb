"""Plans: what they refuse, what they read out of compiled text, and that their bytes are those of a real run."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from specjax import main, plan
from specjax.decoding import batch, loop
from specjax.decoding.plan import padded_length
from specjax.distillation import update
from specjax.hub.families import llama, t5
from specjax.models.config import DecoderConfig
from specjax.models.encoder_decoder import EncoderDecoderConfig
from specjax.planning import account, chips, executables, hlo, smallest
from specjax.planning import tables as plan_tables
from specjax.planning.models import ModelCatalog
from specjax.reporting import records
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SHAPE = dict(width=32, layers=2, heads=4, kv_heads=4, head_size=8, mlp_width=64, vocab_size=64)
DTYPES = dict(param_dtype="bfloat16", compute_dtype="bfloat16")


def directory(path, **changes):
    """A checkpoint of which only config.json is there."""
    fields = dict(max_positions=256, rope_theta=1e4, norm_epsilon=1e-5, tied_head=False, **DTYPES)
    config = DecoderConfig.llama(**{**SHAPE, **fields, **changes})
    return written(path, llama.FAMILY.write_config(config))


def t5_directory(path, **changes):
    fields = dict(encoder_layers=2, norm_epsilon=1e-6, tied_head=False, start_token=0, **DTYPES)
    return written(path, t5.FAMILY.write_config(EncoderDecoderConfig.t5(**{**SHAPE, **fields, **changes})))


def written(path, fields):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields))
    return str(path)


def pair(target, draft, mesh, *, exit_layer=0):
    """configs/plan/pairs.py with small batches of these directories; an adapter drafts where there is no draft."""
    name = "vicuna_13b" if exit_layer else "llama_65b"
    config = configs.load(f"{ROOT}/configs/plan/pairs.py:{name}")
    config.target, config.draft = target, draft
    for stage in config.stages:
        config[stage].mesh.update(dict(zip(meshes.AXES, mesh, strict=True)))
    training = config[config.stages[0]]
    training.data.update({"batch_size": 8, "sequence_length": 16, "prompt_length_max": 8})
    training.data.generation.max_new_tokens = 8
    training.loss.chunk = 64
    if exit_layer:
        training.adapter.exit_layer = exit_layer
    config.evaluation.batch_sizes = (8,)
    config.evaluation.selection.length_max = 32
    config.evaluation.max_new_tokens = 16
    return config


# --- what is refused


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("v5x", 8, 'there is no chip "v5x" to plan for; did you mean "v5'),
        ("h1000", 8, 'did you mean "h100"'),
        ("v5e:3x3", 9, "v5e has no slice 3x3"),
        ("v5e:4x4", 8, "the mesh has 8 devices and v5e:4x4 has 16 chips; let mesh.data"),
        ("v5p", 6, "v5p has none of 6"),
    ],
)
def test_a_slice_that_is_not_to_be_had_is_refused_with_those_that_are(name, size, message):
    with pytest.raises(UserError, match=message):
        chips.slice_named(name, size)


def test_a_slice_is_found_by_its_chip_and_the_size_of_the_mesh():
    assert chips.slice_named("v5e", 16).name == "v5e:4x4"
    assert chips.slice_named("V5P:2x2x4", 16).size == 16
    assert chips.slice_named("h100", 256).topology == "256"
    for chip in chips.CHIPS.values():
        sizes = [part.size for part in chips.slices_of(chip)]
        assert sizes == sorted(sizes) and max(sizes) == 256 and chip.source.startswith("https://")


def test_a_config_without_a_chip_a_stage_or_an_earlier_stage_is_refused(tmp_path):
    with pytest.raises(UserError, match="names no chip to plan for; name one, as in --plan=v5e"):
        plan.run(configs.load(f"{ROOT}/configs/quickstart.py"))
    with pytest.raises(UserError, match="has nothing to plan; planning needs a stage of distill or evaluate"):
        plan.run(configs.load(f"{ROOT}/configs/benchmark/cpu.py"), "v5e")
    config = pair(directory(tmp_path / "t"), "stage:nowhere", (1, 1, 1))
    with pytest.raises(UserError, match='"stage:nowhere" names no stage planned before'):
        plan.run(config, "h100")
    config.draft, config.target = str(tmp_path / "t"), str(tmp_path / "none")
    with pytest.raises(UserError, match="none"):
        plan.run(config, "h100")


def test_the_command_line_tells_a_mistake_in_one_line(capsys):
    assert main.launch([f"--config={ROOT}/configs/quickstart.py", "--plan=v7z"]) == 2
    assert 'error: there is no chip "v7z" to plan for' in capsys.readouterr().err
    assert main.launch([f"--config={ROOT}/configs/quickstart.py", "--plan=v5e:2x2"]) == 2
    assert "the mesh has 1 devices and v5e:2x2 has 4 chips" in capsys.readouterr().err


# --- bytes are those of a real run


def held(tree):
    """Bytes on each device: the same on all of them."""
    result = {}
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            result[shard.device] = result.get(shard.device, 0) + shard.data.nbytes
    assert len(set(result.values())) == 1, result
    return next(iter(result.values()))


def begun(decoding, target, draft, mesh):
    """The state of a real decode after its prefill."""
    put = lambda array, axes: jax.device_put(array, jax.NamedSharding(mesh, meshes.spec(axes)))
    prompts = put(np.ones((decoding.batch, decoding.plan.prompt_slots), np.int32), ("batch", None))
    lengths = put(np.full(decoding.batch, decoding.plan.prompt_slots, np.int32), ("batch",))
    keys = put(jax.random.split(jax.random.key(0), decoding.batch), ("batch",))
    return loop.prefill(decoding.plan, target, draft, prompts, lengths, keys)


def compare(config, mesh):
    """Plans both stages and makes for each what a run would hold: parameters, optimiser, caches."""
    shelf, section = ModelCatalog(), config[config.stages[0]]
    stage = executables.training(section, shelf, mesh)
    shelf.made[config.stages[0]] = stage.draft
    drawn = lambda model, seed: jax.jit(model.init, out_shardings=model.shardings(mesh))(jax.random.key(seed))
    target, params = drawn(stage.target, 0), drawn(stage.draft, 1)
    optimizer = update.make_optimizer(section.optimizer, section.train.steps)
    state = update.initial_state(params, stage.draft.axes(), optimizer, mesh)
    assert stage.resident == {
        "parameters": held(state.params),
        "optimizer": held(state.optimizer_state),
        "target parameters": held(target),
    }
    with meshes.use(mesh):
        (decoding,) = executables.decodings(config.evaluation, shelf, mesh)
        begun_state = begun(decoding, target, params, mesh)
    caches = [x for x in jax.tree.leaves((begun_state.target_cache, begun_state.drafter_state)) if x.ndim == 4]
    assert decoding.resident_on(mesh)["cache"] == held(caches)
    assert decoding.resident_on(mesh)["parameters"] == held(params)
    assert decoding.resident_on(mesh)["target parameters"] == held(target)


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.parametrize("encoder_decoder", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_more_devices_with_as_many_rows_each_hold_and_send_no_more(tmp_path, encoder_decoder):
    """Over `fsdp` the weights go to the rows: of a step, rows that went to the weights would be all rows of all."""
    write = t5_directory if encoder_decoder else directory
    target, draft = write(tmp_path / "target", width=64), write(tmp_path / "draft", layers=1)
    result = []
    for ways in (2, 8):
        types = (jax.sharding.AxisType.Auto,) * len(meshes.AXES)
        mesh = jax.make_mesh((1, ways, 1), meshes.AXES, axis_types=types, devices=jax.devices()[:ways])
        section = pair(target, draft, (1, ways, 1)).distilled
        section.data.batch_size = 8 * ways
        *_, step = executables.training_executables(executables.training(section, ModelCatalog(), mesh))
        with meshes.use(mesh):
            compiled = step.lower().compile()
        traffic = account.program_of(compiled).work().traffic
        result.append((account.Memory.of(compiled).temporary, sum(of.sent for of in traffic.values())))
    (held_by_two, sent_by_two), (held_by_eight, sent_by_eight) = result
    assert held_by_eight < 1.3 * held_by_two
    assert sent_by_eight < 2 * sent_by_two  # of a whole copy 7/8 come from others, in place of 1/2


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_assisted_rollouts_and_the_step_on_them_are_planned(tmp_path):
    section = pair(directory(tmp_path / "target"), directory(tmp_path / "draft", layers=1), (2, 2, 2)).distilled
    section.data.update({"fixed": 0.0, "draft": 0.0, "target": 0.0, "assisted": 1.0})
    mesh = meshes.make_mesh(section.mesh)
    parts = list(executables.training_executables(executables.training(section, ModelCatalog(), mesh)))
    assert [part.name for part in parts] == ["assisted text", "update"]
    with meshes.use(mesh):
        for part in parts:
            part.lower().compile()
    section.loss.update({"selected": 0.4, "reference": section.model.init})
    with pytest.raises(UserError, match="a plan does not include the draft in loss.reference; set"):
        executables.training(section, ModelCatalog(), mesh)


def test_remat_is_refused_unless_it_is_true_or_false(tmp_path):
    section = pair(directory(tmp_path / "target"), directory(tmp_path / "draft"), (1, 1, 1)).distilled
    section.model = ConfigDict({**section.model, "remat": "layers"})
    with pytest.raises(UserError, match="model.remat must be True or False, not 'layers'"):
        executables.training(section, ModelCatalog(), meshes.make_mesh(section.mesh))


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.parametrize("mesh", [(2, 2, 2), pytest.param((1, 4, 2), marks=pytest.mark.slow)], ids=str)
def test_bytes_of_a_decoder_and_its_draft_are_those_of_a_run(tmp_path, mesh):
    """Both have a vocabulary, and the draft has one key/value head, that the tensor axis does not divide."""
    draft = directory(tmp_path / "d", layers=1, tied_head=True, kv_heads=1, vocab_size=65)
    config = pair(directory(tmp_path / "t", kv_heads=2, vocab_size=65), draft, mesh)
    compare(config, meshes.make_mesh(config.evaluation.mesh))


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_bytes_of_a_target_and_its_adapter_are_those_of_a_run(tmp_path):
    config = pair(directory(tmp_path / "t", kv_heads=1), "", (1, 2, 4), exit_layer=1)
    compare(config, meshes.make_mesh(config.evaluation.mesh))


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_bytes_of_an_encoder_decoder_are_those_of_a_run(tmp_path):
    config = pair(t5_directory(tmp_path / "t"), t5_directory(tmp_path / "d", layers=1), (4, 1, 2))
    compare(config, meshes.make_mesh(config.evaluation.mesh))


@pytest.mark.slow
def test_a_plan_for_gpus_says_that_it_is_an_estimate_and_finds_the_smallest_slice(tmp_path):
    target, draft = directory(tmp_path / "t"), directory(tmp_path / "d", layers=1)
    given = [f"--config.target={target}", f"--config.draft={draft}", f"--workdir={tmp_path / 'w'}"]
    small = {"data.batch_size": 8, "data.sequence_length": 16, "data.prompt_length_max": 8, "loss.chunk": 64}
    small |= {"data.generation.max_new_tokens": 8}
    given += [f"--config.distilled.{key}={value}" for key, value in small.items()]
    given += ["--config.evaluation.selection.length_max=32", "--config.evaluation.max_new_tokens=16"]
    given += [f"--config.{stage}.mesh.{axis}=2" for stage in ("distilled", "evaluation") for axis in meshes.AXES]
    command = [
        sys.executable,
        "-m",
        "specjax.main",
        "--config=configs/plan/pairs.py:llama_65b",
        "--plan=h100:8",
        *given,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Temporary memory is an estimate" in done.stdout
    assert "the smallest listed slice that holds it is h100:1 " in done.stdout
    record = records.read_results(tmp_path / "w" / "plan.json")
    assert [row["step"] for row in record["rows"]] == ["draft text", "update", "prefill", "decode block"]
    assert all(row["fits"] and row["compiler"] == "CPU" and row["flops"] > 0 for row in record["rows"])
    assert set(record["rows"][0]["roofline"]) == set(chips.CHIPS)


# --- the smallest slice


def test_the_smallest_slice_grows_with_what_is_resident_and_is_none_where_nothing_holds_it():
    part = chips.slice_named("v5e:4x4", 16)
    sizes = {"data": 1, "fsdp": 2, "tensor": 8}
    row = {"resident_bytes": {"parameters": 2 * chips.GIB}, "peak_bytes": 3 * chips.GIB, "fits": True}
    section = ConfigDict({"binary": "distill"})

    def smallest_of(total):
        over = lambda mesh: {"parameters": total // (mesh.shape["fsdp"] * mesh.shape["tensor"])}
        return smallest.summary("stage", section, over, [row], part, sizes)["smallest"]

    assert smallest_of(chips.GIB)["slice"] == "v5e:1x1"
    assert smallest_of(100 * chips.GIB) == {"slice": "v5e:2x4", "mesh": {"data": 1, "fsdp": 1, "tensor": 8}}
    assert smallest_of(10**5 * chips.GIB) is None


def test_what_does_not_divide_is_passed_over():
    def needs(mesh):
        if mesh.shape["tensor"] > 1:
            raise UserError("heads")
        return {"parameters": 1}

    row = {"resident_bytes": {"parameters": 1}, "peak_bytes": 1, "fits": True}
    part, sizes = chips.slice_named("v5e:2x2", 4), {"data": 1, "fsdp": 1, "tensor": 4}
    result = smallest.summary("s", ConfigDict({"binary": "evaluate"}), needs, [row], part, sizes)["smallest"]
    assert result == {"slice": "v5e:1x1", "mesh": {"data": 1, "fsdp": 1, "tensor": 1}}


# --- compiled text

TEXT = """
%cond (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%body (q: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %q = (s32[], f32[8,16]{1,0:T(8,128)S(1)}) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%q), index=1
  %w = f32[16,16]{1,0} constant({...})
  %dot = f32[8,16]{1,0:T(8,128)} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum = f32[8,16]{1,0} all-reduce(%dot), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add
  %wide = f32[32,16]{1,0} all-gather(%sum), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %out = (s32[], f32[8,16]{1,0}) tuple(%i2, %sum)
}
ENTRY %main (a: f32[8,16], k: bf16[16,32]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %k = bf16[16,32]{1,0} parameter(1)
  %conv = f32[8,32]{1,0} convolution(%a, %k), dim_labels=bf_io->bf
  %one = f32[8,32]{1,0} reduce-scatter(%conv), replica_groups={{0}}, dimensions={0}
  %loop = (s32[], f32[8,16]{1,0}) while(%t), condition=%cond, body=%body, metadata={op_name="jit(f)/while"}
  ROOT %r = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_work_is_counted_as_often_as_it_is_done():
    program = hlo.Program(TEXT)
    once, every = program.work(lambda source: 1), program.work()
    assert once.flops == 2 * 8 * 32 * 16 + 2 * 8 * 16 * 16
    assert every.flops == 2 * 8 * 32 * 16 + 5 * 2 * 8 * 16 * 16
    assert program.work(lambda source: 7 if source == "jit(f)/while" else None).flops - once.flops == 6 * 4096
    reduce, gather = every.traffic["all-reduce"], every.traffic["all-gather"]
    assert (reduce.count, reduce.bytes, reduce.sent) == (5, 5 * 512, 5 * 2 * 512 * 3 / 4)
    assert (gather.count, gather.bytes, gather.sent) == (5, 5 * 2048, 5 * 2048 * 3 / 4)
    assert "reduce-scatter" not in every.traffic  # a group of one sends nothing
    assert list(hlo.gathered(program.inside_loops())) == [(32, 16)]


def test_of_loops_of_which_one_is_taken_the_most_expensive_counts():
    program = hlo.Program(
        TEXT.replace(
            "ROOT %r",
            '%again = (s32[]) while(%t), condition=%cond, body=%body, metadata={op_name="jit(f)/while"}\n  ROOT %r',
        )
    )
    assert program.work(lambda source: hlo.ONE_OF_THEM).flops == hlo.Program(TEXT).work(lambda source: 1).flops


def test_a_loop_that_counts_by_two_takes_half_the_turns():
    counter = "  %two = s32[] constant(2)\n  %j = s32[] get-tuple-element(%q), index=0\n  %i2 = s32[] add(%j, %two)\n"
    program = hlo.Program(TEXT.replace("  %x = f32[8,16]", f"{counter}  %x = f32[8,16]", 1))
    assert program.work().traffic["all-reduce"].count == 3  # 0, 2 and 4 are below 5


def bytes_of(main: str, *computations: str, counts=hlo.unknown) -> float:
    """Bytes of a program whose entry computation has these lines."""
    return hlo.Program("\n".join([*computations, "ENTRY %main () -> f32[] {", main, "}"])).work(counts).bytes


# A cache of 4,096 bytes in main memory, an update and a slice of 64, and an index.
ARGUMENTS = """
  %cache = bf16[2048]{0:T(1024)(128)(2,1)} parameter(0)
  %update = bf16[32]{0} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
"""
SLICES = """
%slices (p.0: s32[], p.1: bf16[2048]) -> f32[32] {
  %p.1 = bf16[2048]{0} parameter(1)
  %p.0 = s32[] parameter(0)
  %view = bf16[2048]{0} bitcast(%p.1)
  %part = bf16[32]{0} dynamic-slice(%view, %p.0), dynamic_slice_sizes={32}
  ROOT %wide = f32[32]{0} convert(%part)
}
"""
UPDATES = """
%updates (p.2: s32[], p.0: bf16[2048], p.1: bf16[32]) -> (bf16[32], bf16[2048]) {
  %p.2 = s32[] parameter(2)
  %p.1 = bf16[32]{0} parameter(1)
  %p.0 = bf16[2048]{0} parameter(0)
  %zero = s32[] constant(0)
  %first = bf16[2048]{0} dynamic-update-slice(%p.0, %p.1, %zero)
  %second = bf16[2048]{0} dynamic-update-slice(%first, %p.1, %p.2)
  %twice = bf16[32]{0} add(%p.1, %p.1)
  ROOT %both = (bf16[32]{0}, bf16[2048]{0}) tuple(%twice, %second)
}
"""
OUTER = """
%outer (p.0: bf16[2048], p.1: s32[]) -> f32[32] {
  %p.0.1 = bf16[2048]{0} parameter(0)
  %p.1.1 = s32[] parameter(1)
  %inner = f32[32]{0} fusion(%p.1.1, %p.0.1), kind=kLoop, calls=%slices
  ROOT %minus = f32[32]{0} negate(%inner)
}
"""
GATHERED = """
%step (p.0: bf16[16], p.1: bf16[32]) -> (f32[8], bf16[16], bf16[32]) {
  %p.0 = bf16[16]{0} parameter(0)
  %p.1 = bf16[32]{0} parameter(1)
  %all = bf16[32]{0} all-gather(%p.0), channel_id=2, replica_groups={{0,1}}, frontend_attributes={chain_id="1"}
  %work = f32[8]{0} constant({...})
  ROOT %all.three = (f32[8]{0}, bf16[16]{0}, bf16[32]{0}) tuple(%work, %p.0, %all)
}
"""
START = "  %a = ((bf16[2048]{0}), bf16[32]{0:S(1)}, s32[]{:S(2)})"
ASYNC = "%async (p: bf16[2048]) -> bf16[32] {\n  %p = bf16[2048]{0} parameter(0)\n"
ASYNC += "  ROOT %s = bf16[32]{0:S(1)} slice(%p), slice={[0:32]}\n}"


@pytest.mark.parametrize(
    ("expected", "line", "computations"),
    [
        # A fusion's operands are numbered by parameter(N), in whatever order these are written; the index is on chip.
        (64 + 128, "  %r = f32[32]{0} fusion(%i, %cache), kind=kLoop, calls=%slices", [SLICES]),
        (64 + 128, "  %r = f32[32]{0} fusion(%cache, %i), kind=kLoop, calls=%outer", [SLICES, OUTER]),
        # Two updates in place read the update once, and write it twice and the other result once.
        (
            64 + 2 * 64 + 64,
            "  %r = (bf16[32]{0}, bf16[2048]{0}) fusion(%cache, %update, %i), kind=kLoop, calls=%updates",
            [UPDATES],
        ),
        # What is in on-chip memory moves only on the side of the main memory.
        (64, "  %r = bf16[32]{0:T(128)S(1)} slice(%cache), slice={[0:32]}", []),
        (64, f"{START} slice-start(%cache), slice={{[0:32]}}\n  %r = bf16[32]{{0:S(1)}} slice-done(%a)", []),
        (
            64,
            f"{START.replace('}),', '}, s32[]),')} dynamic-slice-start(%cache, %i)\n"
            "  %r = bf16[32]{0:S(1)} dynamic-slice-done(%a)",
            [],
        ),
        (64, f"{START} async-start(%cache), calls=%async\n  %r = bf16[32]{{0:S(1)}} async-done(%a)", [ASYNC]),
        (
            4096,
            "  %a = (bf16[2048]{0:S(1)}, bf16[2048]{0}, u32[]{:S(2)}) copy-start(%cache)\n"
            "  %r = bf16[2048]{0:S(1)} copy-done(%a)",
            [],
        ),
        (
            64 + 128,
            "  %a = (bf16[32]{0}, bf16[64]{0}) all-gather-start(%update), replica_groups={{0,1}}, dimensions={0}\n"
            "  %r = bf16[64]{0} all-gather-done(%a)",
            [],
        ),
        (
            2 * 64,
            "  %a = (bf16[32]{0}, bf16[32]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%update)\n"
            "  %r = bf16[32]{0} collective-permute-done(%a)",
            [],
        ),
        (2 * 64, "  %r = bf16[32]{0} all-reduce-start(%update), replica_groups={{0,1}}", []),
    ],
)
def test_bytes_are_those_of_main_memory_that_an_instruction_touches(expected, line, computations):
    assert bytes_of(ARGUMENTS + line, *computations) == expected


def test_of_a_conditional_in_either_notation_the_costliest_branch_counts():
    branch = lambda name, size: f"%{name} (p: f32[9]) -> f32[9] {{\n  ROOT %x = f32[{size}]{{0}} sqrt(%q)\n}}"
    branches = branch("small", 2), branch("large", 5)
    for attributes in ("branch_computations={%large, %small}", "true_computation=%large, false_computation=%small"):
        assert bytes_of(f"  %r = f32[9]{{0}} conditional(%p, %t, %t), {attributes}", *branches) == 4 * 5


def test_a_collective_that_several_fusions_carry_is_sent_once():
    buffers, again = "(f32[8]{0}, bf16[16]{0}, bf16[32]{0})", "output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}"
    text = f"""{GATHERED}
ENTRY %main (w: bf16[16], b: bf16[32]) -> f32[8] {{
  %w = bf16[16]{{0}} parameter(0)
  %b = bf16[32]{{0}} parameter(1)
  %async-collective-start.1 = {buffers} fusion(%w, %b), kind=kCustom, calls=%step
  %fusion.1 = {buffers} fusion(%w, %b), kind=kOutput, calls=%step, {again}
  %async-collective-done.1 = bf16[32]{{0}} fusion(%w, %b), kind=kCustom, calls=%step, {again}
}}
"""
    work = hlo.Program(text).work()
    assert work.traffic["all-gather"] == hlo.Traffic(1, 64.0, 32.0)
    assert work.bytes == 32 + 64 + 32  # the shard and the gathered array, and the result of the fusion between them


def test_a_block_is_one_turn_of_its_loop_and_parts_add_up_to_the_total():
    hoisted = '  %copy = bf16[16,32]{0,1} copy(%k), metadata={op_name="jit(f)/while/body/verify/copy"}\n'
    program = hlo.Program(TEXT.replace("  %loop =", f"{hoisted}  %loop ="))
    step = executables.Executable("decode block", print, {}, frozenset(), loop="jit(f)/while")
    parts, outside = account.parts_of(program, step), account.outside_loop(program, step)
    block, everything = hlo.Work.total((1, part) for part in parts.values()), program.work(lambda source: 1)
    assert block.flops == 2 * 8 * 16 * 16 and outside.flops == 2 * 8 * 32 * 16
    assert block.bytes + outside.bytes == everything.bytes and outside.bytes >= 2 * 1024
    whole = executables.Executable("prefill", print, {}, frozenset())
    assert hlo.Work.total((1, part) for part in account.parts_of(program, whole).values()) == program.work()
    assert account.outside_loop(program, whole) == hlo.Work()


def test_the_work_of_a_compiled_scan_is_that_of_its_turns():
    def scan(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 128), (128, 128))]
    compiled = jax.jit(scan).lower(*shapes).compile()
    work = account.program_of(compiled).work()
    assert work.flops == 7 * 2 * 64 * 128 * 128
    assert 7 * 4 * 128 * 128 < work.bytes < 7 * 4 * (128 * 128 + 8 * 64 * 128)
    assert account.Memory.of(compiled).arguments == 4 * (64 * 128 + 128 * 128)


def test_a_compiled_loop_over_a_cache_moves_the_slots_that_it_touches():
    def fill(cache, x):
        step = lambda i, cache: jax.lax.dynamic_update_slice(cache, jnp.tanh(cache[i] + x)[None], (i, 0))
        return jax.lax.fori_loop(0, 64, step, cache)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 1024), (1024,))]
    compiled = jax.jit(fill, donate_argnums=0).lower(*shapes).compile()
    slot, cache = 4 * 1024, 4 * 64 * 1024
    assert 64 * 3 * slot <= account.program_of(compiled).work().bytes <= 64 * 8 * slot + 2 * cache


def test_the_least_time_is_that_of_the_busiest_part():
    chip = chips.CHIPS["v5e"]
    work = hlo.Work(float(chip.flops), 2.0 * chip.bandwidth, {"all-reduce": hlo.Traffic(1, 0.0, 3 * chip.interconnect)})
    assert account.roofline(work, chip) == {"compute": 1, "memory": 2, "communication": 3, "seconds": 3}


def test_a_stage_that_does_not_fit_is_reported_in_the_compilers_reason():
    reason = account._reason(
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 20.5G of 15.7G hbm. Exceeded hbm capacity by 4.8G.\n\nTotal hbm usage >= 21G"
    )
    assert "Used 20.5G of 15.7G hbm" in reason and "Total" not in reason
    part = chips.slice_named("v5e:1x1", 1)
    step = executables.Executable("update", print, {"parameters": 5}, frozenset())
    mesh = jax.sharding.AbstractMesh((1, 1, 1), meshes.AXES)
    row = account.row("s", step, part, mesh, None, 1.0, reason)
    assert not row["fits"] and row["refusal"] == reason
    summary = smallest.summary("s", ConfigDict({"binary": "distill"}), dict, [row], part, dict(mesh.shape))
    assert summary["peak_bytes"] is None and summary["smallest"] is None
    record = {"rows": [{**row, "resident_bytes": {"parameters": 5, "target parameters": 0}}], "stages": []}
    assert "s: update does not compile: Ran out of memory" in plan_tables.terminal(record)


def test_prompts_are_padded_as_decoding_pads_them():
    assert padded_length(33) == batch.prompt_slots([[0] * 33]) == 64
