"""Llama, and models that differ from it in their windows alone: softmax layers with a dense MLP."""

from typing import Any

from .base import Mismatches, NativeTarget


class LlamaLike(NativeTarget):
    """Norms before the two halves of a layer, softmax attention, and a dense MLP."""

    def mismatches(self) -> Mismatches:
        yield from self.layer_mismatches("pre")
        yield from self.softmax_mismatches()
        yield from self.window_mismatches()


class Llama(LlamaLike):
    """Full attention in all layers."""

    model_type = "llama"
    kinds = {"full": "full_attention"}


class Mistral(LlamaLike):
    """One window in all layers."""

    model_type = "mistral"
    kinds = {"window": "sliding_attention"}

    def config(self) -> dict[str, Any]:
        return super().config() | {"sliding_window": self.windows[0]}


class Ministral(LlamaLike):
    """Layers of full attention and layers of one window."""

    model_type = "ministral"
    kinds = {"full": "full_attention", "window": "sliding_attention"}

    def config(self) -> dict[str, Any]:
        window = self.windows[0] if self.windows else None
        return super().config() | {"sliding_window": window, "layer_types": self.layer_types}
