"""``torch.cuda`` as it answers on a machine with a GPU, for the code that asks it."""

import contextlib
import sys
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from ...trainer.predict.estimate import GIB, Device
from .recorder import Recorder

_DEVICES_OF_A_NODE = 8


def pretend_gpu(device: Device, recorder: Recorder) -> None:
    """Let torch find GPUs of this kind, in this process, for good.

    What makes the host wait is recorded. Streams and events do nothing: everything is in order.
    """
    _answer(device)
    _replace_streams(recorder)
    _replace_random_states()
    _replace_tensor_methods(recorder)
    # Fake tensors would otherwise ask for the device's driver.
    cast(Any, FakeTensorMode).avoid_device_init = property(lambda self: True)
    cast(Any, torch.nn.Module)._apply = _apply
    _register_cuda_kernels()
    _replace_compiler(recorder)


def _answer(device: Device) -> None:
    """Let questions about the GPU be answered as for ``device``."""
    capability = divmod(device.capability, 10)
    memory = int(device.memory_gib * GIB)
    properties = SimpleNamespace(
        name=f"NVIDIA {device.name.upper()}",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=device.processors,
        total_memory=memory,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        gcnArchName="",
        uuid="0",
        L2_cache_size=50 * 2**20,
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "_is_compiled": True,
        "is_initialized": True,
        "device_count": _DEVICES_OF_A_NODE,
        "current_device": 0,
        "get_device_capability": capability,
        "get_device_properties": properties,
        "get_device_name": properties.name,
        "mem_get_info": (memory, memory),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "memory_stats": {},
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        # What is done and gives nothing.
        "set_device": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
    }
    cuda = cast(Any, torch.cuda)
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, _answer=answer, **__: _answer)
    torch.backends.cuda.is_flash_attention_available = lambda: True
    cuda.nccl.version = lambda: (2, 29, 7)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    cast(Any, torch._C)._cuda_getCurrentRawStream = lambda device: 0


def _replace_streams(recorder: Recorder) -> None:
    class Stream:
        """A stream or an event: everything that was asked of it is done."""

        cuda_stream = 0
        stream_id = 0

        def __init__(self, *_, **__):
            self.device = torch.device("cuda", 0)

        def query(self) -> bool:
            return True

        def elapsed_time(self, _) -> float:
            return 1.0

        def record_event(self, event=None):
            return event or Stream()

        def synchronize(self) -> None:
            recorder.wait("synchronize")

        def wait_stream(self, _) -> None: ...

        def wait_event(self, _) -> None: ...

        def record(self, *_) -> None: ...

        def wait(self, *_) -> None: ...

        def __enter__(self):
            return self

        def __exit__(self, *_): ...

    cuda = cast(Any, torch.cuda)
    current = Stream()
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = cuda.default_stream = lambda device=None: current
    cuda.set_stream = lambda stream: None
    cuda.stream = cuda.device = cuda.device_of = lambda _: contextlib.nullcontext()
    cuda.synchronize = lambda device=None: recorder.wait("torch.cuda.synchronize")


def _replace_random_states() -> None:
    """Give random generators a state that never changes: nothing random is launched."""

    class Generator:
        def clone_state(self):
            return self

        def get_state(self) -> Tensor:
            return torch.zeros(16, dtype=torch.uint8)

        def set_state(self, _) -> None: ...

        graphsafe_get_state = clone_state
        graphsafe_set_state = set_state
        manual_seed = set_state

    cuda = cast(Any, torch.cuda)
    for module in (cuda, cast(Any, sys.modules["torch.cuda.random"])):
        module.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
        module.set_rng_state = lambda state, device=None: None
        module._lazy_init = lambda: None
        module._lazy_call = lambda function, **_: None
    cuda.manual_seed = cuda.manual_seed_all = cuda.seed = lambda *_: None
    cuda.default_generators = [Generator() for _ in range(_DEVICES_OF_A_NODE)]


def _replace_tensor_methods(recorder: Recorder) -> None:
    fake = cast(Any, FakeTensor)

    def to_list(tensor: Tensor) -> Any:
        numbers = recorder.numbers(tensor)
        with _disable_current_modes():
            return numbers.tolist()

    def to_numpy(tensor: Tensor) -> Any:
        numbers = recorder.numbers(tensor)
        with _disable_current_modes():
            return numbers.numpy()

    fake.tolist = to_list
    fake.numpy = to_numpy
    fake.data_ptr = lambda self: self.storage_offset() * self.element_size()  # for alignments
    tensor = cast(Any, Tensor)
    tensor.record_stream = lambda self, stream: None
    tensor.pin_memory = lambda self, *_: self
    tensor.cuda = lambda self, *_, **__: self.to("cuda")
    make_empty = torch.empty
    cast(Any, torch).empty = lambda *size, pin_memory=False, **options: make_empty(*size, **options)


def _apply(module: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """Do what ``Module._apply`` does: torch's own cannot exchange what is inside fake tensors."""
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        moved = function(parameter.detach())
        if moved.device != parameter.device or moved.dtype != parameter.dtype:
            replacement = Parameter(moved, parameter.requires_grad)
            vars(replacement).update(
                {key: x for key, x in vars(parameter).items() if not key.startswith("_")}
            )
            module._parameters[name] = replacement
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _replace_compiler(recorder: Recorder) -> None:
    """Let a compiled function be one kernel, as what is compiled here is on a GPU."""

    def compile_(function: Any = None, **options: Any) -> Any:
        if function is None:
            return partial(compile_, **options)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with recorder.one_kernel(f"compiled {function.__name__}"):
                result = function(*args, **kwargs)
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.is_cuda:
                    recorder.memory.see(tensor, recorder.kind)
            return result

        return call

    cast(Any, torch).compile = compile_


_library = torch.library.Library("aten", "IMPL")


def _register_cuda_kernels() -> None:
    """Say of operations that CUDA has a kernel for, and a CPU composes, that there is a kernel.

    Else a build of torch for CPUs would compose them here too.
    """
    if torch.version.cuda is None:
        _library.impl("_fused_rms_norm", _never_called, "CUDA")


def _never_called(*_: Any) -> None:
    raise AssertionError("fake tensors have no numbers to compute")
