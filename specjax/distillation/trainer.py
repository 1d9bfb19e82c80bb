"""The training loop, for plain training and every kind of distillation.

The device does not wait for the host: while step k + 1 runs, the host reads the metrics of step k and checks that its
loss is finite. A checkpoint is written only after that check.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specjax.distillation import data_sources, first_fit, settings, update
from specjax.distillation.cached_text import CachedText
from specjax.distillation.meter import Clock, Interval
from specjax.distillation.steps import make_functions
from specjax.models.attachment import runtime_params
from specjax.models.language_model import LanguageModel, Params
from specjax.reporting.records import MetricsLog
from specjax.runtime import errors, processes, stopping
from specjax.runtime import mesh as meshes
from specjax.runtime.checkpoint import Checkpointer
from specjax.runtime.errors import UserError
from specjax.runtime.timing import progress

Evaluator = Callable[[Params, int], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """The result of a training run.

    Attributes:
      params: parameters after the last step.
      steps: number of updates.
      train_seconds: seconds on the training clock, including the time before interruptions.
      tokens: number of positions trained on.
      loss: training loss in the last log line.
      validation: metrics of each validation, with its `step`.
    """

    params: Params
    steps: int
    train_seconds: float
    tokens: float
    loss: float | None
    validation: Sequence[Mapping[str, float | int]]

    @property
    def last_quarter_improvement(self) -> float | None:
        """Relative decrease of the validation loss over the last quarter of the steps; None if it was not measured.

        The quarter starts at the last evaluation within the first 3/4 of the steps.
        """
        before = [line for line in self.validation if line["step"] <= 0.75 * self.steps]
        if not before or not self.steps or not before[-1]["validation_loss"]:
            return None
        return 1 - self.validation[-1]["validation_loss"] / before[-1]["validation_loss"]


@dataclasses.dataclass(frozen=True)
class TrainingInputs:
    """The models and data of a training run.

    Attributes:
      draft: the model that is trained; of an `AttachedDraft`, only the attachment is trained.
      params: the trained parameters at step 0.
      target: the model to learn from; None for plain training. With the divergence "cross_entropy" it is only used to
        measure the acceptance on validation data.
      target_params: the target's parameters, sharded over the mesh.
      batches: an endless iterator with `get_state` and `set_state`, see `data.batches`.
      validation: batches of the same layout.
      eos_ids: ids that end a generated row.
      longest_prompt: maximum number of prompt tokens in a row of `batches`.
      target_text: text that the target generated earlier; None generates it during training.
      replicate: every device of the mesh's tensor axis holds the whole draft and its optimiser state.
      reference: the draft that `loss.reference` names; None if all tokens are in the loss.
      reference_params: its parameters.
    """

    draft: LanguageModel
    params: Params
    target: LanguageModel | None
    target_params: Params | None
    batches: Iterator[Mapping[str, np.ndarray]]
    validation: Sequence[Mapping[str, np.ndarray]]
    eos_ids: tuple[int, ...]
    longest_prompt: int
    target_text: CachedText | None = None
    replicate: bool = False
    reference: LanguageModel | None = None
    reference_params: Params | None = None


class Trainer:
    """Trains for `train.steps` steps and at least `min_seconds`, and resumes an interrupted run.

    It writes metrics.jsonl and checkpoints/ in `workdir`. On CPU, a run that is killed at any moment and resumed ends
    with the same bits as an uninterrupted one.
    """

    def __init__(
        self,
        config: Any,
        workdir: str | Path,
        inputs: TrainingInputs,
        mesh: jax.sharding.Mesh,
        *,
        min_seconds: float,
        evaluator: Evaluator | None,
    ):
        """Builds the functions of the loop without compiling them.

        Args:
          config: with the sections seed, data, rollouts, loss, optimizer, train, speculative_eval and mesh.
          min_seconds: training continues at the final learning rate until the training clock shows this; 0 is off.
          evaluator: called with (params, step) every `speculative_eval.every` steps; its numbers are logged.

        Raises:
          UserError: for invalid settings.
        """
        settings.check(config, inputs)
        self.config, self.inputs, self.mesh = config, inputs, mesh
        self.workdir, self.min_seconds, self.evaluator = Path(workdir), min_seconds, evaluator
        optimizer = update.make_optimizer(config.optimizer, config.train.steps)
        axes = inputs.draft.axes(replicate=inputs.replicate)
        self.state = update.initial_state(inputs.params, axes, optimizer, mesh)
        self.clock = Clock()
        self.step, self.saved, self.seconds = 0, None, 0.0  # `seconds` are those of the last checkpoint
        self.tokens, self.loss, self.validation = 0.0, None, []
        self._log: MetricsLog | None = None  # only in the first process
        self._pending: tuple[int, dict] | None = None
        self._interval = Interval(self.clock.seconds)
        self._executables: dict[str, Callable] = {}
        self._fractions = data_sources.fractions_of(config.data)
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        models, how = (inputs.draft, inputs.target, inputs.eos_ids), (inputs.reference, inputs.replicate)
        self._functions = make_functions(config, *models, optimizer, placed, mesh, *how)
        self._teacher_params = inputs.target_params if self._functions.needs_teacher else None
        if inputs.reference is not None:
            self._teacher_params = {"target": self._teacher_params, "reference": inputs.reference_params}

    def run(self) -> TrainingResult:
        """Trains to the end, from the last checkpoint if there is one.

        Raises:
          UserError: if the loss is not finite; the last checkpoint remains.
          Stopped: if the process was asked to stop; the current step is saved first.
        """
        train = self.config.train
        checkpoints = Checkpointer(
            self.workdir / "checkpoints",
            keep_last=train.keep_last,
            best_metric=train.best_metric,
            best_mode=settings.BEST_METRICS[train.best_metric],
        )
        with (
            errors.writing(self.workdir),
            stopping.holding(),
            checkpoints,
            meshes.use(self.mesh),
            contextlib.ExitStack() as stack,
        ):
            resumed = self._restore(checkpoints)
            if processes.first():
                log = MetricsLog(self.workdir, resume_step=self.step if resumed else None)
                self._log = stack.enter_context(log)
            stack.enter_context(self.clock.running())
            if not resumed:
                self._fit()
                self._evaluate()
            self._loop(checkpoints)
        validation = tuple(self.validation)
        return TrainingResult(self.state.params, self.step, self.seconds, self.tokens, self.loss, validation)

    def _loop(self, checkpoints: Checkpointer) -> None:
        train = self.config.train
        finished = self._finished()
        with progress(total=train.steps, description=self.workdir.name, unit="step") as bar:
            # The remaining time is estimated from the steps since the start or resumption.
            bar.initial = bar.n = self.step
            while not finished:
                if stopping.stop_asked():
                    self._save(checkpoints, {})
                    raise stopping.Stopped
                self._advance(next(self.inputs.batches))
                bar.update()
                finished = self._finished()
                if finished or self.step % train.eval_every == 0:
                    self._evaluate()
                if finished or self.step % train.checkpoint_every == 0:
                    self._save(checkpoints, self.validation[-1])

    def _finished(self) -> bool:
        if self.step < self.config.train.steps:
            return False
        finished = self.clock.seconds >= self.min_seconds
        if self.min_seconds and jax.process_count() > 1:
            # Clocks differ between processes, and they would deadlock if only some of them ran another step.
            finished = bool(processes.from_first(finished))
        return finished

    def _fit(self) -> None:
        """Fits a draft that starts so to the first batches of text that no draft writes; see `Attachment.fitted`."""
        count, inputs, total = first_fit.fitted_batches(self.inputs.draft), self.inputs, None
        if not count:
            return
        # Where the text comes from rollouts alone, rows of the corpus are prompts without answers.
        only_corpus = self._fractions[data_sources.FIXED] and not self._fractions[data_sources.TARGET]
        source = data_sources.FIXED if only_corpus else data_sources.TARGET
        place = inputs.batches.get_state()
        for step in progress(range(count), description=f"{self.workdir.name}: least squares", unit="batch"):
            rows, _ = self._text(source, next(inputs.batches), step)
            arguments = self.state.params, inputs.target_params, rows
            part = self._call(f"moments {rows['tokens'].shape}", self._functions.moments, arguments, ())
            total = part if total is None else total + part
        inputs.batches.set_state(place)
        params, total = processes.fetch((self.state.params, total))
        params = inputs.draft.attachment.fitted(params, total)
        placed = jax.tree.map(lambda new, old: meshes.place(new, old.sharding), params, self.state.params)
        self.state = dataclasses.replace(self.state, params=placed)

    def _advance(self, batch: Mapping[str, np.ndarray]) -> None:
        """Dispatches one step, then reads the metrics of the preceding one, which the device has finished."""
        source = data_sources.source_of_step(self._fractions, self.config.seed, self.step)
        rows, counted = self._text(source, batch, self.step)
        shapes = {name: array.shape for name, array in rows.items() if array.ndim > 1}
        window = data_sources.window(counted, rows["tokens"].shape[1])
        arguments = self.state, self._teacher_params, rows
        self.state, metrics = self._call(f"update {shapes} {window}", self._functions.update, arguments, (window,))
        self.step += 1
        self._read_pending((self.step, metrics))

    def _text(self, source: str, batch: Mapping[str, np.ndarray], step: int) -> tuple[Mapping[str, jax.Array], int]:
        """The rows of a step, and the most counted positions in one of them.

        They are the corpus batch, its prompts continued by a model or by both, or stored text of the target.
        """
        inputs, generation = self.inputs, self.config.data.generation
        if source == data_sources.FIXED:
            return update.shard(batch, self.mesh), int((batch["lengths"] - batch["loss_start"]).max())
        if source == data_sources.TARGET and inputs.target_text is not None:
            layers = [layer for layer in self._functions.reads if layer in inputs.target_text.states]
            rows = inputs.target_text.batch(self.config.seed, step, self.config.data.batch_size, layers)
            return update.shard(rows, self.mesh), generation.max_new_tokens
        width = data_sources.prompt_width(
            batch["prompt_lengths"], self.config.data.prompt_length_max, inputs.longest_prompt
        )
        texts = batch["sources"] if "sources" in batch else batch["tokens"]
        prompts = update.shard({"tokens": texts[:, :width], "lengths": batch["prompt_lengths"]}, self.mesh)
        arguments = prompts["tokens"], prompts["lengths"], np.int32(step)
        if source == data_sources.ASSISTED:
            arguments = self.state.params, inputs.target_params, *arguments
            rows = self._call(f"{source} {width}", self._functions.rollouts, arguments, ())
            return rows, generation.max_new_tokens
        if source == data_sources.TARGET:
            model, params = inputs.target, inputs.target_params
        else:
            model = self._functions.author
            params = runtime_params(model, self.state.params, inputs.target_params)
        rows = self._call(f"{source} {width}", self._functions.generate, (params, *arguments), (model,))
        return rows, generation.max_new_tokens

    def _call(self, name: str, function: Any, arguments: tuple, static: tuple) -> Any:
        """Calls the executable cached under `name`; compiles it first if there is none, with the clock paused."""
        if name not in self._executables:
            self._read_pending()
            with self.clock.paused():
                self._executables[name] = function.lower(*arguments, *static).compile()
        return self._executables[name](*arguments)

    def _read_pending(self, following: tuple[int, dict] | None = None) -> None:
        """Waits for the pending step and reads its metrics; then the step `following` is pending."""
        pending, self._pending = self._pending, following
        if pending is None:
            return
        step, metrics = pending
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        # A finite gradient of a finite loss, clipped, gives finite parameters.
        self._check_finite("training loss", step, values["loss"], values["grad_norm"])
        self.tokens += values["tokens"]
        self._interval.add(values)
        if step % self.config.train.log_every == 0:
            line = self._interval.line(self.clock.seconds, self._functions.has_teacher)
            self.loss = line["loss"]
            self._write(step, line)
            self._interval = Interval(self.clock.seconds)

    def _write(self, step: int, line: Mapping[str, float]) -> None:
        if self._log is not None:
            self._log.write(step, line)

    def _check_finite(self, what: str, step: int, *values: float) -> None:
        if all(math.isfinite(value) for value in values):
            return
        last = "there is no checkpoint yet" if self.saved is None else f"the checkpoint of step {self.saved} remains"
        remedy = (
            "run again in a new workdir with a lower optimizer.peak_learning_rate or optimizer.clip_norm, or more "
            "optimizer.warmup_steps"
        )
        if not step:  # nothing is trained yet
            remedy = "check the weights of model.init and target, or compute in float32 (model.compute_dtype)"
        dtype = self.inputs.draft.config.compute_dtype
        raise UserError(f"the {what} or its gradient is not finite at step {step} in {dtype} ({last}); {remedy}")

    def _evaluate(self) -> None:
        """Measures validation loss and acceptance, and if due the evaluator's numbers, with the clock paused."""
        self._read_pending()
        with self.clock.paused():
            sums = []
            for batch in self.inputs.validation:
                rows = update.shard(batch, self.mesh)
                sums.append(self._functions.validation_loss(self.state.params, self.inputs.target_params, rows))
            sums = jax.device_get(sums)
            tokens = max(sum(float(part.tokens) for part in sums), 1.0)
            line = {"validation_loss": sum(float(part.loss) for part in sums) / tokens}
            self._check_finite("validation loss", self.step, line["validation_loss"])
            if self.inputs.target is not None:
                line["validation_acceptance"] = sum(float(part.acceptance) for part in sums) / tokens
                if sums[0].outside is not None:
                    line["validation_outside"] = sum(float(part.outside) for part in sums) / tokens
            self.validation.append({"step": self.step, **line})
            every = self.config.speculative_eval.every
            if self.evaluator is not None and every and self.step % every == 0:
                line |= self.evaluator(self.state.params, self.step)
            self._write(self.step, {**line, "train_seconds": self.clock.seconds})

    def _save(self, checkpoints: Checkpointer, measured: Mapping[str, float | int]) -> None:
        """Saves the run with the validation metrics of this step; empty if it was not validated."""
        self._read_pending()
        if self.saved == self.step:
            return
        with self.clock.paused():
            self.seconds = self.clock.seconds
            host = {
                "batches": self.inputs.batches.get_state(),
                "seconds": self.seconds,
                "tokens": self.tokens,
                "loss": self.loss,
                "validation": list(self.validation),
                "interval": dataclasses.asdict(self._interval),
            }
            metrics = {name: value for name, value in measured.items() if name != "step"}
            checkpoints.save(self.step, self.state, host=host, metrics=metrics)
            self.saved = self.step

    def _restore(self, checkpoints: Checkpointer) -> bool:
        """Restores the last checkpoint; returns whether there was one."""
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), self.state
        )
        restored = checkpoints.restore(abstract)
        if restored is None:
            return False
        self.state, host, self.step = restored
        self.saved = self.step
        self.inputs.batches.set_state(host["batches"])
        self.seconds = host["seconds"]
        self.clock = Clock(self.seconds)
        self.tokens, self.loss, self.validation = host["tokens"], host["loss"], host["validation"]
        self._interval = Interval(**host["interval"])
        return True
