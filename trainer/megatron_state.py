"""What a checkpoint keeps of the Megatron engine, as parts of whole tensors.

Megatron's distributed optimizer gives each data- and context-parallel rank a flat range of its tensor-parallel slice of each
parameter: the fp32 weights there, and Adam's two moments. Those ranges are saved and loaded where they lie in the whole
tensors. (Megatron-core 0.16.1's own checkpoints cannot resume this optimizer without Apex or Transformer Engine.)
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from .shards import Shards, flat_range_boxes
from .weights import global_parameters, is_second_copy, is_split


class MegatronState:
    """Of one rank's part of a model and its optimizer."""

    def __init__(self, model: GPTModel, ddp: DistributedDataParallel, optimizer: MegatronOptimizer):
        self._model, self._ddp = model, ddp
        self._optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
        for each in self._optimizers:
            if not isinstance(each.optimizer, torch.optim.AdamW):
                kind = f"{type(each.optimizer).__module__}.{type(each.optimizer).__name__}"
                raise RuntimeError(f"Megatron chose {kind}, whose state is not known here: remove Transformer Engine and Apex")

    def shards(self) -> dict[str, Shards]:
        found = {"optimizer.step": Shards.whole(torch.tensor([self._steps()]), owner=dist.get_rank() == 0)}
        for name, parameter in global_parameters(self._model):
            for optimizer in self._optimizers:
                if parameter in optimizer.model_param_group_index_map:
                    start = optimizer._get_model_param_range_map(parameter)["param"].start
                    main, moments = _main_and_moments(optimizer, parameter)
                    owner = self._saves(parameter)
                    found[f"model.{name}"] = _placed(main, start, parameter, owner)
                    for key in ("exp_avg", "exp_avg_sq"):
                        found[f"optimizer.{key}.{name}"] = _placed(moments[key], start, parameter, owner)
        for key, state in _random_states().items():
            found[f"rng.{dist.get_rank()}.{key}"] = Shards.whole(state)
        return found

    def restored(self, shards: dict[str, Shards]) -> None:
        step = float(shards["optimizer.step"].boxes[0].data)
        for optimizer in self._optimizers:
            for state in optimizer.optimizer.state.values():
                state["step"] = torch.tensor(step)  # each its own: Adam counts them up one by one
            optimizer._copy_main_params_to_model_params()
        self._ddp.start_param_sync()
        random = {key.split(".", 2)[2]: entry.boxes[0].data for key, entry in shards.items() if key.startswith("rng.")}
        if random:
            _set_random_states(random)

    def _steps(self) -> int:
        """Updates so far: the same for every parameter."""
        states = [state for optimizer in self._optimizers for state in optimizer.optimizer.state.values() if state]
        return int(states[0]["step"]) if states else 0

    def _saves(self, parameter: torch.nn.Parameter) -> bool:
        """Whether no other rank holds the same part: a parameter that is not split is on every tensor-parallel rank."""
        if is_second_copy(self._model, parameter):
            return False
        return is_split(parameter) or parallel_state.get_tensor_model_parallel_rank() == 0


def _main_and_moments(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> tuple[Tensor, dict[str, Tensor]]:
    """The rank's flat fp32 range of a parameter and Adam's state for it, which before the first step does not exist yet."""
    group, place = optimizer.model_param_group_index_map[parameter]
    main = optimizer.optimizer.param_groups[group]["params"][place]
    state = optimizer.optimizer.state[main]
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(main), torch.zeros_like(main)
    return main.detach(), state


def _placed(flat: Tensor, start: int, parameter: torch.nn.Parameter, owner: bool) -> Shards:
    split = is_split(parameter)
    shape, boxes = flat_range_boxes(
        flat,
        start,
        parameter.shape,
        parameter.partition_dim if split else None,
        parameter.partition_stride if split else 1,
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    return Shards(shape, boxes, owner)


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state(), **{f"megatron.{k}": v for k, v in get_cuda_rng_tracker().get_states().items()}}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    get_cuda_rng_tracker().set_states({k.removeprefix("megatron."): v for k, v in states.items() if k.startswith("megatron.")})
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
