"""Rotary angles of transformers' models without their rounding, for comparisons with a run."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_ROUNDING = 4e-7
"""Bound of an fp32 angle's error, as a share of the angle: its frequency and the product are
rounded."""

Tables = tuple["Tensor", "Tensor"]


def use_exact_angles(model: "PreTrainedModel") -> None:
    """Make the rotary positions of ``model`` compute their angles in fp64, as a run does.

    Transformers multiplies positions and frequencies in fp32: at position 131,072 its cosines and
    sines are off by up to 8e-3, at 1,048,576 by 6e-2. Replaced are only tables that differ from the
    exact ones by no more than this rounding; what is wrong in any other way stays wrong.
    """
    parameters = getattr(model.config, "rope_parameters", None) or {}
    theta = parameters.get("rope_theta")
    if theta is None:
        return
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.forward = _exact(module, module.forward, float(theta))


def _exact(
    module: "nn.Module", forward: Callable[..., Tables], theta: float
) -> Callable[..., Tables]:
    import torch

    def exact_forward(x: "Tensor", position_ids: "Tensor") -> Tables:
        cos, sin = forward(x, position_ids)  # [batch, time, dim]
        dim = cos.shape[-1]
        positions = position_ids.expand(*position_ids.shape[:-2], *cos.shape[:2])
        positions = positions.reshape(-1, *cos.shape[:2])[0].double()
        frequencies = theta ** (-torch.arange(0, dim, 2, device=x.device).double() / dim)
        angles = (positions[..., None] * frequencies).repeat(1, 1, 2)
        error = torch.maximum((angles.cos() - cos).abs(), (angles.sin() - sin).abs())
        if (error > _ROUNDING * (angles + 1)).any():
            return cos, sin
        return angles.cos().to(cos.dtype), angles.sin().to(sin.dtype)

    return exact_forward
