"""Counts which ids your target writes, for drafts with a reduced vocabulary (FR-Spec, arXiv 2502.14856).

    python -m specjax.main --config=configs/draft_design/vocabulary.py --workdir=runs/vocabulary --config.target=DIR \\
        --config.size=8192 --config.target_text=runs/target_text/export

A draft whose head has only the ids that its target writes most takes less time for a token, and decoding stays exact.
The text is that of the binary target_text, or any text: without `target_text`, the completions or documents of `task`
(`--config.task.name=text --config.task.path=FILE`). The ids are left in runs/vocabulary/export/draft_vocabulary.json.
Name that folder as `vocabulary` where a draft is cut, trained or used: `--config.vocabulary=` of
configs/draft_design/prune.py, configs/distill.py and configs/adapter.py, an option of a drafter in configs/evaluate.py
and configs/generate.py, or `api.Draft(model, vocabulary=DIR)`.

Hardware: any. Time: that of tokenising the text. The printed table has the share of the tokens of held-out texts that
vocabularies of several sizes hold: the acceptance of a draft is at most this share.
`configs/draft_design/vocabulary.py:smoke` counts a little text.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("draft_design/vocabulary", variant)
    config = common.draft_vocabulary("required:target:the directory of the checkpoint whose ids to count", 8192)
    if variant:
        config.task.size = 60_000
        config.size = 64
    return config
