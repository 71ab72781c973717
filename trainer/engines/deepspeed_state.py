"""The state of the DeepSpeed engine, under every stage of ZeRO."""

import torch
from torch import Tensor
from torch.nn import Parameter

from .engine_state import MOMENTS, EngineState, Part, fresh


class DeepSpeedState(EngineState):
    """Under ZeRO Adam updates a few flat tensors on each rank, of which every parameter has a range, or nothing."""

    def __init__(self, engine):
        super().__init__(engine.module)
        self._zero = engine.optimizer
        self._stage = engine.zero_optimization_stage()
        self._adam = engine.basic_optimizer
        counts_tensors = isinstance(self._adam, torch.optim.AdamW)
        for flat in self._flats():
            fresh(self._adam.state[flat], flat, torch.tensor(0.0) if counts_tensors else 0)
        if hasattr(
            self._zero, "_lazy_init_hp_params_optimizer_state"
        ):  # it links the moments once, after the first step
            self._zero._lazy_init_hp_params_optimizer_state()

    def part(self, parameter: Parameter) -> Part | None:
        if self._stage == 0:
            flat, first, count, start = parameter, 0, parameter.numel(), 0
        elif self._stage == 3:
            group, first, count = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = count * self._zero._get_param_partition_rank(parameter)
            flat, count = (
                self._flats()[group],
                min(count, parameter.ds_numel - start),
            )  # the last ranks' are padded
        else:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            flat, start = (
                self._flats()[mapping.param_group_index],
                mapping.lp_fragment_address.start,
            )
            first, count = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        if count <= 0:
            return None
        state = self._adam.state[flat]

        def own(x: Tensor) -> Tensor:
            return x.detach().view(-1).narrow(0, first, count)

        return Part(start, own(flat), {key: own(state[key]) for key in MOMENTS})

    def states(self) -> list[dict]:
        return [self._adam.state[flat] for flat in self._flats()]

    def begin_update(self) -> None:
        """DeepSpeed's Adam of the CPU multiplies the powers of its betas by them once more, from the first step of the process
        on. Of a step that is not the next one it takes the powers themselves, which are those of a run that goes on, too.
        """
        if not hasattr(self._adam, "ds_opt_adam"):
            return
        step, group = int(self.states()[0]["step"]) + 1, self._adam.param_groups[0]
        options = group["lr"], *group["betas"], group["eps"], 0.0, group["bias_correction"]
        for other in (step + 2, step):
            self._adam.ds_opt_adam.adam_update(
                self._adam.opt_id, other, *options, *torch.zeros(4, 1)
            )

    def publish(self) -> None:
        if self._stage == 3:
            for group in range(len(self._flats())):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            for parameter in self._zero.persistent_parameters[:1]:
                parameter.all_gather(self._zero.persistent_parameters)
        elif self._stage:
            self._zero.update_lp_params()

    def _flats(self) -> list[Tensor]:
        """What Adam updates on this rank."""
        for name in (
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
            "fp32_partitioned_groups_flat",
        ):
            if hasattr(self._zero, name):  # ZeRO 1 and 2; 1 in bf16; 3
                return getattr(self._zero, name)
        return [parameter for group in self._adam.param_groups for parameter in group["params"]]
