"""Speculative decoding in training: how many tokens a target call the draft is worth by now."""

from collections.abc import Callable
from typing import Any

import jax

from specjax.data import batches, tasks
from specjax.decoding import batch
from specjax.decoding.drafters.model import ModelDraft
from specjax.decoding.drafters.table import build_drafter, make_options
from specjax.decoding.plan import Plan
from specjax.decoding.sampling import Sampling
from specjax.hub.tokenizer import Tokenizer
from specjax.models.self_draft import SelfDraft


def _drafter(material: Any, gamma: int) -> Any:
    if isinstance(material.draft, SelfDraft):
        adapter = material.draft.adapter
        return build_drafter(make_options(adapter.drafter, {}), material.target, gamma, adapter)
    return build_drafter(ModelDraft(), material.target, gamma, material.draft)


def make_evaluator(
    config: Any, material: Any, task: tasks.Task, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> Callable:
    """The trainer's in-training speculative evaluation: (draft params, step) -> {"block_efficiency": ...}."""
    section = config.speculative_eval
    lengths = (config.data.prompt_length_min, config.data.prompt_length_max)
    prompts = batches.evaluation_prompts(
        task, tokenizer, count=section.prompts, prompt_length=lengths, seed=config.seed
    )
    ids = [prompt.tokens for prompt in prompts]
    plan = Plan.for_prompts(
        material.target,
        ids,
        max_new_tokens=section.max_new_tokens,
        greedy=section.temperature == 0,
        drafter=_drafter(material, section.gamma),
        gamma=section.gamma,
        replicate_draft=material.replicate,
    )
    put = batch.Placer(mesh)

    def evaluate(params: Any, step: int) -> dict[str, float]:
        result = batch.decode(
            plan,
            material.target_params,
            params,
            ids,
            indices=range(len(ids)),
            seed=config.seed,
            sampling=Sampling.of(section.temperature),
            max_new_tokens=section.max_new_tokens,
            eos_ids=tokenizer.eos_ids,
            put=put,
        )
        counts = result.counts(len(ids))
        return {"block_efficiency": float(counts["emitted"].sum() / counts["target_calls"].sum())}

    return evaluate
