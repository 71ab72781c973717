"""What a checkpoint keeps of an engine, as parts of whole tensors.

Engines give each rank a flat range of its tensor-parallel slice of each parameter: the fp32 weights there, and Adam's two
moments. Those ranges are saved and loaded where they lie in the whole tensors, under the same names whatever the engine, so
that a run may move from one to another.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor
from torch.nn import Parameter

from ..checkpoint.shards import Shards, flat_range_boxes
from ..model.weights import global_parameters, is_second_copy, is_split, local_shape, split_ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


class Part(NamedTuple):
    """A rank's flat range of a parameter, from element ``start`` of its tensor-parallel slice on."""

    start: int
    main: Tensor
    """fp32 weights."""
    moments: dict[str, Tensor]


class EngineState(ABC):
    """Of one rank's part of a model and its optimizer."""

    def __init__(self, model: GPTModel):
        self._model = model

    @abstractmethod
    def part(self, parameter: Parameter) -> Part | None:
        """Views of what this rank has of it, with zeros for moments before the first step."""

    @abstractmethod
    def states(self) -> list[dict]:
        """Adam's, of all tensors that it updates on this rank."""

    @abstractmethod
    def publish(self) -> None:
        """Make the model's weights what the fp32 weights of all ranks are."""

    def shards(self) -> dict[str, Shards]:
        steps = {int(state["step"]) for state in self.states() if "step" in state} or {0}
        assert len(steps) == 1, f"Adam counts {steps} steps"
        found = {"optimizer.step": Shards.whole(torch.tensor([*steps]), owner=dist.get_rank() == 0)}
        for name, parameter in global_parameters(self._model):
            part = self.part(parameter)
            if part is not None:
                owner = self._saves(parameter)
                found[f"model.{name}"] = _placed(part.main, part.start, parameter, owner)
                for key, moment in part.moments.items():
                    found[f"optimizer.{key}.{name}"] = _placed(moment, part.start, parameter, owner)
        for key, state in _random_states().items():
            found[f"rng.{dist.get_rank()}.{key}"] = Shards.whole(state)
        return found

    def restored(self, shards: dict[str, Shards]) -> None:
        step = float(shards["optimizer.step"].boxes[0].data)
        for state in self.states():
            if torch.is_tensor(state["step"]):
                # Each its own, as Adam counts them up one by one, and where the fused Adam reads it.
                state["step"] = torch.tensor(step, device=state["exp_avg"].device)
            else:
                state["step"] = int(step)
        self.publish()
        random = {
            key.split(".", 2)[2]: entry.boxes[0].data
            for key, entry in shards.items()
            if key.startswith("rng.")
        }
        if random:
            _set_random_states(random)

    def load_weights(self, whole: dict[str, Tensor]) -> None:
        """Take this rank's parts of whole tensors, by global name."""
        shards = self.shards()
        for name, tensor in whole.items():
            for offsets, data in shards[f"model.{name}"].boxes if f"model.{name}" in shards else ():
                place = tuple(
                    slice(at, at + size) for at, size in zip(offsets, data.shape, strict=True)
                )
                data.copy_(tensor[place])
        self.publish()

    def _saves(self, parameter: Parameter) -> bool:
        """Whether no other rank holds the same part: a parameter that is not split is on every tensor-parallel rank."""
        if is_second_copy(self._model, parameter):
            return False
        return is_split(parameter) or parallel_state.get_tensor_model_parallel_rank() == 0


def fresh(state: dict, main: Tensor, step: float | Tensor) -> dict:
    """Adam's state of a tensor, made if there is none before the first step."""
    if "exp_avg" not in state:
        state["step"] = step
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(main), torch.zeros_like(main)
    return state


def _placed(flat: Tensor, start: int, parameter: Parameter, owner: bool) -> Shards:
    split = is_split(parameter)
    shape, boxes = flat_range_boxes(
        flat,
        start,
        local_shape(parameter),
        parameter.partition_dim if split else None,
        parameter.partition_stride if split else 1,
        *split_ranks(parameter),
    )
    return Shards(shape, boxes, owner)


def _random_states() -> dict[str, Tensor]:
    states = {
        "cpu": torch.get_rng_state(),
        **{f"megatron.{k}": v for k, v in get_cuda_rng_tracker().get_states().items()},
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    get_cuda_rng_tracker().set_states(
        {k.removeprefix("megatron."): v for k, v in states.items() if k.startswith("megatron.")}
    )
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
