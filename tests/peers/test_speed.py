"""Our speculative decoding compared with Hugging Face's plain and assisted generation: same weights, prompts and CPU.

Batch 1, greedy. `SPECJAX_PAIR=TARGET:DRAFT` names two Hugging Face directories (otherwise those of the quickstart, if
they exist); `SPECJAX_PEERS_OUT=FILE` receives the record as JSON. Every setting of every system is first tried on a few
prompts; the best of each kind is then measured on all of them, in turn with the others.

For a pair of real checkpoints add `SPECJAX_QUESTIONS=FILE`, Spec-Bench's question.jsonl, whose first turns are asked
in the chat template, and `SPECJAX_DTYPE=bfloat16` to have transformers compute in bfloat16; specjax loads the same
files in the dtype that it chooses itself.
"""

import itertools
import json
import os
import statistics
import sysconfig
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from specjax.hub.save import save
from specjax.hub.tokenizer import Tokenizer, train_byte_bpe
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder

pytestmark = pytest.mark.peers

QUICKSTART = "runs/quickstart/target/export:runs/quickstart/distilled/export"
NEEDED_RATIO = 3.0
TIE = 1e-5  # where the two best logits are nearer than this, two correct programs may choose differently
PROMPT_TOKENS = 32
# With a real pair, how fast specjax has to be in units of transformers, by the dtype of transformers: our system, the
# systems of transformers whose faster one it is compared with, and the ratio.
REAL_RATIOS = {
    "float32": (("plain", ("plain",), 2.0), ("speculative", ("assisted",), 3.0)),
    "bfloat16": (("plain", ("plain",), 0.9), ("speculative", ("plain", "assisted"), 1.4)),
}
# Trained pair: enough for a stable median. Random pair: only that both systems run.
TRAINED = {
    "new_tokens": 128,
    "prompts": 8,
    "tried_prompts": 2,
    "repeats": 3,
    "draft_lengths": tuple(range(2, 9)),
}
RANDOM = {"new_tokens": 16, "prompts": 2, "tried_prompts": 1, "repeats": 1, "draft_lengths": (2, 4)}
# A real pair of a billion parameters takes seconds a prompt, and fits the memory once for each system.
REAL = {"new_tokens": 64, "prompts": 6, "tried_prompts": 1, "repeats": 3, "draft_lengths": (2, 4, 6)}
TRIED_TOKENS = 32  # per prompt, with which a real pair's settings are compared
ATTENTION = ("eager", "sdpa")
THREADS = (1, 2)
THRESHOLDS = (0.0, None)  # of the draft's confidence; None is what transformers does unasked


def random_pair(directory):
    """An untrained target and draft of about the quickstart's size, with a tokenizer."""
    texts = [Path(json.__file__).read_text(), Path(statistics.__file__).read_text()]
    tokenizer = train_byte_bpe(texts, 1024)
    shared = {
        "vocab_size": tokenizer.vocab_size,
        "head_size": 64,
        "max_positions": 512,
        "rope_theta": 1e4,
        "norm_epsilon": 1e-5,
        "tied_head": True,
        "param_dtype": "float32",
        "compute_dtype": "float32",
    }
    target = DecoderConfig.llama(width=512, layers=4, heads=8, kv_heads=4, mlp_width=1536, **shared)
    draft = DecoderConfig.llama(width=128, layers=2, heads=2, kv_heads=2, mlp_width=384, **shared)
    paths = []
    for name, config in (("target", target), ("draft", draft)):
        decoder = Decoder(config)
        save(directory / name, decoder, decoder.init(jax.random.key(0)), tokenizer)
        paths.append(directory / name)
    return paths


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(target, draft, whether they are trained)."""
    given = os.environ.get("SPECJAX_PAIR")
    paths = [Path(path) for path in (given or QUICKSTART).split(":")]
    if all((path / "config.json").exists() for path in paths) and len(paths) == 2:
        return (*paths, True)
    # A pair that was asked for and is not there must not turn into a test of something else.
    assert given is None, f"SPECJAX_PAIR={given} does not name two exported directories"
    return (*random_pair(tmp_path_factory.mktemp("pair")), False)


def chat_prompts(directory, questions, count):
    """Token ids of evenly spaced questions of a Spec-Bench file, as users' turns of a chat."""
    tokenizer = Tokenizer.load(directory)
    turns = [json.loads(line)["turns"][0] for line in Path(questions).read_text(encoding="utf-8").splitlines()]
    short = [turn for turn in turns if len(turn) < 1200]
    return [tokenizer.apply_chat([{"role": "user", "content": turn}]) for turn in short[:: len(short) // count]][:count]


def code_prompts(directory, count):
    """Token ids of openings of functions in the standard library, from evenly spaced files."""
    tokenizer = Tokenizer.load(directory)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    prompts = []
    for path in files[:: max(1, len(files) // (4 * count))]:
        text = path.read_text(encoding="utf-8", errors="replace")
        ids = tokenizer.encode(text[max(text.find("\n    def "), 0) :][:2000])
        if len(ids) >= PROMPT_TOKENS:
            prompts.append(ids[:PROMPT_TOKENS])
    assert len(prompts) >= count
    return prompts[:count]


class HuggingFace:
    """Plain and assisted generation by transformers, a model for each attention implementation."""

    def __init__(self, target, draft, dtype, attention):
        from transformers import AutoModelForCausalLM

        read = lambda path, name: AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=name
        ).eval()
        self.models = {name: (read(target, name), read(draft, name)) for name in attention}

    def plain_settings(self):
        return [{"attention": a, "threads": t} for a, t in itertools.product(self.models, THREADS)]

    def assisted_settings(self, draft_lengths):
        names = ("attention", "threads", "num_assistant_tokens", "confidence_threshold")
        values = itertools.product(self.models, THREADS, draft_lengths, THRESHOLDS)
        return [dict(zip(names, chosen, strict=True)) for chosen in values]

    def generate(self, prompt, new_tokens, attention, threads, **assisted):
        import torch

        target, draft = self.models[attention]
        torch.set_num_threads(threads)
        extra = {}
        if assisted:
            draft.generation_config.num_assistant_tokens = assisted["num_assistant_tokens"]
            draft.generation_config.num_assistant_tokens_schedule = "constant"
            draft.generation_config.assistant_confidence_threshold = assisted["confidence_threshold"]
            extra = {"assistant_model": draft}
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            output = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, **extra)
        return output[0, len(prompt) :].tolist()


class Ours:
    """`api.generate`, plain (gamma 0) and speculative."""

    def __init__(self, target, draft):
        from specjax import api

        self.api = api
        self.target, self.draft = api.load(target), api.load(draft)

    def generate(self, prompt, new_tokens, gamma):
        drafter = self.draft if gamma else None
        out = self.api.generate(
            self.target,
            [prompt],
            drafter=drafter,
            gamma=gamma,
            temperature=0.0,
            max_new_tokens=new_tokens,
            seed=0,
        )
        return [int(token) for token in out.tokens[0]]

    def differences(self, prompts, reference, texts):
        """The first difference of each prompt's text from the reference, and how near a tie it was."""
        result = []
        for index, (prompt, expected, text) in enumerate(zip(prompts, reference, texts, strict=True)):
            if text == expected:
                continue
            shared = min(len(text), len(expected))
            position = next((i for i in range(shared) if text[i] != expected[i]), shared)
            logits = np.asarray(self.target.logits(np.array([[*prompt, *expected[:position]]], np.int32)))[0, -1]
            second, best = np.sort(logits)[-2:]
            result.append({"prompt": index, "position": position, "top2_gap": float(best - second)})
        return result


def tokens_per_second(generate, setting, prompts, new_tokens):
    """Of one warm pass over the prompts, and the texts."""
    generate(prompts[0], new_tokens, **setting)
    started = time.perf_counter()
    emitted = [generate(prompt, new_tokens, **setting) for prompt in prompts]
    return sum(map(len, emitted)) / (time.perf_counter() - started), emitted


def best_setting(generate, settings, prompts, new_tokens):
    """The fastest of these settings on these prompts, and the rate of each."""
    tried = [(tokens_per_second(generate, setting, prompts, new_tokens)[0], setting) for setting in settings]
    return max(tried, key=lambda pair: pair[0])[1], tried


def measure(pair, sizes):
    """The record: the best setting of each kind, its rates in turn with the others', and what was emitted."""
    target, draft, trained = pair
    questions, dtype = os.environ.get("SPECJAX_QUESTIONS"), os.environ.get("SPECJAX_DTYPE", "float32")
    prompts = code_prompts(target, sizes["prompts"])
    if questions:
        prompts = chat_prompts(target, questions, sizes["prompts"])
    few, new_tokens = prompts[: sizes["tried_prompts"]], sizes["new_tokens"]
    theirs = HuggingFace(target, draft, dtype, ("sdpa",) if questions else ATTENTION)
    ours = Ours(target, draft)
    kinds = {
        "transformers plain": (theirs.generate, theirs.plain_settings()),
        "transformers assisted": (theirs.generate, theirs.assisted_settings(sizes["draft_lengths"])),
        "specjax plain": (ours.generate, [{"gamma": 0}]),
        "specjax speculative": (ours.generate, [{"gamma": gamma} for gamma in sizes["draft_lengths"]]),
    }
    best, tried, texts = {}, {}, {}
    for kind, (generate, settings) in kinds.items():
        best[kind], tried[kind] = best_setting(generate, settings, few, TRIED_TOKENS if questions else new_tokens)
    rates = {kind: [] for kind in kinds}
    for _ in range(sizes["repeats"]):
        for kind, (generate, _) in kinds.items():
            rate, texts[kind] = tokens_per_second(generate, best[kind], prompts, new_tokens)
            rates[kind].append(rate)
    reference = texts["specjax plain"]
    differences = {kind: ours.differences(prompts, reference, texts[kind]) for kind in kinds}
    return {
        "trained": trained,
        "target": target.name if target.is_absolute() else str(target),
        "draft": draft.name if draft.is_absolute() else str(draft),
        "transformers_dtype": dtype,
        "specjax_dtype": ours.target.decoder.config.param_dtype,
        "prompts": len(prompts),
        "prompt_tokens": " to ".join(map(str, sorted({min(map(len, prompts)), max(map(len, prompts))}))),
        "max_new_tokens": new_tokens,
        "cpus": os.cpu_count(),
        "rows": [
            {
                "system": kind,
                "setting": best[kind],
                "tokens_per_second": statistics.median(rates[kind]),
                "measured": rates[kind],
                "differences_from_specjax_plain": differences[kind],
                "tried": [{"tokens_per_second": rate, **setting} for rate, setting in tried[kind]],
            }
            for kind in kinds
        ],
    }


def report(record):
    """The table, as text."""
    lines = [f"{'system':24}{'tokens/s':>10}  same texts  best setting"]
    for row in record["rows"]:
        setting = ", ".join(f"{name} {value}" for name, value in row["setting"].items())
        same = f"{record['prompts'] - len(row['differences_from_specjax_plain'])}/{record['prompts']}"
        lines.append(f"{row['system']:24}{row['tokens_per_second']:10.1f}  {same:>10}  {setting}")
    return "\n".join(lines)


def test_speculative_decoding_is_three_times_as_fast_as_the_faster_of_transformers(pair, capsys):
    trained, real = pair[2], "SPECJAX_QUESTIONS" in os.environ
    record = measure(pair, REAL if real else TRAINED if trained else RANDOM)
    with capsys.disabled():
        print("\n" + report(record))
    if out := os.environ.get("SPECJAX_PEERS_OUT"):
        Path(out).write_text(json.dumps(record, indent=2) + "\n")
    rows = {row["system"]: row for row in record["rows"]}
    assert all(rate > 0 for row in rows.values() for rate in row["measured"])
    differences = [d for row in rows.values() for d in row["differences_from_specjax_plain"]]
    if record["transformers_dtype"] == "float32":
        assert all(d["top2_gap"] < TIE for d in differences), differences
    if real:
        speed = {name: row["tokens_per_second"] for name, row in rows.items()}
        for ours, theirs, ratio in REAL_RATIOS[record["transformers_dtype"]]:
            fastest = max(speed[f"transformers {name}"] for name in theirs)
            assert speed[f"specjax {ours}"] >= ratio * fastest, (ours, theirs)
    elif trained:
        theirs = max(row["tokens_per_second"] for name, row in rows.items() if name.startswith("transformers"))
        assert rows["specjax speculative"]["tokens_per_second"] >= NEEDED_RATIO * theirs
