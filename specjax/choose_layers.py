"""Chooses the layers of a target that the drafter "skip_layers" skips.

    python -m specjax.choose_layers --config=FILE --workdir=DIR [--config.section.key=value ...]

The target continues a few prompts by plain decoding, and `draft_design.layer_search` scores drafts on that text. A
drafter's section with `skipped: "workdir:STAGE"` uses the choice of an earlier stage.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from specjax.data import batches, tasks
from specjax.decoding import batch
from specjax.decoding.sampling import Sampling
from specjax.draft_design import layer_search
from specjax.evaluation.engine import Method, decode_all
from specjax.hub import model as hub_model
from specjax.reporting import records
from specjax.runtime import cli
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.timing import progress


def run(config: Any, workdir: str | Path) -> dict:
    """Writes `workdir/results.json`: a row for each number of skipped layers, one of which is marked `chosen`.

    Raises:
      UserError: for invalid models, prompts or settings.
    """
    mesh = meshes.make_mesh(config.mesh)
    target = hub_model.loader(config, mesh)(config.target)
    sampling = Sampling.of(config.temperature)
    with meshes.use(mesh):
        tokens, lengths, starts = _texts(config, target, sampling)
        choices = layer_search.search(
            target.decoder,
            target.params,
            tokens,
            lengths,
            starts,
            sampling=sampling,
            most_skipped=config.most_skipped,
            longest_gamma=config.longest_gamma,
            verify_cost=config.verify_cost,
        )
        rows = []
        with progress(total=config.most_skipped, description="choose layers", unit="layer") as bar:
            for choice in choices:
                rows.append({"target": config.target, **dataclasses.asdict(choice)})
                bar.update(1)
    best = max(rows, key=lambda row: row["predicted_speedup"])
    rows = [{**row, "chosen": row is best} for row in rows]
    path = Path(workdir) / "results.json"
    return records.write_results(path, binary="choose_layers", config=configs.to_plain(config), rows=rows)


def _texts(config: Any, target: hub_model.Model, sampling: Sampling):
    """Prompts with the target's continuations: padded tokens `[B, T]`, lengths `[B]`, prompt lengths `[B]`."""
    selection = config.selection
    prompts = batches.evaluation_prompts(
        tasks.load_task(config.task),
        target.tokenizer,
        count=selection.count,
        prompt_length=(selection.length_min, selection.length_max),
        chat=selection.chat,
        seed=config.seed,
    )
    ids = [prompt.tokens for prompt in prompts]
    batch.check_prompts(ids, target.decoder, config.max_new_tokens)
    method = Method.of(target, ids, sampling, max_new_tokens=config.max_new_tokens)
    how = {"max_new_tokens": config.max_new_tokens, "eos_ids": target.tokenizer.stop_ids, "seed": config.seed}
    _, output = decode_all(method, ids, batch_size=len(ids), mesh=target.mesh, **how)
    texts = [(*prompt, *emitted) for prompt, emitted in zip(ids, output.tokens, strict=True)]
    tokens, lengths = batch.pad(texts, batch.prompt_slots(texts))
    return tokens, lengths, np.asarray([len(prompt) for prompt in ids], np.int32)


if __name__ == "__main__":
    cli.leave(cli.launch(run, "specjax.choose_layers"))
