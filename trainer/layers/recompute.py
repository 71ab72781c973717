"""Activations that do not wait on the device for the backward pass: they are computed again there,
or come back from host memory.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class LayerMemory(NamedTuple):
    """What a layer keeps for its backward pass."""

    recompute: str = "none"
    """none; selective: recompute all but the mixer's operation; full: recompute the whole layer."""
    mlp_tile: int | None = None
    """Tokens of a rank that go through the MLP at a time; None for all."""
    offload: bool = False
    """Whether the input of a layer that is recomputed in full waits in host memory."""


def recomputed(function: Callable, *inputs):
    """Return ``function(*inputs)`` and keep only the inputs for the backward pass.

    The function must draw no random numbers.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile: int | None) -> Tensor:
    """Return ``function(x)`` of ``[time, batch, ...]``, computed ``tile`` tokens at a time.

    Every tile is computed again in the backward pass. None computes all tokens at once, and keeps
    what the function keeps.
    """
    time, batch = x.shape[:2]
    if tile is None or time * batch <= tile:
        return function(x)
    tiles = x.split(max(1, tile // batch))
    return torch.cat([recomputed(function, each) for each in tiles])


class OnHost(saved_tensors_hooks):
    """A context: CUDA tensors saved inside it for the backward pass wait in pinned host memory.

    They leave on a stream of their own while the forward pass continues. In the backward pass each
    asks for the one that was saved before it, so that it is on the device again when its turn
    comes. Tensors on a CPU stay where they are.
    """

    def __init__(self):
        super().__init__(
            lambda tensor: _HostTensor(tensor) if tensor.is_cuda else tensor,
            lambda saved: saved.take() if isinstance(saved, _HostTensor) else saved,
        )


def _no_tensor() -> "_HostTensor | None":
    return None


class _HostTensor:
    """A tensor in host memory, or on its way there or back."""

    _stream: torch.cuda.Stream | None = None
    """On which all of them are copied."""
    _newest: "Callable[[], _HostTensor | None]" = staticmethod(_no_tensor)
    """A weak reference to the one saved last."""

    def __init__(self, tensor: Tensor):
        if _HostTensor._stream is None:
            _HostTensor._stream = torch.cuda.Stream(tensor.device)
        stream = _HostTensor._stream
        self._previous = _HostTensor._newest
        _HostTensor._newest = weakref.ref(self)
        self._device = tensor.device
        self._on_device: Tensor | None = None
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not reused before the copy is done

    def fetch(self) -> None:
        """Start the copy back to the device."""
        if self._on_device is None:
            with torch.cuda.stream(self._stream):
                self._on_device = self._host.to(self._device, non_blocking=True)

    def take(self) -> Tensor:
        """Return the tensor on the device, for the current stream, and fetch the one before it."""
        self.fetch()
        assert self._on_device is not None
        assert self._stream is not None
        tensor = self._on_device
        self._on_device = None
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        tensor.record_stream(current)
        previous = self._previous()  # None if it was another microbatch's
        if previous is not None:
            previous.fetch()
        return tensor
