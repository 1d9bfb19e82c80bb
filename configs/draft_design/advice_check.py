"""Whether the advice holds: what was advised against what was fastest, on other prompts."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.draft_design import contest
from configs.draft_design import summary as study
from specjax import design, evaluate
from specjax.reporting import records


def run(config: Any, workdir: str | Path) -> dict:
    """Runs the study's stage; returns the content of results.json."""
    return design.finish(config, workdir, check_advice(config, Path(workdir)))


def check_advice(config: Any, workdir: Path) -> list[dict]:
    """Runs what would have been advised and what was fastest in an evaluation again, beside each other.

    Both decode other prompts than before, some times over; where they are one, nothing is run. What has been run stays
    in its folder, so that the action goes on where it stopped.
    """
    first = Path(config.evaluation)
    results = records.read_results(first / "results.json")
    drafts = study.drafts_of(config.trained)
    study.refuse_strangers(results["rows"], drafts)
    rows = []
    for each in contest.contests(results["rows"], drafts, config.seeds):
        repeats = []
        for repeat in range(config.repeats) if each.entries else ():
            folder = workdir / f"seed{each.seed}_T{each.temperature:g}_batch{each.batch_size}_{repeat}"
            if not (folder / "results.json").exists():
                evaluate.run(_again(results["config"], each, config.count, repeat), folder)
            repeats.append(records.read_results(folder / "results.json")["rows"])
        rows.append(each.row(first.name, repeats))
    return rows


def _again(evaluation: dict, each: contest.Contest, count: int, repeat: int) -> ConfigDict:
    """The evaluation's config, of one setting and two ways to decode, with other prompts."""
    config = ConfigDict(evaluation)
    gammas = {entry.drafter: [e.gamma for e in each.entries if e.drafter == entry.drafter] for entry in each.entries}
    drafters = {name: section for name, section in evaluation["drafters"].items() if name in gammas}
    config.drafters = ConfigDict({name: {**how, "rules": {"lossless": gammas[name]}} for name, how in drafters.items()})
    config.update({"batch_sizes": [each.batch_size], "temperatures": [each.temperature]})
    config.update({"measure_parts": False, "seed": config.seed + 1 + repeat})
    config.task.seed += 1 + repeat
    config.selection.count = count
    return config
