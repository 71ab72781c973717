"""What a recipe's model becomes in ``transformers``: an architecture that it has, or code that goes with the model."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

from ...attention.patterns import ClosedFormPattern
from ..errors import UserError
from ..layers.base import Block
from ..layers.convolution import ConvolutionBlock
from ..layers.linear import LinearAttentionBlock
from ..layers.softmax import SoftmaxBlock
from . import naming
from .native import ModelToExport, native_target
from .tensor_map import TensorMap

if TYPE_CHECKING:
    from torch import nn


class Target(Protocol):
    model_type: str

    def config(self) -> dict: ...

    def rows(self) -> Iterator[TensorMap]: ...

    def finish(self, built: "nn.Module") -> None: ...


class CustomTarget:
    """Our own code, which follows the recipe layer by layer."""

    model_type = "longspan"

    def __init__(self, source: ModelToExport):
        self.source, self.model = source, source.model

    def config(self) -> dict:
        return self.source.config() | {
            "layers": [self._layer(block, number) for number, block in enumerate(self.model.stack)],
            "moe": self._moe(),
            "rope_theta": self.model.rope_theta,
        }

    def _moe(self) -> dict | None:
        moe = self.model.moe
        return moe and {
            **moe.model_dump(),
            "intermediate_size": moe.intermediate_size or self.model.intermediate_size,
        }

    def _layer(self, block: Block, number: int) -> dict:
        return {
            "norm": block.norm,
            "mixer_residual": list(block.mixer_residual),
            "mlp_residual": list(block.mlp_residual),
            "mlp": block.mlp,
            "mlp_activation": block.mlp_activation,
            "mixer": self._mixer(block, number),
        }

    def _mixer(self, block: Block, number: int) -> dict:
        if isinstance(block, ConvolutionBlock):
            return {"kind": "convolution", "conv_kernel": block.conv_kernel}
        if isinstance(block, LinearAttentionBlock):
            from ..layers.decay import FIXED

            design = block.design(self.model, number)
            fixed = FIXED.get(design.decay)
            log = (
                fixed(design.heads, number, self.model.num_hidden_layers).tolist()
                if fixed
                else None
            )
            return {"kind": "linear", **asdict(design), "log_decay": log}
        pattern = block.attention_pattern(self.model.kv_heads)
        rules = [
            [list(asdict(rule).values()) for rule in pattern.rules(head)]
            for head in range(self.model.kv_heads)
        ]
        return {
            "kind": "softmax",
            "rules": rules,
            "rotary_dim": int(self.model.kv_channels * block.rotary_fraction),
            "output_gate": block.output_gate,
            "softcap": block.softcap,
            "qk_norm": block.qk_norm,
            "attention_sink": block.attention_sink,
        }

    def rows(self) -> Iterator[TensorMap]:
        yield from naming.ends(self.model, self.source.vocab_size)
        for number, block in enumerate(self.model.stack):
            yield from naming.custom_layer(self.model, block, number)

    def finish(self, built: "nn.Module") -> None:
        """Nothing is left: all that is fixed is in the config."""


def choose_target(source: ModelToExport) -> tuple[Target, list[str]]:
    """The native architecture that the model is exactly; else our code, and why none was.

    Raises:
        UserError: naming a block that nothing can express.
    """
    for name, block in source.model.layers.blocks.items():
        if isinstance(block, SoftmaxBlock) and not isinstance(
            block.attention_pattern(source.model.kv_heads), ClosedFormPattern
        ):
            raise UserError(
                f"model.layers.blocks.{name}: {block.mixer} chooses its keys from the content, which no exported code does"
            )
    native, reasons = native_target(source)
    return native or CustomTarget(source), reasons


def describe_target(source: ModelToExport) -> str:
    """One line: the architecture, and why it is no other; or why there is none."""
    try:
        target, reasons = choose_target(source)
    except UserError as error:
        return f"refuses: {error}"
    if not isinstance(target, CustomTarget):
        return f"writes {target.model_type}, an architecture of transformers"
    why = "; ".join(reasons) or "no architecture of transformers has these layers together"
    return f"writes code of its own (trust_remote_code): {why}"


def stays_fp32(name: str) -> bool:
    """Rates of decay: rounded, they would be others."""
    return name.endswith(("A_log", "rate_log"))
