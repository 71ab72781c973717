"""The state of the Megatron engine. (Megatron-core 0.16.1's own checkpoints cannot resume its distributed optimizer without
Apex or Transformer Engine.)
"""

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from torch.nn import Parameter

from .engine_state import MOMENTS, EngineState, Part, fresh


class MegatronState(EngineState):
    """Of the distributed optimizer: each data- and context-parallel rank has a range of every parameter, or nothing of it."""

    def __init__(self, model: GPTModel, ddp: DistributedDataParallel, optimizer: MegatronOptimizer):
        super().__init__(model)
        self._ddp = ddp
        self.optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
        """One, or two where experts have their own."""
        for each in self.optimizers:
            if not isinstance(each.optimizer, torch.optim.AdamW):
                kind = f"{type(each.optimizer).__module__}.{type(each.optimizer).__name__}"
                raise RuntimeError(
                    f"Megatron chose {kind}, whose state is not known here: remove Transformer Engine and Apex"
                )

    def part(self, parameter: Parameter) -> Part | None:
        for optimizer in self.optimizers:
            if parameter in optimizer.model_param_group_index_map:
                start = optimizer._get_model_param_range_map(parameter)["param"].start
                group, place = optimizer.model_param_group_index_map[parameter]
                main = optimizer.optimizer.param_groups[group]["params"][place]
                state = fresh(
                    optimizer.optimizer.state[main], main, torch.zeros((), device=main.device)
                )
                return Part(start, main.detach(), {key: state[key] for key in MOMENTS})
        return None

    def states(self) -> list[dict]:
        return [
            state
            for optimizer in self.optimizers
            for state in optimizer.optimizer.state.values()
            if state
        ]

    def publish(self) -> None:
        for optimizer in self.optimizers:
            optimizer._copy_main_params_to_model_params()
        self._ddp.start_param_sync()
