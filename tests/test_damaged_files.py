"""Damaged files end in one sentence, never in a traceback or a hang: each seed draws a file and what happens to it."""

import contextlib
import dataclasses
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import toy_tokenizers
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file
from test_gpt_oss import FIELDS as GPT_OSS
from test_layouts import LAYOUTS

from specjax import main
from specjax.data import tasks
from specjax.data.batches import evaluation_prompts
from specjax.data.tasks import load_task
from specjax.distillation import data_sources, divergences, recipes, settings
from specjax.hub import adapter as hub_adapter
from specjax.hub import load as hub_load
from specjax.hub import model as hub_model
from specjax.hub import weights
from specjax.hub.save import save
from specjax.hub.tokenizer import Tokenizer, train_byte_bpe
from specjax.models.decoder import Decoder
from specjax.runtime import cli
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

STRANGE = [
    None,
    True,
    -1,
    0,
    3,
    10**12,
    1e400,
    float("nan"),
    "",
    "x",
    "\x00",
    [],
    [[]],
    {},
    {"a": [None]},
    [1, "a", {}],
]
STRANGE += [json.loads("[" * 400 + "]" * 400)]
# Files of the reader, and the tokenizer that has them.
CHECKPOINTS = {
    "byte_bpe": ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    "llama_as_json": ("config.json", "tokenizer.json", "model.safetensors"),
    "llama_with_added_tokens": ("tokenizer.model", "tokenizer_config.json", "model.safetensors"),
    "gpt2_merges": ("vocab.json", "merges.txt", "model.safetensors.index.json"),
    "llama_of_old": ("added_tokens.json", "special_tokens_map.json", "model.safetensors"),
    "t5": ("spiece.model", "tokenizer_config.json", "config.json"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A tiny model with each of these tokenizers; the one with an index has two shards."""
    home = tmp_path_factory.mktemp("checkpoints")
    for kind in CHECKPOINTS:
        toy_tokenizers.KINDS[kind](home / "tokenizer" / kind)
        tokenizer = Tokenizer.load(home / "tokenizer" / kind)
        model = Decoder(dataclasses.replace(tiny.config(), vocab_size=512))
        params = jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), model.abstract_params())
        save(home / kind, model, params, tokenizer, max_shard_bytes=40_000 if kind == "gpt2_merges" else 10**9)
    return home


def places(value):
    """Every (container, key) in a JSON value, to a depth of four and 200 of each container."""
    stack, found = [(value, 0)], []
    while stack:
        node, depth = stack.pop()
        items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
        for key, inner in items[:200]:
            found.append((node, key))
            if depth < 4:
                stack.append((inner, depth + 1))
    return found


def damage(content: bytes, name: str, draw: random.Random) -> bytes:
    """One random damage: bytes flipped, removed or repeated, or a JSON value removed, replaced or nested."""
    with contextlib.suppress(ValueError):
        if name.endswith(".json") and draw.random() < 0.7:
            value = json.loads(content)
            node, key = draw.choice(places(value))
            if draw.random() < 0.3:
                del node[key]
            else:
                node[key] = draw.choice([*STRANGE, [node[key]], str(node[key])])
            return json.dumps(value).encode()
    head = min(len(content), 2000)  # of weights only the header is text
    place = draw.randrange(head)
    kind = draw.choice(("flip", "cut", "remove", "repeat", "empty"))
    if kind == "flip":
        changed = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(head)] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == "cut":
        return content[:place]
    if kind == "remove":
        return content[:place] + content[place + draw.randint(1, 9) :]
    return content[:place] + content[place:] * 2 if kind == "repeat" else b""


def refused(whole: Path, names: Sequence[str], seeds: Sequence[int], load: Callable[[Path, str], None]) -> int:
    """How many damaged copies of a directory end in one sentence; in each, one of the files `names` is damaged."""
    count = 0
    for seed in seeds:
        draw = random.Random(f"{whole.name} {seed}")
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place) / "copy"
            shutil.copytree(whole, directory)
            name = draw.choice(names)
            path = directory / name
            path.write_bytes(damage(path.read_bytes(), name, draw))
            try:
                load(directory, name)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000, (seed, name)
                count += 1
    return count


def load_checkpoint(directory, name):
    tokenizer = Tokenizer.load(directory)
    tokenizer.decode(tokenizer.encode_prompt("hello</s> world"))
    hub_load.read_config(directory, param_dtype="float32", compute_dtype="float32")
    weights.stored_in(directory)
    if name not in CHECKPOINTS["byte_bpe"][2:]:
        hub_model.load(directory)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_damaged_checkpoint_loads_or_ends_in_one_sentence(checkpoints, kind):
    assert refused(checkpoints / kind, CHECKPOINTS[kind], range(25), load_checkpoint) > 5


# Drafts that attach to a target, and the files of each.
DRAFTS = {
    **dict.fromkeys(("sglang", "speculators", "block_parallel"), ("config.json", "model.safetensors")),
    **dict.fromkeys(("kangaroo", "medusa"), ("adapter_config.json", "adapter.safetensors")),
}


@pytest.fixture(scope="module")
def target():
    return tiny.decoder(1, layers=6)


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_damaged_draft_loads_or_ends_in_one_sentence(target, tmp_path, kind):
    makers = {"kangaroo": lambda: tiny.adapter(target[0]), "block_parallel": lambda: tiny.block_parallel(*target)}
    makers["medusa"] = lambda: (tiny.heads(target[0]), tiny.heads_params(*target))
    network, own = makers.get(kind, lambda: tiny.eagle3(*target))()
    draft, whole = hub_adapter.LoadedAttachment(network, own, "fingerprint"), tmp_path / kind
    if kind in makers:
        hub_adapter.save(whole, draft)
    else:
        hub_adapter.save_for_engines(whole, draft, layout=kind)
    load = lambda directory, name: hub_adapter.load(directory, *target)
    assert refused(whole, DRAFTS[kind], range(15), load) > 5


@pytest.mark.parametrize("value", [{}, "3", None, 2.5, 10**12, [1]], ids=repr)
@pytest.mark.parametrize("kind, name", [("medusa", "heads"), ("kangaroo", "exit_layer")])
def test_a_number_of_an_adapters_description_that_is_none_is_one_sentence(target, tmp_path, kind, name, value):
    network, own = (
        tiny.adapter(target[0]) if kind == "kangaroo" else (tiny.heads(target[0]), tiny.heads_params(*target))
    )
    hub_adapter.save(tmp_path, hub_adapter.LoadedAttachment(network, own, "fingerprint"))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(UserError, match="adapter_config.json: ") as raised:
        hub_adapter.load(tmp_path, *target)
    assert "\n" not in str(raised.value)


def quantised_tensors(kind, name, values):
    """The tensors of a quantised checkpoint in place of one weight, and its description in config.json."""
    outputs, inputs = values.shape
    base, groups = name.removesuffix(".weight"), inputs // 8
    zeros = lambda *shape: np.zeros(shape, np.int32)
    packed = {f"{base}.qzeros": zeros(groups, outputs // 8), f"{base}.scales": np.zeros((groups, outputs), np.float16)}
    if kind == "gptq":
        return packed | {f"{base}.qweight": zeros(inputs // 8, outputs), f"{base}.g_idx": zeros(inputs)}
    if kind == "awq":
        return packed | {f"{base}.qweight": zeros(inputs, outputs // 8)}
    scales = np.ones([-(-size // 16) for size in values.shape], np.float32)
    return {name: values.astype(ml_dtypes.float8_e4m3fn), f"{name}_scale_inv": scales}


QUANTISED = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [16, 16]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 8},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"},
    "mxfp4": {"quant_method": "mxfp4"},
}


def sparse_tensors(name, values):
    """The same for the experts of gpt-oss."""
    experts, inputs, outputs = values.shape
    blocks = np.zeros((experts, outputs, inputs // 32, 16), np.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": np.zeros(blocks.shape[:-1], np.uint8)}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_damaged_quantised_checkpoint_loads_or_ends_in_one_sentence(tmp_path, kind):
    whole, sparse = tmp_path / kind, kind == "mxfp4"
    fields = dict(param_dtype="float32", compute_dtype="float32")
    config = hub_load.FAMILIES["gpt_oss"].read_config(GPT_OSS, **fields) if sparse else tiny.config(vocab_size=272)
    model = Decoder(config)
    params = jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), model.abstract_params())
    save(whole, model, params, train_byte_bpe(["some words, and some words again\n"] * 20, 265))
    tensors = {}
    for name, values in load_file(whole / "model.safetensors").items():
        if sparse and name.endswith("_proj"):
            tensors |= sparse_tensors(name, values)
        else:
            tensors |= quantised_tensors(kind, name, values) if "_proj." in name and not sparse else {name: values}
    save_file(tensors, whole / "model.safetensors")
    path = whole / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": QUANTISED[kind]}))
    load = lambda directory, name: hub_load.load(directory)
    load(whole, "")
    assert refused(whole, ("config.json", "model.safetensors"), range(15), load) > 5


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_damaged_file_of_examples_is_read_or_ends_in_one_sentence(tmp_path, name):
    path = tmp_path / name
    LAYOUTS[name][0](path)
    whole = path.read_bytes()
    tokenizer = train_byte_bpe([whole.decode("latin-1")], 280)
    count = 0
    for seed in range(10):
        draw = random.Random(f"{name} {seed}")
        lines = whole.split(b"\n")
        if path.suffix == ".jsonl" and draw.random() < 0.7:  # one value of one line
            line = draw.randrange(len(lines) - 1)
            lines[line] = damage(lines[line], "line.json", draw)
            path.write_bytes(b"\n".join(lines))
        else:
            path.write_bytes(damage(whole, path.name, draw))
        for task in ("prompts", "prompt_completion", "text"):
            try:
                loaded = load_task(ConfigDict({"name": task, "path": str(path), "seed": 0, "size": 0}))
                evaluation_prompts(loaded, tokenizer, count=1, prompt_length=(1, 10**6), seed=0)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000, (seed, task)
                count += 1
    assert count > 5


# Overrides on the command line.

VALUES = [
    *(
        "",
        "x",
        "-1",
        "0",
        "1e400",
        "nan",
        "-inf",
        "10**9",
        "9" * 400,
        "1.5",
        "True",
        "none",
        "None",
        "[",
        "(,)",
        "((1,2),3)",
    ),
    *(
        "{}",
        "{'a':1}",
        "a,b",
        "1,x",
        "\x00",
        "é" * 50,
        "stage:",
        "stage:nowhere",
        "workdir:target",
        "required:a:b",
    ),
    *("forward_kl", "jsd", "file.py:Name", "/nowhere", "gkd", "float16", " ", "=", "--config.seed=1", "%s{0}\\"),
]


def random_override(draw, keys):
    """A key that exists, one that is damaged, or a section, with a random value."""
    key = draw.choice(keys)
    damage = draw.randrange(8)
    if damage == 0:
        key = key.rpartition(".")[0] or "stages"
    elif damage == 1:
        key += draw.choice([".", ".x", "..y", "[0]", ".__class__", ".items", " "])
    elif damage == 2:
        key = draw.choice(["", ".", "x" * 300, "_fields", "lock", "\x00", "distilled.", "to_dict.x", "é"])
    return f"--config.{key}={draw.choice(VALUES)}"


def check_stages(config, workdir):
    """What a run checks in its stages' sections before it loads anything."""
    main._check_stages(config)
    for name in config.stages:
        section = configs.resolve(config[name], workdir, config.stages)
        meshes.make_mesh(section.mesh)
        if section.binary == "distill":
            section = recipes.expand(section)
            settings.check_numbers(section)
            divergences.of_config(section.loss)
            data_sources.check_fractions(data_sources.fractions_of(section.data), has_target=bool(section.target))
            if (section.task.name, section.task.path) != ("stdlib_code", ""):  # the text of the default takes a while
                tasks.load_task(section.task)


@pytest.mark.slow
def test_random_overrides_end_in_one_sentence(tmp_path, capsys):
    file = Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"
    keys = [key for key, _ in configs.leaves(configs.load(f"{file}:smoke").to_dict())]
    codes = []
    for seed in range(150):
        draw = random.Random(seed)
        overrides = [random_override(draw, keys) for _ in range(draw.randint(1, 3))]
        arguments = [f"--config={file}:smoke", f"--workdir={tmp_path / str(seed)}", *overrides]
        codes.append(cli.launch(check_stages, "specjax.main", arguments))
        assert codes[-1] in (0, 2), overrides
        assert capsys.readouterr().err.count("\n") == (codes[-1] == 2), overrides
    assert 10 < codes.count(2) < 149
