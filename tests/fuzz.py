"""Random calls of the public functions: an answer that is right, or an exception of the package; nothing else.

`kinds()` names them. A call is determined by its kind and seed alone, so a failed one can be repeated:
python tests/fuzz.py KIND SEED.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch

from approxkmv import (
    approx_attention,
    approx_kmv,
    attention_statistics,
    log_kernel,
    order_ratios,
    reduce_attention,
    top_eigenvalue,
)
from approxkmv.attention import get, methods
from approxkmv.attention.blocks import chunks
from approxkmv.corpora import read_corpus
from approxkmv.errors import ApproxKMVError
from approxkmv.files import read_table
from approxkmv.statistics import unmasked_and_masked_statistics
from approxkmv.statistics.streaming import length_statistics

# Of float32 sums of some hundred products, relative to the sum of their absolute values.
ROUNDING = 1e-6
# Exponentials and quotients of the exact methods, relative.
EXACT = 1e-5
# bfloat16 has 8 bits: weights, values and answers are rounded to them.
BRAIN = 2.0**-6


class Wrong(Exception):
    """An answer that is not right."""


class Bad(Exception):
    """A call that must be refused was answered."""


def demand(holds: object, *what: object) -> None:
    if not bool(holds):
        raise Wrong(" ".join(map(str, what)))


def below(rng: np.random.Generator, most: int) -> int:
    """A whole number from 1 to `most`; half of the time small ones are as likely as great ones."""
    return int(rng.integers(most)) + 1 if rng.random() < 0.5 else int(math.exp(rng.uniform(0, math.log(most + 1))))


def rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Points (..., n, width) of a random kind."""
    out = rng.standard_normal(shape) * 10 ** rng.uniform(-2, 1)
    kind = rng.integers(12)
    if kind == 0:
        out[:] = 0.0
    elif kind == 1:
        out *= 1e-40  # subnormal in float32
    elif kind == 2:
        out *= 10 ** rng.uniform(2, 30)
    elif kind == 3:
        out[:] = out.flat[0]
    elif kind == 4:
        out[:] = out[..., rng.integers(0, shape[-2], shape[-2]), :]
    elif kind == 5:
        out[..., rng.integers(shape[-2]), :] *= 10 ** rng.uniform(1, 3)
    elif kind == 6:
        out *= rng.random(shape) < 0.1
    elif kind == 7:
        out += 10 ** rng.uniform(0, 3)
    elif kind == 8:
        out[rng.random(shape) < 0.05] *= 10 ** rng.uniform(1, 6)
    return out


def values(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.ones(shape) if rng.random() < 0.2 else rows(rng, *shape)


def poisoned(rng: np.random.Generator, arrays: list[Any]) -> bool:
    """One time in ten puts a NaN or an infinity into one of the arrays."""
    if rng.random() > 0.1:
        return False
    array = arrays[rng.integers(len(arrays))]
    array.flat[rng.integers(array.size)] = rng.choice([np.nan, np.inf, -np.inf])
    return True


def seen_by_window(n_q: int, n: int, window: int, sinks: int, causal: bool) -> torch.Tensor:
    """Which keys each query of method window sees (n_q, n), as its document says."""
    if n_q < n:
        kept = (torch.arange(n) >= n - n_q - window) | (torch.arange(n) < min(sinks, window))
        return kept.expand(n_q, n)
    i, j = torch.arange(n).unsqueeze(1), torch.arange(n)
    block, of_key = i // window, j // window
    if causal:
        return (j <= i) & ((of_key >= block - 1) | (j < min(sinks, window)))
    if n <= 4 * window:
        return torch.ones(n, n, dtype=torch.bool)
    start = ((block - 1) * window).clamp(0, n - 3 * window)
    return ((j >= start) & (j < start + 3 * window)) | ((j < min(sinks, window)) & (block >= 2))


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, seen: torch.Tensor
) -> torch.Tensor:
    logits = (scale * (q.double() @ k.double().mT)).masked_fill(~seen, -math.inf)
    return logits.softmax(-1) @ v.double()


def attention(name: str, causal: bool, rng: np.random.Generator) -> None:
    method = get(name)
    most = 700 if rng.random() < 0.1 else 150
    n_q, n_k, d, d_v, batch = (below(rng, m) for m in (most, most, 80, 70, 3))
    if causal or name == "own-key" or (name == "window" and rng.random() < 0.5):
        n_k = n_q
    arrays = [rows(rng, batch, n_q, d), rows(rng, batch, n_k, d), values(rng, batch, n_k, d_v)]
    ones = bool((arrays[2] == 1.0).all())
    bad = poisoned(rng, arrays) or (name == "window" and n_q > n_k)
    dtype = torch.bfloat16 if rng.random() < 0.25 else torch.float32
    with np.errstate(over="ignore"):
        q, k, v = (torch.from_numpy(array).to(dtype) for array in arrays)
    scale: Any = rng.choice([None, d**-0.5, 1e-3, 1.0, 10 ** rng.uniform(-40, 40)])
    longest = float(q.double().norm(dim=-1).amax() * k.double().norm(dim=-1).amax())
    if rng.random() < 0.6 and 1e-30 < longest < 1e30:
        # Largest logits from 1 to 100, where attention is neither the mean nor one key.
        scale = 10 ** rng.uniform(0, 2) / longest
    parameters = dict(method.grid[rng.integers(len(method.grid))]) if rng.random() < 0.5 else {}
    if name == "window":
        parameters |= {"window": below(rng, 40), "sinks": int(rng.integers(51))}
        parameters["products"] = str(rng.choice(["float32", "bfloat16"]))
    elif causal and name in ("approxkmv", "local-expansion"):
        # With these a chunk has at least 32 queries, or 64 of more than 128.
        parameters |= {"block": below(rng, 40), "near": below(rng, 40), "directions": int(rng.choice([0, 8, 48]))}
    mistake = rng.integers(40)
    if mistake == 0:
        q, bad = q[0], True
    elif mistake == 1:
        k, bad = torch.cat([k, k], -1), True
    elif mistake == 2:
        v, bad = v[:, : n_k - 1], True
    elif mistake == 3:
        parameters, bad = {"no such": 1}, True
    elif mistake == 4:
        scale, bad = rng.choice([0.0, -1.0, math.nan, math.inf]), True
    elif mistake == 5:
        q, bad = q.double(), True
    elif mistake == 6 and method.defaults:
        parameters, bad = {str(rng.choice(list(method.defaults))): -1}, True
    copies = [tensor.clone() for tensor in (q, k, v)]
    call = method.attend_causally if causal else method
    seed = int(rng.integers(2**31))
    with patch.object(chunks, "EXACT_BELOW", 32):
        out = call(q, k, v, scale=None if scale is None else float(scale), seed=seed, **parameters)
    if bad:
        raise Bad("answered")
    demand(all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True)), "an input was written to")
    demand(out.shape == (batch, n_q, d_v), "shape", tuple(out.shape))
    demand(out.dtype == dtype, "type", out.dtype)
    demand(out.isfinite().all(), "not finite")
    products = getattr(torch, parameters["products"]) if name == "window" else method.dtype
    brain = BRAIN if torch.bfloat16 in (dtype, products) else 0.0
    largest = float(v.double().abs().amax())
    if ones:
        demand((out.double() - 1).abs().max() < brain + 1e-3, "ones become", float(out.min()), "to", float(out.max()))
    if method.exact or name == "window":
        s = d**-0.5 if scale is None else float(scale)
        # Each logit may be off by its rounding; a weight is then off by that factor, and an answer by twice that.
        # Products of numbers that are bfloat16 from the start are whole, but exact-tiles-bf16 keeps logits in bfloat16.
        in_brain = products == torch.bfloat16 and (dtype != products or name == "exact-tiles-bf16")
        rounding = BRAIN if in_brain else ROUNDING
        off = rounding * s * q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()
        allowed = largest * (min(2.0, 2 * math.expm1(min(off, 1.0))) + EXACT + 2 * brain) + 1e-37
        seen = torch.ones(n_q, n_k, dtype=torch.bool)
        if name == "window":
            seen = seen_by_window(n_q, n_k, parameters["window"], parameters["sinks"], causal)
        elif causal:
            seen = seen.tril()
        gap = (out.double() - attention_reference(q, k, v, s, seen)).abs().max()
        demand(gap <= allowed, "off by", float(gap), "where", float(allowed), "is rounding")


def plain_ratio(logs: np.ndarray, count: int) -> float:
    values = np.sort(np.exp(logs - logs.max()))
    return float(values[:-count].sum() / values[-count:].sum())


def head(rng: np.random.Generator, least: int) -> tuple[np.ndarray, np.ndarray, float | None, bool]:
    n, d = least + below(rng, 90), below(rng, 40)
    q, k = rows(rng, n, d), rows(rng, n, d)
    bad = poisoned(rng, [q, k])
    scale: float | None = None
    if rng.random() < 0.5:
        scale = float(10 ** rng.uniform(-3, 1))
    mistake = rng.integers(20)
    if mistake == 0:
        q, bad = q[0], True
    elif mistake == 1:
        k, bad = np.concatenate([k, k], 1), True
    elif mistake == 2:
        scale, bad = float(rng.choice([0.0, -1.0, math.nan, math.inf])), True
    return q, k, scale, bad


def logarithms(q: np.ndarray, k: np.ndarray, scale: float | None) -> np.ndarray:
    s = scale or q.shape[1] ** -0.5
    return s * (q @ k.T) - 0.5 * s * (q**2).sum(1)[:, None] - 0.5 * s * (k**2).sum(1).max()


def statistics(rng: np.random.Generator) -> None:
    q, k, scale, bad = head(rng, 3)
    n = len(k)
    first = int(rng.integers(1, n + 1))
    both = unmasked_and_masked_statistics(q, k, first, scale)
    order = order_ratios(torch.from_numpy(q), torch.from_numpy(k), scale)
    if bad:
        raise Bad("answered")
    logs = logarithms(q, k, scale)
    # What the float64 logits themselves may be off by.
    off = 1e-13 * np.abs(logs).max() + 1e-8
    for causal, found in zip((False, True), both, strict=True):
        demand(all(np.isfinite(part).all() for part in vars(found).values()), "not finite")
        demand(found.ratios.shape == (n - first + 1,), "shape", found.ratios.shape)
        for i in {first, n}:
            part = logs[:i, :i]
            entries = part[np.tril(np.ones((i, i), bool))] if causal else part.ravel()
            wanted = plain_ratio(entries, i) if len(entries) > i else 0.0
            got = float(found.ratios[i - first])
            # Sums that are kept from prefix to prefix lose what is 1e-100 of their largest.
            demand(abs(got - wanted) <= 10 * off * wanted + 1e-100, "c is", got, "and not", wanted)
    falling = np.sort(logs.ravel())[::-1]
    demand(abs(float(order.log_next) - (falling[n - 1] - falling[n])) <= off, "log_next is", float(order.log_next))
    demand(abs(float(order.log_double) - (falling[n - 1] - falling[2 * n - 1])) <= off, "log_double")


def lengths(rng: np.random.Generator) -> None:
    q, k, scale, bad = head(rng, 3)
    found = length_statistics(q, k, scale, causal=True, block=int(rng.integers(1, 200)))
    if bad:
        raise Bad("answered")
    off = 1e-13 * np.abs(logarithms(q, k, scale)).max() + 1e-6
    for whole, one in zip(unmasked_and_masked_statistics(q, k, len(k), scale), found[0], strict=True):
        pairs = (whole.ratios[0], one.ratio), (whole.softmax_ratio, one.softmax_ratio)
        for a, b in pairs:
            # Which of two equal keys is larger is rounding where a logit's is a nat.
            demand(off > 1 or abs(a - b) <= 10 * off * abs(a) + 1e-300, "c of heads", float(a), "and of lengths", b)
        demand(abs(float(whole.log_next) - one.log_next) <= off, "log_next", float(whole.log_next), one.log_next)


def attention_rows(rng: np.random.Generator) -> None:
    q, k, scale, bad = head(rng, 3)
    n, d = q.shape if q.ndim == 2 else (0, 1)
    options: dict[str, Any] = {"dtype": str(rng.choice(["float32", "float64"]))}
    seen = np.ones((len(q), len(k)), dtype=bool)
    kind = rng.integers(4)
    if kind == 1:
        options["mask"], seen = "causal", np.tri(len(k), dtype=bool)
    elif kind == 2:
        options["mask"] = window = below(rng, len(k))
        seen = np.tri(len(k), dtype=bool) & ~np.tri(len(k), k=-window, dtype=bool)
    elif kind == 3:
        options["mask"] = seen = rng.random(seen.shape) < 0.7
    if rng.integers(3) == 0:
        options["softcap"] = float(10 ** rng.uniform(-1, 2))
    sink = -np.inf
    if rng.integers(3) == 0:
        options["sinks"] = np.array(sink := float(rng.normal()))
    found = attention_statistics(q, k, scale=scale, **options)
    rows_of = {
        name: getattr(found, name) for name in ("entropy", "support", "largest_weight", "first_mass", "sink_mass")
    }
    whole = (found.mean_entropy, found.entropy_quantiles, found.keys_per_share, found.ratio, found.softmax_ratio)
    whole += (found.column_norm, found.stable_rank)
    if bad:
        raise Bad("answered")
    demand(all(np.isfinite(part).all() for part in (*rows_of.values(), *whole)), "not finite")
    s = d**-0.5 if scale is None else scale
    logits = s * (q @ k.T)
    cap = options.get("softcap")
    logits = cap * np.tanh(logits / cap) if cap else logits
    every = torch.from_numpy(np.concatenate([np.where(seen, logits, -np.inf), np.full((n, 1), sink)], 1))
    p = every.softmax(-1).nan_to_num(0.0)
    # What each logit may be off by: sums of products in their type, and the exponentials.
    eps = ROUNDING if options["dtype"] == "float32" else 1e-13
    off = eps * (1 + s * np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max())
    entropy = torch.special.entr(p).sum(-1).numpy()
    # A logit that is off by x changes an entropy by at most x log n or so, and no entropy is above log n.
    allowed = min(math.log(n + 2), 4 * off * (1 + math.log(n)) + 1e-6)
    demand(np.abs(rows_of["entropy"] - entropy).max() <= allowed, "entropy off where", allowed, "is rounding")
    for name, right in (("largest_weight", p[:, :-1].amax(-1)), ("first_mass", p[:, 0]), ("sink_mass", p[:, -1])):
        demand(np.abs(rows_of[name] - right.numpy()).max() <= min(1.0, 2 * off + 1e-6), name)
    demand((found.keys_per_share <= seen.sum(1)[:, None]).all(), "more keys than there are")
    demand(0 <= found.stable_rank <= 1.01 * n, "stable rank", float(found.stable_rank))


def kernel(rng: np.random.Generator) -> None:
    q, k, scale, bad = head(rng, 0)
    logs, reduced = log_kernel(q, k, scale), reduce_attention(q, k, scale)
    if bad:
        raise Bad("answered")
    demand(np.isfinite(logs).all() and (logs <= 0).all(), "log K above 0 or not finite")
    size = 1e-12 * (np.abs(logs).max() + np.abs(np.asarray(reduced.log_row_scale)).max()) + 1e-12
    demand(np.abs(logs - np.minimum(logarithms(q, k, scale), 0)).max() <= size, "log K")
    points = np.asarray(reduced.queries)[:, None] - np.asarray(reduced.keys)
    with np.errstate(over="ignore"):
        exponents = -((points / reduced.sigma) ** 2).sum(-1) / 2
    # Squared distances lose what their points' squares are larger.
    demand(np.abs(exponents - logs).max() <= 10 * size, "the points' kernel")


def product(rng: np.random.Generator) -> None:
    n_q, n_k, d = (below(rng, m) for m in (40, 40, 20))
    q, k, x = rows(rng, n_q, d), rows(rng, n_k, d), rows(rng, n_k, 1)[:, 0]
    bad = poisoned(rng, [q, k, x])
    sigma = float(10 ** rng.uniform(-2, 2))
    epsilon = float(10 ** rng.uniform(-3, 0.5))
    options: dict[str, Any] = {}
    mistake = rng.integers(20)
    if mistake == 0:
        x, bad = x[:-1], True
    elif mistake == 1:
        sigma, bad = float(rng.choice([0.0, -1.0, math.nan, math.inf])), True
    elif mistake == 2:
        epsilon, bad = -epsilon, True
    elif mistake == 3:
        options, bad = {"family": "none"}, True
    elif mistake == 4:
        # Theorem 2.2 at a small epsilon takes minutes.
        options, epsilon = {"density": "levels"}, max(epsilon, 0.3)
    result = approx_kmv(q, k, x, sigma=sigma, epsilon=epsilon, seed=int(rng.integers(2**31)), **options)
    if bad:
        raise Bad("answered")
    demand(result.y.shape == (n_q,), "shape", result.y.shape)
    demand(np.isfinite(result.y).all(), "not finite")
    with np.errstate(over="ignore"):
        distance = ((q[:, None] / sigma - k / sigma) ** 2).sum(-1)
    unit = np.abs(x).max() or 1.0
    gap = np.linalg.norm(np.exp(-distance / 2) @ (x / unit) - result.y / unit)
    bound = epsilon * np.linalg.norm(x / unit)
    # Points far from 0 lose the last digits of their distances: that much of each entry.
    lost = 1e-15 * (np.square(q / sigma).sum(1).max() + np.square(k / sigma).sum(1).max())
    demand(gap <= bound + min(1.0, 10 * lost) * math.sqrt(n_q) * np.abs(x / unit).sum(), "off by", gap, "over", bound)


def eigenvalue(rng: np.random.Generator) -> None:
    n = below(rng, 20)
    points = rows(rng, n, below(rng, 8))
    bad = poisoned(rng, [points])
    epsilon = float(rng.uniform(0.2, 0.9))
    if rng.integers(10) == 0:
        epsilon, bad = 1.0, True
    found = top_eigenvalue(points, 1.0, epsilon, seed=int(rng.integers(2**31)))
    if bad:
        raise Bad("answered")
    with np.errstate(over="ignore"):
        exact = np.linalg.eigvalsh(np.exp(-((points[:, None] - points) ** 2).sum(-1) / 2))[-1]
    demand(abs(found.value - exact) <= epsilon * exact, "eigenvalue", found.value, "and not", exact)


def by_products(rng: np.random.Generator) -> None:
    n_q, n_k, d, d_v = (below(rng, m) for m in (30, 30, 20, 4))
    q, k, v = rows(rng, n_q, d), rows(rng, n_k, d), values(rng, n_k, d_v)
    bad = poisoned(rng, [q, k, v])
    epsilon = float(10 ** rng.uniform(-2, 0))
    out = np.asarray(approx_attention(q, k, v, epsilon, seed=int(rng.integers(2**31))))
    if bad:
        raise Bad("answered")
    demand(out.shape == (n_q, d_v), "shape", out.shape)
    demand(np.isfinite(out).all(), "not finite")
    exact = attention_reference(*(torch.from_numpy(a) for a in (q, k, v)), d**-0.5, torch.tensor(True)).numpy()
    for column, wanted, given in zip(out.T, exact.T, v.T, strict=True):
        unit = np.abs(given).max() or 1.0
        size = max(np.linalg.norm(given / unit), np.linalg.norm(wanted / unit))
        off = np.linalg.norm((column - wanted) / unit)
        logits = np.abs(q).max() * np.abs(k).max() * d**0.5
        demand(off <= epsilon * size + min(2.0, 1e-12 * logits) * math.sqrt(n_q), "off by", off, "of", size)


def damaged(rng: np.random.Generator, data: bytes) -> bytes:
    """The same with bytes changed, put in, left out or doubled, or cut; one time in eight as it was."""
    changed = bytearray(data)
    for _ in range(rng.integers(4) if rng.random() > 0.125 else 0):
        place = int(rng.integers(len(changed) + 1))
        kind = rng.integers(5)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << rng.integers(8)
        elif kind == 1:
            changed[place:place] = rng.bytes(below(rng, 8))
        elif kind == 2:
            del changed[place : place + below(rng, 20)]
        elif kind == 3:
            changed[place:place] = changed[max(0, place - below(rng, 40)) : place]
        elif kind == 4:
            del changed[place:]
    return bytes(changed)


WORDS = ["One.", "Two words.", "ö", "", " ", '"quoted", twice', "a\nb", "\u2028", "0", "nan", "\\ud800", "line\r\n"]


def texts(rng: np.random.Generator) -> None:
    contexts = [str(rng.choice(WORDS)) for _ in range(below(rng, 6))]
    suffix = str(rng.choice(["txt", "jsonl", "json", "csv", "parquet"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"words.{suffix}")
        table = pd.DataFrame({"context": contexts})
        if suffix == "parquet":
            table.to_parquet(path)
        elif suffix == "csv":
            table.to_csv(path, index=False)
        elif suffix == "txt":
            path.write_text("\n\n".join(contexts), encoding="utf-8")
        else:
            objects = [{"context": context} for context in contexts]
            text = json.dumps(objects) if suffix == "json" else "\n".join(map(json.dumps, objects))
            path.write_text(text, encoding="utf-8")
        pack = [None, gzip.compress, lzma.compress][rng.integers(3)]
        if pack is None:
            path.write_bytes(damaged(rng, path.read_bytes()))
        else:
            inside = rng.random() < 0.5
            whole = pack(damaged(rng, path.read_bytes()) if inside else path.read_bytes())
            path = path.with_name(f"{path.name}.{'gz' if pack is gzip.compress else 'xz'}")
            path.write_bytes(whole if inside else damaged(rng, whole))
        found = [document.context for document in read_corpus(f"path:{path}")]
        demand(any(context.strip() for context in found), "no text")
        "".join(found).encode("utf-8")


def tables(rng: np.random.Generator) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, str(rng.choice(["table.csv", "table.parquet"])))
        count = below(rng, 20)
        table = pd.DataFrame(
            {"model": rng.choice(WORDS, count), "n": rng.integers(0, 99, count), "c": rng.random(count)}
        )
        table.to_csv(path, index=False) if path.suffix == ".csv" else table.to_parquet(path)
        path.write_bytes(damaged(rng, path.read_bytes()))
        demand(isinstance(read_table(path), pd.DataFrame), "no table")


def kinds() -> dict[str, Callable[[np.random.Generator], None]]:
    """Each kind of call by its name."""
    found: dict[str, Callable[[np.random.Generator], None]] = {}
    for name in methods():
        found[f"method {name}"] = partial(attention, name, False)
        if get(name).causal is not None:
            found[f"causal {name}"] = partial(attention, name, True)
    return found | {
        "statistics of heads": statistics,
        "statistics of lengths": lengths,
        "attention_statistics": attention_rows,
        "log_kernel": kernel,
        "approx_kmv": product,
        "approx_attention": by_products,
        "top_eigenvalue": eigenvalue,
        "texts": texts,
        "tables": tables,
    }


def call(kind: str, seed: int) -> tuple[str, str]:
    """Make one call: "answered", "refused" or "failed", and why it was refused or failed."""
    run = kinds()[kind]
    # By the name and not its place, so that a new kind changes no other's calls.
    rng = np.random.default_rng([*kind.encode(), seed])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run(rng)
        except ApproxKMVError as error:
            message = str(error)
            return ("refused", message) if message and "\n" not in message else ("failed", f"not one line: {message}")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = "" if isinstance(error, Wrong | Bad) else f" at {Path(where.filename).name}:{where.lineno}"
            return "failed", f"{type(error).__name__}: {error}{place}".replace("\n", " ")
    return "answered", ""


if __name__ == "__main__":
    outcome, why = call(sys.argv[1], int(sys.argv[2]))
    print(outcome, why)
    sys.exit(outcome == "failed")
