"""The tables and figures of configs/kangaroo/README.md, by record, and its claims, by the name of their table."""

from configs.kangaroo import claims, figures, tables
from specjax.reporting import spec_bench_page

TABLES = {
    "kangaroo": tables.main_table,
    "kangaroo_ablations": tables.ablations,
    "kangaroo_recipes": tables.recipes,
    "kangaroo_recipes_continued": tables.recipes,
    "kangaroo_spec_bench": tables.spec_bench,
    "real_drafts_smollm2": tables.real_drafts,
    "real_drafts_smollm2_amx": tables.real_drafts,
    "real_drafts_smollm2_amx_more": tables.real_drafts,
}
FIGURES = {"kangaroo_ablations": figures.ablations, "kangaroo_spec_bench": spec_bench_page.figure}
CLAIMS = {"kangaroo_claims": claims.CLAIMS}
