"""Generates the target's continuations of a task's training prompts, as training text for drafts.

    python -m specjax.target_text --config=FILE --workdir=DIR [--config.section.key=value ...]

With a draft the text is decoded speculatively with an exact rule. The rule `coupled` emits the same tokens as plain
decoding, so the text does not depend on the draft. An interrupted run resumes: texts are written in batches as they
end, and SIGTERM keeps those of batches that are not complete.

`config.states` lists layers (-1 is the last one) after which the target's hidden states are stored with the text, as
decoding computes them: training then need not run the target, neither for the loss (its last layer) nor for an
attachment (the layers it reads).
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specjax.data import batches, tasks
from specjax.decoding import batch, rules
from specjax.decoding.drafters.model import ModelDraft
from specjax.decoding.drafters.states import NoDrafter, StatesDrafter
from specjax.decoding.drafters.table import build_drafter
from specjax.decoding.results import Row
from specjax.decoding.sampling import Sampling
from specjax.distillation import cached_text
from specjax.distillation.cached_text import EndedText
from specjax.evaluation import engine
from specjax.evaluation.continuations import note_positions
from specjax.evaluation.engine import Method, Output
from specjax.hub import model as hub_model
from specjax.models.fusing import layer_numbers
from specjax.models.language_model import LanguageModel, Params
from specjax.reporting import records
from specjax.runtime import cli, processes, stopping
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.errors import UserError
from specjax.runtime.timing import progress


def run(config: Any, workdir: str | Path) -> dict:
    """Writes the text to `workdir/export` (for `data.target_path`) and `workdir/results.json`; returns the results.

    Raises:
      UserError: for incompatible settings, models or prompts, and for a folder with other text.
    """
    workdir = Path(workdir)
    writer = _Writer(config)
    directory = workdir / "export"
    if processes.first():
        cached_text.begin(directory, writer.about)
    processes.meet("the folder of the text")
    with meshes.use(writer.target.mesh):
        writer.write(directory)
        processes.meet("the text is written")
        measured = writer.measure()
    row = {**_settings(config), **_written(cached_text.load(directory)), **measured}
    path = workdir / "results.json"
    return records.write_results(path, binary="target_text", config=configs.to_plain(config), rows=[row])


def _settings(config: Any) -> dict:
    return {
        "task": config.task.name,
        "target": config.target,
        "drafter": config.drafter.path,
        "rule": config.drafter.rule,
        "gamma": config.drafter.gamma,
        "temperature": config.data.generation.temperature,
        "batch_size": config.data.batch_size,
        "seed": config.seed,
    }


def _written(text: cached_text.CachedText) -> dict:
    start = np.minimum(text.rows["loss_start"], text.rows["lengths"])
    tokens = int((text.rows["lengths"] - start).sum())
    return {"rows": len(text), "tokens": tokens, "seconds": text.seconds, "tokens_per_second": tokens / text.seconds}


# Texts per row of the batch that are decoded, and in memory, at one time.
_TEXTS_AT_ONCE = 64
# The logits of this many tokens are in memory at one time.
_TOKENS_AT_ONCE = 256


@functools.partial(jax.jit, static_argnums=0)
def _normalisers(target: LanguageModel, params: Params, last: Float[Array, "N D"]) -> Float[Array, "N"]:
    """The normalisers of tokens with these states after the last layer, see `cached_text`."""
    return jax.nn.logsumexp(target.head(params, last[:, None])[:, 0].astype(jnp.float32), axis=-1)


class _Writer:
    """Loads the models and prompts of a config, and continues batches of the prompts."""

    def __init__(self, config: Any):
        mesh, data = meshes.make_mesh(config.mesh), config.data
        load = hub_model.loader(config, mesh)
        self.config, self.target, self.draft = config, load(config.target), None
        if config.drafter.path:
            self.draft = load(config.drafter.path)
            hub_model.check_pair(self.target, self.draft)
        for name in ("count", "measure_batches"):
            if config[name] < 1:
                raise UserError(f"{name} is {config[name]}; it must be 1 or more")
        self.rule = rules.rule_named(config.drafter.rule)
        if self.rule.lossy:
            raise UserError(
                f"drafter.rule {config.drafter.rule} is lossy and would change the text; use lossless or coupled"
            )
        self.layers = self._layers_to_store(config.states)
        task = tasks.load_task(config.task)
        self.prompts = _prompts(config, task, self.target)
        batch.check_prompts(self.prompts, self.target.decoder, data.generation.max_new_tokens)
        if self.draft is not None:
            note_positions("the draft", self.draft.network, self.prompts, data.generation.max_new_tokens)
        self.prompt_slots = batch.prompt_slots(self.prompts)
        self.method = self._method(config.drafter.gamma if self.draft else 0, self.layers)
        fingerprints = self.target.fingerprint, self.target.tokenizer.fingerprint()
        settings = {"seed": config.seed, "count": config.count, "batch_size": data.batch_size}
        settings |= {"rule": config.drafter.rule, "states": list(self.layers)}
        if self.target.decoder.layers in self.layers:
            settings[cached_text.NORMALISERS] = True
        self.about = cached_text.provenance(*fingerprints, config.task, data) | settings

    def _method(self, gamma: int, layers: tuple[int, ...] = ()) -> Method:
        """The method that writes texts with the draft, or without one if gamma is 0, and records these layers."""
        generation, draft = self.config.data.generation, self.draft if gamma else None
        drafter = build_drafter(ModelDraft(), self.target.decoder, gamma, draft and draft.decoder)
        if layers:
            drafter = StatesDrafter.of(drafter or NoDrafter(), gamma, self.target.decoder, layers)
        sampling = Sampling.of(generation.temperature, generation.top_k, generation.top_p)
        how = {"max_new_tokens": generation.max_new_tokens, "drafter": drafter, "gamma": gamma, "rule": self.rule}
        return Method.of(self.target, self.prompts, sampling, draft, **how)

    @property
    def _decoding(self) -> dict[str, Any]:
        """The settings of `scheduler.decode`."""
        return dict(
            batch_size=self.config.data.batch_size,
            max_new_tokens=self.config.data.generation.max_new_tokens,
            eos_ids=self.target.tokenizer.stop_ids,
            seed=self.config.seed,
            put=batch.Placer(self.target.mesh),
        )

    def write(self, directory: Path) -> None:
        """Continues the prompts whose texts are not in the directory, and writes each batch of them that is complete.

        Raises:
          Stopped: if the process was asked to stop; texts of batches that are not complete are kept in the directory.
        """
        size, count = self.config.data.batch_size, len(self.prompts)
        files = [range(first, min(first + size, count)) for first in range(0, count, size)]
        written = [cached_text.rows_file(directory, number).exists() for number in range(len(files))]
        written = processes.from_first(np.asarray(written))
        texts, unwritten = cached_text.take_unwritten(directory)  # `unwritten` seconds are in no batch yet
        resumed = bool(texts or unwritten)
        missing = [number for number in range(count) if not written[number // size] and number not in texts]

        def on_end(prompts: Sequence[int], place: int, row: Row, seconds: float, recorded: tuple) -> None:
            nonlocal unwritten, resumed
            bar.update(1)
            number = prompts[place] // size
            texts[prompts[place]] = self._text(prompts[place], row.tokens, recorded)
            if all(prompt in texts for prompt in files[number]):
                ended = [texts.pop(prompt) for prompt in files[number]]
                self._write_batch(directory, number, ended, unwritten + seconds)
                unwritten = -seconds
                if resumed and processes.first():  # their seconds are in this batch
                    cached_text.keep_unwritten(directory, texts, 0.0)
                    resumed = bool(texts)
            if stopping.stop_asked():
                if processes.first():
                    cached_text.keep_unwritten(directory, texts, unwritten + seconds)
                raise stopping.Stopped

        with progress(total=count, description=directory.parent.name, unit="text") as bar, stopping.holding():
            bar.update(count - len(missing))
            for first in range(0, len(missing), _TEXTS_AT_ONCE * size):
                part = missing[first : first + _TEXTS_AT_ONCE * size]
                how = {"indices": part, "on_end": functools.partial(on_end, part), **self._decoding}
                decoded = self.method.decode([self.prompts[number] for number in part], **how)
                unwritten += decoded.seconds  # `on_end` has changed it

    def _text(self, number: int, emitted: Sequence[int], recorded: tuple[Float[np.ndarray, "S D"], ...]) -> EndedText:
        """The text of a prompt. The last token has no states, and nothing follows that training could predict."""
        length = len(self.target.decoder.start_text(self.prompts[number])) + len(emitted)
        states = {}
        for layer, array in zip(self.layers, recorded, strict=True):
            states[layer] = np.zeros((length, array.shape[1]), np.float16)
            states[layer][:-1] = cached_text.rounded(array[: length - 1], layer)
        return EndedText(emitted, states)

    def _write_batch(self, directory: Path, number: int, texts: Sequence[EndedText], seconds: float) -> None:
        rows = self.rows(number, texts, seconds)
        states = {layer: np.concatenate([text.states[layer] for text in texts]) for layer in self.layers}
        last = states.get(self.target.decoder.layers)
        normalisers = None if last is None else self._normalisers(last, rows)
        if not processes.first():
            return
        for layer, array in states.items():
            cached_text.write_states(directory, number, layer, array)
        if normalisers is not None:
            cached_text.write_normalisers(directory, number, normalisers)
        cached_text.write_rows(directory, number, rows)

    def rows(self, number: int, ended: Sequence[EndedText], seconds: float) -> dict[str, np.ndarray]:
        """The arrays to store for a batch: those of `data.batches`, and the seconds that it took."""
        first, decoder = number * self.config.data.batch_size, self.target.decoder
        prompts = self.prompts[first : first + len(ended)]
        openings = [decoder.start_text(prompt) for prompt in prompts]
        texts = [[*opening, *text.tokens] for opening, text in zip(openings, ended, strict=True)]
        width = decoder.text_slots(self.prompt_slots) + self.config.data.generation.max_new_tokens
        tokens, lengths = batch.pad(texts, width)
        sources, prompt_lengths = batch.pad(prompts, self.prompt_slots)
        starts = np.asarray(list(map(len, openings)), np.int32)
        rows = {"tokens": tokens, "lengths": lengths, "loss_start": starts, "prompt_lengths": prompt_lengths}
        return rows | ({"sources": sources} if decoder.is_encoder_decoder else {}) | {"seconds": np.asarray(seconds)}

    def _layers_to_store(self, layers: Sequence[int | float]) -> tuple[int, ...]:
        decoder = self.target.decoder
        numbers = layer_numbers(layers, decoder.layers)
        for asked, layer in zip(layers, numbers, strict=True):
            if not isinstance(layer, int) or not 1 <= layer <= decoder.layers:
                raise UserError(
                    f"states has the layer {asked}; this target's layers are 1 .. {decoder.layers}, -1 is the last, "
                    "and 0.5 the one after half of them"
                )
        if layers and decoder.is_encoder_decoder:
            raise UserError("states of an encoder-decoder are not stored; leave states empty")
        return tuple(sorted(set(numbers)))

    def _normalisers(self, last: Float[np.ndarray, "N D"], rows: dict[str, np.ndarray]) -> Float[np.ndarray, "N"]:
        """The normalisers of a batch's tokens, from their states after the last layer; 0 where no token of an answer
        follows, as these are not trained on."""
        parts = zip(rows["loss_start"], rows["lengths"], strict=True)
        predicts = np.concatenate([np.arange(1, length + 1) >= start for start, length in parts])
        predicts[np.cumsum(rows["lengths"]) - 1] = False
        places, put = np.flatnonzero(predicts), batch.Placer(self.target.mesh)
        size = put.rows(_TOKENS_AT_ONCE)
        normalisers, dtype = np.zeros(len(last), np.float32), dtype_named(self.target.decoder.config.compute_dtype)
        for part in np.split(places, range(size, len(places), size)):
            states = np.pad(last[part], ((0, size - len(part)), (0, 0)))
            computed = _normalisers(self.target.decoder, self.target.params, put(states).astype(dtype))
            normalisers[part] = processes.fetch(computed)[: len(part)]
        return normalisers

    def measure(self) -> dict:
        """Measures tokens per second with and without the draft on the first batches, and whether texts are equal."""
        if not self.method.plan.gamma:
            return {}
        size = self.config.data.batch_size
        prompts = self.prompts[: self.config.measure_batches * size]
        how = {"group": engine.group_size(len(prompts), size), "label": "speed", **self._decoding}
        plain, drafted = Output(), Output()
        for _, results in engine.decode_in_turns([self._method(0), self.method], prompts, **how):
            for output, result in zip((plain, drafted), results, strict=True):
                output.batches.append(result)
        counts = drafted.counts()
        plain_speed, speed = (output.emitted / float(output.seconds.sum()) for output in (plain, drafted))
        return {
            "measured_batches": -(-len(prompts) // size),
            "drafted_tokens_per_second": speed,
            "plain_tokens_per_second": plain_speed,
            "speedup": speed / plain_speed,
            "block_efficiency": float(counts.emitted.sum() / counts.target_calls.sum()),
            "same_text": drafted.tokens == plain.tokens,
        }


def _prompts(config: Any, task: tasks.Task, target: hub_model.Model) -> list[list[int]]:
    """The prompts of the first `count` training rows, in the order in which training with this seed visits them."""
    decoder = target.decoder
    layout = batches.RowLayout.of_config(config.data, seed=config.seed, model=decoder)
    rows = batches.training_batches(task, target.tokenizer, layout, prompts_alone=True)
    prompts: list[list[int]] = []
    while len(prompts) < config.count:
        part = next(rows)
        tokens = part["sources" if decoder.is_encoder_decoder else "tokens"]
        prompts += [row[:length].tolist() for row, length in zip(tokens, part["prompt_lengths"], strict=True)]
    return prompts[: config.count]


if __name__ == "__main__":
    cli.leave(cli.launch(run, "specjax.target_text"))
