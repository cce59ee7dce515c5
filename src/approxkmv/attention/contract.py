"""The interface of every attention method of the sweep: its signature, its parameters and the grid for tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial, wraps
from typing import Any, TypeVar

import torch

from approxkmv.arrays import Array, as_batches, resolve_scale, resolve_seed
from approxkmv.attention.causal import EXACT_BELOW, Sums, causal_attention
from approxkmv.compute.torch_state import plain_torch
from approxkmv.errors import InputError, UnavailableError

P = TypeVar("P")
"""A frozen dataclass with a method's parameters and their defaults."""

# Limit on norms of rows and their products, so that squares summed over any number of rows stay within float32.
LARGEST = 1e12


@dataclass(frozen=True)
class Method:
    """One way to compute or approximate softmax(scale q k^T) v.

    >>> import torch
    >>> from approxkmv.attention import get
    >>> q, k, v = torch.randn(2, 50, 16), torch.randn(2, 70, 16), torch.randn(2, 70, 3)
    >>> tuple(get("exact-fused")(q, k, v, scale=0.25, seed=0).shape)
    (2, 50, 3)

    `compute` is the same without checks of its input; this is what a sweep times.

    The answer is an ordinary tensor and does not depend on torch's default dtype and device, its grad and inference
    modes, or autocast. No method gives gradients: inputs may require them, but the answer does not. (The function
    `knn_attention` of `knn_gradients.py` does.) Finite inputs give finite answers or an InputError.
    """

    name: str
    compute: Callable[..., torch.Tensor]
    """f(q, k, v, *, scale, seed, **parameters), with every parameter given and checked inputs."""
    summary: str
    defaults: dict[str, Any] = field(default_factory=dict)
    grid: Sequence[dict[str, Any]] = field(default_factory=lambda: ({},))
    """Settings to try, cheapest first; each is completed with the defaults."""
    exact: bool = False
    """Whether its only error is rounding."""
    trivial: bool = False
    """Whether it is a baseline that any method should beat, such as the mean of the values."""
    dtype: torch.dtype = torch.float32
    """The type in which it computes when its inputs are float32."""
    widens: frozenset[str] = frozenset()
    """Types of device on which it computes in float32 whatever its inputs."""
    seeded: bool = True
    """Whether the answer depends on the seed."""
    may_be_zero: frozenset[str] = frozenset()
    """Integer parameters that may be 0; the others start at 1."""
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The values that a string parameter may take, unless the method checks that itself."""
    causal: Callable[..., torch.Tensor] | None = None
    """Like `compute`, but query i attends to keys 0 to i only, with as many queries as keys; None if not offered."""

    def __post_init__(self) -> None:
        # Wrapped here, so that code which calls `compute` or `causal` directly, to time them, is covered too.
        for name in ("compute", "causal"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _never_compiled(plain_torch()(getattr(self, name))))

    @classmethod
    def from_sums(
        cls,
        name: str,
        sums: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Generator, P], Sums],
        parameters: type[P],
        *,
        around_mean: bool = False,
        **described: Any,
    ) -> Method:
        """A method defined by its sums before division, from which its causal form follows.

        Args:
            sums: f(q, k, v, generator, parameters) for the float32 matrices of one batch entry, q scaled: numerators
                (n_q, d_v), row sums (n_q,) above 0 and logs (n_q,): both sums are divided by exp(log).
            parameters: the dataclass of that last argument; its field exact_below, if it has one, is that of
                `causal_attention`.
            around_mean: `sums` receives values less their mean; see `per_batch`.
            described: see `from_masked`.
        """

        def attend(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            generator: torch.Generator,
            chosen: P,
            scale: float,
            is_causal: bool,
        ) -> torch.Tensor:
            def square(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> Sums:
                # The mean of this square's values only: the mean of all values would include later ones.
                mean = v.mean(0) if around_mean else v.new_zeros(v.shape[1])
                numerators, row_sums, logs = sums(q, k, v - mean, generator, chosen)
                return numerators + row_sums.unsqueeze(1) * mean, row_sums, logs

            if is_causal:
                exact_below = getattr(chosen, "exact_below", EXACT_BELOW)
                return causal_attention(q * scale, k, v, generator, square, exact_below)
            mean = v.mean(0) if around_mean else None
            numerators, row_sums, _ = sums(q * scale, k, v if mean is None else v - mean, generator, chosen)
            answer = numerators / row_sums.unsqueeze(1)
            return answer if mean is None else answer.add_(mean)

        return cls.from_masked(name, attend, parameters, **described)

    @classmethod
    def from_masked(
        cls,
        name: str,
        attend: Callable[..., torch.Tensor],
        parameters: type[P],
        *,
        causal: bool = True,
        cpu_only: bool = False,
        **described: Any,
    ) -> Method:
        """A method whose function applies the causal mask itself.

        Args:
            attend: f(q, k, v, generator, parameters, scale, is_causal) for the float32 matrices of one batch entry to
                (n_q, d_v); if is_causal, query i attends to keys 0 to i.
            parameters: the dataclass of its argument.
            causal: whether there is that form; without it `attend` takes no is_causal.
            cpu_only: whether other devices are refused.
            described: other fields of the method.
        """

        def compute(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            *,
            scale: float,
            seed: int,
            is_causal: bool = False,
            **given: Any,
        ) -> torch.Tensor:
            if cpu_only and q.device.type != "cpu":
                raise UnavailableError(f"{name} runs on a CPU only, not on {q.device.type}")
            more = parameters(**given), scale, *([is_causal] if causal else [])

            def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
                return attend(q, k, v, generator, *more)

            return per_batch(single, q, k, v, seed)

        defaults = asdict(parameters())  # type: ignore[call-overload]
        masked = partial(compute, is_causal=True) if causal else None
        return cls(name, compute, defaults=defaults, causal=masked, **described)

    def parameters(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The defaults, overridden by `given`.

        Raises InputError for a parameter the method does not have, or for an invalid value.
        """
        for name, value in (given or {}).items():
            if name not in self.defaults:
                known = ", ".join(self.defaults) or "none"
                raise InputError(f"method {self.name!r} has no parameter {name!r}; it has: {known}")
            wanted = self._unlike(name, value)
            if wanted:
                raise InputError(f"method {self.name!r}: {name} is {value!r}: give {wanted}")
        return {**self.defaults, **(given or {})}

    def _unlike(self, name: str, value: Any) -> str | None:
        """What a parameter has to be, as text, if the value is not that."""
        default = self.defaults[name]
        if isinstance(default, bool):
            return None if isinstance(value, bool) else "true or false"
        if isinstance(default, str):
            wanted = self.choices.get(name)
            known = isinstance(value, str) and (wanted is None or value in wanted)
            return None if known else " or ".join(map(repr, wanted)) if wanted else "a word"
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(default, float):
            return None if number and 0 < value < float("inf") else "a number above 0"
        least = 0 if name in self.may_be_zero else 1
        return None if number and isinstance(value, int) and value >= least else f"a whole number of at least {least}"

    def __call__(
        self, q: Array, k: Array, v: Array, *, scale: float | None = None, seed: int = 0, **parameters: Any
    ) -> Any:
        """Attention of q (batch, n_q, d) on k (batch, n_k, d) with values v (batch, n_k, d_v): (batch, n_q, d_v).

        Tensors or NumPy arrays, float16 to float64; also without a batch, or (batch, heads, n, width), where several
        heads of q may share a head of k and v. The answer is of q's kind and dtype (see `arrays.as_batches`). Raises
        InputError for invalid shapes, types or numbers, and UnavailableError if the method cannot run.
        """
        q, k, v, back = as_batches(q, k, v)
        scale = check_inputs(q, k, v, scale)
        return back(self.compute(q, k, v, scale=scale, seed=resolve_seed(seed), **self.parameters(parameters)))

    def attend_causally(
        self, q: Array, k: Array, v: Array, *, scale: float | None = None, seed: int = 0, **parameters: Any
    ) -> Any:
        """Attention of each query of q (batch, n, d) on the keys up to its own, with values v: (batch, n, d_v).

        Takes what a call takes. Raises InputError as a call does, and for different numbers of queries and keys;
        UnavailableError if the method has no causal form or cannot run.
        """
        q, k, v, back = as_batches(q, k, v)
        scale = check_inputs(q, k, v, scale)
        if q.shape[1] != k.shape[1]:
            raise InputError(f"causal attention has a key for each query: q has {q.shape[1]} rows, but k {k.shape[1]}")
        compute = self.causal_form()
        return back(compute(q, k, v, scale=scale, seed=resolve_seed(seed), **self.parameters(parameters)))

    def causal_form(self) -> Callable[..., torch.Tensor]:
        """`causal`. Raises UnavailableError when there is none."""
        if self.causal is None:
            raise UnavailableError(f"method {self.name} has no causal form: query i would attend to keys after i")
        return self.causal


def _never_compiled(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same, which torch.compile leaves as it is: it would enter loops of numba, and fails in faiss."""

    @wraps(run)
    def call(*args: Any, **given: Any) -> torch.Tensor:
        # Only now, since the import that it takes lasts a second
        return (torch.compiler.disable(run) if torch.compiler.is_compiling() else run)(*args, **given)

    return call


@plain_torch()
def check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> float:
    """The factor of the logits, for valid (batch, n, d) tensors q, k, v.

    Raises InputError unless they are finite, of one dtype and device, match in shape and are small enough for the sums
    of every method to stay within float32.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{name} is a {type(tensor).__name__}: give a torch tensor (batch, n, width)")
        if tensor.ndim != 3 or 0 in tensor.shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}: it must be (batch, n, width), none of them 0")
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"{name} has dtype {tensor.dtype}: give float32 or bfloat16")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise InputError(f"{name} is {tensor.dtype} on {tensor.device}, but q is {q.dtype} on {q.device}")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or k.shape[:2] != v.shape[:2]:
        raise InputError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be (batch, n_q, d), (batch, n_k, d) "
            f"and (batch, n_k, d_v)"
        )
    factor = resolve_scale(scale, q.shape[-1])
    norms = {}
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        norms[name] = float(torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32).amax())
        # The norm of finite numbers is finite unless it overflows, and costs only one pass over the rows.
        if not math.isfinite(norms[name]) and not bool(tensor.isfinite().all()):
            raise InputError(f"{name} holds a NaN or an infinity: remove it before asking for attention")
    if not norms["v"] <= LARGEST:
        raise InputError(f"a row of v has norm {norms['v']:.3g}, more than {LARGEST:g}: scale v down")
    # A short vector does not compensate for a long one: methods look at each separately too.
    if not max(norms["q"], 1.0) * max(norms["k"], 1.0) * max(factor, 1.0) <= LARGEST:
        raise InputError(
            f"logits may leave float32: rows of q and k have norms up to {norms['q']:.3g} and {norms['k']:.3g}, scale "
            f"is {factor:.3g}, and their product, each at least 1, may be {LARGEST:g}: scale them down"
        )
    # A smaller scale would be 0 in float32, and its logits are negligible anyway.
    return max(factor, 1e-30)


def per_batch(
    single: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: int,
    *,
    around_mean: bool = False,
) -> torch.Tensor:
    """Apply single(q, k, v, generator) to the float32 matrices of each batch entry in turn and stack the answers.

    around_mean: single receives the values less their mean, which is added back to its answer. Exact attention does not
    change; an estimate whose weights do not sum to one, or that uses the size of values, loses their common offset.
    """
    generator = torch.Generator(device=q.device).manual_seed(seed)

    def answer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not around_mean:
            return single(q, k, v, generator)
        mean = v.mean(0)
        return single(q, k, v - mean, generator).add_(mean)

    answers = [answer(*(t[i].float() for t in (q, k, v))) for i in range(q.shape[0])]
    return torch.stack(answers).to(v.dtype)
