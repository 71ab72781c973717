"""What a recipe's model can become in ``transformers``."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .model_to_export import ModelToExport
from .tensor_map import TensorMap

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Target(ABC):
    """An architecture for one model: its config, and where its tensors lie in the parameters."""

    model_type: ClassVar[str]
    """The name of the architecture, as in ``config.json``."""
    ships_code: ClassVar[bool] = False
    """Whether the model's code goes with it, so that users must set ``trust_remote_code``."""

    def __init__(self, to_export: ModelToExport):
        self.to_export = to_export
        self.model = to_export.model
        self.stack = self.model.stack

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return what the model's config is made from, apart from the ids of special tokens."""

    @abstractmethod
    def tensor_maps(self) -> Iterator[TensorMap]:
        """Yield the map of every parameter, layer by layer."""

    def build(self, token_ids: dict[str, int | None], dtype: "torch.dtype") -> "PreTrainedModel":
        """Make the model without memory for its weights, which are on the meta device.

        Args:
            token_ids: the ids of special tokens, by their names in ``config.json``.
        """
        import torch

        make = self._maker(token_ids)
        with torch.device("meta"):
            return make().to(dtype)

    @abstractmethod
    def _maker(self, token_ids: dict[str, int | None]) -> "Callable[[], PreTrainedModel]":
        """Return a function that makes the model, on the default device."""

    def finish(self, hf_model: "PreTrainedModel") -> None:
        """Set the tensors of ``hf_model`` that come from no parameter."""
        return

    def finish_folder(self, folder: Path) -> None:
        """Add to the folder what ``save_pretrained`` has not written."""
        return


def stays_fp32(name: str) -> bool:
    """Return whether a tensor is written in fp32 always.

    Rates of decay are: rounded to bf16, they would be other rates.
    """
    return name.endswith(("A_log", "rate_log"))
