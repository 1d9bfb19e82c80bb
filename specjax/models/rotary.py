"""Rotary position embeddings (arXiv 2104.09864) and their extensions to longer contexts."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The frequencies of a rotary embedding.

    Attributes:
      theta: base of the frequencies.
      size: number of channels of each head that are rotated, even; the others are unchanged.
      kind: "default"; "linear" (positions / factor, arXiv 2306.15595); "dynamic" (a base that grows with the length);
        "llama3" (low frequencies / factor); "yarn" (arXiv 2309.00071); "longrope" (arXiv 2402.13753).
      factor: extension factor: maximum length / original maximum length.
      original_positions: maximum length before the extension (all kinds but "default" and "linear").
      low_frequency: of "llama3": wavelengths above original_positions / this are scaled by the full factor.
      high_frequency: of "llama3": wavelengths below original_positions / this are unchanged.
      beta_fast: of "yarn": channels with more rotations than this over the original length are unchanged.
      beta_slow: of "yarn": channels with fewer rotations than this are scaled by the full factor.
      truncate: of "yarn": whether the bounds between the two are rounded to whole channels.
      magnitude: factor on cosine and sine; None for the kind's default.
      short_factors: of "longrope", one for each pair of channels, for lengths up to original_positions.
      long_factors: the same for longer texts (see `text_lengths`).
    """

    theta: float
    size: int
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.size < 2 or self.size % 2:
            raise ValueError(f"head_size or its rotary part ({self.size}) must be even: rotary embeddings rotate pairs")
        if not self.theta > 0:
            raise ValueError(f"the rotary base must be above 0, not {self.theta}")
        if self.kind not in KINDS:
            raise ValueError(f'the kind of rotary positions must be one of {", ".join(KINDS)}, not "{self.kind}"')
        if self.kind not in ("default", "linear") and self.original_positions < 1:
            raise ValueError(f'rotary positions of kind "{self.kind}" need the original number of positions')
        for factors in (self.short_factors, self.long_factors):
            if self.kind == "longrope" and len(factors) != self.size // 2:
                raise ValueError(f"longrope has {len(factors)} factors for {self.size // 2} pairs of channels")

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the length of the text."""
        return self.kind in ("dynamic", "longrope")

    @property
    def scale(self) -> float:
        """The factor on cosine and sine."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.magnitude is not None or self.factor <= 1:
            return 1.0 if self.magnitude is None else self.magnitude
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_positions))

    def frequencies(self, lengths: Int[Array, "*X"]) -> Float[Array | np.ndarray, "*Y half"]:
        """Radians per position of each pair of channels; one row, or one for each of `lengths` if `by_length`."""
        pairs = np.arange(0, self.size, 2, dtype=np.float32) / np.float32(self.size)
        plain = 1.0 / np.float32(self.theta) ** pairs
        if self.kind == "linear":
            return plain / np.float32(self.factor)
        if self.kind == "dynamic":
            longer = jnp.maximum(lengths, self.original_positions)[..., None].astype(jnp.float32)
            stretch = self.factor * longer / self.original_positions - (self.factor - 1)
            theta = self.theta * stretch ** (self.size / (self.size - 2))
            return 1.0 / theta ** jnp.expand_dims(pairs, range(lengths.ndim))
        if self.kind == "llama3":
            return self._llama3(plain)
        if self.kind == "yarn":
            return self._yarn(plain)
        if self.kind == "longrope":
            divided = lambda factors: plain / np.asarray(factors, np.float32)
            longer = lengths[..., None] > self.original_positions
            return jnp.where(longer, divided(self.long_factors), divided(self.short_factors))
        return plain

    def _llama3(self, plain):
        wavelength = 2 * np.pi / plain
        share = self.original_positions / wavelength - self.low_frequency
        share = np.clip(share / (self.high_frequency - self.low_frequency), 0, 1)
        return ((1 - share) * plain / self.factor + share * plain).astype(np.float32)

    def _yarn(self, plain):
        # The (fractional) channel index with this many rotations over the original length.
        channel = lambda turns: (
            self.size * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
        )
        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.size - 1)
        stretched = np.clip((np.arange(self.size // 2) - low) / max(high - low, 0.001), 0, 1)
        frequencies = plain / self.factor * stretched + plain * (1 - stretched)
        return frequencies.astype(np.float32)


def text_lengths(positions: Int[Array, "B T"], prompt_lengths: Int[Array, "B"] | None = None) -> Int[Array, "B T"]:
    """The length of the text from which "dynamic" and "longrope" take the frequencies of the token at each position.

    It is the larger of the prompt's length and position + 1, as if the prompt were computed at once and then one token
    at a time. In the reference implementation (`dynamic_rope_update` in transformers), a cached key likewise keeps the
    rotation of the step that computed it. So it does not depend on gamma, the batch, padding or a limit of new tokens.
    """
    ends = positions + 1
    return ends if prompt_lengths is None else jnp.maximum(ends, prompt_lengths[:, None])


def angles(
    rotary: Rotary, positions: Int[Array, "B T"], lengths: Int[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosine and sine of the rotary angles of each pair of channels, float32. `lengths`: see `text_lengths`."""
    frequencies = jnp.asarray(rotary.frequencies(lengths))
    frequencies = frequencies if frequencies.ndim == 3 else frequencies[None, None]
    radians = positions[..., None].astype(jnp.float32) * frequencies
    if rotary.scale == 1:
        return jnp.cos(radians), jnp.sin(radians)
    return jnp.cos(radians) * rotary.scale, jnp.sin(radians) * rotary.scale


def rotate(heads: Float[Array, "B X T H"], angles) -> Float[Array, "B X T H"]:
    """Rotates the leading channels in pairs (h, h + half), the order of Hugging Face checkpoints."""
    cosine, sine = (a[:, None].astype(heads.dtype) for a in angles)
    half = cosine.shape[-1]
    first, second, rest = jnp.split(heads, [half, 2 * half], axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated if rest.shape[-1] == 0 else [*rotated, rest], axis=-1)
