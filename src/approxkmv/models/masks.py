"""Which keys each query of a layer sees, read from the mask that the model computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from approxkmv.errors import CaptureError

# Additive masks hide keys with the lowest number of their dtype, or -10,000 in older code; biases stay above this.
HIDDEN = -9999.0


def plain_spans(n: int, causal: bool) -> torch.Tensor:
    """(n, 2) int32: query i sees the keys in [first number, second number), causal or all keys."""
    stops = torch.arange(1, n + 1) if causal else torch.full((n,), n)
    return torch.stack([torch.zeros(n, dtype=torch.long), stops], 1).int()


def spans_of(mask: torch.Tensor, lengths: Sequence[int]) -> tuple[list[torch.Tensor], bool]:
    """The spans of each text, as in plain_spans, and whether the mask adds a bias to visible logits.

    Args:
        mask: (batch or 1, heads or 1, n or 1, n), True or close to 0 where a key is visible.
        lengths: tokens of each text; what comes after them is padding.
    Raises:
        CaptureError: heads of a layer see different keys, or the visible keys are not contiguous.
    """
    if mask.ndim != 4:
        raise CaptureError(f"a mask has the shape {tuple(mask.shape)}: only one of (batch, heads, n, n) is understood")
    spans, biased = [], False
    for index, n in enumerate(lengths):
        own = mask[index if len(mask) > 1 else 0, :, :n, :n]
        seen = own if own.dtype == torch.bool else own > HIDDEN
        biased = biased or (own.dtype != torch.bool and bool(((own != 0) & seen).any()))
        if len(seen) > 1 and not bool((seen == seen[:1]).all()):
            raise CaptureError("the heads of a layer see different keys: only a mask for all of them is understood")
        rows = seen[0].expand(n, n).to(torch.uint8)
        first, count = rows.argmax(-1), rows.sum(-1)
        # Of a row without a visible key both places are 0.
        if not bool((n - rows.flip(-1).argmax(-1) == first + count).all()):
            raise CaptureError("a query sees no key, or keys that are not contiguous: no such mask is understood")
        spans.append(torch.stack([first, first + count], 1).int().cpu())
    return spans, biased
