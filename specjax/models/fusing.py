"""What EAGLE-3 and block-parallel drafts share: they fuse the hidden states of several of the target's layers."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from specjax.models import kv_cache
from specjax.models.attachment import Attachment, AttachmentConfig
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.language_model import Params
from specjax.runtime import mesh as meshes
from specjax.runtime.dtypes import dtype_named
from specjax.runtime.errors import UserError


def layer_numbers(layers: Sequence[int | float], count: int) -> tuple[int | float, ...]:
    """Numbers of layers of a config, which may count from the end or be fractions, for a target with `count` layers.

    -1 is the last layer, and 0.5 the one after which half of the layers have run. Other numbers stay as they are.
    """

    def number(layer: int | float) -> int | float:
        if isinstance(layer, int) and layer < 0:
            return count + 1 + layer
        return max(round(layer * count), 1) if 0 < layer < 1 else layer

    return tuple(map(number, layers))


@dataclasses.dataclass(frozen=True)
class FusingConfig(AttachmentConfig):
    """Options of a draft that fuses states.

    Attributes:
      states_after: it reads the target's hidden states after these numbers of layers, in ascending order; () is
        `default_states`. Checkpoints of other tools that list the layers whose *output* is read count from 0: their
        layer i is i + 1 here.
      layer: sizes, rotary positions and biases of the draft's layers; None is `default_layer`. It has no key in a
        config: only drafts of other tools differ.
      section: name of the config section of these options.
    """

    states_after: Sequence[int] = ()
    layer: DecoderConfig | None = dataclasses.field(default=None, kw_only=True)
    section: ClassVar[str]
    without_key = ("target", "layer")

    def __post_init__(self):
        super().__post_init__()
        after, count = tuple(self.states_after) or self.default_states(), self.target.layers
        object.__setattr__(self, "states_after", after)
        if list(after) != sorted(set(after)) or not (after[0] >= 1 and after[-1] <= count):
            raise UserError(
                f"{self.section}.states_after is {after}; give numbers of layers in ascending order, from 1 to the "
                f"target's {count}"
            )

    def default_states(self) -> tuple[int, ...]:
        """`states_after` if it is ()."""
        raise NotImplementedError

    def default_layer(self) -> DecoderConfig:
        """The layers as a decoder if `layer` is None."""
        return self.one_layer()

    @property
    def inner(self) -> DecoderConfig:
        """The layers as a decoder, in the target's dtypes."""
        return self.default_layer() if self.layer is None else self.computed_as_target(self.layer)


@dataclasses.dataclass(frozen=True)
class FusingDraft(Attachment):
    """A draft that projects the states to one, which is g in the formulas of the papers, before its own layers.

    Its parameters include the projection as `project`, and as `norm` the norm before the head.
    """

    config: FusingConfig
    writes = False  # it reads tokens besides the target's states

    @property
    def taps(self) -> tuple[int, ...]:
        return self.config.states_after

    def init_on(self, key: Key[Array, ""], target: Decoder, target_params: Params) -> Params:
        """Random layers; the projection gives the last of the states, and the norm has the target's gains, if it has
        no layer norm."""
        params, config = self.init(key), self.config.target
        kernel = params["project"]["kernel"]
        width = kernel.shape[0]
        last = jnp.zeros_like(kernel).at[:, -width:].set(jnp.eye(width, dtype=kernel.dtype))
        params |= {"project": {"kernel": last}}
        if config.norm != "layer":
            ones = jnp.ones((1, 1, config.width), jnp.float32)  # an RMS norm turns ones into its gains
            gains = target.normed(target_params, ones)[0, 0].astype(dtype_named(config.float_dtype))
            params |= {"norm": {"scale": gains}}
        return params

    def start(self, batch: int, capacity: int) -> kv_cache.Cache:
        return kv_cache.zeros(self.config.inner, batch, capacity)


def unsharded_rows(array: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Rows are not sharded in decoding, because the compiler would gather complete weights to compute them."""
    return meshes.constrain(array, (None, None, "embed"))
