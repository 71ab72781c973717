"""How fast a run is and how much memory it uses: the metrics under ``perf/`` and ``memory/``."""

import contextlib
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ..predict.estimate import DEVICES


class PerformanceMeter:
    """Time, data waits and arithmetic of the steps since the last record.

    A record shows means over these steps; what happens between steps (packing, evaluation) restarts
    the meter.
    """

    def __init__(self) -> None:
        self.restart(0)

    def restart(self, step: int) -> None:
        """Forget everything up to the end of step ``step`` (from 1), and measure from now on."""
        self._last_step = step
        self._began = time.monotonic()
        self._data_seconds = 0.0
        self._flops = 0.0  # of all ranks

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        began = time.monotonic()
        yield
        self._data_seconds += time.monotonic() - began

    def add_flops(self, flops: float) -> None:
        """Count the arithmetic of one step, of all ranks together."""
        self._flops += flops

    def seconds_per_step(self, step: int) -> float:
        """Return the mean time of the steps since the last record, at the end of step ``step``."""
        return (time.monotonic() - self._began) / (step - self._last_step)

    def metrics(self, step: int, step_seconds: float, tokens_per_second: float) -> dict[str, float]:
        """Return what a record says about speed and memory.

        Args:
            step: the step that has just ended.
            step_seconds: its :meth:`seconds_per_step`.
            tokens_per_second: of all ranks together.
        """
        world_size = dist.get_world_size()
        num_steps = step - self._last_step
        return {
            "perf/step_time_s": step_seconds,
            "perf/data_time_s": self._data_seconds / num_steps,
            "perf/tokens_per_sec_per_device": tokens_per_second / world_size,
            **_arithmetic(self._flops / num_steps / step_seconds / world_size),
            **_memory(),
        }


def _arithmetic(flops_per_second: float) -> dict[str, float]:
    """Return the TFLOP/s of each device and, on a GPU of known peak, the share of it (MFU)."""
    tflops = flops_per_second / 1e12
    metrics = {"perf/tflops_per_device": tflops}
    if not torch.cuda.is_available():
        return metrics

    device_name = torch.cuda.get_device_name().lower()
    for device in DEVICES.values():
        if device.name in device_name:
            metrics["perf/mfu"] = tflops / device.tflops
    return metrics


def _memory() -> dict[str, float]:
    """Return the most memory used so far, in GiB.

    That is memory reserved on the GPU, or resident in this process on a CPU.
    """
    if torch.cuda.is_available():
        return {"memory/max_reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
    import resource

    return {"memory/max_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
