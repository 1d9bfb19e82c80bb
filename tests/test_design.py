"""Draft design: the published shapes and rows, shapes at a budget, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
import tiny

from configs.draft_design import claims as design_claims
from configs.draft_design import page as design_page
from configs.draft_design import paper_check, profiling, series
from specjax import design
from specjax.draft_design import shapes
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "draft_design"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("noft-1.3b", 1_345_423_360),
        ("wide-1.3b", 1_333_721_600),
        ("wide-796m", 796_290_560),
        ("wide-543m", 543_311_360),
        ("wide-290m", 290_332_160),
    ],
)
def test_published_shapes_have_the_parameters_of_their_names(name, count):
    layers, width, heads, head_size, mlp = paper_check.PRESETS[name]
    layer = 4 * width * heads * head_size + 3 * width * mlp + 2 * width
    assert shapes.parameters(paper_check.preset(name)) == layers * layer + width + 2 * 32000 * width == count
    assert profiling.weight_bytes(paper_check.preset(name, "bfloat16")) == 2 * count


def test_caches_of_the_published_shapes_are_192_and_120_mebibytes():
    assert profiling.kv_bytes(paper_check.preset("noft-1.3b"), 1024) == 192 * 2**20
    assert profiling.kv_bytes(paper_check.preset("wide-1.3b"), 1024) == 120 * 2**20
    assert profiling.kv_bytes(paper_check.preset("wide-1.3b", "float32"), 512, batch=3) == 360 * 2**20


def test_a_step_reads_the_head_whole_and_of_the_embedding_a_row():
    config = tiny.config(tied_head=False)
    read = shapes.parameters(config) - config.vocab_size * config.width
    cache = 2 * config.layers * config.kv_heads * config.head_size * 4 * 7
    assert profiling.step_bytes(config, context=7) == 4 * read + cache


def test_the_published_rows_come_out_within_half_a_percent(tmp_path, capsys):
    results = paper_check.run(configs.load(str(CONFIGS / "published.py")), tmp_path)
    consistency = [row for row in results["rows"] if row["table"] == "consistency"]
    assert [row["published_tokens_per_second"] for row in consistency] == [32.59, 23.10]
    assert all(abs(row["off_by"]) < 5e-3 for row in consistency)
    caches = {row["draft"]: row["kv_mebibytes"] for row in results["rows"] if row["table"] == "shapes"}
    assert (caches["noft-1.3b"], caches["wide-1.3b"]) == (192, 120)
    printed = capsys.readouterr().out
    assert "32.59" in printed and "23.09" in printed
    page = design_page.all_tables(results)
    assert "| wide-796m | 5 | 2560 | 32 | 11008 | 796,290,560 | 1024 | 80 |" in page


def verdicts(record, *rows, **others):
    """Of the claims that this record judges, in their order."""
    made = {"rows": rows, "environment": {"device_kind": "X"}, **others}
    judged = [claim for claim in design_claims.CLAIMS if claim.record == record]
    return [claim.judged(made)[1] for claim in judged]


def test_verdicts_of_the_profile_follow_from_its_lines_and_from_doubled_widths():
    line = {"table": "lines", "milliseconds_for_one_more": 0.5, "slowest_over_fastest": 3.0, "r_squared": 0.99}
    depth = {**line, "series": "depth at fixed parameters", "against": "layers"}

    def wide(*took, table="width_at_fixed_depth", key="width"):
        sizes = zip((1, 2, 4, 6), took, strict=True)
        return [{"table": table, key: size, "milliseconds": each, "estimate": False} for size, each in sizes]

    heads = wide(1.0, 1.0, 1.0, 1.0, table="heads_at_fixed_width", key="heads")
    flat, steep = wide(1.0, 1.2, 1.4, 9.0), wide(1.0, 1.0, 1.3, 1.3)
    assert verdicts("design_profile", depth, *flat, *heads) == ["reproduced"] * 2
    bent = {**depth, "r_squared": 0.5}
    assert verdicts("design_profile", bent, *steep, *heads) == ["not reproduced", "not reproduced"]
    assert verdicts("design_profile") == ["not measured yet"] * 2


def study_of(*, speeds, efficiencies, spearman=0.6, median=0.03, settings=12):
    """The study's rows: three depths of three seeds, speed and block efficiency of each."""
    predicted = {"table": "predicted_against_measured", "batch_size": 1, "configurations": 9, "blocks": "of the run"}
    predicted |= {"within_10_percent": 0.95, "median_error": median}
    advised = {"table": "advice", "settings": settings, "within_5_percent": 1.0, "least_of_advised_over_fastest": 0.96}
    advised["of_them_one_and_the_same"] = 3
    depth = {"table": "depth_at_equal_parameters", "task": "t", "recipe": "r", "temperature": 0.0, "seeds": 3}
    spread = {1: (0.99, 1.0, 1.01), 4: (1.01, 1.0, 0.99), 8: (1.0, 0.99, 1.01)}
    by_seed = lambda layers, mean: [share * mean for share in spread[layers]]
    depths = [
        {**depth, "layers": layers, "tokens_per_second": speed, "tokens_per_second_by_seed": by_seed(layers, speed)}
        | {"block_efficiency_by_seed": by_seed(layers, efficiency)[::-1]}
        for layers, speed, efficiency in zip((1, 4, 8), speeds, efficiencies, strict=True)
    ]
    weak = {"table": "perplexity_correlation", "task": "t", "temperature": 0.0, "with": "tokens per second"}
    return [predicted, advised, *depths, {**weak, "drafts": 12, "spearman": spearman}]


def test_verdicts_of_the_study_follow_from_its_tables():
    good = {"speeds": (9.0, 12.0, 8.0), "efficiencies": (2.0, 2.1, 2.2)}
    judged = lambda **changes: verdicts("design_study", *study_of(**{**good, **changes}))
    assert judged() == ["reproduced"] * 3 + ["holds"] * 2
    # The shallowest is fastest; one accepts more than the deepest; one is slower; better models are faster.
    assert judged(speeds=(13.0, 12.0, 8.0))[:2] == ["reproduced", "not reproduced"]
    assert judged(efficiencies=(2.0, 2.4, 2.2))[:2] == ["not reproduced", "reproduced"]
    assert judged(speeds=(7.0, 12.0, 8.0))[:2] == ["not reproduced", "reproduced"]
    assert judged(spearman=-0.8)[2] == "not reproduced"
    # What lies within the spread of the seeds says nothing.
    assert judged(speeds=(9.0, 9.1, 9.0))[:2] == ["not decided"] * 2
    assert judged(spearman=0.0)[2] == "not decided"
    assert judged(median=0.05, settings=9)[3:] == ["does not hold"] * 2
    assert verdicts("design_study") == ["not measured yet"] * 5


def test_verdicts_of_published_rows_and_of_pruning():
    rows = [{"table": "consistency", "off_by": 1e-3, "computed_tokens_per_second": 1.0}]
    rows += [
        {"table": "shapes", "draft": f"{name}-1.3b", "kv_mebibytes": size}
        for name, size in (("noft", 192), ("wide", 120))
    ]
    consistent = "consistent; arithmetic, nothing is reproduced"
    assert verdicts("design_published", *rows) == [consistent, consistent, "not testable here"]
    rows[0]["off_by"], rows[1]["kv_mebibytes"] = -0.02, 191
    assert verdicts("design_published", *rows)[:2] == ["not reproduced"] * 2
    pair = {"drafter": "recovered_wide_0", "temperature": 0.0, "block_efficiency_ratio": 1.2}
    seeds = lambda *ratios: [{**pair, "block_efficiency_ratio": ratio} for ratio in ratios]
    assert verdicts("design_pruning", comparisons=seeds(1.2, 1.21, 1.19)) == ["holds"]
    assert verdicts("design_pruning", comparisons=seeds(0.9, 0.91, 0.89)) == ["does not hold"]
    # One seed has no interval, and two that disagree have a wide one.
    assert verdicts("design_pruning", comparisons=seeds(1.2)) == ["not decided"]
    assert verdicts("design_pruning", comparisons=seeds(1.2, 0.9)) == ["not decided"]


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_a_shape_at_a_budget_has_about_so_many_parameters_in_the_same_proportions(layers):
    like = tiny.config(head_size=8, heads=4, kv_heads=2, width=32, mlp_width=88)
    result = shapes.at_parameters(like, layers, 60_000)
    assert abs(shapes.parameters(result) / 60_000 - 1) < 0.03
    assert result.layers == layers and result.head_size == 8 and result.heads == 2 * result.kv_heads
    assert result.width == result.heads * result.head_size
    assert result.family == like.family and result.vocab_size == like.vocab_size


def test_what_no_shape_meets_is_refused():
    like = tiny.config()
    with pytest.raises(UserError, match="no shape of 6 layers in these proportions has about 900 parameters"):
        shapes.at_parameters(like, 6, 900)
    with pytest.raises(UserError, match="3 heads do not divide into 2 groups"):
        shapes.reshaped(like, heads=3, kv_heads=2)
    with pytest.raises(UserError, match="a width of 50 does not divide into heads of 16"):
        series._wide(dataclasses.replace(like, head_size=16), 1, 50)
    with pytest.raises(UserError, match="no such shape: mlp_width must be at least 1, not 0"):
        shapes.reshaped(like, mlp_width=0)
    with pytest.raises(UserError, match='no published shape "wide-796"; did you mean "wide-796m"'):
        paper_check.preset("wide-796")


def test_an_unknown_action_is_refused(tmp_path):
    config = configs.load(str(CONFIGS / "what_if.py"))
    config.action = "what"
    with pytest.raises(UserError, match='no action "what"; did you mean "what_if"'):
        design.run(config, tmp_path)
