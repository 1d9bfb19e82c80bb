"""Checks the throughput model's advice: what it recommends in each setting of an evaluation, against the fastest there.

Of many configurations, the fastest was also lucky. So both are measured again, in turns, on other prompts.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs.records.claims import Measured
from specjax import design, evaluate
from specjax.draft_design import advice, shapes
from specjax.evaluation import throughput
from specjax.hub import load as hub_load
from specjax.models.decoder import Decoder
from specjax.reporting import records
from specjax.runtime.errors import UserError


def run(config: Any, workdir: str | Path) -> dict:
    """Writes the rows of `check_advice`; returns the content of results.json."""
    return design.finish(config, workdir, check_advice(config, Path(workdir)))


def check_advice(config: Any, workdir: Path) -> list[dict]:
    """A row for each setting of an evaluation: the advised and the fastest configuration, and their ratio when rerun.

    Reruns use other prompts, several times; if both are the same configuration, nothing runs. Finished reruns stay in
    their folders, so that the stage resumes where it stopped.
    """
    first = Path(config.evaluation)
    results = records.read_results(first / "results.json")
    drafts = drafts_of(config.trained)
    check_drafters(results["rows"], drafts)
    rows = []
    for contest in contests(results["rows"], drafts, config.seeds):
        repeats = []
        for repeat in range(config.repeats) if contest.entries else ():
            folder = workdir / f"seed{contest.seed}_T{contest.temperature:g}_batch{contest.batch_size}_{repeat}"
            if not (folder / "results.json").exists():
                evaluate.run(_rerun(results["config"], contest, config.count, repeat), folder)
            repeats.append(records.read_results(folder / "results.json")["rows"])
        rows.append(contest.row(first.name, repeats))
    return rows


def drafts_of(trained: Sequence[str]) -> dict[str, dict]:
    """Shape and training of each draft, by the name of its training's folder, RECIPE_TASK_LAYERS_SEED."""
    drafts = {}
    for folder in map(Path, trained):
        (training,) = records.read_results(folder / "results.json")["rows"]
        _, shape = hub_load.read_config(folder / "export", param_dtype="float32", compute_dtype="float32")
        drafts[folder.name] = {
            "decoder": Decoder(shape),
            "recipe": folder.name.partition("_")[0],
            **{key: training[key] for key in ("seed", "steps", "divergence", "validation_loss")},
            **{key: getattr(shape, key) for key in ("layers", "width", "heads")},
            "parameters": shapes.parameters(shape),
        }
    return drafts


def check_drafters(rows: Sequence[Mapping], drafts: Mapping[str, Mapping]) -> None:
    """Raises UserError if a drafter in these evaluation rows is not one of the drafts."""
    for name in (row["drafter"] for row in rows if row["gamma"]):
        if name not in drafts:
            raise UserError(f'no training of this study made the drafter "{name}"; list its stage')


class Entry(NamedTuple):
    """A decoding setting: a drafter with a gamma; gamma 0 is plain decoding."""

    drafter: str
    gamma: int

    def __str__(self) -> str:
        return f"{self.drafter}, gamma {self.gamma}" if self.gamma else "plain decoding"

    @classmethod
    def of(cls, row: Mapping) -> "Entry":
        return cls(row["drafter"], row["gamma"])


class Contest(NamedTuple):
    """The advised and the fastest entry of one setting, among the drafts of one training seed.

    Attributes:
      configurations: how many ran, plain decoding included.
      advised: the entry of highest predicted throughput.
      fastest: the entry of highest measured throughput.
    """

    seed: int
    temperature: float
    batch_size: int
    configurations: int
    advised: Entry
    fastest: Entry

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The entries to measure again: both, or none if they are the same."""
        return () if self.advised == self.fastest else (self.advised, self.fastest)

    def row(self, evaluation: str, repeats: Sequence[Sequence[Mapping]]) -> dict:
        """A row of the study's table.

        Args:
          evaluation: its name.
          repeats: the evaluate rows of each rerun; none if both entries are the same.
        """
        speeds = [{Entry.of(row): row["tokens_per_second"] for row in rows} for rows in repeats]
        mean = lambda entry: statistics.fmean(each[entry] for each in speeds) if speeds else None
        ratio = Measured.over_seeds([each[self.advised] / each[self.fastest] for each in speeds] or [1.0])
        return {
            "table": "advice_checked",
            "evaluation": evaluation,
            **self._asdict(),
            "advised": str(self.advised),
            "fastest": str(self.fastest),
            "repeats": len(speeds),
            "tokens_per_second_of_advised": mean(self.advised),
            "tokens_per_second_of_fastest": mean(self.fastest),
            "advised_over_fastest": ratio.value,
            "with_interval": ratio.plus_minus,
        }


def contests(measured: Sequence[Mapping], drafts: Mapping[str, Mapping], seeds: Sequence[int]) -> list[Contest]:
    """A contest for each training seed, temperature and batch size whose drafts were timed.

    Args:
      measured: evaluate rows with the parts of a block, including plain decoding in every setting.
      drafts: "seed" and "decoder" of each drafter.
      seeds: the training seeds to look at.
    """
    made = []
    for seed in seeds:
        rows = [row for row in measured if not row["gamma"] or drafts[row["drafter"]]["seed"] == seed]
        for temperature, size in sorted({(row["temperature"], row["batch_size"]) for row in rows if row["gamma"]}):
            group = [row for row in rows if (row["temperature"], row["batch_size"]) == (temperature, size)]
            if all(row["draft_step_seconds"] is not None for row in group if row["gamma"]):
                fastest = max(group, key=lambda row: row["tokens_per_second"])
                made.append(Contest(seed, temperature, size, len(group), _advised(group, drafts), Entry.of(fastest)))
    return made


def _advised(group: Sequence[Mapping], drafts: Mapping[str, Mapping]) -> Entry:
    """The entry that `advice` recommends among one setting's rows.

    It knows the parts of a block and of plain decoding, and each draft's acceptance, and how much the rows of a batch
    differed, at its largest gamma.
    """
    some = group[0]
    work = advice.Workload((), some["max_new_tokens"], (some["batch_size"],), some["temperature"], seed=0)
    options = []
    for name in dict.fromkeys(row["drafter"] for row in group if row["gamma"]):
        rows = {row["gamma"]: row for row in group if row["drafter"] == name}
        longest = rows[max(rows)]
        ctar = throughput.by_position(longest["acceptance_by_position"])
        slowest = max(1.0, longest["iterations"] / longest["expected_iterations"])
        uneven = slowest if longest["batch_size"] > 1 else 1.0
        acceptance = advice.Acceptance(ctar, ctar, ctar, float(longest["gamma"]))
        parts = {(some["batch_size"], gamma): parts_of(row) for gamma, row in rows.items()}
        mine = advice.Candidate(name, drafts[name]["decoder"], {0.0: acceptance}, parts, True).options(work)
        options += [row | {"tokens_per_second": row["tokens_per_second"] / uneven} for row in mine]
    best = advice.recommend(options)
    plain = next(row["drafter"] for row in group if not row["gamma"])
    return Entry(best["draft"], best["gamma"]) if best["pays"] else Entry(plain, 0)


def parts_of(row: Mapping) -> throughput.PartSeconds:
    """The seconds of a block's parts in an evaluation row."""
    keys = ("draft_step_seconds", "target_step_seconds", "verify_seconds", "rule_seconds", "baseline_rule_seconds")
    return throughput.PartSeconds(*(row[key] for key in keys))


def _rerun(evaluation: dict, contest: Contest, count: int, repeat: int) -> ConfigDict:
    """The evaluation's config for one setting and two ways to decode, with other prompts."""
    config = ConfigDict(evaluation)
    gammas = {name: [gamma for other, gamma in contest.entries if other == name] for name, _ in contest.entries}
    drafters = {name: how for name, how in evaluation["drafters"].items() if name in gammas}
    config.drafters = ConfigDict({name: {**how, "rules": {"lossless": gammas[name]}} for name, how in drafters.items()})
    config.update({"batch_sizes": [contest.batch_size], "temperatures": [contest.temperature]})
    config.update({"measure_parts": False, "seed": config.seed + 1 + repeat})
    config.task.seed += 1 + repeat
    config.selection.count = count
    return config


def summary(checked: Sequence[Mapping]) -> list[dict]:
    """In how many of the checked settings the advice was as good as the fastest; nothing without any."""
    ratios = [row["advised_over_fastest"] for row in checked]
    if not ratios:
        return []
    return [
        {
            "table": "advice",
            "settings": len(checked),
            "of_them_one_and_the_same": sum(not row["repeats"] for row in checked),
            "within_5_percent": sum(ratio >= 0.95 for ratio in ratios) / len(ratios),
            "median_of_advised_over_fastest": statistics.median(ratios),
            "least_of_advised_over_fastest": min(ratios),
        }
    ]
