"""The state of the DeepSpeed engine, under every stage of ZeRO."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .engine_state import MOMENTS, EngineState, ParameterPart, init_adam_state


class _FlatRange(NamedTuple):
    """Where a parameter's part lies in a tensor that Adam updates."""

    flat: Tensor
    offset: int
    """The first element in ``flat``."""
    size: int
    start: int
    """The first element in the rank's tensor-parallel slice of the parameter."""


class DeepSpeedState(EngineState):
    """The state of a DeepSpeed engine.

    Under ZeRO, Adam updates a few flat tensors on each rank; every parameter has a range of one of
    them, or nothing.
    """

    def __init__(self, engine: Any):
        """``engine`` is DeepSpeed's."""
        super().__init__(engine.module)
        self._zero = engine.optimizer
        self._zero_stage = engine.zero_optimization_stage()
        self._adam = engine.basic_optimizer
        # torch's Adam counts its steps in tensors, DeepSpeed's on the CPU in ints.
        counts_in_tensors = isinstance(self._adam, torch.optim.AdamW)
        for flat in self._flat_tensors():
            step = torch.tensor(0.0) if counts_in_tensors else 0
            init_adam_state(self._adam.state[flat], flat, step)
        # DeepSpeed links the moments to the parameters only after its first step: do it now.
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):
            self._zero._lazy_init_hp_params_optimizer_state()

    def part(self, parameter: Parameter) -> ParameterPart | None:
        place = self._flat_range(parameter)
        if place is None or place.size <= 0:
            return None

        def part_of(flat: Tensor) -> Tensor:
            return flat.detach().view(-1).narrow(0, place.offset, place.size)

        state = self._adam.state[place.flat]
        moments = {key: part_of(state[key]) for key in MOMENTS}
        return ParameterPart(place.start, part_of(place.flat), moments)

    def optimizer_states(self) -> list[dict]:
        return [self._adam.state[flat] for flat in self._flat_tensors()]

    def begin_update(self) -> None:
        """Prepare DeepSpeed's Adam of the CPU for an update.

        It multiplies the powers of its betas by them once more at each step, beginning with the
        first step of the process. At a step that is not the next one it computes the powers
        themselves, which are right for a resumed run, too: so let it update a tensor of one zero at
        two such steps.
        """
        if not hasattr(self._adam, "ds_opt_adam"):
            return
        step = int(self.optimizer_states()[0]["step"]) + 1
        group = self._adam.param_groups[0]
        options = group["lr"], *group["betas"], group["eps"], 0.0, group["bias_correction"]
        for other_step in (step + 2, step):
            self._adam.ds_opt_adam.adam_update(
                self._adam.opt_id, other_step, *options, *torch.zeros(4, 1)
            )

    def sync_model_weights(self) -> None:
        if self._zero_stage == 3:
            for group in range(len(self._flat_tensors())):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            for parameter in self._zero.persistent_parameters[:1]:
                parameter.all_gather(self._zero.persistent_parameters)
        elif self._zero_stage:
            self._zero.update_lp_params()

    def _flat_range(self, parameter: Parameter) -> _FlatRange | None:
        if self._zero_stage == 0:
            return _FlatRange(parameter, offset=0, size=parameter.numel(), start=0)
        # ZeRO keeps what it knows of a parameter as attributes of it.
        zero_parameter: Any = parameter
        if self._zero_stage == 3:
            group, offset, padded_size = self._zero.grad_position[
                self._zero.get_param_id(parameter)
            ]
            start = padded_size * self._zero._get_param_partition_rank(parameter)
            # The last ranks' ranges are filled up, or all filling.
            size = min(padded_size, zero_parameter.ds_numel - start)
            return _FlatRange(self._flat_tensors()[group], offset, size, start)
        mapping = zero_parameter._hp_mapping
        if mapping is None:
            return None
        in_flat = mapping.hp_fragment_address
        in_parameter = mapping.lp_fragment_address
        flat = self._flat_tensors()[mapping.param_group_index]
        return _FlatRange(flat, in_flat.start, in_flat.numel, in_parameter.start)

    def _flat_tensors(self) -> list[Tensor]:
        """Return what Adam updates on this rank."""
        for name in (
            "single_partition_of_fp32_groups",  # ZeRO 1 and 2
            "fp32_groups_flat_partition",  # ZeRO 1 in bf16
            "fp32_partitioned_groups_flat",  # ZeRO 3
        ):
            if hasattr(self._zero, name):
                return getattr(self._zero, name)
        return [parameter for group in self._adam.param_groups for parameter in group["params"]]
