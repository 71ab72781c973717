"""What hybrids of gated delta and softmax layers have in common."""

from collections.abc import Container
from typing import Any

from ...layers.linear_design import LinearDesign
from .base import Mismatches, NativeTarget


class GatedDeltaHybrid(NativeTarget):
    """Layers with Gated DeltaNet and layers with full attention."""

    kinds = {"full": "full_attention", "gated_deltanet": "linear_attention"}

    def delta_mismatches(self, betas: Container[float]) -> Mismatches:
        """Yield what differs in the gated delta layers.

        Args:
            betas: the factors of the delta rule that it has; 2 allows negative eigenvalues.
        """
        designs = set(self.designs("gated_deltanet").values())
        if len(designs) > 1:
            yield "gated_deltanet layers of different sizes"
        for design in designs:
            if not design.conv_kernel:
                yield "conv_kernel: 0"
            if design.beta not in betas:
                yield "allow_negative_eigenvalues"
        if not self.blocks("full") or not designs:
            yield "a stack with only one kind of layer"

    @property
    def delta_design(self) -> LinearDesign:
        """What all its gated delta layers do."""
        return next(iter(self.designs("gated_deltanet").values()))

    def config(self) -> dict[str, Any]:
        design = self.delta_design
        return super().config() | {
            "layer_types": self.layer_types,
            "linear_num_key_heads": design.key_heads,
            "linear_num_value_heads": design.heads,
            "linear_key_head_dim": design.key_dim,
            "linear_value_head_dim": design.value_dim,
            "linear_conv_kernel_dim": design.conv_kernel,
        }
