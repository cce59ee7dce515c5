"""The inputs of a sweep: word vectors and the heads of a real model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch

from approxkmv.compute.memory import free_bytes
from approxkmv.errors import InputError, SourceError, one_line
from approxkmv.sweep.settings import CaptureSettings, WorkloadSettings
from approxkmv.sweep.word_vectors import shipped_vectors, word_vectors
from approxkmv.typed import shown

PARTS = ("tuning", "evaluation")
# KDEformer's demonstration divides the logits by sqrt(10) instead of sqrt(100), which makes them sharp.
_SHARPER = {"glove-paper": 1.0, "glove-sharp": 10**0.5, "glove-split": 10**0.5}
# Rows from one input of a capture to the next.
_STEP = 64


@dataclass(frozen=True)
class Problem:
    """Inputs of one attention: q (batch, n_q, d), k (batch, n, d), v (batch, n, d_v), and the factor of the logits."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    causal: bool = False


@dataclass(frozen=True)
class Case:
    """A workload at one length, batch and choice of columns."""

    settings: WorkloadSettings
    n: int
    batch: int
    columns: str
    head: int | None = None
    queries: int | None = None

    @property
    def name(self) -> str:
        """The workload's name, with the head for a model, the mask and the number of queries if they are few."""
        head = "" if self.head is None else f"-{self.head}"
        queries = "" if self.queries is None else f"-q{self.queries}"
        return f"{self.settings.name}{head}{'-causal' if self.settings.causal else ''}{queries}"


def cases(settings: WorkloadSettings) -> Iterator[Case]:
    """Every combination of length, batch, columns, head and number of queries."""
    heads: tuple[int | None, ...] = (settings.heads or (0,)) if settings.name == "model-qk" else (None,)
    ways = product(heads, settings.queries or (None,), settings.columns, settings.batches, settings.lengths)
    for head, queries, columns, batch, n in ways:
        yield Case(settings, n, batch, columns, head, queries)


def _needed(case: Case) -> int:
    return 2 * case.n if case.settings.name == "glove-split" else case.n


def check_case(case: Case) -> None:
    """Raise InputError when n exceeds the available rows, SourceError when a file cannot be read."""
    if case.settings.name == "model-qk":
        _capture_of(case, "evaluation")
        _capture_of(case, "tuning")
        return
    rows, d = word_vectors(case.settings.path)[: case.settings.rows].shape
    if d < 2:
        raise InputError(f"{case.name} takes the second column as values, but its word vectors have {d}")
    if _needed(case) > rows:
        raise InputError(f"{case.name} at n = {case.n} needs {_needed(case)} word vectors, but there are {rows}")


def files(settings: WorkloadSettings) -> list[Path]:
    """The files from which a workload's inputs are made."""
    if settings.name == "model-qk":
        return [Path(path) for path in (settings.path, settings.tuning_path) if path is not None]
    return [shipped_vectors() if settings.path is None else Path(settings.path)]


def shares_inputs(case: Case, inputs: int) -> bool:
    """Whether there are too few rows to tune a case on so many inputs of rows other than those it is measured on."""
    settings = case.settings
    if settings.name != "model-qk":
        rows = len(word_vectors(settings.path)[: settings.rows])
        return 2 * _needed(case) > min(rows, 4 * _needed(case))
    if settings.tuning_path is not None and not Path(str(settings.path)).samefile(settings.tuning_path):
        return False
    rows = _capture_of(case, "evaluation")[0]["q"].shape[1]
    # Those of each part move towards the other's.
    return 2 * (case.n * case.batch + _STEP * (inputs - 1)) > rows


def _word_problem(case: Case, part: str, index: int) -> Problem:
    check_case(case)
    vectors = word_vectors(case.settings.path)[: case.settings.rows]
    needed = _needed(case)
    # Rows, and q, k and v made from them, in float32. Where memory is overcommitted, allocating would kill the process.
    size, free = 4 * case.batch * vectors.shape[1] * (needed + 3 * case.n), free_bytes(torch.device("cpu"))
    if size > free:
        raise MemoryError(f"one input takes {size / 2**30:.4g} GiB, but {free / 2**30:.4g} GiB are free")
    # The most frequent words, four times as many as needed if available, with tuning and evaluation on alternate ones.
    pool = np.arange(min(len(vectors), 4 * needed))
    if 2 * needed <= len(pool):
        pool = pool[PARTS.index(part) :: 2]
    entries = []
    for b in range(case.batch):
        generator = np.random.default_rng([PARTS.index(part), index, b])
        entries.append(vectors[generator.permutation(pool)[:needed]])
    rows = torch.from_numpy(np.stack(entries))
    if case.settings.name == "glove-split":
        q, k = rows[:, 0::2], rows[:, 1::2]
    else:
        q = k = rows
    # As in the paper, Q = K and V are separate selections. If no other rows are left, V takes the keys' rows in another
    # order, which are just as unrelated to the keys.
    values = rows[:, torch.randperm(needed, generator=torch.Generator().manual_seed(index))]
    v = k if case.settings.values == "keys" else values[:, : k.shape[1]]
    v = v[..., 1:2] if case.columns == "one" else v
    q, k, v = (t.contiguous().clone() for t in (q, k, v))
    return Problem(q, k, v, _SHARPER[case.settings.name] * q.shape[2] ** -0.5)


@cache
def _capture(path: str) -> tuple[dict[str, torch.Tensor], float, dict[str, str]]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise SourceError("model-qk reads a capture with the package safetensors: install it") from error
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in ("q", "k", "v")}
            metadata = file.metadata() or {}
        scale = float(metadata.get("scale", tensors["q"].shape[-1] ** -0.5))
    except Exception as error:  # safetensors raises its own type, which it does not export
        raise SourceError(f"{path}: no capture with tensors q, k, v could be read ({one_line(error)})") from error
    q, k, v = tensors.values()
    if any(t.ndim != 3 or 0 in t.shape for t in (q, k, v)) or q.shape != k.shape or k.shape[:2] != v.shape[:2]:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise SourceError(f"{path}: q, k and v of a capture are (heads, tokens, width), here {shapes}")
    if not all(bool(t.isfinite().all()) for t in (q, k, v)):
        raise SourceError(f"{path}: q, k or v holds a NaN or an infinity")
    if not 0 < scale < float("inf"):
        raise SourceError(f"{path}: its scale is {scale}, which is not a number above 0")
    return tensors, scale, metadata


def check_capture(path: str, wanted: CaptureSettings) -> None:
    """Raise SourceError for a capture of another model or of other heads; those of earlier versions name no model."""
    named = _capture(path)[2]
    heads = " ".join(f"{layer}.{head}" for layer, head in wanted.heads)
    for what, value in (("model", wanted.model), ("heads", heads)):
        if (found := named.get(what, value)) != value:
            raise SourceError(f"{path} has the {what} {shown(found)}, the sweep {value!r}: run model-heads again")


def _capture_of(case: Case, part: str) -> tuple[dict[str, torch.Tensor], float]:
    settings, head = case.settings, case.head or 0
    elsewhere = part == "tuning" and settings.tuning_path is not None
    path = str(settings.tuning_path if elsewhere else settings.path)
    tensors, scale, _ = _capture(path)
    heads, rows, _ = tensors["q"].shape
    if head >= heads:
        raise InputError(f"model-qk: head {head} was requested, but {path} holds {heads}")
    if case.n * case.batch > rows:
        raise InputError(f"model-qk at n = {case.n}, batch {case.batch} needs {case.n * case.batch} tokens of {rows}")
    return tensors, scale


def _model_problem(case: Case, part: str, index: int) -> Problem:
    tensors, scale = _capture_of(case, part)
    head = case.head or 0
    rows = tensors["q"].shape[1]
    # Tuning starts from the front and evaluation from the back, a little further in for each input if there is room.
    room = rows - case.n * case.batch
    offset = min(room, index * _STEP)
    first = offset if part == "tuning" else room - offset
    chosen = [
        tensors[name][head, first : first + case.n * case.batch].view(case.batch, case.n, -1).clone()
        for name in ("q", "k", "v")
    ]
    v = chosen[2][..., :1].contiguous() if case.columns == "one" else chosen[2]
    return Problem(chosen[0], chosen[1], v, scale)


def load(case: Case, part: str, index: int, device: str = "cpu", dtype: str = "float32") -> Problem:
    """The index-th input of a case, of its 'tuning' or its 'evaluation' part.

    Raises InputError when n exceeds the available rows and SourceError when a file cannot be read.
    """
    build = _model_problem if case.settings.name == "model-qk" else _word_problem
    problem = build(case, part, index)
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    q = problem.q if case.queries is None else problem.q[:, -case.queries :].contiguous()
    q, k, v = (t.to(device=device, dtype=kind) for t in (q, problem.k, problem.v))
    return Problem(q, k, v, problem.scale, case.settings.causal)
