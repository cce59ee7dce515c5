"""MPNet, whose attention multiplies the outputs of its layers q and k itself and adds a positional bias."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from approxkmv.models.recording import Layer, Recording


@contextlib.contextmanager
def recording_calls(backbone: torch.nn.Module, recording: Recording) -> Iterator[None]:
    """Within the block, every layer records what its attention multiplies; afterwards the modules are restored.

    The relative-position bias that the model adds to the logits is recorded separately.

    Args:
        backbone: an MPNetModel.
        recording: takes queries, keys and values (batch, heads, n, d) of each layer.
    """
    attentions: list[Any] = [layer.attention.attn for layer in backbone.encoder.layer]  # type: ignore[union-attr]
    handles = []

    def keep(made: dict[str, torch.Tensor], name: str, heads: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            made[name] = output.unflatten(-1, (heads, -1)).transpose(1, 2)

        return hook

    def hand_over(made: dict[str, torch.Tensor], width: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, options: dict[str, Any], output: Any) -> None:
            q, k, v = (made.pop(name) for name in ("q", "k", "v"))
            # By name, or after the hidden states and the mask.
            bias = options.get("position_bias", next(iter(inputs[2:3]), None))
            recording.record(q, k, v, width**-0.5, causal=False, layer=Layer(bias=bias))

        return hook

    for module in attentions:
        made: dict[str, torch.Tensor] = {}
        for name in ("q", "k", "v"):
            linear = getattr(module, name)
            handles.append(linear.register_forward_hook(keep(made, name, module.num_attention_heads)))
        handles.append(module.register_forward_hook(hand_over(made, module.attention_head_size), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
