"""The target's layers and what is attached to them, taken together as a language model: what its training needs."""

import dataclasses
from typing import Any

from specjax.models.adapters import Adapter
from specjax.models.decoder import Decoder
from specjax.models.kv_cache import Cache
from specjax.models.language_model import LanguageModel, Params
from specjax.models.medusa import MedusaHeads


@dataclasses.dataclass(frozen=True)
class SelfDraft(LanguageModel):
    """A draft of which the adapter alone is trained; it is scored, and unless it has several heads writes text, like
    any other model.

    `init`, `abstract_params`, `axes` and `num_params` speak of the adapter; what takes parameters wants them as
    `joined` makes them, the target's with it.
    """

    adapter: Adapter | MedusaHeads = dataclasses.field(kw_only=True)
    needs_target = True

    @classmethod
    def of(cls, adapter: Adapter | MedusaHeads) -> "SelfDraft":
        """The self-draft of the adapter's own target."""
        return cls(adapter.config.target, adapter=adapter)

    @property
    def target(self) -> Decoder:
        return Decoder(self.config, logits_size=self.logits_size)

    @property
    def predicts(self) -> tuple[tuple[int, float], ...]:
        return self.adapter.predicts

    @property
    def layers(self) -> int:
        return self.adapter.config.exit_layer

    @property
    def num_params(self) -> int:
        return self.adapter.num_params

    def init(self, key) -> Params:
        return self.adapter.init(key)

    def init_on(self, key, target_params: Params) -> Params:
        """Parameters of the adapter to begin training with, beside this target."""
        return self.adapter.init_on(key, self.target, target_params)

    def abstract_params(self) -> Params:
        return self.adapter.abstract_params()

    def axes(self, *, replicate: bool = False) -> Params:
        return self.adapter.axes(replicate=replicate)

    def joined(self, params: Params, target_params: Params) -> Params:
        return {"adapter": params, "target": target_params}

    def start(self, params, prompts, lengths, capacity: int) -> Any:
        cache = self.target.start(params["target"], prompts, lengths, capacity)
        if cache is None:
            return None
        shallow = Cache(cache.keys[: self.layers], cache.values[: self.layers], cache.meter)
        return shallow, self.adapter.start(prompts.shape[0], capacity)

    def extend(self, params, cache, inputs, positions, mask=None, *, layers: tuple[int, int] | None = None):
        if layers not in (None, (0, self.layers)):
            raise ValueError(f"A self-draft runs whole, not from layer {layers[0]} to {layers[1]}.")
        shallow, own = (None, None) if cache is None else cache
        hidden, shallow = self.target.extend(
            params["target"], shallow, inputs, positions, mask, layers=(0, self.layers)
        )
        hidden, own = self.adapter.extend(params["adapter"], own, hidden, positions)
        return hidden, None if cache is None else (shallow, own)

    def head(self, params, hidden):
        return self.adapter.head(params["adapter"], self.target, params["target"], hidden)
