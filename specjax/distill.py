"""Trains a model and exports it: a target, a draft, or an attachment of a target such as Kangaroo's adapter.

    python -m specjax.distill --config=FILE --workdir=DIR [--config.section.key=value ...]

`loss.divergence` "cross_entropy" without a `target` is plain training. Fractions under `data` are the shares of steps
on text of the corpus, of the draft, of the target, and of both decoding together. A `recipe` sets divergence and
fractions to those of a paper.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from specjax.data import batches, tasks
from specjax.distillation import cached_text, recipes, settings, update
from specjax.distillation.data_sources import fractions_of
from specjax.distillation.evaluator import make_evaluator
from specjax.distillation.trainer import Trainer, TrainingInputs, TrainingResult
from specjax.hub import adapter as hub_adapter
from specjax.hub import load as hub_load
from specjax.hub import model as hub_model
from specjax.hub import save as hub_save
from specjax.hub.tokenizer import Tokenizer, check_same_tokens, train_byte_bpe
from specjax.models.attachment import AttachedDraft
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from specjax.models.fusing import layer_numbers
from specjax.models.language_model import LanguageModel, Params
from specjax.models.pard import ParallelDraft
from specjax.models.table import ATTACHMENTS, is_attachment, make_attachment
from specjax.models.vocabulary import DraftVocabulary, draft_vocabulary
from specjax.reporting import records
from specjax.runtime import checks, cli, dtypes, processes
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

# `model.init` for a new model with random parameters.
RANDOM = "random"
# The config section of a user's own attachment; others have sections with their names in `ATTACHMENTS`.
_ATTACHMENT = "attachment"

# Keys of `config.model` that are fields of the config of any model, and of decoders only.
_SHAPE = ("width", "layers", "heads", "kv_heads", "head_size", "mlp_width", "norm_epsilon", "tied_head")
_DECODER = ("rope_theta", "max_positions")


def run(config: Any, workdir: str | Path) -> dict:
    """Trains, writes `workdir/export` and `workdir/results.json`, and returns the record in the latter.

    Args:
      config: the section of a training stage, with every key of `training` in `configs/common.py`.
      workdir: folder of the stage; an interrupted run in it is resumed.

    Raises:
      UserError: for settings, files and vocabularies that are invalid or incompatible, and for a loss that is not
        finite.
    """
    workdir, config = Path(workdir), recipes.expand(config)
    settings.check_numbers(config)
    checks.instance("model.remat", config.model.remat, bool)
    dtypes.check_trained("model.param_dtype", config.model.param_dtype)
    configs.check_data(config, workdir)
    min_seconds = _min_seconds(config.train.min_seconds_of)
    mesh = meshes.make_mesh(config.mesh)
    task = tasks.load_task(config.task)
    tokenizer = _tokenizer(config.tokenizer, task)
    inputs = _inputs(config, task, tokenizer, mesh)
    evaluator = None
    if config.speculative_eval.every:
        if inputs.target is None:
            raise UserError(
                "speculative_eval.every needs a target to draft for: set `target`, or speculative_eval.every to 0"
            )
        evaluator = make_evaluator(config, inputs, task, tokenizer, mesh)
    result = Trainer(config, workdir, inputs, mesh, min_seconds=min_seconds, evaluator=evaluator).run()
    if tokenizer.vocab_size > inputs.draft.vocab_size and not isinstance(inputs.draft, AttachedDraft):
        # A loaded draft that lacks ids keeps its own tokenizer.
        tokenizer = Tokenizer.load(config.model.init)
    params = jax.jit(functools.partial(update.cast, dtype=config.model.param_dtype))(result.params)
    _export(workdir / "export", inputs, processes.fetch_to_first(params), tokenizer, config.target)
    rows = [_row(config, inputs.draft, result)]
    path = workdir / "results.json"
    return records.write_results(path, binary="distill", config=configs.to_plain(config), rows=rows)


def _export(directory: Path, inputs: TrainingInputs, params: Params, tokenizer: Tokenizer, target_name: str) -> None:
    """Writes the trained model or attachment; only process 0 has all parameters, and writes."""
    if isinstance(inputs.draft, AttachedDraft):
        target = hub_adapter.fingerprint(inputs.target, inputs.target_params)  # collective: every process calls this
        if processes.first():
            loaded = hub_adapter.LoadedAttachment(inputs.draft.attachment, params, target)
            hub_adapter.save(directory, loaded, target_name=target_name)
    elif processes.first():
        hub_save.save(directory, inputs.draft, params, tokenizer)


def _row(config: Any, draft: LanguageModel, result: TrainingResult) -> dict:
    last = result.validation[-1]
    return {
        "task": config.task.name,
        "target": config.target,
        "recipe": config.recipe,
        "data": fractions_of(config.data),
        "divergence": config.loss.divergence,
        "seed": config.seed,
        "params": draft.num_params,
        "steps": result.steps,
        "train_seconds": result.train_seconds,
        "tokens": result.tokens,
        "loss": result.loss,
        "validation_loss": last["validation_loss"],
        "validation_acceptance": last.get("validation_acceptance"),
        "last_quarter_improvement": result.last_quarter_improvement,
        "validation": list(result.validation),
    }


def _min_seconds(stage: str) -> float:
    """The training seconds of the finished stage in this workdir; 0 for ""."""
    if not stage:
        return 0.0
    path = Path(stage) / "results.json"
    rows = records.read_results(path)["rows"]
    if len(rows) != 1 or not isinstance(rows[0].get("train_seconds"), float):
        raise UserError(f"{path} has no train_seconds; let train.min_seconds_of name a training stage")
    return rows[0]["train_seconds"]


def _tokenizer(config: Any, task: tasks.Task) -> Tokenizer:
    if config.path:
        return Tokenizer.load(config.path)
    texts = (text for example in task.train for text in (example.prompt, example.completion))
    return train_byte_bpe(texts, config.vocab_size)


@dataclasses.dataclass(frozen=True)
class _Models:
    """Loads the models of a training stage onto its mesh, or makes new ones."""

    config: Any
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    target: LanguageModel | None = None
    target_params: Params | None = None

    def with_target(self) -> "_Models":
        config = self.config
        if not config.target:
            return self
        loaded = self.load(config.target, param_dtype=config.target_param_dtype or config.model.param_dtype)
        return dataclasses.replace(self, target=loaded.decoder, target_params=loaded.params)

    def draft(self) -> tuple[LanguageModel, Params]:
        """The model or attachment to train, with its parameters at step 0, which are loaded from an export or new."""
        config, model, init = self.config, self.config.model, self.config.model.init
        ids = draft_vocabulary(model.vocabulary)
        ids = ids and ids.including(self.tokenizer.stop_ids)
        if hub_adapter.holds_one(init):
            draft, params = self.trained_draft(init)
            if ids and ids != draft.attachment.config.vocabulary:
                raise UserError(
                    f"model.vocabulary has other ids than the draft in {init}; leave it out to train the draft's own"
                )
            if "eagle3" in config:
                draft = AttachedDraft.of(draft.attachment.unrolled(config.eagle3.steps))
            return draft, params
        if is_attachment(init):
            draft = new_attached_draft(config, self.target, ids)
            start = lambda key, target_params: draft.attachment.init_on(key, self.target, target_params)
        elif init == RANDOM:
            new = random_model(model, self.tokenizer.vocab_size, self.tokenizer.pad_id)
            draft = trained_for_blocks(config, new.reduced(ids))
            start = lambda key, _: draft.init(key)
        else:
            loaded = hub_model.reduced(hub_model.Model(*self.trained_draft(init), self.tokenizer), ids)
            return trained_for_blocks(config, loaded.decoder), loaded.params
        shardings = draft.shardings(self.mesh, replicate=model.replicate)
        return draft, jax.jit(start, out_shardings=shardings)(jax.random.key(config.seed), self.target_params)

    def trained_draft(self, path: str) -> tuple[LanguageModel, Params]:
        """Loads a model, or an attachment of the target, with its parameters."""
        model = self.config.model
        if not hub_adapter.holds_one(path):
            loaded = self.load(path, param_dtype=model.param_dtype, replicate=model.replicate)
            return loaded.decoder, loaded.params
        target = _required(self.target, path), self.target_params
        after = self.config.eagle3.states_after if "eagle3" in self.config else ()
        after = layer_numbers(after, target[0].layers)
        shardings = lambda network: network.shardings(self.mesh, replicate=model.replicate)
        loaded = hub_adapter.load(path, *target, states_after=after, shardings=shardings)
        loaded.check(hub_adapter.fingerprint(*target))
        return AttachedDraft.of(loaded.network), loaded.params

    def load(self, directory: str, *, param_dtype: str, replicate: bool = False) -> hub_model.Model:
        """Loads an export.

        Raises:
          UserError: if its ids mean other tokens than those of `tokenizer`, or its own tokenizer has more ids than it.
        """
        own = Tokenizer.load(directory)
        try:
            check_same_tokens(self.tokenizer, own)
        except UserError as error:
            ids = str(error).partition("(")[2].rstrip(")")
            raise UserError(
                f"the model in {directory} has another tokenizer than the one used here ({ids}); set tokenizer.path to "
                f"{directory}"
            ) from None
        dtypes_of = {"param_dtype": param_dtype, "compute_dtype": self.config.model.compute_dtype}
        vocab_size = hub_load.describe(directory, **dtypes_of).vocab_size
        if vocab_size < own.vocab_size:
            raise UserError(
                f"the tokenizer has {own.vocab_size} ids and the model in {directory} only {vocab_size}; "
                "take the tokenizer that the model was trained with"
            )
        return hub_model.load(directory, mesh=self.mesh, replicate=replicate, **dtypes_of)

    def target_text(self) -> cached_text.CachedText:
        """Loads the text in `data.target_path`; checks that it comes from this target, task and generation settings."""
        task, data = self.config.task, self.config.data
        if self.target is None:
            raise UserError(
                'data.target_path names text of a target, and there is none: set `target`, or the path to ""'
            )
        text = cached_text.load(data.target_path)
        fingerprints = hub_adapter.fingerprint(self.target, self.target_params), self.tokenizer.fingerprint()
        text.check(cached_text.provenance(*fingerprints, task, data))
        return text


def _inputs(config: Any, task: tasks.Task, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> TrainingInputs:
    data = config.data
    models = _Models(config, tokenizer, mesh).with_target()
    target, (draft, params) = models.target, models.draft()
    draft = draft.with_remat(config.model.remat)
    reference, reference_params = None, None
    if config.loss.reference:
        reference, reference_params = models.trained_draft(config.loss.reference)
        reference = trained_for_blocks(config, reference)
    if target is not None and target.is_encoder_decoder != draft.is_encoder_decoder:
        raise UserError(
            f"either the target in {config.target} or the model to train is an encoder-decoder, but not both; "
            "take two of a kind"
        )
    layout = batches.RowLayout.of_config(data, seed=config.seed, model=draft)
    process_rows = meshes.own_rows(mesh, data.batch_size) if jax.process_count() > 1 else None
    text = models.target_text() if data.target_path else None
    if text is not None and not task.is_language_modelling and not any(each.completion for each in task.validation):
        # Without completions in the data, stored answers of the target are what to validate on.
        text, validation = text.held_out(config.train.eval_batches, data.batch_size)
    else:
        validation = batches.validation_batches(task, tokenizer, layout, count=config.train.eval_batches)
    return TrainingInputs(
        draft=draft,
        params=params,
        target=target,
        target_params=models.target_params,
        batches=batches.training_batches(task, tokenizer, layout, own_rows=process_rows, prompts_alone=data.fixed == 0),
        validation=validation,
        eos_ids=tokenizer.stop_ids,
        longest_prompt=data.prompt_length_max if task.is_language_modelling else data.sequence_length - 1,
        target_text=text,
        replicate=config.model.replicate,
        reference=reference,
        reference_params=reference_params,
    )


def trained_for_blocks(config: Any, draft: LanguageModel) -> LanguageModel:
    """A draft model as it is trained: with mask tokens if the config has a section `pard`, see `ParallelDraft.of`."""
    return ParallelDraft.of(draft, **config.pard) if "pard" in config else draft


def new_attached_draft(
    config: Any, target: LanguageModel | None, vocabulary: DraftVocabulary | None = None
) -> AttachedDraft:
    """The draft that consists of the target's first layers and the attachment named by `model.init`.

    Its options are in the config section with its name in `ATTACHMENTS`, or `attachment` for a user's own class.
    """
    init = config.model.init
    if "pard" in config:
        raise UserError(f'model.init is "{init}", and a section `pard` is for draft models; leave it out')
    section = init if init in ATTACHMENTS else _ATTACHMENT
    if section not in config:
        raise UserError(f'model.init is "{init}", and its options are missing: add a section `{section}`')
    options = config[section].to_dict() | ({"vocabulary": vocabulary} if vocabulary else {})
    of_target = _required(target, init).config
    if "states_after" in options:
        options["states_after"] = layer_numbers(options["states_after"], of_target.layers)
    return AttachedDraft.of(make_attachment(init, of_target, options))


def _required(target: LanguageModel | None, init: str) -> LanguageModel:
    if target is None:
        raise UserError(f'model.init is "{init}", which attaches to a target: set `target`')
    return target


def random_model(model: Any, vocab_size: int, pad_id: int) -> LanguageModel:
    """A Llama with the sizes in a config's `model` section; if `encoder_layers` is above 0, a T5 v1.1.

    Raises:
      UserError: for inconsistent sizes.
    """
    fields = {
        "vocab_size": vocab_size,
        "param_dtype": model.param_dtype,
        "compute_dtype": dtypes.compute_dtype(model.compute_dtype),
        **{name: model[name] for name in _SHAPE},
    }
    try:
        if not model.encoder_layers:
            return Decoder(DecoderConfig.llama(**fields, **{name: model[name] for name in _DECODER}))
        shape = EncoderDecoderConfig.t5(**fields, encoder_layers=model.encoder_layers, start_token=pad_id)
        return EncoderDecoder(shape)
    except ValueError as error:
        raise UserError(f"config.model: {error}") from None


if __name__ == "__main__":
    cli.leave(cli.launch(run, "specjax.distill"))
