"""GPT-1, whose attention is a separate method `Attention._attn(q, k, v)`, with k already transposed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from approxkmv.models.recording import Recording


@contextlib.contextmanager
def recording_calls(backbone: torch.nn.Module, recording: Recording) -> Iterator[None]:
    """Within the block, every layer records what its attention multiplies; afterwards the modules are restored.

    Args:
        backbone: an OpenAIGPTModel.
        recording: takes queries, keys and values (batch, heads, n, d) of each layer.
    """
    attentions: list[Any] = [block.attn for block in backbone.h]  # type: ignore[union-attr]

    def wrap(module: Any) -> Callable[..., Any]:
        original = module._attn

        def recorded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **named: Any) -> Any:
            # The model's code divides by the width of the values, and only if the block was built to.
            scale = v.shape[-1] ** -0.5 if module.scale else 1.0
            recording.record(q, k.mT, v, scale, causal=True)
            return original(q, k, v, *rest, **named)

        return recorded

    for module in attentions:
        module._attn = wrap(module)
    try:
        yield
    finally:
        for module in attentions:
            del module._attn  # deletes the instance's attribute, which uncovers the class's method
