"""Mixture-of-experts MLP: a router chooses a few of many MLPs for each token (arXiv 1701.06538, 2101.03961).

No token is dropped and no expert has a capacity, so a row's output does not depend on the rest of the batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.models import layers
from specjax.models.config import DecoderConfig
from specjax.models.quantised import Quantised, factors
from specjax.runtime import mesh as meshes

# Kernels `[E, O, I]` and biases `[E, O]` of the experts' projections, by the projection's name.
Kernels = dict[str, dict[str, Any]]
# A function from a projection's name and its inputs `[R, I]` to its outputs `[R, O]`.
Multiply = Callable[[str, jax.Array], jax.Array]

# On GPU, up to this many times as many pairs of token and expert as there are experts, each pair reads its own kernels.
_FEW_PAIRS = 4
# On TPU, from this many pairs for each expert on, `ragged_dot` is worth the copy of all kernels that it begins with.
_MANY_PAIRS = 64
# Up to so many pairs, the order by expert is found by comparing all of them, not by sorting.
_COMPARED = 512
# The pairs of a group in which all are compared, if there are more.
_GROUP = 256
# The most rows in a tile: a larger one reads no fewer kernels, but has more unused rows.
_TILE = 128


class Choice(NamedTuple):
    """What a router chose for each token.

    Attributes:
      experts: the k chosen experts.
      weights: float32 weights of their outputs.
    """

    experts: Int[Array, "*X k"]
    weights: Float[Array, "*X k"]


def choose(logits: Float[Array, "*X E"], config: DecoderConfig) -> Choice:
    """The experts with the largest logits. Their weights are softmax probabilities, over the chosen experts if
    `config.normalised_experts`, otherwise over all of them."""
    top, experts = _largest(logits, config.experts_per_token)
    total = jax.nn.logsumexp(top if config.normalised_experts else logits, axis=-1, keepdims=True)
    return Choice(experts, jnp.exp(top - total))


def _largest(logits: Float[Array, "*X E"], k: int) -> tuple[Float[Array, "*X k"], Int[Array, "*X k"]]:
    """The k largest logits in descending order, and their experts.

    On TPU one after the other, because its compiler sorts for `top_k`, which takes it 1.6 s for 256 rows of 128; the
    loop takes 0.15 s.
    """
    if meshes.platform() != "tpu":
        return tuple(jax.lax.top_k(logits, k))
    marked = functools.partial(jax.nn.one_hot, num_classes=logits.shape[-1], dtype=bool)

    def step(rest, _):
        expert = jnp.argmax(rest, axis=-1).astype(jnp.int32)
        return jnp.where(marked(expert), -jnp.inf, rest), expert

    experts = jnp.moveaxis(jax.lax.scan(step, jax.lax.stop_gradient(logits), None, length=k)[1], 0, -1)
    return jnp.where(marked(experts), logits[..., None, :], 0).sum(-1), experts


def balance_loss(logits: Float[Array, "B T E"], per_token: int, mask: Float[Array, "B T"]) -> Float[Array, ""]:
    """Load-balancing loss: E times the sum over experts of (share of tokens that chose it) * (its mean probability).

    It is k if all experts are used equally. Source: Switch Transformer (arXiv 2101.03961), equations 4 to 6.

    Args:
      mask: 1 for tokens that count, 0 for padding.
    """
    count, mask, rows = logits.shape[-1], mask[..., None], jnp.maximum(mask.sum(), 1)
    experts = _largest(logits, per_token)[1]
    chosen = jnp.sum(jax.nn.one_hot(experts, count).sum(-2) * mask, axis=(0, 1)) / rows
    probability = jnp.sum(jax.nn.softmax(logits) * mask, axis=(0, 1)) / rows
    return count * jnp.sum(chosen * probability)


class ExpertLinear(nnx.Module):
    """The same projection of every expert: kernels `[E, O, I]` and, with `bias`, biases `[E, O]`."""

    def __init__(self, count: int, inputs: int, outputs: int, axes: tuple, scale: float, dtype: str, rngs, bias: bool):
        kernel = jax.random.normal(rngs.params(), (count, outputs, inputs), jnp.float32) * scale
        self.kernel, self.scales = layers.kernel_params(kernel, dtype, ("expert", *axes))
        zeros = jnp.zeros((count, outputs), layers.bias_dtype(dtype))
        self.bias = nnx.Param(zeros, axes=("expert", axes[0])) if bias else None

    def arrays(self) -> dict[str, Any]:
        bias = {} if self.bias is None else {"bias": self.bias[...]}
        return {"kernel": layers.kernel_of(self.kernel, self.scales), **bias}


class Experts(nnx.Module):
    """The projections of all experts."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        options = {"dtype": config.param_dtype, "rngs": rngs, "bias": config.mlp_bias}
        make = functools.partial(ExpertLinear, config.experts, **options)
        width, inner = config.width, config.expert_width
        self.gate = make(width, inner, (None, "embed"), width**-0.5)
        self.up = make(width, inner, (None, "embed"), width**-0.5)
        self.down = make(inner, width, ("embed", None), (inner * 2 * config.layers) ** -0.5)

    def kernels(self) -> Kernels:
        return {name: getattr(self, name).arrays() for name in ("gate", "up", "down")}


class ExpertMLP(nnx.Module):
    """The chosen experts' MLPs, weighted and summed; with a shared expert (qwen2_moe), whose MLP every token uses."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        linear = functools.partial(
            layers.Linear, config.width, axes=("embed", None), scale=config.width**-0.5, dtype=config.float_dtype
        )
        self.router = linear(config.experts, rngs=rngs, bias=config.mlp_bias)
        self.experts = Experts(config, rngs)
        self.shared = layers.MLP(config, rngs, config.shared_expert_width) if config.shared_expert_width else None
        self.shared_gate = linear(1, rngs=rngs) if config.shared_expert_width else None
        self.config = config

    def __call__(self, inputs: Float[Array, "B T D"], routed: list | None = None) -> Float[Array, "B T D"]:
        """The outputs; appends the router's logits [B, T, E] to `routed`."""
        with jax.named_scope("router"):
            logits = self.router(inputs, jnp.float32)
            if routed is not None:
                routed.append(logits)
            choice = choose(logits, self.config)
        with jax.named_scope("experts"):
            outputs = _on_mesh(functools.partial(mix, self.config), inputs, choice, self.experts.kernels())
        if self.shared is not None:
            outputs = outputs + jax.nn.sigmoid(self.shared_gate(inputs)) * self.shared(inputs)
        return outputs


def make_mlp(config: DecoderConfig, layer: int, rngs: nnx.Rngs) -> layers.MLP | ExpertMLP:
    """The MLP of a layer: a mixture of experts, unless the config has none or names this layer as dense."""
    return ExpertMLP(config, rngs) if config.is_sparse(layer) else layers.MLP(config, rngs)


# --- computing the experts -----------------------------------------------------------------------------------------


def expert_mlp(config: DecoderConfig, multiply: Multiply, rows: Float[Array, "R D"]) -> Float[Array, "R D"]:
    """The formula of one expert's MLP; `multiply` has that expert's kernels."""
    gate, up = multiply("gate", rows), multiply("up", rows)
    if not config.swiglu_limit:
        return multiply("down", layers.ACTIVATIONS[config.activation](gate) * up)
    gate, up = jnp.minimum(gate, config.swiglu_limit), jnp.clip(up, -config.swiglu_limit, config.swiglu_limit)
    return multiply("down", gate * jax.nn.sigmoid(config.swiglu_alpha * gate) * (up + 1))


@dataclasses.dataclass(frozen=True)
class Split:
    """How the kernels are split over a mesh within `shard_map`.

    Attributes:
      over: mesh axis that splits the experts; None if every device has all.
      part: mesh axis that splits the axis of size D; None if every device has all of it.
    """

    over: str | None = None
    part: str | None = None

    def summed(self, x: jax.Array) -> jax.Array:
        """Sums over D, of which each device has a part."""
        return jax.lax.psum(x, self.part) if self.part else x

    def agreed(self, count: jax.Array) -> jax.Array:
        """The largest of the devices' trip counts, because the devices communicate in the loop."""
        return jax.lax.pmax(count, (self.over, self.part)) if self.over and self.part else count


def mix(
    config: DecoderConfig, inputs: Float[Array, "B T D"], choice: Choice, kernels: Kernels, *, split: Split = Split()
) -> Float[Array, "B T D"]:
    """The weighted sum of the outputs of the chosen experts among those in `kernels`.

    A loop over tiles of tokens with the same expert reads each chosen expert once. On CPU this takes the time of
    reading their bytes; `ragged_dot`, which multiplies by all experts there, took 20 to 100 times as long. On TPU
    `ragged_dot` is a kernel of the compiler's, which first transposes all kernels. On GPU each step of a loop costs
    several launches, so few tokens gather their kernels instead.
    """
    count, per_token = jax.tree.leaves(kernels)[0].shape[0], config.experts_per_token
    rows = inputs.reshape(-1, inputs.shape[-1])
    first = jax.lax.axis_index(split.over) * count if split.over else 0
    pairs = choice.experts.reshape(-1) - first
    pairs = jnp.where((pairs >= 0) & (pairs < count), pairs, count)  # experts of other devices come last
    if meshes.platform() == "gpu" and len(pairs) <= _FEW_PAIRS * count:
        outputs = _gathered(config, split, jnp.repeat(rows, per_token, axis=0), pairs, kernels)
    else:
        order, places = _by_expert(pairs, count)
        by_expert = rows[order // per_token]
        counts = jnp.sum(pairs[:, None] == jnp.arange(count)[None], axis=0, dtype=jnp.int32)  # no scatter, as bincount
        if meshes.platform() == "tpu" and len(pairs) >= _MANY_PAIRS * count:
            outputs = _ragged(config, split, by_expert, pairs[order], counts, kernels)
        else:
            size = tile_size(len(rows), per_token, count)
            outputs = _by_tiles(config, split, size, by_expert, counts, kernels)
        outputs = outputs[places]
    weighted = outputs.reshape(len(rows), per_token, -1) * choice.weights.reshape(len(rows), per_token, 1)
    return weighted.sum(1).astype(inputs.dtype).reshape(*inputs.shape[:2], -1)


def _by_expert(pairs: Int[Array, "N"], count: int) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """The order of pairs by expert, 0 to `count`, and the place of each pair in it.

    Few are compared with each other, which needs neither a sort nor a scatter in the loop. Of many, each is compared
    with those of its group, and the groups are counted; the TPU compiler takes 8 s for a sort of 65,536.
    """
    index = jnp.arange(len(pairs), dtype=jnp.int32)
    if len(pairs) > _COMPARED:
        groups = jnp.pad(pairs, (0, -len(pairs) % _GROUP), constant_values=count).reshape(-1, _GROUP)
        within = jnp.sum(jnp.tril(groups[:, :, None] == groups[:, None], -1), axis=2, dtype=jnp.int32)
        each = jax.nn.one_hot(groups, count + 1, dtype=jnp.int32).sum(1)
        total = each.sum(0, keepdims=True)
        starts = jnp.cumsum(total, axis=1) - total + jnp.cumsum(each, axis=0) - each
        places = (within + jnp.take_along_axis(starts, groups, axis=1)).reshape(-1)[: len(pairs)]
        return jnp.zeros_like(index).at[places].set(index, unique_indices=True), places
    earlier = (pairs[None] < pairs[:, None]) | ((pairs[None] == pairs[:, None]) & (index[None] < index[:, None]))
    places = jnp.sum(earlier, axis=1, dtype=jnp.int32)
    return jnp.sum(jnp.where(places[None] == index[:, None], index[None], 0), axis=1, dtype=jnp.int32), places


def _one_expert(config, split, rows, kernels):
    """`expert_mlp` with one expert's kernels `[O, I]`."""

    def multiply(name, rows):
        outputs = layers.product(rows[None], kernels[name]["kernel"], rows.dtype)[0]
        return _finished(name, outputs, split, kernels[name].get("bias"))

    return expert_mlp(config, multiply, rows)


def _ragged(config, split, rows, experts, counts, kernels):
    """`expert_mlp` of rows sorted by their `experts`, with XLA's grouped product."""
    contracting = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])

    def multiply(name, rows):
        pairs, bias = factors(rows, kernels[name]["kernel"]), kernels[name].get("bias")
        outputs = sum(jax.lax.ragged_dot_general(*pair, counts, contracting) for pair in pairs)
        return _finished(name, outputs, split, None if bias is None else bias.at[experts].get(mode="clip"))

    return jnp.where((jnp.arange(len(rows)) < counts.sum())[:, None], expert_mlp(config, multiply, rows), 0)


def _gathered(config, split, rows, experts, kernels):
    """`expert_mlp` with each row's own kernels. A sum of products, because XLA on GPU fuses the gather into that."""

    def multiply(name, rows):
        chosen = jax.tree.map(lambda x: x.at[experts].get(mode="clip"), kernels[name])
        pairs = factors(rows.astype(jnp.float32), chosen["kernel"])
        outputs = sum((kernel * inputs[:, None]).sum(-1) for inputs, kernel in pairs).astype(rows.dtype)
        return _finished(name, outputs, split, chosen.get("bias"))

    known = experts < jax.tree.leaves(kernels)[0].shape[0]
    return jnp.where(known[:, None], expert_mlp(config, multiply, rows), 0)


def _finished(name, outputs, split, bias):
    """A product's outputs, summed over the devices that each have a part of the inputs, with the bias."""
    outputs = outputs if name == "down" else split.summed(outputs)
    if bias is None:
        return outputs
    return outputs + (bias if bias.ndim == 2 else bias[None]).astype(outputs.dtype)


# --- a loop over tiles ---------------------------------------------------------------------------------------------


def tile_size(rows: int, per_token: int, count: int) -> int:
    """The number of rows in a tile: about twice an expert's average, because a second tile reads the kernels again."""
    if rows == 1:
        return 1
    average = -(-rows * per_token // count)
    return min(max(4, 1 << (2 * average - 1).bit_length()), _TILE)


def _tiles(counts: Int[Array, "E"], size: int, num_rows: int, split: Split):
    """The number of tiles, and a function from a tile's index to its expert, its first row and its expert's last row.

    Tiles are in the order of their rows. Rows after the expert's last belong to the next one, whose tiles replace what
    this one writes there.
    """
    each, ends = -(-counts // size), jnp.cumsum(counts)
    through = jnp.cumsum(each)

    def place(index):
        expert = jnp.minimum(jnp.searchsorted(through, index, side="right"), len(counts) - 1)
        within = index - (through[expert] - each[expert])
        start = jnp.minimum(ends[expert] - counts[expert] + within * size, num_rows)
        return expert, start, ends[expert]

    # On GPU, a loop of unknown length makes the host wait in each step.
    if meshes.platform() == "gpu":
        return min(num_rows, len(counts)) + num_rows // size, place
    return split.agreed(through[-1]), place


_slice, _put = jax.lax.dynamic_slice_in_dim, jax.lax.dynamic_update_slice_in_dim


def _kernels_of(kernels: Any, expert: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, expert, keepdims=False), kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _by_tiles(config, split, size, rows, counts, kernels):
    """`expert_mlp` for rows sorted by expert; 0 for rows after those in `counts`."""
    (num_rows, width), padded = rows.shape, jnp.pad(rows, ((0, size), (0, 0)))
    body, (total, place) = functools.partial(_one_expert, config, split), _tiles(counts, size, num_rows, split)

    def step(index, outputs):
        expert, start, _ = place(index)
        return _put(outputs, body(_slice(padded, start, size), _kernels_of(kernels, expert)), start, 0)

    width = jax.eval_shape(body, padded[:size], jax.tree.map(lambda x: x[0], kernels)).shape[1]
    outputs = jax.lax.fori_loop(0, total, step, jnp.zeros((num_rows + size, width), rows.dtype))[:num_rows]
    return jnp.where((jnp.arange(num_rows) < counts.sum())[:, None], outputs, 0)


def _by_tiles_backward(config, split, size, saved, gradient):
    """Computes each tile again, and adds its gradient to that of its expert."""
    rows, counts, kernels = saved
    rows, gradient = (jnp.pad(x, ((0, size), (0, 0))) for x in (rows, gradient))
    total, place = _tiles(counts, size, len(rows) - size, split)
    body = functools.partial(_one_expert, config, split)

    def step(index, sums):
        expert, start, end = place(index)
        mine = (start + jnp.arange(size) < end)[:, None]
        _, pull = jax.vjp(body, _slice(rows, start, size), _kernels_of(kernels, expert))
        to_rows, to_kernels = pull(jnp.where(mine, _slice(gradient, start, size), 0))
        add = lambda sum_, part: sum_.at[expert].add(part.astype(sum_.dtype))
        return _put(sums[0], to_rows, start, 0), jax.tree.map(add, sums[1], to_kernels)

    start = jnp.zeros_like(rows), jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), kernels)
    to_rows, to_kernels = jax.lax.fori_loop(0, total, step, start)
    to_rows = jnp.where((jnp.arange(len(rows)) < counts.sum())[:, None], to_rows, 0)[:-size]
    return to_rows, None, jax.tree.map(lambda sum_, x: sum_.astype(x.dtype), to_kernels, kernels)


_by_tiles.defvjp(lambda *call: (_by_tiles(*call), call[3:]), _by_tiles_backward)


# --- several devices -----------------------------------------------------------------------------------------------


def _on_mesh(run: Callable[..., jax.Array], inputs: jax.Array, choice: Choice, kernels: Kernels) -> jax.Array:
    """`run`, where every device computes the experts that it holds.

    Kernels are also split over the axis `fsdp`. Its devices either gather them, and each computes its own rows, or each
    keeps its part of the kernels and they exchange rows, whichever sends less: in training the first, in decoding the
    second.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(inputs, choice, kernels)
    (count, inner, width), (batch, steps, per_token) = kernels["gate"]["kernel"].shape, choice.experts.shape
    num_experts, (between, within) = meshes.num_shards("expert"), meshes.MESH_AXES["batch"]
    (over,) = meshes.MESH_AXES["expert"] if count % num_experts == 0 else (None,)
    sent = batch * steps * (2 * width + 2 * per_token * inner)
    gathers = sent > 3 * count * inner * width // num_experts and batch % meshes.num_shards("batch") == 0
    rows = (between, within) if gathers else between if batch % mesh.shape[between] == 0 else None
    part = within if width % mesh.shape[within] == 0 and not gathers else None
    # Of each projection's kernel, the axis of size D is split over `fsdp`; biases are not, unless they have that axis.
    specs = {
        "gate": {"kernel": jax.P(over, None, part), "bias": jax.P(over)},
        "down": {"kernel": jax.P(over, part), "bias": jax.P(over, part)},
    }
    specs = {
        name: {kind: specs["down" if name == "down" else "gate"][kind] for kind in kernels[name]} for name in kernels
    }
    for name, spec in specs.items():
        if isinstance(kernels[name]["kernel"], Quantised):
            spec["kernel"] = Quantised(spec["kernel"], spec["kernel"] if name == "down" else jax.P(over))

    split = Split(over, part)

    def local(inputs, choice, kernels):
        outputs = run(inputs, choice, kernels, split=split)
        return jax.lax.psum(outputs, over) if over else outputs

    activations = jax.P(rows, None, part)
    return jax.shard_map(local, in_specs=(activations, jax.P(rows), specs), out_specs=activations, check_vma=False)(
        inputs, choice, kernels
    )
