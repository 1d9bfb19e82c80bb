"""The tables and figures of configs/distillspec/README.md, by record, and its claims, by the name of their table."""

from configs.distillspec import claims, figures, recipe_sweep, tables, texts

TABLES = {
    "sweep": recipe_sweep.table,
    "sweep_encoder_decoder": recipe_sweep.table,
    "study": tables.study,
    "distillation_memory": tables.distillation_memory,
    "lossy": tables.lossy,
    "garden": tables.garden,
    "real_texts_smollm2": texts.compared,
}
FIGURES = {
    "sweep": recipe_sweep.heat_map,
    "sweep_encoder_decoder": recipe_sweep.heat_map,
    "lossy": figures.lossy,
    "garden": figures.garden,
}
CLAIMS = {"claims": claims.CLAIMS}
