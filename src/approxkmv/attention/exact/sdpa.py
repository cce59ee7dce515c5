"""torch's scaled_dot_product_attention, with the backend chosen by timing rather than by the dispatcher."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from approxkmv.attention.causal import pairs_seen
from approxkmv.attention.contract import Method, UnavailableError
from approxkmv.compute.counting import count
from approxkmv.errors import one_line

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_fastest: dict[tuple[object, ...], str] = {}


def _run(
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool = False
) -> torch.Tensor:
    # The fused backends need one width for q, k and v, a multiple of 8; zero columns change no product.
    width = 8 * -(-max(q.shape[-1], min(v.shape[-1], 256)) // 8)
    q, k = (_widened(t, width) for t in (q, k))
    answers = []
    with sdpa_kernel(_BACKENDS[backend]):
        for columns in v.split(width, -1):
            padded = _widened(columns, width)
            answer = scaled_dot_product_attention(q, k, padded, scale=scale, is_causal=is_causal)
            answers.append(answer[:, 0, :, : columns.shape[-1]])
    return answers[0] if len(answers) == 1 else torch.cat(answers, -1)


def _widened(t: torch.Tensor, width: int) -> torch.Tensor:
    """t (batch, n, w) as (batch, 1, n, width), with zero columns where it is narrower."""
    return (t if t.shape[-1] == width else pad(t, (0, width - t.shape[-1]))).unsqueeze(1)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    run()
    best = float("inf")
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def choose_backend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> str:
    """The fastest backend that accepts these inputs, timed once per shape, dtype and device.

    Raises UnavailableError if none does.
    """
    key = (q.shape, k.shape, v.shape, q.dtype, q.device)
    if key not in _fastest:
        candidates = ("cudnn", "flash", "efficient") if q.device.type == "cuda" else ("flash",)
        seconds: dict[str, float] = {}
        refusals = []
        with warnings.catch_warnings(action="ignore"):  # torch warns why a backend refuses, then raises
            for backend in candidates:
                try:
                    seconds[backend] = _seconds(lambda b=backend: _run(b, q, k, v, scale), q.device)  # type: ignore[misc]
                except RuntimeError as error:
                    refusals.append(f"{backend}: {one_line(error)}")
        if not seconds:
            raise UnavailableError(f"exact-sdpa finds no fused backend here ({'; '.join(refusals)})")
        _fastest[key] = min(seconds, key=lambda name: seconds[name])
    return _fastest[key]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, seed: int, backend: str, is_causal: bool = False
) -> torch.Tensor:
    """Attention of checked inputs (batch, n, d) in their own dtype; is_causal: query i attends to keys 0 to i.

    Raises UnavailableError for a backend that does not exist or refuses the inputs.
    """
    chosen = backend == "fastest"
    if chosen:
        backend = choose_backend(q, k, v, scale)
    elif backend not in _BACKENDS:
        raise UnavailableError(f"exact-sdpa has no backend {backend!r}; it has: {', '.join(_BACKENDS)}")
    count(kernel_evaluations=q.shape[0] * (pairs_seen(q.shape[1]) if is_causal else q.shape[1] * k.shape[1]))
    try:
        # One that was tried needs no filter of warnings, which would be timed.
        with nullcontext() if chosen else warnings.catch_warnings(action="ignore"):
            return _run(backend, q, k, v, scale, is_causal)
    except RuntimeError as error:
        raise UnavailableError(f"exact-sdpa: backend {backend} refuses these inputs ({one_line(error)})") from error


method = Method(
    name="exact-sdpa",
    compute=attend,
    causal=partial(attend, is_causal=True),
    summary="torch's scaled_dot_product_attention, the fastest of its fused backends",
    defaults={"backend": "fastest"},
    exact=True,
    seeded=False,
)
