"""Parts that are timed round by round next to a run, with timers that report prepared values."""

from specjax.evaluation import latency
from specjax.evaluation.throughput import PartSeconds


def scripted(calls, plan, **seconds):
    """Timers of one plan: each says its seconds call after call, the last of them for ever, and that it was asked."""

    def timer(part, left):
        def seconds_of_this_call():
            calls.append((plan, part))
            return left.pop(0) if len(left) > 1 else left[0]

        return seconds_of_this_call

    return {part: timer(part, list(left)) for part, left in seconds.items()}


PLAIN = [("plain", "verify"), ("plain", "rule")]
SPECULATIVE = [(plan, part) for plan in ("a", "b") for part in ("verify", "rule", "propose_and_verify")]


def test_rounds_follow_the_share_and_each_times_every_part_of_every_plan():
    calls = []
    plain = scripted(calls, "plain", verify=[1.0], rule=[2.0])
    plans = [scripted(calls, plan, verify=[3.0], rule=[4.0], propose_and_verify=[5.0]) for plan in ("a", "b")]
    meter = latency.PartsMeter(plain, plans, (1, 2))
    assert calls == PLAIN + SPECULATIVE and meter.rounds == [], "compiled, which is no round"
    made = []
    for share in (0.0, 0.1, 0.1, 0.5, 0.2, 1.0, 1.0):
        meter.keep_up(share)
        made.append(len(meter.rounds))
    assert made == [0, 2, 2, 8, 8, 15, 15]  # round(1.5) and round(7.5) are even
    assert calls == 16 * (PLAIN + SPECULATIVE)
    speculative = {"verify": 3.0, "rule": 4.0, "propose_and_verify": 5.0}
    assert meter.rounds == 15 * [[{"verify": 1.0, "rule": 2.0}, speculative, speculative]]


def test_parts_are_medians_over_rounds():
    compiling, calls = 1e6, []
    plain = scripted(calls, "plain", verify=[compiling, *7 * [9.0], 4.0], rule=[compiling, 50.0, 0.5])
    calling = [float(number) for number in range(1, 15)] + [1000.0]
    drafting = 6 * [10.0] + 9 * [3.0]
    # A draft is what the pair took more than the call of its own round: of the pairs the median is 14, less 8 is 6.
    pairs = [sum(parts) for parts in zip(calling, drafting, strict=True)]
    draft = scripted(
        calls, "draft", verify=[compiling, *calling], rule=[compiling, 0.25], propose_and_verify=[compiling, *pairs]
    )
    free = scripted(calls, "free", verify=[compiling, 5.0], rule=[compiling, 0.75], propose_and_verify=[compiling, 4.5])
    meter = latency.PartsMeter(plain, [draft, free], (2, 3))
    meter.keep_up(1.0)
    shared = {"target_step": 4.0, "baseline_rule": 0.5}
    assert meter.parts() == [
        PartSeconds(draft_step=1.5, verify=8.0, rule=0.25, **shared),
        # Where the pair took less than the call, by noise, drafting costs nothing, and never less.
        PartSeconds(draft_step=0.0, verify=5.0, rule=0.75, **shared),
    ]
