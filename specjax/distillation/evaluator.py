"""Measures the draft's block efficiency (emitted tokens per target call) by speculative decoding during training."""

from collections.abc import Callable
from typing import Any

import jax

from specjax.data import batches, tasks
from specjax.decoding import batch, scheduler
from specjax.decoding.plan import Plan
from specjax.decoding.results import counts_of
from specjax.decoding.sampling import Sampling
from specjax.distillation.rollouts import drafter_of
from specjax.hub.tokenizer import Tokenizer
from specjax.runtime.errors import prefixed


def make_evaluator(
    config: Any, inputs: Any, task: tasks.Task, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> Callable:
    """Makes the trainer's `evaluator`, a function (draft's parameters, step) -> {"block_efficiency": ...}.

    Args:
      config: config of a training stage.
      inputs: a `trainer.TrainingInputs` with a target.
    """
    section = config.speculative_eval
    lengths = (config.data.prompt_length_min, config.data.prompt_length_max)
    prompts = batches.evaluation_prompts(
        task, tokenizer, count=section.prompts, prompt_length=lengths, seed=config.seed, chat=config.data.chat
    )
    ids = [prompt.tokens for prompt in prompts]
    with prefixed("speculative_eval: "):
        batch.check_prompts(ids, inputs.target, section.max_new_tokens)
    plan = Plan.for_prompts(
        inputs.target,
        ids,
        max_new_tokens=section.max_new_tokens,
        greedy=section.temperature == 0,
        drafter=drafter_of(inputs.draft, inputs.target, section.gamma),
        gamma=section.gamma,
        replicate_draft=inputs.replicate,
    )
    put = batch.Placer(mesh)

    def evaluate(params: Any, step: int) -> dict[str, float]:
        result = scheduler.decode(
            plan,
            inputs.target_params,
            params,
            ids,
            indices=range(len(ids)),
            seed=config.seed,
            sampling=Sampling.of(section.temperature),
            max_new_tokens=section.max_new_tokens,
            eos_ids=tokenizer.stop_ids,
            put=put,
        )
        counts = counts_of(result.rows)
        return {"block_efficiency": float(counts["emitted"].sum() / counts["target_calls"].sum())}

    return evaluate
