"""The largest numbers of a stream, in constant memory."""

from __future__ import annotations

import math

import torch

# The candidates are cut back to the 2n largest when there are SLACK * n of them.
SLACK = 8
# Numbers that one thread sums: torch splits a longer sum over the threads there are, and so rounds it differently.
PART = 2**14


def log_sum(values: torch.Tensor) -> torch.Tensor:
    """logsumexp of all values, the same on any number of threads."""
    flat = values.flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % PART), value=-math.inf)
    return padded.view(-1, PART).logsumexp(1).logsumexp(0)


class Largest:
    """The 2n largest of a stream of logarithms and the sum of all others; on one device, in O(n) memory."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.n = n
        self.bound = -math.inf
        self._parts: list[torch.Tensor] = []
        self._count = 0
        self._far = torch.tensor(-math.inf, dtype=torch.float64, device=device)

    def add(self, values: torch.Tensor, log_far: torch.Tensor) -> None:
        """Add the values of a strip that are above the bound, and the log of the sum of the others."""
        self._parts.append(values)
        self._count += values.numel()
        self._far = torch.logaddexp(self._far, log_far)
        if self._count > SLACK * self.n:
            self._cut(2 * self.n)

    def add_strip(self, values: torch.Tensor) -> None:
        """Add the values of a strip; -inf marks entries that do not exist."""
        above = values > self.bound
        self.add(values[above], log_sum(values.masked_fill(above, -math.inf)))

    def _cut(self, count: int) -> torch.Tensor:
        """Keep the `count` largest, in descending order; the others join the far tail."""
        values = torch.cat([self._far.new_empty(0), *self._parts])
        if values.numel() > count:
            values = values.sort(descending=True).values
            self._far = torch.logaddexp(self._far, log_sum(values[count:]))
            values = values[:count]
            self.bound = float(values[-1])
        self._parts = [values]
        self._count = values.numel()
        return values

    def finish(self) -> tuple[float, float, float, float]:
        """c, log K_(n), log K_(n+1) and log K_(2n); with fewer entries c is 0, and missing ones are -inf."""
        n = self.n
        ordered = self._cut(2 * n).sort(descending=True).values
        head = log_sum(ordered[:n])
        tail = torch.logaddexp(self._far, log_sum(ordered[n:]))
        nth, following, double = (float(ordered[i]) if i < len(ordered) else -math.inf for i in (n - 1, n, 2 * n - 1))
        return math.exp(float(tail - head)) if float(tail) > -math.inf else 0.0, nth, following, double
