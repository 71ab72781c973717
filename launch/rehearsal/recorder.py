"""Records what a step does to a GPU: kernels, collectives, waits, memory, and faults."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .device_memory import DeviceMemory
from .known_values import KnownValues
from .places import place

FIRST, STEADY, EVALUATION, CHECKPOINT = "first step", "step", "evaluation", "checkpoint"
"""Phases after the engine was built; a step after the first finds what that kept."""
_WITHOUT_KERNEL = {
    "aten::_reshape_alias",
    "aten::_unsafe_view",
    "aten::alias",
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::set_",
}
"""Operations that launch nothing, beside views."""
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "_grouped_mm"}
_SIZED_BY_VALUES = {"aten::masked_select", "aten::nonzero", "aten::_unique2", "aten::index"}
"""Operations whose results have a shape that may depend on values; the GPU is waited for."""


class Collective(NamedTuple):
    """A kind of message that ranks exchange, at one place of the code."""

    phase: str
    name: str
    ranks: int
    place: str


class CollectiveTotals:
    """What the messages of one kind come to."""

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0
        self.hidden = 0
        """Of the messages, those that other kernels were launched beside."""


class Recorder(TorchDispatchMode):
    """Sees every operation of torch, and keeps what matters of it by the :attr:`phase`."""

    def __init__(self, memory: DeviceMemory, values: KnownValues):
        super().__init__()
        self.phase = "start"
        self.kind = "weights"
        """What new tensors hold, unless something better is known about them."""
        self.memory = memory
        self.values = values
        # All of these are by phase.
        self.kernels: Counter[tuple[str, str]] = Counter()
        """(phase, name of a kernel of torch's) -> launches."""
        self.launches: Counter[tuple[str, str]] = Counter()
        """(phase, name of a Triton kernel) -> launches."""
        self.product_flops: Counter[tuple[str, str]] = Counter()
        """(phase, dtype) -> operations of matrix products."""
        self.waits: Counter[tuple[str, str, str]] = Counter()
        """(phase, what makes the host wait for the GPU, place) -> times."""
        self.faults: Counter[tuple[str, str, str]] = Counter()
        """(phase, what would fail on a GPU, place) -> times."""
        self.collectives: dict[Collective, CollectiveTotals] = {}
        self._started: list[tuple[CollectiveTotals, int]] = []
        """Collectives whose handle nobody has yet, and the kernels that had been launched."""
        self._running: dict[int, tuple[Any, CollectiveTotals, int]] = {}
        """Address of a handle -> it, what it stands for, and the kernels launched before."""
        self._num_kernels = 0
        self._is_fused = False

    def wait(self, what: str) -> None:
        """Record that the host waits for the GPU here."""
        self.waits[self.phase, what, place()] += 1

    def fault(self, what: str) -> None:
        """Record what would end the run on a GPU."""
        self.faults[self.phase, what, place()] += 1

    def triton_kernel(self, name: str) -> None:
        """Record the launch of a Triton kernel."""
        self.launches[self.phase, name] += 1
        self._num_kernels += 1

    @contextmanager
    def one_kernel(self, name: str) -> Iterator[None]:
        """Count what is done inside as a single kernel, without memory for what is in between."""
        self.kernels[self.phase, name] += 1
        self._num_kernels += 1
        was_fused = self._is_fused
        self._is_fused = True
        try:
            yield
        finally:
            self._is_fused = was_fused

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name
        if name.startswith("prim::"):
            return function(*args, **kwargs)
        # A setting of each thread: autograd has its own.
        torch._C._set_only_lift_cpu_tensors(True)
        tensors = _tensors((args, kwargs))
        if name == "aten::_local_scalar_dense":
            return self._number(args[0])
        if name == "aten::equal":
            return self._equal(*args)
        if name.startswith("c10d::"):
            return self._collective(function, name, args, kwargs, tensors)

        twins = self.values.compute(function, args, kwargs, tensors)
        if name in _SIZED_BY_VALUES:
            result = self._sized_by_values(function, name, args, kwargs, tensors, twins)
        else:
            result = function(*args, **kwargs)
        results = _tensors(result)
        if twins is not None:
            self.values.keep(results, _tensors(twins))
        if _on_gpu(tensors) or _on_gpu(results):
            self._on_gpu(function, name, args, kwargs, tensors, results)
        return result

    def _on_gpu(
        self,
        function: Any,
        name: str,
        args: tuple,
        kwargs: dict,
        tensors: list[Tensor],
        results: list[Tensor],
    ) -> None:
        """Count an operation that concerns the GPU."""
        if self._is_fused:
            return
        for result in results:
            if result.is_cuda:
                self.memory.see(result, self.kind)
        if function.is_view or name in _WITHOUT_KERNEL:
            return
        self.kernels[self.phase, name.removeprefix("aten::")] += 1
        self._num_kernels += 1
        if name.removeprefix("aten::") in _PRODUCTS:
            first, second = [x for x in tensors if x.ndim > 1][-2:]
            dtype = str(first.dtype).removeprefix("torch.")
            self.product_flops[self.phase, dtype] += 2 * first.numel() * second.shape[-1]
        if name in ("aten::_to_copy", "aten::copy_"):
            self._copy(name, args, kwargs, results[0])

    def _copy(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        """Record a copy between the host and the GPU for which the host waits."""
        source = args[0] if name == "aten::_to_copy" else args[1]
        is_async = kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))
        if source.is_cuda == result.is_cuda or is_async or not source.numel():
            return
        self.wait("copy to the host" if source.is_cuda else "copy from pageable memory")

    def _number(self, tensor: Tensor) -> float | int | bool:
        """Return what ``item()`` gives: the value if it is known, else a plausible one."""
        if tensor.is_cuda:
            self.wait("item")
        twin = self.values.get(tensor)
        if twin is None:
            twin = getattr(tensor, "constant", None)
        if twin is not None:
            with unset_fake_temporarily():
                return twin.item()
        if tensor.dtype == torch.bool:
            return False
        return 1.0 if tensor.is_floating_point() else 1

    def numbers(self, tensor: Tensor) -> Tensor:
        """Return numbers for what the host reads at once: the values if known, else ones."""
        if tensor.is_cuda:
            self.wait("tolist")
        twin = self.values.get(tensor)
        with unset_fake_temporarily():
            return torch.ones(tensor.shape, dtype=tensor.dtype) if twin is None else twin

    def _equal(self, a: Tensor, b: Tensor) -> bool:
        if a.is_cuda:
            self.wait("equal")
        twins = self.values.get(a), self.values.get(b)
        if twins[0] is None or twins[1] is None:
            return a.shape == b.shape
        with unset_fake_temporarily():
            return torch.equal(twins[0], twins[1])

    def _sized_by_values(
        self, function: Any, name: str, args: tuple, kwargs: dict, tensors: list[Tensor], twins: Any
    ) -> Any:
        """Return results of the shape that the values ask for."""
        if name == "aten::index":
            masks = [x for x in tree_leaves(args[1]) if x is not None and x.dtype == torch.bool]
            if not masks:
                return function(*args, **kwargs)
        if _on_gpu(tensors):
            self.wait(name.removeprefix("aten::"))
        if twins is None:
            twins = self._from_known_mask(name, args)
        if twins is None:
            raise RuntimeError(f"a shape depends on values that a rehearsal does not know: {name}")
        return torch.utils._pytree.tree_map_only(
            Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device=tensors[0].device), twins
        )

    @unset_fake_temporarily()
    def _from_known_mask(self, name: str, args: tuple) -> Tensor | None:
        """Return zeros in the shape that a known mask takes of an unknown tensor."""
        if name not in ("aten::masked_select", "aten::index"):
            return None
        source, index = args
        masks = tree_leaves(index)
        mask = self.values.get(masks[0]) if len(masks) == 1 else None
        if mask is None:
            return None
        if name == "aten::masked_select":
            mask = mask.expand(torch.broadcast_shapes(mask.shape, source.shape))
            return torch.zeros(int(mask.sum()), dtype=source.dtype)
        return torch.zeros(int(mask.sum()), *source.shape[mask.ndim :], dtype=source.dtype)

    def _collective(
        self, function: Any, name: str, args: tuple, kwargs: dict, tensors: list[Tensor]
    ) -> Any:
        """Record a message, and let a fake group pretend to send it."""
        group = next((x for x in args if isinstance(x, torch.ScriptObject)), None)
        ranks = torch.distributed.ProcessGroup.unbox(group).size() if group is not None else 0
        kind = Collective(self.phase, name.removeprefix("c10d::").rstrip("_"), ranks, place())
        totals = self.collectives.setdefault(kind, CollectiveTotals())
        totals.count += 1
        # What is sent and what is received: of both, the larger one is the message.
        totals.bytes += max((x.numel() * x.element_size() for x in tensors), default=0)
        self._started.append((totals, self._num_kernels))
        for tensor in tensors:
            if not tensor.is_contiguous():
                self.fault(f"{kind.name} of a tensor that is not contiguous")
            if not tensor.is_cuda:
                self.fault(f"{kind.name} of a tensor on the host")
        self._exchange_values(name, args, ranks)
        if "coalesced" in name or name == "c10d::barrier":
            return torch._C._distributed_c10d.FakeWork().boxed()
        return function(*args, **kwargs)

    @unset_fake_temporarily()
    def _exchange_values(self, name: str, args: tuple, ranks: int) -> None:
        """Let every rank have what this one has, as far as that is known.

        Sums stay what this rank adds to them: nothing that is launched depends on one.
        """
        if name != "c10d::_allgather_base_":
            return
        gathered, sent = args[:2]
        own = self.values.get(sent)
        if own is None:
            self.values.forget(gathered)
        else:
            self.values.set(gathered, own.flatten().repeat(ranks).view(gathered.shape))

    def work_began(self, work: Any) -> None:
        """Connect the handle of a collective with the last one that was started."""
        if self._started:
            totals, num_kernels = self._started.pop()
            self._running[id(work)] = (work, totals, num_kernels)
        self._started.clear()

    def work_awaited(self, work: Any) -> None:
        """Take note whether anything was launched since the collective began."""
        entry = self._running.pop(id(work), None)
        if entry is not None and self._num_kernels > entry[2]:
            entry[1].hidden += 1


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _on_gpu(tensors: list[Tensor]) -> bool:
    return any(x.is_cuda for x in tensors)
