"""Lets a chat model write questions, so that drafts can learn from its answers without any data.

    python -m specjax.questions --config=FILE --workdir=DIR [--config.section.key=value ...]

A chat model has learnt what follows the beginning of a user's turn in its template, so it continues it with what users
ask (Magpie, arXiv 2406.08464). `workdir/export` then has train.jsonl and, with a tenth of the questions, test.jsonl,
for the tasks `prompt_completion` and `prompts`. A stopped run resumes after its last complete part.
"""

import json
from pathlib import Path
from typing import Any

from specjax.data import corpora
from specjax.decoding import batch
from specjax.decoding.sampling import Sampling
from specjax.evaluation.engine import Method
from specjax.hub import model as hub_model
from specjax.reporting import records
from specjax.runtime import cli, processes, stopping
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError
from specjax.runtime.files import write_atomically
from specjax.runtime.timing import progress

# Questions for each row of the batch in one part, after which a stopped run resumes.
_PER_ROW = 8


def run(config: Any, workdir: str | Path) -> dict:
    """Writes `workdir/export` and `workdir/results.json`; returns the content of the latter.

    Config keys: `target`, `count` of questions to begin, `batch_size`, `seed`, and `generation` with temperature,
    top_k, top_p and max_new_tokens. Questions that do not end within these, that are empty or that came before are left
    out.

    Raises:
      UserError: for a model without a chat template, invalid settings, and if fewer than two questions are left.
    """
    workdir = Path(workdir)
    if config.count < 1:
        raise UserError(f"count is {config.count}; begin at least one question")
    with meshes.use(meshes.make_mesh(config.mesh)) as mesh:
        target = hub_model.loader(config, mesh)(config.target)
        written = _written(config, target, workdir / "parts")
    questions = list(dict.fromkeys(text for text in written if text))
    if len(questions) < 2:
        raise UserError(
            f"{len(questions)} of {config.count} questions ended within generation.max_new_tokens "
            f"{config.generation.max_new_tokens}; raise it or count"
        )
    train, test = corpora.split(questions, questions)
    if processes.first():
        for name, split in (("train", train), ("test", test)):
            lines = "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in split)
            write_atomically(workdir / "export" / f"{name}.jsonl", lines)
    row = {"target": config.target, "begun": config.count, "questions": len(questions), "held_out": len(test)}
    row |= {"temperature": config.generation.temperature, "top_p": config.generation.top_p, "seed": config.seed}
    plain = configs.to_plain(config)
    return records.write_results(workdir / "results.json", binary="questions", config=plain, rows=[row])


def _written(config: Any, target: hub_model.Model, folder: Path) -> list[str]:
    """The text of each question; "" for one that did not end. Parts that are in the folder are read."""
    opening, generation = target.tokenizer.user_opening(), config.generation
    batch.check_prompts([opening], target.decoder, generation.max_new_tokens)
    sampling = Sampling.of(generation.temperature, generation.top_k, generation.top_p)
    method = Method.of(target, [opening], sampling, max_new_tokens=generation.max_new_tokens)
    ends = set(target.tokenizer.stop_ids)
    how = {"max_new_tokens": generation.max_new_tokens, "eos_ids": target.tokenizer.stop_ids, "seed": config.seed}
    texts, part = [], _PER_ROW * config.batch_size
    with progress(total=config.count, description=folder.parent.name, unit="text") as bar:
        for first in range(0, config.count, part):
            stopping.stop_if_asked()
            numbers, path = range(first, min(first + part, config.count)), folder / f"{first:07d}.json"
            if processes.from_first(path.exists()):
                texts += json.loads(path.read_text(encoding="utf-8"))
            else:
                prompts, put = [opening] * len(numbers), batch.Placer(target.mesh)
                result = method.decode(prompts, config.batch_size, indices=numbers, put=put, **how)
                ended = [row.tokens if ends & set(row.tokens[-1:]) else [] for row in result.rows]
                written = [target.tokenizer.decode(tokens, after=opening).strip() for tokens in ended]
                if processes.first():
                    write_atomically(path, json.dumps(written, ensure_ascii=False))
                texts += written
            bar.update(len(numbers))
    return texts


if __name__ == "__main__":
    cli.leave(cli.launch(run, "specjax.questions"))
