"""The inputs of one case of a sweep and their exact answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from approxkmv.attention import Method, get
from approxkmv.attention.contract import check_inputs
from approxkmv.compute.loops import numba_works
from approxkmv.errors import one_line
from approxkmv.sweep.settings import SweepSettings
from approxkmv.sweep.workloads import Case, Problem, load

REFERENCE = "exact-fused"
# The error of the reference answer is measured on this many rows, against float64.
_CHECKED_ROWS = 256
# Seconds at this length; four times as many at twice the length.
_LONGEST_KERNEL = 32768


def attend(method: Method, problem: Problem, seed: int, parameters: dict[str, Any]) -> torch.Tensor:
    """A method's answer with the mask of the problem. Raises UnavailableError without a form for it."""
    compute = method.causal_form() if problem.causal else method.compute
    return compute(problem.q, problem.k, problem.v, scale=problem.scale, seed=seed, **parameters)


class Inputs:
    """The inputs of one case and their exact answers, each computed once."""

    def __init__(self, case: Case, settings: SweepSettings) -> None:
        self.case, self.settings = case, settings
        self._problems: dict[tuple[str, int], Problem] = {}
        self._exact: dict[tuple[str, int], torch.Tensor] = {}

    def problem(self, part: str, index: int) -> Problem:
        key = (part, index % self.settings.inputs)
        if key not in self._problems:
            problem = load(self.case, *key, device=self.settings.device, dtype=self.settings.dtype)
            check_inputs(problem.q, problem.k, problem.v, problem.scale)
            self._problems[key] = problem
        return self._problems[key]

    def exact(self, part: str, index: int) -> torch.Tensor:
        """The answer in float32, for any dtype of the inputs."""
        key = (part, index % self.settings.inputs)
        if key not in self._exact:
            p = self.problem(*key)
            method = get(REFERENCE)
            wide = Problem(p.q.float(), p.k.float(), p.v.float(), p.scale, p.causal)
            self._exact[key] = attend(method, wide, 0, method.defaults)
        return self._exact[key]

    def prepare(self) -> None:
        """Compute every input and its exact answer, before anything is measured."""
        turns = max(len(self.settings.seeds), self.settings.warmups + self.settings.repeats)
        for part, count in (("tuning", len(self.settings.tuning_seeds)), ("evaluation", turns)):
            for index in range(min(count, self.settings.inputs)):
                self.exact(part, index)

    def head_to_tail(self, say: Callable[[str], None]) -> float | None:
        """c of the first input's kernel, over all entries.

        On CUDA it is computed there. None if that takes too long, if the kernel is not square, or if numba, which a CPU
        needs for it, does not work.
        """
        p = self.problem("evaluation", 0)
        square, on_cuda = p.q.shape[1] == p.k.shape[1], p.q.device.type == "cuda"
        if not square or not (on_cuda or (self.case.n <= _LONGEST_KERNEL and numba_works())):
            return None
        try:
            if on_cuda:
                from approxkmv.statistics.largest_cuda import largest_of

                q, k = p.q[0].float(), p.k[0].float()
                return largest_of(q, k, p.scale, -0.5 * p.scale * q.double().square().sum(1)).finish()[0]
            from approxkmv.statistics.streaming import length_statistics

            return length_statistics(p.q[0].float().cpu(), p.k[0].float().cpu(), p.scale)[0][0].ratio
        # With a NumPy too new for it numba fails in many ways, and nothing else here needs c.
        except Exception as error:
            say(f"{self.case.name} n={self.case.n}: c is left out: {one_line(error)}")
            return None

    def reference_error(self) -> float:
        """Error of the exact answer itself, against float64 on some of its rows."""
        p, exact = self.problem("evaluation", 0), self.exact("evaluation", 0)
        rows = torch.linspace(0, p.q.shape[1] - 1, min(_CHECKED_ROWS, p.q.shape[1])).long().to(p.q.device)
        q, k, v = p.q[:, rows].double(), p.k.double(), p.v.double()
        later = torch.arange(p.k.shape[1], device=rows.device) > rows.unsqueeze(1) if p.causal else None
        right = []
        for b in range(len(q)):
            logits = p.scale * q[b] @ k[b].mT
            if later is not None:
                logits.masked_fill_(later, -torch.inf)
            right.append(logits.softmax(-1) @ v[b])
        scale = float(v.norm()) * (len(rows) / p.k.shape[1]) ** 0.5
        return float((exact[:, rows].double() - torch.stack(right)).norm()) / scale
