"""Our on-policy distillation compared with TRL's GKD trainer: the same loss, and the speed of a step on the same CPU.

Both trainers have the same weights, prompts, batch, lengths, sampling and loss, float32, and AdamW after clipping. No
row ends before it has all its new tokens. TRL's best setting is first tried; then its steps and ours are taken in turn,
and the first few of each, with all compilation, do not count. `SPECJAX_GKD_OUT=FILE` receives the record as JSON.
"""

import itertools
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.distillation import data_sources, divergences, objective
from specjax.distillation.trainer import Trainer, TrainingInputs
from specjax.hub.load import load
from specjax.hub.save import save
from specjax.hub.tokenizer import train_byte_bpe
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytestmark = [pytest.mark.peers, pytest.mark.standard_promotion, pytest.mark.filterwarnings("default")]

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.py"
BETA, LEARNING_RATE = 0.5, 1e-3
PROMPT, NEW = 32, 128
WARM_UP, TRIED, MEASURED = 2, 2, 6
ROWS = 8  # of the comparison of losses
# Layers and width of target and draft.
PAIRS = {"small": ((4, 256), (1, 128)), "medium": ((3, 512), (1, 256))}
VOCAB = 1024
# (pair, rows of a batch) -> how many times as fast ours has to be. With few rows writing is most of a step; the more
# there are, the more both trainers wait for the same matrix products of the target.
NEEDED = {("small", 1): 3.0, ("small", 8): 1.0, ("medium", 8): 1.0}
ATTENTION, THREADS = ("eager", "sdpa"), tuple(range(1, (os.cpu_count() or 1) + 1))


def random_pair(directory, target, draft, vocab=VOCAB):
    """Paths of an untrained target and draft of these layers and widths."""
    tokenizer = train_byte_bpe([Path(__file__).read_text()], 300)
    paths = []
    for seed, (name, (layers, width)) in enumerate((("target", target), ("draft", draft))):
        config = DecoderConfig.llama(
            vocab_size=vocab,
            layers=layers,
            width=width,
            heads=width // 64,
            kv_heads=width // 64,
            head_size=64,
            mlp_width=width * 11 // 4,
            max_positions=512,
            rope_theta=1e4,
            norm_epsilon=1e-5,
            tied_head=True,
            param_dtype="float32",
            compute_dtype="float32",
        )
        decoder = Decoder(config)
        save(directory / name, decoder, decoder.init(jax.random.key(seed)), tokenizer)
        paths.append(directory / name)
    return paths


def prompts_of(batches, size):
    """Random prompts, all of one length, in ids that every vocabulary here has."""
    return np.random.default_rng(0).integers(3, 300, (batches, size, PROMPT)).astype(np.int32)


def their_models(pair, attention="eager"):
    import torch
    from transformers import AutoModelForCausalLM

    read = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
    models = [read(path) for path in pair]
    for model in models:
        model.generation_config.eos_token_id = None
    return models


def their_trainer(pair, workdir, prompts, attention, callbacks=()):
    """TRL's trainer, on-policy in every step; the rows of its data set are prompts of one length."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(rows):
        ids = torch.tensor([row["ids"] for row in rows])
        # Labels as many as will be written, for the loss is divided by their number.
        text = torch.cat([ids, torch.zeros(len(rows), NEW, dtype=ids.dtype)], dim=1)
        labels = torch.where(torch.arange(PROMPT + NEW) < PROMPT, -100, text)
        of_prompts = {"prompts": ids, "prompt_attention_mask": torch.ones_like(ids)}
        return {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": labels, **of_prompts}

    target, draft = their_models(pair, attention)
    config = GKDConfig(
        output_dir=str(workdir),
        lmbda=1.0,
        beta=BETA,
        temperature=1.0,
        max_new_tokens=NEW,
        per_device_train_batch_size=prompts.shape[1],
        max_steps=len(prompts),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    return GKDTrainer(
        model=draft,
        teacher_model=target,
        args=config,
        data_collator=collate,
        train_dataset=Dataset.from_dict({"ids": prompts.reshape(-1, PROMPT).tolist()}),
        processing_class=AutoTokenizer.from_pretrained(pair[1]),
        callbacks=list(callbacks),
    )


def their_seconds(pair, workdir, prompts, setting, between=lambda: None):
    """Seconds of each step after the warm-up, from its beginning to the updated weights, and those of generation."""
    import torch
    from transformers import TrainerCallback

    class Stamps(TrainerCallback):
        def __init__(self):
            self.steps, self.generation = [], []

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.steps.append(time.perf_counter() - self.began)
            between()

        def timed(self, generate):
            def call(*arguments):
                began = time.perf_counter()
                texts = generate(*arguments)
                self.generation.append(time.perf_counter() - began)
                assert texts[0].shape == (size, PROMPT + NEW) and int((texts[2] != -100).sum()) == size * NEW
                return texts

            return call

    stamps, size = Stamps(), prompts.shape[1]
    trainer = their_trainer(pair, workdir, prompts, setting["attention"], [stamps])
    trainer.generate_on_policy_outputs = stamps.timed(trainer.generate_on_policy_outputs)
    torch.set_num_threads(setting["threads"])
    trainer.train()
    return stamps.steps[WARM_UP:], stamps.generation[WARM_UP:]


class Ours:
    """The trainer of the binaries, a step at a time."""

    def __init__(self, pair, workdir, prompts):
        config = configs.load(str(QUICKSTART)).distilled
        config.optimizer.update({"peak_learning_rate": LEARNING_RATE, "warmup_steps": 0, "final_fraction": 1.0})
        config.loss.update({"divergence": "jsd", "beta": BETA})
        config.data.update({"batch_size": prompts.shape[1], "prompt_length_min": PROMPT, "prompt_length_max": PROMPT})
        config.data.generation.max_new_tokens = NEW
        self.mesh = meshes.make_mesh(config.mesh)
        (target, target_params), (draft, params) = map(load, pair)
        placed = meshes.shard(target_params, target.axes(), self.mesh)
        inputs = TrainingInputs(draft, params, target, placed, iter(()), [], (), PROMPT)
        self.trainer = Trainer(config, workdir, inputs, self.mesh, min_seconds=0.0, evaluator=None)
        lengths = np.full(prompts.shape[1], PROMPT, np.int32)
        self.size = prompts.shape[1]
        named = {"lengths": lengths, "prompt_lengths": lengths, "loss_start": lengths}
        self._batches = itertools.cycle({"tokens": tokens, **named} for tokens in prompts)
        self.seconds = []

    def step(self):
        """One step of the trainer, until its metrics are read."""
        learned = self.trainer.tokens
        with meshes.use(self.mesh):
            began = time.perf_counter()
            self.trainer._advance(next(self._batches))
            self.trainer._read_pending()
            self.seconds.append(time.perf_counter() - began)
        assert self.trainer.tokens - learned == self.size * NEW

    def generation_seconds(self):
        """Of the writing of one batch alone."""
        with meshes.use(self.mesh):
            began = time.perf_counter()
            jax.block_until_ready(self.trainer._text(data_sources.DRAFT, next(self._batches), self.trainer.step))
            return time.perf_counter() - began


def measure(pair, size, workdir):
    """Rows of both systems: TRL at the fastest of its settings, its steps and ours in turn."""
    prompts = prompts_of(WARM_UP + MEASURED, size)
    ours = Ours(pair, workdir / "ours", prompts)
    for _ in range(WARM_UP):
        ours.step()
    ours.seconds.clear()
    tried = []
    for attention, threads in itertools.product(ATTENTION, THREADS):
        setting = {"attention": attention, "threads": threads}
        seconds, _ = their_seconds(pair, workdir / "tried", prompts[: WARM_UP + TRIED], setting)
        tried.append({**setting, "step_seconds": statistics.median(seconds)})
    fastest = min(tried, key=lambda row: row["step_seconds"])
    setting = {name: fastest[name] for name in ("attention", "threads")}
    theirs, their_generation = their_seconds(pair, workdir / "theirs", prompts, setting, between=ours.step)
    mine = ours.seconds[WARM_UP:]
    generation = [ours.generation_seconds() for _ in range(MEASURED)]
    row = lambda system, setting, seconds, generation: {
        "system": system,
        "setting": setting,
        "tokens_per_second": size * NEW / statistics.median(seconds),
        "step_seconds": statistics.median(seconds),
        "generation_seconds": statistics.median(generation),
        "measured": seconds,
    }
    first = row("TRL GKDTrainer", setting, theirs, their_generation)
    second = row("specjax", {}, mine, generation)
    ratio = statistics.median(a / b for a, b in zip(theirs, mine, strict=True))
    return [{**first, "tried": tried, "ratio": 1.0}, {**second, "ratio": ratio}]


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_their_loss_is_ours(tmp_path, beta):
    """Rows of different lengths; both are means over the counted positions."""
    import torch

    pair = random_pair(tmp_path, (2, 128), (1, 64), 320)
    draw = np.random.default_rng(1)
    tokens = draw.integers(3, 320, (ROWS, PROMPT + 8)).astype(np.int32)
    lengths = draw.integers(PROMPT // 2, PROMPT + 9, ROWS).astype(np.int32)
    starts = (lengths - draw.integers(1, 8, ROWS)).astype(np.int32)
    (target, target_params), (draft, params) = map(load, pair)
    loss = objective.Loss(draft, target, divergences.divergence("jsd", beta=beta), temperature=1.0, chunk=64)
    # Far from the target's distribution, where both losses vanish.
    params = jax.tree.map(lambda leaf: 4 * leaf, params)
    batch = {"tokens": tokens, "lengths": lengths, "loss_start": starts}
    sums = loss(params, target_params, jax.tree.map(jnp.asarray, batch))
    trainer = their_trainer(pair, tmp_path / "theirs", prompts_of(1, ROWS), "eager")
    trainer.beta = beta
    index = np.arange(tokens.shape[1])[None]
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter *= 4
        inside = (index >= starts[:, None]) & (index < lengths[:, None])
        inputs = {
            "input_ids": torch.from_numpy(tokens).long(),
            "attention_mask": torch.from_numpy(index < lengths[:, None]).long(),
            "labels": torch.from_numpy(np.where(inside, tokens, -100)).long(),
        }
        theirs = float(trainer.compute_loss(trainer.model, inputs))
    assert theirs > 0.01
    assert float(objective.mean(sums.loss, sums.tokens)) == pytest.approx(theirs, rel=1e-4)


def test_where_writing_is_most_of_an_on_policy_step_ours_is_three_times_as_fast(tmp_path, capsys):
    pairs = {name: random_pair(tmp_path / name, *shapes) for name, shapes in PAIRS.items()}
    rows = []
    for name, size in NEEDED:
        measured = measure(pairs[name], size, tmp_path / f"{name}_{size}")
        rows += [{"pair": name, "batch_size": size, **row} for row in measured]
    record = {
        "pairs": PAIRS,
        "vocabulary": VOCAB,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "cpus": os.cpu_count(),
        "rows": rows,
    }
    with capsys.disabled():
        for row in rows:
            print(
                f"\n{row['pair']:12}{row['batch_size']:4}  {row['system']:16}{row['tokens_per_second']:10.0f} tokens/s",
                end="",
            )
            print(f"{row['step_seconds']:8.3f} s a step, generation {row['generation_seconds']:.3f}", end="")
            print(f"  ratio {row['ratio']:.2f}  {row['setting']}", end="")
        print()
    if out := os.environ.get("SPECJAX_GKD_OUT"):
        Path(out).write_text(json.dumps(record, indent=2) + "\n")
    ours = [row for row in rows if row["system"] == "specjax"]
    assert [row["ratio"] for row in ours if row["ratio"] < NEEDED[row["pair"], row["batch_size"]]] == []
