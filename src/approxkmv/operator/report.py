"""What a product of KernelOperator says of itself."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Report:
    """What the last product did, and how far it is off."""

    method: str
    """"zero" or "constant" where that trivial answer meets epsilon, "blocks" or "exact"."""
    reason: str
    """Why, in words."""
    error: float
    """Estimate of |Kx - y|, relative to |Kx| or |x|; with several columns all norms are Frobenius norms."""
    bound: float | None
    """Its upper bound at `confidence`; None: unknown, since few rows make up what the sample saw, or none, or since
    |Kx| may be 0."""
    confidence: float
    relative_to: str
    epsilon: float
    fell_back: bool
    """Whether the product was made exactly because blocks would not meet epsilon for less."""
    near: int | None
    """Near keys per block."""
    blocks: int | None
    exponents: str
    """The format of exponents: float32, bfloat16 or float64."""
    kernel_evaluations: int
    """All of them: pilot, product (of every attempt) and error bar, of the first product also preparation."""
    pilot_evaluations: int
    seconds: dict[str, float]
    """Of preparation (made once), pilot, product and error bar."""

    @property
    def met(self) -> bool | None:
        """Whether the bound is at most epsilon; None where it is unknown."""
        return None if self.bound is None else self.bound <= self.epsilon


class Clock:
    """Adds up the seconds of parts, by name."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self._seconds, self._device = seconds, device

    def __call__(self, part: str) -> Clock:
        self._part = part
        return self

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + time.perf_counter() - self._began
