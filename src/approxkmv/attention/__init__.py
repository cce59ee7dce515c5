"""The attention methods of the sweep: exact, trivial and approximate, one file each, with one interface."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from approxkmv.errors import InputError, did_you_mean
from approxkmv.lazy import attributes

if TYPE_CHECKING:
    from approxkmv.attention.contract import Method as Method
    from approxkmv.attention.contract import UnavailableError as UnavailableError

__all__ = ["Method", "UnavailableError", "get", "methods"]

# One line per method: its name, and the module of this package that defines it as `method`.
_MODULES = {
    "exact-naive": "exact.naive",
    "exact-sdpa": "exact.sdpa",
    "exact-sdpa-bf16": "exact.sdpa_bf16",
    "exact-tiles-bf16": "exact.tiles_bf16",
    "exact-fused": "exact.fused",
    "mean": "trivial.mean",
    "uniform": "trivial.uniform",
    "own-key": "trivial.own_key",
    "window": "coresets.window",
    "approxkmv-paper": "hashed.approxkmv_paper",
    "kdeformer": "hashed.kdeformer",
    "hyperattention": "hashed.hyperattention",
    "clustered": "blocks.clustered",
    "vkde-lsh": "hashed.vkde_lsh",
    "approxkmv": "blocks.approxkmv",
    "local-expansion": "blocks.local_expansion",
    "balancekv": "coresets.balancekv",
    "top-k": "searched.top_k",
    "vattention": "searched.vattention",
    "knn": "searched.knn",
    "hnsw": "searched.hnsw",
    "vamana": "searched.vamana",
}


def methods() -> list[str]:
    """The names of all methods, the exact ones first."""
    return list(_MODULES)


def check_name(name: str) -> None:
    """Raise InputError, suggesting the closest name, unless a method has this name. Needs no torch."""
    if name not in methods():
        raise InputError(f"no method is called {name!r}; {did_you_mean(name, _MODULES, 'there are', cutoff=0.4)}")


def get(name: str) -> Method:
    """The method with this name. Raises InputError, suggesting the closest name, if there is none."""
    check_name(name)
    method: Method = import_module(f"{__name__}.{_MODULES[name]}").method
    return method


# On demand: method names in a configuration are checked without importing torch.
__getattr__ = attributes(__name__, {"contract": ["Method", "UnavailableError"]})
