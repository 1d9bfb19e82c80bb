"""Ties and true differences between plain and speculative text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specjax.decoding import identity
from specjax.decoding.sampling import Sampling
from specjax.runtime import dtypes

PROMPT = [1, 2, 3, 4]


def compared(dtype, drawn, rank, **sampling):
    """One difference, in the first token, between a text and one with the token of this rank by score."""
    target, params = tiny.decoder(3, compute_dtype=dtype, sharpness=1.0)
    greedy = not sampling
    how = Sampling.of(**(sampling or {"temperature": 0.0}))
    rule = "lossless" if greedy else "coupled"
    plan = tiny.plan(target, "ngram", {}, gamma=2, slots=8, max_new=8, rule=rule, greedy=greedy)
    logits = tiny.full_logits(target, params, jnp.asarray([PROMPT], jnp.int32))[0, -1]
    order = np.argsort(-np.asarray(logits))
    plain, other = [int(order[0]), 5], [int(order[rank]), 5]
    result = identity.compare(plan, params, [PROMPT], [plain], [other], slots=16, seed=0, sampling=how)
    return (*result["differences"], np.asarray(logits)[order])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tie_bound_fits_the_dtype_and_the_spread_of_the_logits(dtype):
    difference, logits = compared(dtype, None, 1)
    eps = {"float32": 128 * 2**-23, "bfloat16": 16 * 2**-7}[dtype]
    assert difference["tie_bound"] == pytest.approx(eps * logits.std(), rel=0.05)
    assert difference["top2_gap"] == pytest.approx(logits[0] - logits[1], abs=difference["tie_bound"])
    assert difference["tie"] == (difference["top2_gap"] <= difference["tie_bound"])


@pytest.mark.parametrize(
    ("dtype", "platform", "precision", "bits"),
    [
        ("float32", "cpu", None, 23),
        ("float32", "gpu", None, 10),
        ("float32", "gpu", "highest", 23),
        ("float32", "tpu", "default", 7),
        ("float32", "tpu", "float32", 23),
        ("bfloat16", "gpu", None, 7),
        ("float16", "tpu", None, 10),
    ],
)
def test_rounding_is_that_of_the_products_inputs(monkeypatch, dtype, platform, precision, bits):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    with jax.default_matmul_precision(precision):
        assert dtypes.rounding(dtype) == 2.0**-bits


def test_a_token_far_from_the_best_is_no_tie_in_any_dtype():
    for dtype in ("float32", "bfloat16", "float16"):
        difference, _ = compared(dtype, None, 20)
        assert not difference["tie"] and difference["position"] == 0


def test_equal_logits_are_a_tie_and_a_text_that_ends_early_is_none():
    target, params = tiny.decoder(3)
    # Two ids with one embedding have equal logits everywhere.
    logits = tiny.full_logits(target, params, jnp.asarray([PROMPT], jnp.int32))[0, -1]
    best = int(jnp.argmax(logits))
    twin = (best + 1) % target.vocab_size
    params = jax.tree.map(lambda x: x, params)
    params["embedding"] = params["embedding"].at[twin].set(params["embedding"][best])
    plan = tiny.plan(target, "ngram", {}, gamma=2, slots=8, max_new=8, rule="lossless", greedy=True)
    compare = lambda plain, other: identity.compare(
        plan, params, [PROMPT], [plain], [other], slots=16, seed=0, sampling=Sampling.of(0.0)
    )
    (difference,) = compare([best, 2], [twin, 2])["differences"]
    assert difference["tie"] and difference["top2_gap"] == 0
    (difference,) = compare([best], [best, 2])["differences"]
    assert not difference["tie"] and difference["position"] == 1
    assert compare([best], [best]) == {"equal": 1, "of": 1, "differences": []}
