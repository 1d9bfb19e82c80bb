"""The training state, its shardings, and the optimiser step with gradient accumulation."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from specjax.distillation import data_sources, objective
from specjax.models.language_model import Params
from specjax.runtime import mesh as meshes
from specjax.runtime.dtypes import dtype_named

# Logical axes of the arrays of a batch, see `data.batches`.
BATCH_AXES = {
    "tokens": ("batch", None),
    "lengths": ("batch",),
    "loss_start": ("batch",),
    "prompt_lengths": ("batch",),
}

# The additional array of an encoder-decoder's batch.
SOURCE_AXES = {"sources": ("batch", None)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of training. Trees of its shardings or shapes use this class too.

    Attributes:
      params: parameters of the trained model, float32 whatever dtype they are stored in: in bfloat16 most updates of a
        step would be rounded away. The forward pass casts them to the model's compute dtype.
      optimizer_state: state of the optax optimiser.
      step: number of updates so far, int32.
    """

    params: Any
    optimizer_state: Any
    step: Any


def shard(batch: Mapping, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Places a batch, or some of its arrays with `lengths` among them, with rows sharded over the mesh's batch axes."""
    count = len(batch["lengths"])
    return {name: meshes.place_rows(np.asarray(array), count, mesh) for name, array in batch.items()}


def learning_rate(config: Any, steps: int) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """The rate of each step from a config's `optimizer` section and its `train.steps`.

    Linear warm-up to the peak at step `warmup_steps - 1`, then a cosine decay to `final_fraction` of the peak.
    The final rate is held for the last `hold_fraction` of the steps and after them, because a flat validation loss
    shows convergence only if the rate is constant.
    """
    decay_steps = max(steps * (1 - config.hold_fraction) - config.warmup_steps, 1)

    def rate(step: Int[Array, ""]) -> Float[Array, ""]:
        step = jnp.asarray(step).astype(jnp.float32)
        warm = jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1.0)
        progress = jnp.clip((step - config.warmup_steps) / decay_steps, 0.0, 1.0)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        fraction = config.final_fraction + (1 - config.final_fraction) * cosine
        return config.peak_learning_rate * warm * fraction

    return rate


def make_optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) after clipping by the global norm; weight decay applies to matrices alone."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1),
        ),
    )


def make_step(
    loss: objective.Loss, optimizer: optax.GradientTransformation, rate: Callable, accumulation: int
) -> Callable:
    """Makes the update `(state, target_params, batch, window) -> (state, metrics)`, with `accumulation` microbatches.

    The gradient is that of the mean over all counted positions of the batch, for any number of microbatches.
    """

    def step(state: TrainState, target_params: Params | None, batch: Mapping, window: int = 0):
        batch = {**batch, data_sources.DRAWS: jnp.full_like(batch["lengths"], state.step)}
        sums, gradient = _gradient_of_sum(loss, state.params, target_params, batch, accumulation, window)
        gradient = jax.tree.map(lambda total: objective.mean(total, sums.tokens), gradient)
        # optax needs implicit dtype promotion; our own modules also run with strict promotion.
        with jax.numpy_dtype_promotion("standard"), jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": sums.loss,
            "acceptance": sums.acceptance,
            "tokens": sums.tokens,
            **({} if sums.outside is None else {"outside": sums.outside}),
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": rate(state.step),
        }
        return TrainState(params, optimizer_state, state.step + 1), metrics

    return step


def _gradient_of_sum(loss, params, target_params, batch, accumulation, window):
    def total(params, batch):
        sums = loss(params, target_params, batch, window)
        return sums.loss, sums

    gradient = jax.grad(total, has_aux=True)
    if accumulation == 1:
        gradients, sums = gradient(params, batch)
        return sums, gradients

    # Adjacent rows go to different microbatches, so that each microbatch is sharded over all devices.
    split = lambda rows: rows.reshape(-1, accumulation, *rows.shape[1:]).swapaxes(0, 1)

    def add(carry, microbatch):
        gradients, sums = gradient(params, microbatch)
        return jax.tree.map(jnp.add, carry, (sums, gradients)), None

    zeros = (loss.zeros(), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zeros, jax.tree.map(split, dict(batch)))[0]


def cast(params: Params, *, dtype: str) -> Params:
    """A copy of the parameters in this dtype: "float32" to train them, or the dtype to export them in."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, dtype_named(dtype)), params)


def state_shardings(
    params: Params, axes: Params, optimizer: optax.GradientTransformation, mesh: meshes.AnyMesh
) -> TrainState:
    """Shardings of a state of these parameters, or shapes; the optimiser's statistics have that of their parameter."""
    placed, replicated = meshes.shardings(axes, mesh, shapes=params), jax.NamedSharding(mesh, jax.P())
    optimizer_placed = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        placed,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(placed, optimizer_placed, replicated)


def initial_state(
    params: Params, axes: Params, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """The state of step 0 on the mesh."""
    placed = state_shardings(params, axes, optimizer, mesh)
    return jax.jit(functools.partial(_started, optimizer), out_shardings=placed)(params)


def _started(optimizer: optax.GradientTransformation, params: Params) -> TrainState:
    # A copy, because every step donates the state; the caller's parameters stay valid.
    params = cast(params, dtype="float32")
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def abstract_state(
    params: Params, axes: Params, optimizer: optax.GradientTransformation, mesh: meshes.AnyMesh
) -> TrainState:
    """`initial_state` as shapes with shardings, from the shapes of the parameters; nothing is allocated."""
    shapes = jax.eval_shape(functools.partial(_started, optimizer), params)
    return meshes.abstract(shapes, state_shardings(params, axes, optimizer, mesh))
