"""Triton's interpreter without a search of its whole language at every call of a function within a kernel."""

from __future__ import annotations


def patch_once_per_launch() -> None:
    """The interpreter replaces the language's functions at each such call; those of a launch are replaced already."""
    from triton.runtime import interpreter

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
