"""The tables of plans in configs/plan/README.md, by record."""

from specjax.planning import tables

TABLES = {f"plan_{pair}": tables.plan for pair in ("llama_65b", "vicuna_13b", "t5_xxl", "llama3_70b")}
TABLES["plan_scaling"] = tables.scaling
FIGURES = {}
CLAIMS = {}
