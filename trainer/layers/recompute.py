"""Activations that do not wait on the device for the backward pass: computed again there, or brought back from the host."""

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
    """none; selective: all but the mixer's operation; full: the whole layer."""
    mlp_tile: int | None = None
    """Tokens of a rank that go through the MLP at a time; None for all."""
    offload: bool = False
    """Whether the input of a layer that is recomputed in full waits in host memory."""


def recomputed(function: Callable, *inputs):
    """``function(*inputs)``, of which only the inputs are kept. It must draw no random numbers."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile: int | None) -> Tensor:
    """``function(x)`` of ``[time, batch, ...]``, ``tile`` tokens at a time, which are computed again in the backward pass."""
    if tile is None or x.shape[0] * x.shape[1] <= tile:
        return function(x)
    return torch.cat([recomputed(function, part) for part in x.split(max(1, tile // x.shape[1]))])


class OnHost(saved_tensors_hooks):
    """A context: CUDA tensors that are saved for the backward pass inside of it wait in pinned host memory.

    They leave on a stream of their own while the forward pass goes on. In the backward pass each asks for the one that was
    saved before it, so that it is on the device again when its turn comes. Tensors on a CPU stay where they are.
    """

    def __init__(self):
        super().__init__(
            lambda x: _Waiting(x) if x.is_cuda else x,
            lambda x: x.take() if isinstance(x, _Waiting) else x,
        )


class _Waiting:
    """A tensor in host memory, on its way there or back."""

    _stream: torch.cuda.Stream | None = None
    _newest: "weakref.ref[_Waiting]" = staticmethod(lambda: None)

    def __init__(self, x: Tensor):
        if _Waiting._stream is None:
            _Waiting._stream = torch.cuda.Stream(x.device)
        self._before, _Waiting._newest = _Waiting._newest, weakref.ref(self)
        self._device, stream = x.device, self._stream
        self._on_device: Tensor | None = None
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self._host.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is free for others when the copy is done

    def fetch(self) -> None:
        """Start the way back."""
        if self._on_device is None:
            with torch.cuda.stream(self._stream):
                self._on_device = self._host.to(self._device, non_blocking=True)

    def take(self) -> Tensor:
        """On the device, for the current stream; the one before it is on its way."""
        self.fetch()
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        found, self._on_device = self._on_device, None
        found.record_stream(current)
        if (before := self._before()) is not None:  # of another microbatch it is gone by now
            before.fetch()
        return found
