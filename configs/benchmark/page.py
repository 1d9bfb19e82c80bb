"""The tables of configs/benchmark/README.md, by record."""

from collections.abc import Mapping

from configs.records.rows import markdown, provenance
from specjax.reporting import tables


def quickstart(record: Mapping) -> str:
    """The rows of an evaluation, and its paired comparisons if it has any; the record is a results.json."""
    rows = [row for row in record["rows"] if "block_efficiency" in row]
    parts = [tables.markdown_table(rows, tables.summary_columns(rows))]
    if record.get("comparisons"):
        parts.append(markdown([_comparison(row) for row in record["comparisons"]]))
    return "\n\n".join([*parts, provenance(record)])


def _comparison(row: Mapping) -> dict:
    settings = {key: row[key] for key in ("drafter", "against", "rule", "temperature", "gamma")}
    ratio, interval = row["block_efficiency_ratio"], row["block_efficiency_ratio_ci"]
    ends = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return settings | {
        "rule": tables.rule_label(row),
        "ratio of block efficiencies [95%]": f"{ratio:.3f}{ends}",
    }


def benchmark(record: Mapping) -> str:
    """A table for each benchmark, without the values that are lists or mappings."""
    parts: dict[str, list[Mapping]] = {}
    for row in record["rows"]:
        flat = {key: value for key, value in row.items() if not isinstance(value, (Mapping, list))}
        parts.setdefault(flat.pop("benchmark"), []).append(flat)
    return "\n\n".join(f"{tables.heading(name)}\n\n{markdown(rows)}" for name, rows in parts.items())


def accelerator(record: Mapping) -> str:
    """The tables of `benchmark`, and the device they are of."""
    return f"{benchmark(record)}\n\n{provenance(record)}"


def quantised(record: Mapping) -> str:
    """A checkpoint in each dtype: speed, memory, perplexity, and how well it drafts for the first dtype."""
    columns = {
        "param_dtype": "dtype of parameters",
        "gigabytes": "GB",
        "tokens_per_second": "tok/s",
        "speed_to_target": "speed relative to the first",
        "perplexity": "perplexity",
        "acceptance_rate": "acceptance as its draft",
        "speedup_as_draft": "speed-up as its draft",
    }
    rows = [{title: row[key] for key, title in columns.items()} for row in record["rows"]]
    config = record["config"]
    run = (
        f"{config['prompts']} prompts of {config['prompt_length']} tokens, {config['max_new_tokens']} new tokens, "
        f"gamma {config['gamma']}; medians of {config['rounds']} rounds."
    )
    return f"{markdown(rows)}\n\n{run}\n\n{provenance(record)}"


def peers(record: Mapping) -> str:
    """Tokens per second of each system at its best setting, and what was run."""
    table = tables.markdown_table(record["rows"], ("system", "setting", "tokens_per_second"))
    run = (
        f"{record['prompts']} prompts of {record['prompt_tokens']} tokens, {record['max_new_tokens']} new tokens, "
        f"{record['cpus']} CPU cores, {'trained' if record['trained'] else 'untrained'} pair."
    )
    return f"{table}\n\n{run}"


def peers_distillation(record: Mapping) -> str:
    """Tokens written and learned from per second by each trainer's on-policy step, pair by pair, and what was run."""
    settings = ("pair", "batch_size", "system", "setting")
    columns = (*settings, "tokens_per_second", "step_seconds", "generation_seconds", "ratio")
    pairs = "; ".join(
        f"{name}: target {target[0]} x {target[1]}, draft {draft[0]} x {draft[1]}"
        for name, (target, draft) in record["pairs"].items()
    )
    run = (
        f"Layers x width of {pairs}. Vocabulary {record['vocabulary']}, "
        f"{record['prompt_tokens']} prompt and {record['new_tokens']} new tokens, JSD, float32, random weights, "
        f"{record['cpus']} CPU cores."
    )
    return f"{tables.markdown_table(record['rows'], columns)}\n\n{run}"


TABLES = {
    "quickstart": quickstart,
    "benchmark": benchmark,
    "accelerator_plain": accelerator,
    "accelerator_speculative": accelerator,
    "accelerator_transformers": accelerator,
    "accelerator_identity": accelerator,
    "accelerator_profile": accelerator,
    "experts": accelerator,
    "real_quantised_smollm2": quantised,
    "real_amx_smollm2": quantised,
    "real_quantised_qwen": quantised,
    "peers": peers,
    "peers_qwen": peers,
    "peers_distillation": peers_distillation,
}
FIGURES = {}
CLAIMS = {}
