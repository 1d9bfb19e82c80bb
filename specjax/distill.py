"""Trains a model and exports it: a target, a draft or an adapter, plainly or distilled, on or off its own text.

    python -m specjax.distill --config=FILE --workdir=DIR [--config.section.key=value ...]

One trainer serves all: `loss.divergence` "cross_entropy" without a `target` is plain training, and the
fractions under `data` say whose text a target's probabilities are learned on. A `recipe` names these parts.
"""

from pathlib import Path
from typing import Any

import jax

from specjax.data import batches, tasks
from specjax.distillation import cached_text, recipes
from specjax.distillation.data_sources import SOURCES
from specjax.distillation.evaluator import make_evaluator
from specjax.distillation.trainer import Outcome, Trainer, TrainingInputs
from specjax.hub import adapter as hub_adapter
from specjax.hub import load as hub_load
from specjax.hub import save as hub_save
from specjax.hub.tokenizer import Tokenizer, train_byte_bpe
from specjax.models.adapters import Adapter, AdapterConfig
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from specjax.models.language_model import LanguageModel, Params
from specjax.models.medusa import MedusaConfig, MedusaHeads
from specjax.models.self_draft import SelfDraft
from specjax.models.table import model_of
from specjax.reporting import records
from specjax.runtime import cli, dtypes, processes
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

# What `model.init` says for a model without a past, and for an adapter or Medusa heads of the target.
RANDOM, ADAPTER, MEDUSA = "random", "adapter", "medusa"

# Fields of `config.model` that are fields of the model; then those of a decoder alone, and of an encoder-decoder alone.
_SHAPE = ("width", "layers", "heads", "kv_heads", "head_size", "mlp_width", "norm_epsilon", "tied_head")
_DECODER = ("rope_theta", "max_positions")
_ENCODER_DECODER = ("encoder_layers",)


def run(config: Any, workdir: str | Path) -> dict:
    """Trains, writes `workdir/export` and `workdir/results.json`, and returns what the latter holds.

    Args:
      config: with every key that `configs/quickstart.py` writes for a training stage.
      workdir: where an interrupted run left off it continues.

    Raises:
      UserError: for settings, files and vocabularies that do not fit, and for a loss that is not finite.
    """
    workdir, config = Path(workdir), recipes.expand(config)
    min_seconds = _min_seconds(config.train.min_seconds_of)
    mesh = meshes.make_mesh(config.mesh)
    task = tasks.load_task(config.task)
    tokenizer = _tokenizer(config.tokenizer, task)
    material = _material(config, task, tokenizer, mesh)
    evaluator = None
    if config.speculative_eval.every:
        if material.target is None:
            raise UserError(
                "speculative_eval.every needs a target to draft for: set `target`, or speculative_eval.every to 0"
            )
        evaluator = make_evaluator(config, material, task, tokenizer, mesh)
    trainer = Trainer(config, workdir, material, mesh, min_seconds=min_seconds, evaluator=evaluator)
    outcome = trainer.run()
    _export(workdir / "export", material, processes.fetch_to_first(outcome.params), tokenizer)
    path = workdir / "results.json"
    rows = [_row(config, material.draft, outcome)]
    return records.write_results(path, binary="distill", config=configs.to_plain(config), rows=rows)


def _export(directory: Path, material: TrainingInputs, params: Params, tokenizer: Tokenizer) -> None:
    """Writes what was trained; of several processes the first does, which alone has the parameters whole."""
    if isinstance(material.draft, SelfDraft):
        belongs = hub_adapter.fingerprint(material.target, material.target_params)  # all processes come here
        if processes.first():
            hub_adapter.save(directory, hub_adapter.LoadedAdapter(material.draft.adapter, params, belongs))
    elif processes.first():
        hub_save.save(directory, material.draft, params, tokenizer)


def _row(config: Any, draft: LanguageModel, outcome: Outcome) -> dict:
    last = outcome.validation[-1]
    return {
        "task": config.task.name,
        "target": config.target,
        "recipe": config.recipe,
        "data": {name: config.data[name] for name in SOURCES},
        "divergence": config.loss.divergence,
        "seed": config.seed,
        "params": draft.num_params,
        "steps": outcome.steps,
        "train_seconds": outcome.train_seconds,
        "tokens": outcome.tokens,
        "loss": outcome.loss,
        "validation_loss": last["validation_loss"],
        "validation_acceptance": last.get("validation_acceptance"),
        "last_quarter_improvement": outcome.last_quarter_improvement,
        "validation": list(outcome.validation),
    }


def _min_seconds(stage: str) -> float:
    """The training time of an earlier stage, 0 where none is named."""
    if not stage:
        return 0.0
    path = Path(stage) / "results.json"
    rows = records.read_results(path)["rows"]
    if len(rows) != 1 or "train_seconds" not in rows[0]:
        raise UserError(f"{path} tells no train_seconds; let train.min_seconds_of name a training stage")
    return rows[0]["train_seconds"]


def _tokenizer(config: Any, task: tasks.Task) -> Tokenizer:
    if config.path:
        return Tokenizer.load(config.path)
    texts = (text for example in task.train for text in (example.prompt, example.completion))
    return train_byte_bpe(texts, config.vocab_size)


def _material(config: Any, task: tasks.Task, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> TrainingInputs:
    data, train = config.data, config.train
    target, target_params = None, None
    if config.target:
        target, target_params = _load(config.target, tokenizer, config.model, mesh)
    if config.model.init in (ADAPTER, MEDUSA) or hub_adapter.holds_one(config.model.init):
        draft, params = _attached(config, target, target_params, mesh)
    else:
        draft, params = _model(config, tokenizer, mesh)
    if target is not None and target.is_encoder_decoder != draft.is_encoder_decoder:
        raise UserError(
            f"of the target in {config.target} and the model to train only one is an encoder-decoder; "
            "take two of a kind"
        )
    rows = dict(batch_size=data.batch_size, sequence_length=data.sequence_length, seed=config.seed)
    rows["start_token"] = draft.config.start_token if draft.is_encoder_decoder else None
    rows["prompt_length"] = (data.prompt_length_min, data.prompt_length_max)
    text = None
    if data.target_path:
        text = _target_text(config, target, target_params, tokenizer)
    own = meshes.own_rows(mesh, data.batch_size) if jax.process_count() > 1 else None
    return TrainingInputs(
        draft=draft,
        params=params,
        target=target,
        target_params=target_params,
        batches=batches.training_batches(task, tokenizer, own_rows=own, **rows),
        validation=batches.validation_batches(task, tokenizer, count=train.eval_batches, **rows),
        eos_ids=tokenizer.eos_ids,
        longest_prompt=data.prompt_length_max if task.is_language_modelling else data.sequence_length - 1,
        target_text=text,
        replicate=config.model.replicate,
    )


def _target_text(config: Any, target: LanguageModel | None, params: Params | None, tokenizer: Tokenizer):
    """The text in `data.target_path`, if it is this target's on this task, written with these settings."""
    if target is None:
        raise UserError('data.target_path names text of a target, and there is none: set `target`, or the path to ""')
    text = cached_text.load(config.data.target_path)
    belongs = hub_adapter.fingerprint(target, params), tokenizer.fingerprint()
    text.check(cached_text.provenance(*belongs, config.task, config.data))
    return text


def _attached(
    config: Any, target: LanguageModel | None, target_params: Params | None, mesh: jax.sharding.Mesh
) -> tuple[SelfDraft, Params]:
    """What `config.adapter` or `config.medusa` describes, new; or an export of either, to be trained further."""
    init = config.model.init
    if target is None:
        raise UserError(f'model.init is "{init}", which attaches to a target: set `target`')
    if init not in (ADAPTER, MEDUSA):
        shardings = lambda adapter: meshes.shardings(adapter.axes(replicate=config.model.replicate), mesh)
        loaded = hub_adapter.load(init, target, shardings=shardings)
        loaded.check(hub_adapter.fingerprint(target, target_params))
        return SelfDraft.of(loaded.adapter), loaded.params
    draft = attachment(config, target)
    begin = jax.jit(draft.init_on, out_shardings=meshes.shardings(draft.axes(replicate=config.model.replicate), mesh))
    return draft, begin(jax.random.key(config.seed), target_params)


def attachment(config: Any, target: LanguageModel) -> SelfDraft:
    """What `config.adapter` or `config.medusa` describes, as `model.init` says."""
    section = config[config.model.init]
    if config.model.init == ADAPTER:
        return SelfDraft.of(Adapter(AdapterConfig(target.config, section.exit_layer, section.kind, section.own_head)))
    return SelfDraft.of(MedusaHeads(MedusaConfig(target.config, section.heads, section.own_head)))


def _model(config: Any, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> tuple[LanguageModel, Params]:
    """The model to train: from an export, or random with the tokenizer's vocabulary."""
    model = config.model
    if model.init != RANDOM:
        return _load(model.init, tokenizer, model, mesh, replicate=model.replicate)
    made = random_model(model, tokenizer.vocab_size, tokenizer.pad_id)
    if not model.replicate:
        made.check_split(mesh)
    init = jax.jit(made.init, out_shardings=meshes.shardings(made.axes(replicate=model.replicate), mesh))
    return made, init(jax.random.key(config.seed))


def random_model(model: Any, vocab_size: int, pad_id: int) -> LanguageModel:
    """A Llama of this shape; with `encoder_layers` above 0 an encoder-decoder in the manner of T5 v1.1.

    Raises:
      UserError: for a shape that no model has.
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
        fields |= {name: model[name] for name in _ENCODER_DECODER}
        return EncoderDecoder(EncoderDecoderConfig.t5(**fields, start_token=pad_id))
    except ValueError as error:
        raise UserError(f"config.model: {error}") from None


def _load(
    directory: str, tokenizer: Tokenizer, model: Any, mesh: jax.sharding.Mesh, *, replicate: bool = False
) -> tuple[LanguageModel, Params]:
    """Reads an export straight onto the mesh; it has the tokenizer used here, and at least a row for each id."""
    if Tokenizer.load(directory).fingerprint() != tokenizer.fingerprint():
        raise UserError(
            f"the model in {directory} has another tokenizer than the one used here; set tokenizer.path to {directory}"
        )
    dtypes_of = {"param_dtype": model.param_dtype, "compute_dtype": model.compute_dtype}
    _, config = hub_load.read_config(Path(directory), **dtypes_of)
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model in {directory} only {config.vocab_size}; "
            "take the tokenizer that the model was trained with"
        )
    described = model_of(config)
    if not replicate:
        described.check_split(mesh)
    shardings = meshes.shardings(described.axes(replicate=replicate), mesh)
    return hub_load.load(directory, shardings=shardings, **dtypes_of)


if __name__ == "__main__":
    raise SystemExit(cli.launch(run, "specjax.distill"))
