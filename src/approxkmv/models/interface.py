"""Capture through the attention interface of transformers: the way of most architectures.

A layer that uses the interface calls the registered function with its queries, keys and values, in the form in which
it would multiply them, and the factor of the logits. The function here records them and then computes what the model
would have computed without it, with the same code of transformers, so that the deeper layers are right.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from approxkmv.errors import CaptureError
from approxkmv.models.families import SCALED_QUERIES
from approxkmv.models.recording import ADVICE, Recording

# Names without "sdpa", "flash" or "flex" in them: transformers treats names with these words specially.
FUSED = "approxkmv_fused"
PLAIN = "approxkmv_plain"

_current: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextlib.contextmanager
def recording_calls(recording: Recording) -> Iterator[None]:
    """Within the block, attention computed under one of the names above is recorded."""
    token = _current.set(recording)
    try:
        yield
    finally:
        _current.reset(token)


def implementation_for(model_class: Any) -> str:
    """The name to load a class of models with: FUSED where transformers allows torch's fused attention, else PLAIN.

    A class without it (Gemma2 caps its logits, GPT-OSS has sinks) is computed by the function of its own module.

    Raises:
        CaptureError: the class does not call the attention interface.
    """
    if not model_class._can_set_attn_implementation():
        raise CaptureError(f"{model_class.__name__} does not use the attention interface of transformers: {ADVICE}")
    return FUSED if model_class._supports_sdpa else PLAIN


def _fused(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    _record(module, query, key, value, attention_mask, options)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _plain(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    _record(module, query, key, value, attention_mask, options)
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise CaptureError(f"{type(module).__name__} has no attention function in its own module: {ADVICE}")
    return own(module, query, key, value, attention_mask, **options)


def _record(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict[str, Any],
) -> None:
    recording = _current.get()
    if recording is None:
        return
    scaling = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if type(module).__name__ in SCALED_QUERIES:
        own = float(module.scaling)  # type: ignore[arg-type]
        scale, query = scale * own, query / own
    recording.record(query, key, value, scale, causal=_is_causal(module, mask, options.get("is_causal")))


def _is_causal(module: torch.nn.Module, mask: torch.Tensor | None, flag: bool | None) -> bool:
    """Whether the first position sees no later one, by the rule of sdpa_attention_forward when there is no mask."""
    if mask is None:
        return bool(getattr(module, "is_causal", True) if flag is None else flag)
    if mask.shape[-1] < 2 or mask.shape[-2] < 2:
        return False  # a mask shared by all rows hides padding, not the future
    first = mask[0, 0, 0, 1]
    return not bool(first) if mask.dtype == torch.bool else bool(first < -1000)


AttentionInterface.register(FUSED, _fused)
AttentionInterface.register(PLAIN, _plain)
# Without a mask function of its own, an implementation is handed no mask at all and would attend to padding.
AttentionMaskInterface.register(FUSED, sdpa_mask)
AttentionMaskInterface.register(PLAIN, eager_mask)
