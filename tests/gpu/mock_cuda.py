"""A CUDA device that is a CPU: tensors named cuda, kernels in Triton's interpreter, events that are wall clocks.

    TRITON_INTERPRET=1 python tests/gpu/mock_cuda.py MODULE [ARGUMENT ...]      as python -m MODULE ARGUMENT ...

torch.cuda is torch's own wherever it is Python; below it, where a CPU build of torch has nothing, are the functions of
this file. As on a GPU, these are errors: tensors of two devices in one operation, a tensor of the CPU in a kernel, a
generator of another device, and, while a graph is recorded, all that would wait for the device or depend on contents.
A graph is a tape of operations and launches; a replay does them again into the same tensors.
"""

from __future__ import annotations

import contextlib
import inspect
import runpy
import sys
import time
from types import SimpleNamespace

import interpreter
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
# What waits for the device, or has a size that depends on contents.
WAITS = {
    *("item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "repeat_interleave"),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__", "isfinite_all", "equal", "allclose"),
}
# Operations in which tensors of two devices may meet: copies, and what torch allows for indices.
BETWEEN_DEVICES = {"copy_", "to", "cpu", "__getitem__", "__setitem__", "index_put_", "set_"}


class OnCuda(torch.Tensor):
    """A tensor of the CPU that is said to be on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Generator(torch.Generator):
    """A generator that knows the device it was made for."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, device="cpu")
        made.of = torch.device(device).type
        return made


class Event:
    def __init__(self, enable_timing=False, blocking=False, interprocess=False):
        self.timing, self.at = enable_timing, None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        assert self.at is not None, "an event that was never recorded"

    def elapsed_time(self, end_event):
        if not (self.timing and end_event.timing and self.at and end_event.at):
            raise RuntimeError("Both events must be created with enable_timing=True and recorded")
        return 1000 * (end_event.at - self.at)


class Stream:
    def __init__(self, device=None, priority=0):
        self.device = torch.device(device or CUDA)

    def wait_stream(self, stream):
        assert isinstance(stream, Stream)

    def synchronize(self):
        pass


class Graph:
    """As torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph=False):
        self.tape, self.recorded = [], False

    def pool(self):
        return (0, 1)

    def replay(self):
        assert self.recorded, "a graph that was not recorded"
        if MODE.tape is not None:
            raise RuntimeError("a graph is being recorded")
        MODE.replays += 1
        for work, out in self.tape:
            again = work()
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
    """As torch.cuda.graph."""
    assert isinstance(cuda_graph, Graph)
    assert MODE.tape is None
    MODE.tape = cuda_graph.tape
    try:
        yield
    finally:
        MODE.tape = None
    cuda_graph.recorded = True


def _plain(value):
    return value.as_subclass(torch.Tensor) if isinstance(value, OnCuda) else value


def _is_cuda(value):
    return isinstance(value, OnCuda) or (
        isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda"
        if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda"))
        else False
    )


class Mode(TorchFunctionMode):
    """Every function of torch, on tensors of either device."""

    tape = None
    launches = replays = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch.device:
            return func(*args, **kwargs)
        given = tree_leaves((args, kwargs))
        if name == "__get__":
            owner, tensor = func.__self__, args[0]
            if isinstance(tensor, OnCuda) and owner is torch.Tensor.device:
                return CUDA
            if isinstance(tensor, OnCuda) and owner is torch.Tensor.is_cuda:
                return True
        tensors = [t for t in given if isinstance(t, torch.Tensor)]
        here = [t for t in tensors if isinstance(t, OnCuda)]
        to_cuda = any(_is_cuda(value) for value in given if not isinstance(value, torch.Tensor))
        to_cpu = name == "cpu" or any(
            torch.device(value).type == "cpu"
            for value in given
            if isinstance(value, torch.device) or (isinstance(value, str) and value == "cpu")
        )
        apart = [t for t in tensors if t.ndim and not isinstance(t, OnCuda)]
        if here and apart and name not in BETWEEN_DEVICES:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
        generator = kwargs.get("generator")
        if generator is not None and name != "manual_seed":
            of = getattr(generator, "of", "cpu")
            wanted = "cuda" if to_cuda or here else "cpu"
            if of != wanted:
                raise RuntimeError(f"{name}: expected a {wanted!r} device type for generator but found {of!r}")
        if self.tape is not None and (here or to_cuda):
            index = args[1] if name == "__getitem__" else None
            by_contents = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in tree_leaves(index))
            from_host = (name == "tensor") or (name == "to" and to_cuda and not here)
            if name in WAITS or by_contents or from_host or (name == "copy_" and apart) or (here and to_cpu):
                raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        if name in ("numpy", "__array__") and here:
            raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu()")

        def on_cpu(value):
            return torch.device("cpu") if _is_cuda(value) and not isinstance(value, torch.Tensor) else _plain(value)

        args, kwargs = tree_map(on_cpu, (args, kwargs))
        wide = kwargs.pop("out_dtype", None)
        if wide is not None:
            # Products of bfloat16 numbers in float32, which only CUDA offers.
            assert here
            assert name in ("bmm", "mm")
            assert wide == torch.float32
            assert args[0].dtype == torch.bfloat16
            args = tuple(t.float() for t in args)
        if name in ("to", "cpu") and to_cpu and here:
            # Another memory: never the same tensor.
            kwargs["copy"] = True
            func, args = torch.Tensor.to, (args[0], "cpu") if name == "cpu" else args
        out = func(*args, **kwargs)
        if name in ("untyped_storage", "data_ptr", "manual_seed") or (to_cpu and name in ("to", "cpu")):
            return out
        if here or to_cuda:
            if name.endswith("_") and not name.endswith("__") and here and args[0] is not None and out is args[0]:
                out_marked = here[0] if tensors[0] is here[0] else out
            else:
                out_marked = tree_map(lambda t: t.as_subclass(OnCuda) if isinstance(t, torch.Tensor) else t, out)
            if self.tape is not None:
                self.tape.append((lambda: func(*args, **kwargs), out))
            return out_marked
        return out


MODE = Mode()


def _strict(real, fake):
    """fake, for whose arguments the signature of torch's own function stands."""
    signature = inspect.signature(real)

    def checked(*args, **kwargs):
        signature.bind(*args, **kwargs)
        return fake(*args, **kwargs)

    return checked


def _launch_in_interpreter():
    from triton.runtime.interpreter import InterpretedFunction

    interpreter.prepare()
    original = InterpretedFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        sizes = grid(kwargs) if callable(grid) else grid
        if any(size > 65_535 for size in sizes[1:]) or not all(size > 0 for size in sizes):
            raise RuntimeError(f"Triton Error [CUDA]: invalid argument: grid {tuple(sizes)}")
        for value in args:
            if isinstance(value, torch.Tensor) and not isinstance(value, OnCuda):
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        MODE.launches += 1
        given = [_plain(value) for value in args]

        def work():
            with torch._C.DisableTorchFunction():
                original(self, *given, grid=grid, warmup=warmup, **kwargs)

        work()
        if MODE.tape is not None:
            MODE.tape.append((work, None))

    InterpretedFunction.run = run


def install():
    """Give this process a CUDA device, for the rest of its life."""
    cuda, low = torch.cuda, torch._C
    _launch_in_interpreter()
    torch.Generator = Generator
    current = Stream(CUDA)

    def of_device(index):
        assert index == 0, f"CUDA error: invalid device ordinal {index}"

    def exchange(index):
        if index > 0:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return 0

    low._cuda_setDevice = of_device
    low._cuda_getDevice = lambda: 0
    low._cuda_synchronize = lambda: None
    low._cuda_sleep = lambda cycles: None
    low._cuda_exchangeDevice = low._cuda_maybeExchangeDevice = exchange
    cuda._exchange_device = cuda._maybe_exchange_device = exchange
    cuda._lazy_init = lambda: None
    cuda.is_initialized = lambda: True
    cuda.Event, cuda.Stream, cuda.CUDAGraph, cuda.graph = Event, Stream, Graph, graph
    properties = SimpleNamespace(
        name="a CPU named cuda", total_memory=1 << 34, multi_processor_count=1, major=9, minor=0
    )
    for name, fake in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "current_stream": lambda device=None: current,
        "stream": lambda stream: contextlib.nullcontext(),
        "mem_get_info": lambda device=None: (1 << 33, 1 << 34),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed_all": lambda seed: None,
    }.items():
        setattr(cuda, name, _strict(getattr(cuda, name), fake))
    # A module that is moved gets new parameters: those on the device are another class.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    MODE.__enter__()


if __name__ == "__main__":
    install()
    sys.modules["mock_cuda"] = sys.modules["__main__"]
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
