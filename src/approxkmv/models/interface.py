"""Capture through the attention interface of transformers, which most architectures use.

A layer that uses the interface calls the registered function with its queries, keys and values as it would multiply
them, and with the factor of the logits. The function here records them and then computes what the model would have
computed without it, with the same code of transformers, so that the deeper layers are right.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from approxkmv.errors import CaptureError
from approxkmv.models.families import SCALED_QUERIES, UNSCALED
from approxkmv.models.recording import ADVICE, Layer, Recording

# Names without "sdpa", "flash" or "flex", which transformers treats specially.
FUSED = "approxkmv_fused"
PLAIN = "approxkmv_plain"

# In the code of a class whose layers hide keys (learned sparse attention) under these names of transformers alone.
HIDES_BY_NAME = re.compile(r"\._attn_implementation in \(")

_current: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextlib.contextmanager
def recording_calls(recording: Recording) -> Iterator[None]:
    """Within the block, attention computed under one of the names above is recorded."""
    token = _current.set(recording)
    try:
        yield
    finally:
        _current.reset(token)


def scale_of(query: torch.Tensor, options: Mapping[str, Any]) -> float:
    """The factor of the logits that a layer hands over, or that of its head's width."""
    scaling = options.get("scaling")
    return float(query.shape[-1] ** -0.5 if scaling is None else scaling)


def is_causal(module: torch.nn.Module, options: Mapping[str, Any]) -> bool:
    """Whether a layer without a mask sees no later key: the rule of sdpa_attention_forward."""
    flag = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if flag is None else flag)


def refuse_learned_sparsity(classes: Iterable[type]) -> None:
    """Raise CaptureError if one of the classes sees other keys under an attention of ours than under its own."""
    for found in dict.fromkeys(classes):
        names = {kind.__module__ for kind in found.__mro__ if kind.__module__.startswith("transformers.models.")}
        if any(HIDES_BY_NAME.search(inspect.getsource(sys.modules[name])) for name in names):
            raise CaptureError(
                f"{found.__name__} chooses keys for each query (learned sparse attention) only where transformers' own "
                f"attention runs: {ADVICE}"
            )


def implementation_for(model_class: Any) -> str:
    """The attention implementation for a class of models: FUSED if transformers allows it for the class, else PLAIN.

    Without it (Gemma2 caps its logits, GPT-OSS has sinks) the function in the class's own module is used.

    Raises:
        CaptureError: the class does not call the attention interface, or computes something else under another name.
    """
    if not model_class._can_set_attn_implementation():
        raise CaptureError(f"{model_class.__name__} does not use the attention interface of transformers: {ADVICE}")
    refuse_learned_sparsity([model_class])
    return FUSED if model_class._supports_sdpa else PLAIN


def _fused(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    _record(module, query, key, value, attention_mask, options, is_causal(module, options))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _plain(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    # Functions of this kind use only the mask that they are given.
    _record(module, query, key, value, attention_mask, options, causal=False)
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise CaptureError(f"{type(module).__name__} has no attention function in its own module: {ADVICE}")
    out, weights = own(module, query, key, value, attention_mask, **options)
    recording = _current.get()
    if recording is not None and recording.probing and weights is not None:
        _require_known(type(module).__name__, query, key, attention_mask, options, weights)
    return out, weights


def _require_known(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict[str, Any],
    weights: torch.Tensor,
) -> None:
    """Raise CaptureError if weights (batch, heads, n, n) do not follow from what _record knows of a layer.

    A sink takes a share of each row, which only some functions return: rows are compared without it.
    """
    softcap, bias = options.get("softcap"), options.get("position_bias")
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = scale_of(query, options) * query.double() @ keys.double().mT
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits + mask
    differences = (logits.softmax(-1) - weights / weights.sum(-1, keepdim=True)).abs()
    # Broken weights are reported later, with the text that they affect.
    if float(differences.max()) > (1e-3 if query.dtype == torch.float32 else 5e-2):
        raise CaptureError(f"{name} does more to its logits than a scale, a mask, a cap, a bias or a sink: {ADVICE}")


def _record(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict[str, Any],
    causal: bool,
) -> None:
    recording = _current.get()
    if recording is None:
        return
    scale, width, name = scale_of(query, options), query.shape[-1], type(module).__name__
    if name in SCALED_QUERIES and scale == 1.0:
        scale = width**-0.5
        query = query / scale
    elif scale == 1.0 and width > 1 and name not in UNSCALED:
        raise CaptureError(
            f"{name} hands its queries over with a factor of 1, so they may be scaled already: look, and name it in "
            "models/families.py among SCALED_QUERIES or UNSCALED"
        )
    layer = Layer(
        window=_window(module, options),
        softcap=options.get("softcap"),
        sinks=options.get("s_aux", options.get("sinks")),
        bias=options.get("position_bias"),
    )
    recording.record(query, key, value, scale, causal=causal, mask=mask, layer=layer)


def _window(module: torch.nn.Module, options: dict[str, Any]) -> int | None:
    """The window that a layer passes to the interface, or the chunk in its configuration."""
    config, place = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None) or ()
    if isinstance(place, int) and place < len(kinds) and kinds[place] == "chunked_attention":
        return int(config.attention_chunk_size)  # type: ignore[union-attr]
    window = options.get("sliding_window")
    return window if isinstance(window, int) and window > 0 else None


AttentionInterface.register(FUSED, _fused)
AttentionInterface.register(PLAIN, _plain)
# Without a mask function an implementation receives no mask at all and would attend to padding.
AttentionMaskInterface.register(FUSED, sdpa_mask)
AttentionMaskInterface.register(PLAIN, eager_mask)
