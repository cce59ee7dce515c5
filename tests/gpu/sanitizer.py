"""A memory checker for Triton's interpreter, which runs one program after another and so hides what a GPU would not.

Within `watched()` each launch is checked for

- accesses outside the tensors that were passed;
- reads of memory from `torch.empty` that no kernel has written;
- two programs that touch one element, at least one of them by a plain store: they may run in any order, or together;
- a program's loads and stores of an element that it stored, or stores of one that it loaded, without a barrier between
  them: other warps of the program may be ahead.

Does for Triton's kernels, without a GPU, what `compute-sanitizer` does on one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import numpy as np
import torch


class _Storage:
    """What has been done to each element of one storage since the launch began."""

    def __init__(self, start: int, size: int, length: int) -> None:
        self.start, self.size = start, size
        self.writers, self.readers, self.adders = (np.zeros(length, np.int32) for _ in range(3))
        # Barriers of the program that stored or loaded an element last
        self.stored, self.loaded = np.full(length, -1), np.full(length, -1)


class Sanitizer:
    """Faults found so far (strings), and the number of accesses looked at."""

    def __init__(self) -> None:
        self.faults: dict[str, None] = {}
        self.accesses = 0
        # By address, the elements of a tensor of torch.empty that are written; the tensors, so that none is reused
        self._written: dict[int, np.ndarray] = {}
        self._kept: list[torch.Tensor] = []

    def empty(self, tensor: torch.Tensor) -> torch.Tensor:
        self._kept.append(tensor)
        self._written[tensor.untyped_storage().data_ptr()] = np.zeros(tensor.numel(), bool)
        return tensor

    def launch(self, tensors: list[torch.Tensor]) -> None:
        self._program = self._barriers = 0
        self._storages: dict[int, _Storage] = {}
        self._extents = []
        for tensor in tensors:
            if tensor.numel() == 0:
                continue
            storage, size = tensor.untyped_storage(), tensor.element_size()
            key = storage.data_ptr()
            self._storages.setdefault(key, _Storage(key, size, storage.nbytes() // size))
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            self._extents.append((tensor.data_ptr(), tensor.data_ptr() + last * size, key))

    def program(self) -> None:
        self._program += 1
        self._barriers = 0

    def barrier(self) -> None:
        self._barriers += 1

    def access(self, kind: str, addresses: np.ndarray) -> None:
        """kind: load, store or add (atomic)."""
        if not addresses.size:
            return
        self.accesses += 1
        addresses = addresses.astype(np.int64).ravel()
        low, high = addresses.min(), addresses.max()
        key = next((key for first, last, key in self._extents if first <= low and high <= last), None)
        if key is None:
            self._fault(f"{kind} outside the tensors")
            return
        storage, program = self._storages[key], self._program
        at = (addresses - storage.start) // storage.size
        written = self._written.get(key)
        if kind != "store" and written is not None and not written[at].all():
            self._fault(f"{kind} of memory that nothing has written")
        if kind != "load" and written is not None:
            written[at] = True
        others = [storage.writers] if kind == "load" else [storage.writers, storage.readers]
        if kind != "add":
            others.append(storage.adders)
        if any(bool(((mark := other[at]) != 0).any() and ((mark != 0) & (mark != program)).any()) for other in others):
            self._fault(f"{kind} of an element that another program touches")
        if kind != "add" and (storage.stored[at] == self._barriers)[storage.writers[at] == program].any():
            self._fault(f"{kind} of an element stored since the last barrier")
        if kind == "store":
            if (storage.loaded[at] == self._barriers)[storage.readers[at] == program].any():
                self._fault("store to an element loaded since the last barrier")
            if len(np.unique(at)) < len(at):
                self._fault("store of two values to one element")
            storage.writers[at], storage.stored[at] = program, self._barriers
        elif kind == "load":
            # -1: several programs
            storage.readers[at] = np.where((storage.readers[at] == 0) | (storage.readers[at] == program), program, -1)
            storage.loaded[at] = self._barriers
        else:
            storage.adders[at] = np.where((storage.adders[at] == 0) | (storage.adders[at] == program), program, -1)

    def _fault(self, what: str) -> None:
        frame = sys._getframe()
        # The kernel's own line: the first above the interpreter and the standard library
        while frame is not None and not frame.f_code.co_name.endswith("kernel"):
            frame = frame.f_back
        where = "" if frame is None else f"{frame.f_code.co_name}, line {frame.f_lineno}: "
        self.faults[where + what] = None


@contextlib.contextmanager
def watched() -> Iterator[Sanitizer]:
    """Check every launch in the interpreter."""
    from triton.runtime import interpreter

    found = Sanitizer()
    builder = interpreter.InterpreterBuilder
    with contextlib.ExitStack() as stack:

        def replace(owner, name, make):
            original = getattr(owner, name)
            setattr(owner, name, make(original))
            stack.callback(setattr, owner, name, original)

        def launch(original):
            def call(self, *args, **kwargs):
                found.launch([t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)])
                return original(self, *args, **kwargs)

            return call

        def before(act):
            """As the original, after act of the same arguments."""

            def make(original):
                def call(self, *args, **kwargs):
                    act(*args)
                    return original(self, *args, **kwargs)

                return call

            return make

        replace(interpreter.GridExecutor, "__call__", launch)
        replace(builder, "set_grid_idx", before(lambda *_: found.program()))
        replace(builder, "create_barrier", before(found.barrier))
        for name, kind, mask in (
            ("create_masked_load", "load", 1),
            ("create_masked_store", "store", 2),
            ("create_atomic_rmw", "add", 3),
        ):
            pointer = 1 if kind == "add" else 0

            def act(*args, kind=kind, mask=mask, pointer=pointer):
                addresses, chosen = np.broadcast_arrays(args[pointer].data, args[mask].data)
                found.access(kind, addresses[chosen.astype(bool)])

            replace(builder, name, before(act))
        replace(torch, "empty", lambda original: lambda *args, **kwargs: found.empty(original(*args, **kwargs)))
        yield found
