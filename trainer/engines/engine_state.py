"""What a checkpoint keeps of an engine, as parts of whole tensors.

Engines give each rank a flat range of its tensor-parallel slice of each parameter: the fp32 weights
there, and Adam's two moments. Those ranges are saved and loaded where they lie in the whole
tensors, under the same names whatever the engine, so that a run may move from one to another.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ..checkpoint.shards import Shards, flat_range_boxes
from ..megatron_core import get_cuda_rng_tracker, parallel_state
from ..model.model import HybridModel
from ..model.weights import global_parameters, is_second_copy, is_split, local_shape, split_ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's first and second moment, by their names in its state."""


class ParameterPart(NamedTuple):
    """A rank's flat range of a parameter: views of what the optimizer updates."""

    start: int
    """The first element, counted in the rank's tensor-parallel slice of the parameter."""
    main: Tensor
    """fp32 weights ``[elements]``."""
    moments: dict[str, Tensor]
    """Like ``main``, by the names in :data:`MOMENTS`."""


class EngineState(ABC):
    """The state of one rank's part of a model and its optimizer."""

    def __init__(self, model: HybridModel):
        self._model = model

    @abstractmethod
    def part(self, parameter: Parameter) -> ParameterPart | None:
        """Return this rank's part of a parameter, or None if it has none.

        Before the first step the moments are zeros.
        """

    @abstractmethod
    def optimizer_states(self) -> list[dict]:
        """Return Adam's state of every tensor that it updates here: ``step`` and the moments."""

    @abstractmethod
    def sync_model_weights(self) -> None:
        """Copy the fp32 weights of all ranks to the weights that the model computes with."""

    def shards(self) -> dict[str, Shards]:
        """Return all that a checkpoint keeps, by global name; see :meth:`Engine.state`."""
        steps = {int(state["step"]) for state in self.optimizer_states() if "step" in state} or {0}
        assert len(steps) == 1, f"Adam counts {steps} steps"
        step = torch.tensor([*steps])
        shards = {"optimizer.step": Shards.whole(step, owner=dist.get_rank() == 0)}

        for name, parameter in global_parameters(self._model):
            part = self.part(parameter)
            if part is None:
                continue
            owner = self._is_owner(parameter)
            shards[f"model.{name}"] = _shards_of(part.main, part.start, parameter, owner)
            for key, moment in part.moments.items():
                shards[f"optimizer.{key}.{name}"] = _shards_of(moment, part.start, parameter, owner)

        for key, state in _random_states().items():
            shards[f"rng.{dist.get_rank()}.{key}"] = Shards.whole(state)
        return shards

    def load(self, shards: dict[str, Shards]) -> None:
        """Take over what has been loaded into :meth:`shards`; random states may be missing."""
        step = float(shards["optimizer.step"].boxes[0].data)
        for state in self.optimizer_states():
            if torch.is_tensor(state["step"]):
                # A tensor for each state, as Adam counts them up one by one, on the device where
                # the fused Adam reads it.
                state["step"] = torch.tensor(step, device=state["exp_avg"].device)
            else:
                state["step"] = int(step)
        self.sync_model_weights()

        random_states = {}
        for name, entry in shards.items():
            if name.startswith("rng."):
                _, _, key = name.split(".", 2)
                random_states[key] = entry.boxes[0].data
        if random_states:
            _set_random_states(random_states)

    def load_weights(self, whole: dict[str, Tensor]) -> None:
        """Take this rank's parts of whole tensors, by global name."""
        shards = self.shards()
        for name, tensor in whole.items():
            own_shards = shards.get(f"model.{name}")
            for offsets, data in own_shards.boxes if own_shards else ():
                box = tuple(
                    slice(offset, offset + size)
                    for offset, size in zip(offsets, data.shape, strict=True)
                )
                data.copy_(tensor[box])
        self.sync_model_weights()

    def _is_owner(self, parameter: Parameter) -> bool:
        """Return whether this rank saves its part.

        A parameter that is not split is the same on every tensor-parallel rank, and the first saves
        it.
        """
        if is_second_copy(self._model, parameter):
            return False
        return is_split(parameter) or parallel_state.get_tensor_model_parallel_rank() == 0


def init_adam_state(state: dict, main: Tensor, step: float | Tensor) -> dict:
    """Return Adam's state of a tensor; before its first step, make it."""
    if "exp_avg" not in state:
        state["step"] = step
        state["exp_avg"] = torch.zeros_like(main)
        state["exp_avg_sq"] = torch.zeros_like(main)
    return state


def _shards_of(flat: Tensor, start: int, parameter: Parameter, owner: bool) -> Shards:
    """Return a flat range of this rank's slice of a parameter as boxes of the whole parameter."""
    # Megatron sets these attributes on the parameters that it splits.
    split_dim = getattr(parameter, "partition_dim", None) if is_split(parameter) else None
    stride = getattr(parameter, "partition_stride", 1) if is_split(parameter) else 1
    rank, ranks = split_ranks(parameter)
    shape, boxes = flat_range_boxes(
        flat, start, local_shape(parameter), split_dim, stride, rank, ranks
    )
    return Shards(shape, boxes, owner)


def _random_states() -> dict[str, Tensor]:
    """Return the states of this process's random generators: torch's, Megatron's and the GPU's."""
    states = {"cpu": torch.get_rng_state()}
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[f"megatron.{name}"] = state
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    get_cuda_rng_tracker().set_states(
        {
            name.removeprefix("megatron."): state
            for name, state in states.items()
            if name.startswith("megatron.")
        }
    )
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
