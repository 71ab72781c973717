"""The state of the Megatron engine.

Megatron-core's own checkpoints cannot resume its distributed optimizer without Apex or
Transformer Engine.
"""

import torch
from torch.nn import Parameter

from ..megatron_core import DistributedDataParallel, MegatronOptimizer
from ..model.model import HybridModel
from .engine_state import MOMENTS, EngineState, ParameterPart, init_adam_state


class MegatronState(EngineState):
    """The state of Megatron's distributed optimizer.

    Each data- and context-parallel rank has a range of every parameter, or nothing.
    """

    def __init__(
        self, model: HybridModel, ddp: DistributedDataParallel, optimizer: MegatronOptimizer
    ):
        super().__init__(model)
        self._ddp = ddp
        self.optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
        """One, or two if experts have their own."""
        for chained in self.optimizers:
            assert isinstance(chained.optimizer, torch.optim.AdamW), "its state is known"

    def part(self, parameter: Parameter) -> ParameterPart | None:
        for optimizer in self.optimizers:
            if parameter not in optimizer.model_param_group_index_map:
                continue
            start = optimizer._get_model_param_range_map(parameter)["param"].start
            group, index = optimizer.model_param_group_index_map[parameter]
            adam = optimizer.optimizer
            main = adam.param_groups[group]["params"][index]
            step = torch.zeros((), device=main.device)
            state = init_adam_state(adam.state[main], main, step)
            return ParameterPart(start, main.detach(), {key: state[key] for key in MOMENTS})
        return None

    def optimizer_states(self) -> list[dict]:
        return [
            state
            for optimizer in self.optimizers
            for state in optimizer.optimizer.state.values()
            if state
        ]

    def sync_model_weights(self) -> None:
        for optimizer in self.optimizers:
            optimizer._copy_main_params_to_model_params()
        self._ddp.start_param_sync()
