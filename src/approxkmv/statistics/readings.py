"""The definition of c read in several ways: what a constant or a choice of entries does to Assumption (A)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from approxkmv.arrays import Array, is_whole, queries_and_keys, resolve_scale
from approxkmv.compute.threads import over_items
from approxkmv.compute.torch_state import plain_torch
from approxkmv.errors import InputError
from approxkmv.kernels import log_kernel
from approxkmv.statistics.head_to_tail import ratios_of_prefixes
from approxkmv.statistics.heads import HIDDEN
from approxkmv.statistics.order import order_logarithms

PRINTED = "printed"
# Powers of the model's scale between Lemma 4.1's (1) and none at all (0); the middle is section 1's exponent.
POWERS = {PRINTED: 1.0, "power 3/4": 0.75, "sigma": 0.5, "power 1/4": 0.25, "unscaled": 0.0}
READINGS = (PRINTED, "sigma", "unscaled", "float32", "softmax", "centred", "balanced", "no-special")
# exp of less is 0 in float32, whose smallest number is 2^-149; more than half of it is still rounded up.
LOG_SMALLEST_FLOAT32 = float(np.log(2.0) * -150)


@dataclass(frozen=True)
class Reading:
    """Experiments (i) and (ii) of `heads` heads under one reading; float64 arrays (heads,)."""

    ratio: np.ndarray
    """The largest c over prefixes (of `softmax`: at full length); nan where every prefix is 0/0 or there is none."""
    log_next: np.ndarray
    """log of K_(n)/K_(n+1); of `float32` infinite where K_(n+1) is 0, and nan where K_(n) is 0 as well."""
    log_double: np.ndarray
    """log of K_(n)/K_(2n), likewise."""
    underflows: np.ndarray
    """Whether K_(2n) is 0 as a float32, so that there K_(n)/K_(2n) is infinite, or 0/0."""
    undefined: np.ndarray
    """Whether K_(n) is 0 too, so that it is 0/0."""


@plain_torch()
def readings(
    q: Array,
    k: Array,
    min_prefix: int = 50,
    scale: float | None = None,
    *,
    mask: np.ndarray | None = None,
    special: np.ndarray | None = None,
) -> dict[str, Reading]:
    """What c and the order ratios of a text's heads are under each of READINGS, and without a mask along POWERS.

    >>> found = readings(torch.randn(12, 80, 64), torch.randn(12, 80, 64))
    >>> sorted(set(READINGS) - set(found)), found["sigma"].ratio.shape
    ([], (12,))

    `printed`: Lemma 4.1 with the model's scale s, exponent s |q' - k'|^2 / 2, so sigma^2 = 1/s. `sigma`: section 1's
    |x - y|^2 / (2 sigma), the scale sqrt(s). `unscaled`: the scale 1. `float32`: entries as exponentials in float32.
    `softmax`: D^-1 A. `centred`: keys less their mean. `balanced`: q and k rescaled to equal root mean squares.
    `no-special`: without the special tokens. All but the first three and `float32` leave attention as it is.

    Args:
        q, k: (heads, n, d) queries and keys of the same n tokens. min_prefix: the first prefix of c.
        scale: the model's factor of the logits; None means 1/sqrt(d).
        mask: (n, n) bool, True for the entries that exist; None takes all.
        special: (n,) bool, which tokens are special; None takes none.
    Raises:
        InputError: shapes that do not fit, non-finite values, a bad scale or prefix, a mask that is no bool array.
    """
    queries, keys, _ = queries_and_keys(q, k)
    s = resolve_scale(scale, queries.shape[-1])
    n = queries.shape[-2]
    if queries.ndim != 3 or keys.shape != queries.shape:
        raise InputError(f"q {tuple(queries.shape)} and k {tuple(keys.shape)} must both be (heads, n, d)")
    if not is_whole(min_prefix) or min_prefix < 1:
        raise InputError(f"min_prefix is {min_prefix!r}: it must be a whole number of at least 1")
    for array, name, shape in ((mask, "mask", (n, n)), (special, "special", (n,))):
        if array is not None and not (
            isinstance(array, np.ndarray) and array.dtype == np.bool_ and array.shape == shape
        ):
            raise InputError(f"{name} must be a NumPy array of bool, {shape}")
    printed = _kernel(queries, keys, s)
    found: dict[str, Reading] = {}

    def measured(log_values: np.ndarray, seen: np.ndarray | None = mask, whole: bool = False) -> Reading:
        first = log_values.shape[-1] if whole else min_prefix
        return _measure(log_values, seen, first)

    for name, power in POWERS.items():
        # The scales between the readings are for the paper's entries, all of them.
        if mask is None or name in READINGS:
            found[name] = measured(printed * (s**power / s))
    found["softmax"] = measured(_log_softmax(queries, keys, s, mask), whole=True)
    found["centred"] = measured(_kernel(queries, keys - keys.mean(-2, keepdim=True), s))
    # t (..., 1, 1) with t |q| = |k| / t in the mean of squares.
    t = (keys.square().mean((-2, -1), keepdim=True) / queries.square().mean((-2, -1), keepdim=True)) ** 0.25
    # A head whose queries or keys are all 0 stays as it is.
    t = torch.where(t.isfinite() & (t > 0), t, 1.0)
    found["balanced"] = measured(_kernel(queries * t, keys / t, s))
    with np.errstate(under="ignore", divide="ignore"):
        float32 = np.log(np.exp(printed).astype(np.float32).astype(np.float64))
    found["float32"] = measured(np.maximum(float32, HIDDEN))
    kept = np.ones(n, bool) if special is None else ~np.asarray(special)
    if kept.all():
        found["no-special"] = found[PRINTED]
    else:
        of_kept = np.ix_(kept, kept)
        seen = None if mask is None else mask[of_kept]
        rest = _kernel(queries[:, kept], keys[:, kept], s)
        found["no-special"] = measured(rest, seen)
    return found


def _kernel(queries: torch.Tensor, keys: torch.Tensor, s: float) -> np.ndarray:
    return np.asarray(log_kernel(queries.cpu(), keys.cpu(), s))


def _log_softmax(queries: torch.Tensor, keys: torch.Tensor, s: float, mask: np.ndarray | None) -> np.ndarray:
    logits = s * (queries @ keys.mT)
    if mask is not None:
        logits = logits.masked_fill(torch.from_numpy(~mask).to(logits.device), -torch.inf)
    return np.maximum(logits.log_softmax(-1).cpu().numpy(), HIDDEN)


def _measure(log_values: np.ndarray, mask: np.ndarray | None, first: int) -> Reading:
    """One reading from log K of its heads (heads, n, n); an entry that is 0 is HIDDEN, as one that the mask hides."""
    heads, n = log_values.shape[:2]
    if n < first or n < 3:
        nothing = np.full(heads, np.nan)
        return Reading(nothing, nothing, nothing, *np.zeros((2, heads), bool))
    values = log_values if mask is None else np.where(mask, log_values, HIDDEN)
    # Nothing above the diagonal need be read where nothing of it is seen.
    causal = mask is not None and not np.triu(mask, 1).any()
    ratios = np.empty((heads, n - first + 1))
    logs = np.empty((heads, 3))

    def one_head(head: int) -> None:
        ratios_of_prefixes(values[head], first, causal, ratios[head])
        order_logarithms(values[head], causal, logs[head])

    over_items(one_head, range(heads))
    # A prefix whose entries are all 0 has c = 0/0.
    empty = values[:, :first, :first].max((1, 2)) == HIDDEN
    for head in np.flatnonzero(empty):
        ratios[head, _largest_of_prefixes(values[head])[first - 1 :] == HIDDEN] = np.nan
    with np.errstate(invalid="ignore"):
        highest, following, double = np.where(logs == HIDDEN, -np.inf, logs).T
        return Reading(
            np.array([np.nan if np.isnan(row).all() else np.nanmax(row) for row in ratios]),
            highest - following,
            highest - double,
            double < LOG_SMALLEST_FLOAT32,
            highest < LOG_SMALLEST_FLOAT32,
        )


def _largest_of_prefixes(values: np.ndarray) -> np.ndarray:
    """(n,): the largest entry of values[:i, :i], i = 1..n."""
    rows = np.where(np.tri(len(values), dtype=bool), values, HIDDEN).max(1)
    columns = np.where(np.tri(len(values), dtype=bool).T, values, HIDDEN).max(0)
    return np.maximum.accumulate(np.maximum(rows, columns))


def even_places(count: int, wanted: int) -> Iterator[int]:
    """At most `wanted` of `count` places, evenly spread."""
    yield from sorted({round(i * (count - 1) / max(1, min(wanted, count) - 1)) for i in range(min(wanted, count))})
