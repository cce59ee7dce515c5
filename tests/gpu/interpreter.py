"""Triton's interpreter: faster calls within a kernel, two faults mended, and the kernels' line of inline assembly."""

from __future__ import annotations

from types import SimpleNamespace


def prepare() -> None:
    """Before the first launch."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    # It replaces functions of the language at each call within a kernel; those of a launch are replaced already.
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[int] = set()

    def launched(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def patched_once(fn):
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            return patch(fn)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launched, patched_once

    # Triton 3.6 cannot make a range to a number of the launch under NumPy 2.4, which wants a scalar.
    patch_tensor = interpreter._patch_lang_tensor

    def patched_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched_tensor

    # It multiplies the bits of bfloat16 as integers.
    dot = interpreter.InterpreterBuilder.create_dot

    def wide(handle):
        if handle.dtype != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def wide_dot(self, a, b, *rest):
        return dot(self, wide(a), wide(b), *rest)

    interpreter.InterpreterBuilder.create_dot = wide_dot

    # It runs no inline assembly; the kernels use only a copy of registers.
    def copied(self, assembly, constraints, values, *_):
        assert assembly == "mov.b32 $0, $1;"
        return SimpleNamespace(get_result=lambda i: values[i])

    interpreter.InterpreterBuilder.create_inline_asm = copied
