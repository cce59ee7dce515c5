"""numba's compiler with a cache that tracks all sources: import this only where numba is installed.

numba's own cache checks whether the file of a function has changed, but not the files whose functions and constants are
compiled into it; and two processes that write its index at once may store code under the wrong signature.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from approxkmv.errors import TableError
from approxkmv.files import cache_folder, written_whole
from approxkmv.imports import digest_of, files_behind

_UNUSED = 30 * 86400  # seconds after which code that nobody loaded is deleted


def cached_njit(**options: Any) -> Callable[[Callable], Callable]:
    """numba.njit whose machine code is cached between processes until one of its sources changes.

    The cache is `approxkmv/compiled` below NUMBA_CACHE_DIR, XDG_CACHE_HOME or ~/.cache, whichever is set first; if
    nothing can be written there, each process compiles for itself. Under NUMBA_DISABLE_JIT=1 functions stay Python.
    """

    def decorate(function: Callable) -> Callable:
        compiled: Any = numba.njit(**options)(function)
        folder = cache_folder()
        if folder and compiled is not function:  # the same under NUMBA_DISABLE_JIT
            compiled._cache = _Cache(function, folder / "compiled")
        return compiled

    return decorate


@cache
def _origin(source: str) -> bytes:
    """Everything that determines the code of a source file: what it imports, Python, numba, its settings."""
    settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    sources = digest_of(files_behind(Path(source).resolve()))
    return repr((platform.python_version(), numba.__version__, settings, sources)).encode()


class _Cache(NullCache):
    """Where a dispatcher looks for code before it compiles, and stores it afterwards: one file per signature.

    A file starts with the hash of the rest, since damaged machine code would crash the process.
    """

    def __init__(self, function: Callable, folder: Path) -> None:
        self._start = folder / f"{function.__module__}.{function.__qualname__}"
        # Hash now, at import: the file may be edited before the first call.
        self._origin = _origin(function.__code__.co_filename)

    def _path(self, signature: Any, codegen: Any) -> Path:
        key = hashlib.sha256(self._origin + repr((signature, codegen.magic_tuple())).encode()).hexdigest()
        return self._start.with_name(f"{self._start.name}-{key[:32]}")

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        target_context.refresh()
        path = self._path(signature, target_context.codegen())
        try:
            whole = path.read_bytes()
        except OSError:
            return None
        code = whole[32:]
        if hashlib.sha256(code).digest() != whole[:32]:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return CompileResult._rebuild(target_context, *pickle.loads(code))

    def save_overload(self, signature: Any, result: Any) -> None:
        # Such code holds addresses of this process.
        if result.lifted or result.library.has_dynamic_globals:
            return
        path = self._path(signature, result.codegen)
        code = dumps(result._reduce())
        with contextlib.suppress(TableError), written_whole(path) as temporary:
            temporary.write_bytes(hashlib.sha256(code).digest() + code)
        with contextlib.suppress(OSError):
            for file in path.parent.iterdir():
                if file.stat().st_mtime < time.time() - _UNUSED:
                    file.unlink()
