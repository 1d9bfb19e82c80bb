"""The claims of DistillSpec (arXiv 2310.08461): each with what our record measures and what it takes to hold."""

import dataclasses
from collections.abc import Callable, Mapping

from configs.distillspec import recipe_sweep, texts
from configs.distillspec import tables as written
from configs.records.claims import Claim, Measured, Measures, all_above, all_below, numbers
from configs.records.rows import gains
from specjax.reporting import tables


def _best_gains(record: Mapping) -> Measures:
    """Gains of the best draft over the undistilled one and over plain training for as long."""
    measures = {}
    for temperature, cells in recipe_sweep.efficiencies(record).items():
        winner = recipe_sweep.best(cells)
        for other in ("supervised", "plain_clock") if winner else ():
            gain = recipe_sweep.over(record, winner, other).get(temperature)
            if gain is not None:
                label = f"{tables.heading(winner)} over {tables.heading(other)}, T {temperature:g}"
                measures[label] = gain
    return measures


def _gains_over(cell: str, other: str, *places: str) -> Callable[[Mapping], Measures]:
    """Gains of a draft over another at each temperature, on the sweep's own task or in places of transfer."""
    return lambda record: {
        (f"{tables.heading(place)}, " if place else "") + f"T {temperature:g}": gain
        for place in places or ("",)
        for temperature, gain in recipe_sweep.over(record, cell, other, place).items()
    }


def _fixed_text(record: Mapping) -> Measures:
    """Gains of the other texts over fixed text, as means over the divergences, and in how many cases it is worst."""
    worst, _ = recipe_sweep.ranks(record)
    cases = {"by mean gain": f"fixed text is worst in {worst.count('fixed')} of {len(worst)} cases"} if worst else {}
    return cases | {
        f"{text} over fixed text, T {temperature:g}": gain
        for text in recipe_sweep.TEXTS[1:]
        for temperature, gain in recipe_sweep.over(record, text, "fixed").items()
    }


def _total_variation(record: Mapping) -> Measures:
    _, best = recipe_sweep.ranks(record)
    share = Measured.exact(best.count("total_variation"), note=f"of {len(best)} texts and temperatures")
    # One of four divergences is the best in a quarter of the cases by chance.
    return {"best in": share, "by chance": Measured.exact(len(best) / 4)} if best else {}


def _sweep_claims(record: str, pair: str) -> tuple[Claim, ...]:
    """The claims about recipes, judged by the sweep of one pair of models."""
    return (
        Claim(f"distilled drafts gain 10 to 45% ({pair})", "abstract; figure 1", record, _best_gains, all_above(0)),
        Claim(
            f"fixed data is the worst text for every divergence ({pair})",
            "tables of the recipe sweep",
            record,
            _fixed_text,
            all_above(0),
        ),
        Claim(
            f"total variation is rarely the best divergence ({pair})",
            "tables of the recipe sweep",
            record,
            _total_variation,
            lambda measures: measures["best in"].value <= measures["by chance"].value,
        ),
        Claim(
            f"hard labels of the target's text (SeqKD) are worse than its probabilities ({pair})",
            "comparison of KD algorithms",
            record,
            _gains_over("seqkd", "target_forward_kl"),
            all_below(0),
        ),
    )


def _calls_saved(record: Mapping) -> Measures:
    """The change in target calls at each operating point; the lossless rule's own where no lossy one qualifies."""
    measures = {}
    for exact, lossy_cells in written.lossy_groups(record):
        best = written.operating_cell(record, lossy_cells)
        label = f"target calls, T {exact.temperature:g}, {exact.drafter}"
        if best is None:
            measures[label] = Measured.exact(0.0, "+.1f", unit="%", note="no lossy setting within the loss")
        else:
            calls = gains(exact.efficiencies, best.efficiencies)
            measures[f"{label}: {best.label}"] = Measured.over_seeds(calls, "+.1f", unit="%")
    return measures


def _exponent(record: Mapping) -> Measures:
    """How many operating points are those of p^ε, and how many settings of each rule lie on the front."""
    points = [written.operating_cell(record, group) for _, group in written.lossy_groups(record)]
    share = sum(best is not None and best.rule == "lenient_exp" for best in points) / len(points)
    fronts = ", ".join(f"{rule} {count}" for rule, count in written.lossy_fronts(record).items())
    return {
        "operating points that are p^ε's": Measured.exact(100 * share, unit="%", note=f"of {len(points)}"),
        "settings on the front of quality and target calls": fronts,
    }


def _garden(record: Mapping) -> Measures:
    """The relative latency of the garden's best member."""
    best = written.garden_best(record)
    if best is None:
        return {}
    cell = written.garden_members(record)[best]
    note = f"{1 / cell.latency.value:.1f}x lower; quality {cell.quality.plus_minus}"
    return {f"relative latency of the best within the loss, {best}": dataclasses.replace(cell.latency, note=note)}


CLAIMS: tuple[Claim, ...] = (
    *_sweep_claims("sweep", "decoder-only"),
    *_sweep_claims("sweep_encoder_decoder", "encoder-decoder"),
    Claim(
        "fixed data is the worst text, by forward KL (SmolLM2-135M-Instruct and GSM8K)",
        "tables of the recipe sweep",
        "real_texts_smollm2",
        texts.gains_over_fixed,
        all_above(0),
    ),
    Claim(
        "a draft distilled on one task gains on others (BigBenchHard: 1.93 to 2.21 greedy, 1.78 to 2.02 at T 1)",
        "abstract; transfer",
        "sweep",
        _gains_over("draft_forward_kl", recipe_sweep.UNDISTILLED, "docstrings", "arithmetic"),
        all_above(0),
    ),
    Claim(
        "it gains 7 to 37% with a larger target that it was not distilled from",
        "transfer",
        "sweep",
        _gains_over("draft_forward_kl", recipe_sweep.UNDISTILLED, "large_target"),
        all_above(0),
    ),
    Claim(
        "lossy rules trade little quality for latency: many tokens do not matter for the outcome",
        "abstract; figure 6, GSM8K",
        "lossy",
        _calls_saved,
        all_below(0),
    ),
    Claim(
        "of p/ε, p/ε² and p^ε only the last gives a usable curve of quality against block efficiency",
        "figure 6, GSM8K",
        "lossy",
        _exponent,
        lambda measures: numbers(measures)[0].value == 100,
    ),
    Claim(
        "distil the target from a larger one, then its draft for it: 6 to 10 times less latency at almost no loss "
        "(XSum 17.3 to 2.7 at ROUGE-2 23.1 to 23.0; GSM8K 15.0 to 1.4 at accuracy 33.1 to 34.8)",
        "abstract; model garden",
        "garden",
        _garden,
        lambda measures: next(iter(measures)).endswith("_kd, DistillSpec"),
    ),
)
