"""How a result was made: command, machine, versions, commit. Written as JSON beside each table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    *("numpy", "torch", "numba", "transformers", "datasets", "pandas", "matplotlib", "snakemake", "triton"),
    *("faiss-cpu", "scikit-learn", "pykeops"),
)


def processor() -> str:
    """The processor's model name, or what the platform calls it."""
    name = re.search(r"^model name.*?:(.*)", _cpuinfo(), re.MULTILINE)
    return name[1].strip() if name else platform.processor() or platform.machine()


# What decides how fast exact attention is in either precision; names of processors often hide it.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def instructions() -> list[str]:
    """The vector and matrix instructions that the processor says it has, of those that matter for timings."""
    flags = set(_cpuinfo().split())
    return [name for name in _INSTRUCTIONS if name in flags]


# Settings of torch's libraries and of numba: for which CPU they run, or how precisely. What is fastest depends on them.
_SETTINGS = (
    *("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "NUMBA_CPU_FEATURES", "NUMBA_CPU_NAME"),
    *("DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA"),
)


def instruction_settings() -> dict[str, str]:
    """The environment variables that are set of those that have libraries run as on another CPU than this one."""
    return {name: os.environ[name] for name in _SETTINGS if name in os.environ}


def as_on_another_cpu() -> dict[str, dict[str, str]]:
    """These variables as a record of a machine names them; empty where none is set, as in records of before."""
    return {"settings": found} if (found := instruction_settings()) else {}


def _cpuinfo() -> str:
    """What Linux says of the processors; nothing on other systems."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def versions() -> dict[str, str]:
    """Versions of Python and of those installed packages that affect results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout this package runs from, with "+" if files differ from it; None outside a checkout."""

    def git(*words: str) -> str:
        folder = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def command() -> str:
    """The command line of this process, as one would type it in the checkout."""
    started = Path(sys.argv[0])
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None:
        words = ["python", "-m", module.name.removesuffix(".__main__")]
    elif started.suffix == ".py":
        root = Path(__file__).resolve().parents[2]
        whole = started.resolve()
        words = ["python", str(whole.relative_to(root) if whole.is_relative_to(root) else started)]
    else:
        words = [started.name]
    return " ".join([*words, *sys.argv[1:]])


def describe(settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """The record written beside a table; it holds no times, so that a second run writes the same bytes."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "command": command(),
        "commit": commit(),
        "machine": {
            "processor": processor(),
            "instructions": instructions(),
            **as_on_another_cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
            "device": device,
        },
        "versions": versions(),
        "settings": settings or {},
    }
