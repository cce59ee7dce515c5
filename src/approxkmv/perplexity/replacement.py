"""Replace a model's attention by a method, through the attention interface of transformers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from approxkmv.attention import Method
from approxkmv.compute.counting import counting
from approxkmv.errors import CaptureError
from approxkmv.models.interface import is_causal, scale_of

# A name without "sdpa", "flash" or "flex", which transformers treats specially.
REPLACED = "approxkmv_replaced"

# The seed of layer l is the run's seed times this, plus l.
_SEEDS = 1009


class OfLayers(Protocol):
    """Attention that may differ from layer to layer, such as a plan's."""

    def of_layer(self, layer: int) -> Callable[..., torch.Tensor]:
        """f(q, k, v, *, scale, seed): causal attention of (heads, n, d), (heads, n, d), (heads, n, d_v)."""


@dataclass
class Replacement:
    """Computes the attention of some layers and times it."""

    method: Method | OfLayers | None
    """None: the model's own attention, which is only timed."""
    parameters: dict[str, Any]
    layers: Collection[int]
    seed: int
    seconds: float = field(default=0.0, init=False)
    warm_up_seconds: float = field(default=0.0, init=False)
    """Time of the first call, which is repeated so that one-time loading and compilation do not count."""
    calls: int = field(default=0, init=False)
    rows: int = field(default=0, init=False)
    """Queries of all calls and heads."""
    recomputed_rows: int = field(default=0, init=False)
    """Queries whose approximate answer was lost and recomputed exactly."""

    def attention(self, layer: int) -> Callable[..., torch.Tensor]:
        """See `OfLayers`. Raises UnavailableError for a method without a causal form."""
        assert self.method is not None
        if isinstance(self.method, Method):
            return partial(self.method.causal_form(), **self.parameters)
        return self.method.of_layer(layer)


_current: ContextVar[Replacement | None] = ContextVar("replacement", default=None)


@contextlib.contextmanager
def replaced(replacement: Replacement) -> Iterator[None]:
    """Within the block, the layers of a model loaded with REPLACED are computed by the replacement's method."""
    token = _current.set(replacement)
    try:
        yield
    finally:
        _current.reset(token)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    current = _current.get()
    if current is None or getattr(module, "layer_idx", None) not in current.layers:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if current.method is None:
        start = _now(query.device)
        out = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
    else:
        refuse_what_no_method_does(module, query, key, attention_mask, options)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        given = {"scale": scale_of(query, options), "seed": _SEEDS * current.seed + layer}
        attend = current.attention(layer)
        if not current.calls:
            start = _now(query.device)
            attend(*heads(query, key, value), **given)
            current.warm_up_seconds = _now(query.device) - start
        start = _now(query.device)
        with counting() as counts:
            out = attend(*heads(query, key, value), **given).unsqueeze(0).transpose(1, 2).contiguous()
        current.rows += query.shape[1] * query.shape[2]
        current.recomputed_rows += counts.recomputed_rows
    current.seconds += _now(query.device) - start
    current.calls += 1
    return out, None


def heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """(heads, n, width) of each, of the first text; a key head shared by several query heads is repeated for each."""
    repeats = query.shape[1] // key.shape[1]
    return [query[0], key[0].repeat_interleave(repeats, 0), value[0].repeat_interleave(repeats, 0)]


def refuse_what_no_method_does(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    options: Mapping[str, Any],
) -> None:
    """Raise CaptureError unless the layer is softmax attention of each token to all before it, in a single text."""
    name = f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise CaptureError(
            f"{name} attends from {tuple(query.shape)} to {tuple(key.shape)}: a single whole text is needed"
        )
    window = options.get("sliding_window")
    # Without padding, a mask exists only if attention is not plainly causal.
    if mask is not None or (window is not None and window < key.shape[2]):
        raise CaptureError(f"{name} has its own mask, such as a sliding window, but the methods compute full attention")
    more = any(options.get(word) is not None for word in ("softcap", "s_aux", "sinks", "position_bias"))
    if more or not is_causal(module, options):
        raise CaptureError(
            f"{name} is not plain causal softmax attention: it caps its logits, has sinks or a bias, or looks ahead"
        )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


AttentionInterface.register(REPLACED, _attend)
AttentionMaskInterface.register(REPLACED, sdpa_mask)
