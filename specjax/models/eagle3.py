"""EAGLE-3 (arXiv 2503.01840): a decoder layer on hidden states of three of the target's layers, which then drafts from
its own hidden states."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from specjax.models import attention, eagle3_start, kv_cache, layers
from specjax.models.attachment import States
from specjax.models.decoder import Decoder
from specjax.models.fusing import FusingConfig, FusingDraft, unsharded_rows
from specjax.models.language_model import Params, Prediction, consecutive, look_up
from specjax.models.least_squares import Moments
from specjax.models.rotary import angles, text_lengths
from specjax.runtime import mesh as meshes
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.errors import UserError

# Weight of a drafting step's loss relative to the preceding step's.
_DECAY = 0.8


@dataclasses.dataclass(frozen=True)
class Eagle3Config(FusingConfig):
    """Options of an EAGLE-3 draft. By default it reads the states after 2, L // 2 and L - 3 of L layers.

    Attributes:
      steps: number of tokens that training drafts from each position (the paper's training-time test).
      norm_before_residual: whether the layer's residual is the normed hidden state.
      fc_norm: whether each of the target's states is normed before the projection (EAGLE-3.1).
      norm_output: whether drafting continues from the normed output of the layer (EAGLE-3.1).
      norm_before_fc: whether one norm over all of the target's states together precedes the projection.
      own_embedding: whether the draft has a table of token embeddings; by default it reads the target's.
      fitted_batches: number of batches of training text to which the layer is fitted by least squares before training
        (see `eagle3_start`); 0 starts from random weights.

    `norm_before_fc` and `own_embedding` have no keys in a config: only drafts of other tools differ in them (see
    `hub.eagle3_config`).
    """

    steps: int = 4
    norm_before_residual: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_fc: bool = False
    own_embedding: bool = False
    fitted_batches: int = 0
    section = "eagle3"
    without_key = (*FusingConfig.without_key, "norm_before_fc", "own_embedding")

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 1:
            raise UserError(f"eagle3.steps is {self.steps}; training must draft 1 token or more")
        if self.fitted_batches < 0:
            raise UserError(f"eagle3.fitted_batches is {self.fitted_batches}; give 0 or more")
        if self.fitted_batches and self.norm_before_residual:
            remedy = "set norm_before_residual to False, or fitted_batches to 0"
            raise UserError(f"a layer whose residual is normed is no linear map of the target's states: {remedy}")

    def default_states(self) -> tuple[int, ...]:
        count = self.target.layers
        return tuple(sorted({min(2, count), max(count // 2, 1), max(count - 3, 1)}))

    @property
    def max_positions(self) -> int:
        return self.inner.max_positions


class Eagle3Module(nnx.Module):
    """Parameters and forward pass."""

    def __init__(self, config: Eagle3Config, rngs: nnx.Rngs):
        inner, width, count = config.inner, config.inner.width, len(config.states_after)
        states = count * config.target.width
        norm = lambda size=width: layers.Norm(inner, size)
        self.state_norms = nnx.List([norm(config.target.width) for _ in range(count)]) if config.fc_norm else None
        self.states_norm = norm(states) if config.norm_before_fc else None
        if config.own_embedding:
            table = jax.random.normal(rngs.params(), (inner.vocab_size, width), jnp.float32) * width**-0.5
            self.embedding = nnx.Param(table.astype(dtype_named(inner.param_dtype)), axes=("vocab", "embed"))
        self.project = layers.Linear(states, width, ("embed", None), states**-0.5, inner.param_dtype, rngs)
        self.embedding_norm, self.hidden_norm = norm(), norm()
        # It reads the token's embedding and the hidden state, one after the other.
        self.attention = layers.Attention(inner, 0, rngs, inputs=2 * width)
        self.mlp_norm, self.mlp, self.norm = norm(), layers.MLP(inner, rngs), norm()
        self.unembedding = config.own_head_layer(rngs, width)
        self.config = config

    def projected(self, states):
        """The input of the projection."""
        if self.state_norms is not None:
            states = [norm(state) for norm, state in zip(self.state_norms, states, strict=True)]
        states = jnp.concatenate(states, axis=-1)
        return states if self.states_norm is None else self.states_norm(states)

    def fuse(self, states):
        return self.project(self.projected(states))

    def embed(self, tokens):
        return look_up(self.embedding[...], tokens).astype(dtype_named(self.config.inner.compute_dtype))

    def _inputs(self, embedded, hidden):
        """The input of attention, and the residual."""
        normed = self.hidden_norm(hidden)
        residual = normed if self.config.norm_before_residual else hidden
        return jnp.concatenate([self.embedding_norm(embedded), normed], axis=-1), residual

    def _output(self, residual, mixed):
        hidden = residual + mixed
        return hidden + self.mlp(self.mlp_norm(hidden))

    def fed_back(self, hidden):
        return self.norm(hidden) if self.config.norm_output else hidden

    def extend(self, cache, embedded, hidden, positions):
        inputs, residual = self._inputs(unsharded_rows(embedded), unsharded_rows(hidden))
        inputs, residual = unsharded_rows(inputs), unsharded_rows(residual)
        rotation = angles(self.config.inner.rotary, positions, text_lengths(positions))
        mask = _readable(jnp.arange(cache.keys[0].shape[2])[None, None], positions)
        mixed, keys, values = self.attention(inputs, rotation, positions, mask, cache.keys[0], cache.values[0])
        hidden = unsharded_rows(self._output(residual, unsharded_rows(mixed)))
        return hidden, cache.with_layer(0, keys, values).metered(1, positions.shape[1])

    def unrolled(self, embedded, fused, positions):
        """The outputs of the config's number of drafting steps on whole texts, a list of `[B, T, D]`.

        In step k, row t reads the output of step k - 1 in row t - 1. Its attention sees what decoding would: the keys
        of step 1 in rows up to t - k + 1, and in each later row the key of the step that drafted it.
        """
        rotation = angles(self.config.inner.rotary, positions, text_lengths(positions))
        scale, read, outputs, hidden = layers.query_scale(self.config.inner), [], [], fused

        def draft(step, hidden, read):
            inputs, residual = self._inputs(embedded, _later(hidden, 1))
            queries, added = self.attention.queries(inputs, rotation), self.attention.keys_values(inputs, rotation)
            first, *others = *read, added
            own = [[_later(x, step - j, axis=2) for x in pair] for j, pair in enumerate(others, 1)]
            mixed = _attend(queries, *first, positions, own, step, scale)
            return self._output(residual, self.attention.output(layers.join_heads(mixed))), added

        for step in range(self.config.steps):
            run = layers.recomputed(functools.partial(draft, step), self.config.inner.remat)
            output, added = run(hidden, read)
            hidden, outputs, read = self.fed_back(output), [*outputs, output], [*read, added]
        return outputs


def _readable(slots, positions):
    """Row 0 has no hidden state before it, so only itself may read it."""
    return (slots > 0) | (positions[..., None] == 0)


def _later(array, count, axis=1):
    """Moves entries to later positions; zeros come in."""
    if not count:
        return array
    moved = jnp.roll(array, count, axis)
    index = jnp.arange(array.shape[axis]).reshape([-1 if i == axis else 1 for i in range(array.ndim)])
    return jnp.where(index >= count, moved, 0)


def _attend(queries, keys, values, positions, own, step, scale):
    """Grouped-query attention in a drafting step to the `keys` of step 1, and of each pair in `own` to the entry of the
    query's row."""
    dtype, length = queries.dtype, keys.shape[2]
    dots = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)  # see `attention.by_queries`

    def attend_some(queries, positions, own):
        positions, slots = positions[..., 0], jnp.arange(length)[None, None]
        visible = (slots <= positions[..., None] - step) & _readable(slots, positions)
        grouped = queries.reshape(queries.shape[0], keys.shape[1], -1, *queries.shape[2:])
        scores = dots("BKGTH,BKSH->BKGTS", grouped, keys.astype(dtype)) * scale
        scores = [jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)]
        scores += [dots("BKGTH,BKTH->BKGT", grouped, key)[..., None] * scale for key, _ in own]
        weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(dtype)
        mixed = dots("BKGTS,BKSH->BKGTH", weights[..., :length], values.astype(dtype)).astype(dtype)
        for index, (_, value) in enumerate(own):
            mixed = mixed + weights[..., length + index, None] * value[:, :, None]
        return mixed.reshape(queries.shape)

    return attention.by_queries(attend_some, length, queries, positions[..., None], own)


@dataclasses.dataclass(frozen=True)
class Eagle3Layer(FusingDraft):
    """The draft of EAGLE-3 (section 3.1). With g_t the projected states of the target at token t, e_t the embedding of
    token t, and N norms,

    a_t = h_{t-1} + Attention([N(e_t); N(h_{t-1})]), o_t = a_t + MLP(N(a_t)), logits = head(N(o_t)),

    where h is g for tokens that the target has read, and o for tokens that were drafted since. The head is its own.
    """

    config: Eagle3Config
    config_class = Eagle3Config
    module = Eagle3Module
    drafter = "eagle3"

    @property
    def predicts(self) -> tuple[Prediction, ...]:
        return tuple(Prediction(0, _DECAY**step) for step in range(self.config.steps))

    @property
    def most_drafted(self) -> None:
        """None: it drafts from its own states, so any number."""
        return None

    def unrolled(self, count: int) -> "Eagle3Layer":
        return dataclasses.replace(self, config=dataclasses.replace(self.config, steps=count))

    def init_on(self, key: Key[Array, ""], target: Decoder, target_params: Params) -> Params:
        """As of any `FusingDraft`; the head is a copy of the target's."""
        head = self.head_of_target(target, target_params)
        return super().init_on(key, target, target_params) | {"unembedding": head}

    @property
    def fitted_batches(self) -> int:
        return self.config.fitted_batches

    def regression(self, params, target, target_params, states, tokens):
        """The token's normed embedding and the target's states before it, and the target's last state as its head reads
        it, up to the gains of an RMS norm."""
        *states, last = states
        module, positions = self.bind(params), consecutive(tokens)
        embedded = module.embedding_norm(self.embed(params, target, target_params, tokens, positions))
        inputs = jnp.concatenate([embedded, _later(module.projected(states), 1)], axis=-1)
        if self.config.target.norm == "layer":
            return inputs, target.normed(target_params, last)
        last = last.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(last**2, axis=-1, keepdims=True) + self.config.target.norm_epsilon)
        return inputs, last * scale

    def fitted(self, params: Params, moments: Moments) -> Params:
        widths = (self.config.target.width,) * len(self.taps)
        return eagle3_start.fitted_params(self.config.inner, widths, params, moments)

    def fuse(self, params: Params, states: States) -> Float[Array, "B T E"]:
        """g, of the layer's width, from the target's states after each of `taps`."""
        return self.bind(params).fuse(states)

    def embed(
        self, params: Params, target: Decoder, target_params: Params, tokens: Int[Array, "B T"], positions
    ) -> Float[Array, "B T D"]:
        """The tokens' embeddings from the draft's own table, or from the target's without its scale, as engines do."""
        if self.config.own_embedding:
            return self.bind(params).embed(tokens)
        config = dataclasses.replace(target.config, embedding_scale=1.0)
        return dataclasses.replace(target, config=config).bind(target_params).embed(tokens, positions)

    def draft_step(
        self,
        params: Params,
        target_params: Params,
        cache: kv_cache.Cache,
        tokens: Int[Array, "B T"],
        hidden: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], kv_cache.Cache]:
        """o at these tokens, from h at the token before each, and the cache with their keys and values."""
        embedded = self.embed(params, Decoder(self.config.target), target_params, tokens, positions)
        return self.bind(params).extend(cache, embedded, hidden, positions)

    def fed_back(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """h of a drafted token, from its o."""
        return self.bind(params).fed_back(hidden)

    def training_states(
        self, params: Params, target: Decoder, target_params: Params, states: States, tokens: Int[Array, "B T"]
    ) -> Float[Array, "B T E"]:
        module, positions = self.bind(params), consecutive(tokens)
        embedded = meshes.pin_rows(self.embed(params, target, target_params, tokens, positions))
        fused = meshes.pin_rows(module.fuse(states))
        return jnp.concatenate(module.unrolled(embedded, fused, positions), axis=-1)

    def head(
        self, params: Params, target: Decoder, target_params: Params, hidden: Float[Array, "B T E"]
    ) -> Float[Array, "B T_times_predictions W"]:
        """Float32 logits of every step; those of one position are adjacent."""
        module, batch = self.bind(params), hidden.shape[0]
        return module.unembedding.logits(module.norm(hidden.reshape(batch, -1, self.config.inner.width)))
