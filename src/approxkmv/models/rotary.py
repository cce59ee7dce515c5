"""Rotary embeddings beyond the positions that a model was trained on."""

from __future__ import annotations

from typing import Any

from approxkmv.errors import CaptureError


def scale_rotary(config: Any, method: str, factor: float) -> None:
    """Change a configuration so that its model takes factor times as many positions.

    linear divides positions by the factor (Chen et al., 2023), yarn does so for low frequencies and sharpens the
    softmax a little (Peng et al., 2024), both as transformers has them. Methods that depend on the length of the text
    are left out: the first n tokens of a long text would not be those of a text of n tokens.

    Raises CaptureError for a model without rotary embeddings, or whose own are scaled already.
    """
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None)
    name = type(config).__name__
    if not isinstance(rotary, dict) or "rope_theta" not in rotary:
        raise CaptureError(f"{name}: the model has no single rotary embedding: leave out rotary_scaling")
    if rotary.get("rope_type", "default") != "default":
        raise CaptureError(f"{name}: its rotary embedding is scaled already ({rotary['rope_type']})")
    positions = text.max_position_embeddings
    text.rope_parameters = {
        **rotary,
        "rope_type": method,
        "factor": factor,
        "original_max_position_embeddings": positions,
    }


def scaled_positions(config: Any) -> int | None:
    """How many positions a configuration changed by scale_rotary has; None for any other."""
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None)
    if not isinstance(rotary, dict) or rotary.get("rope_type") not in ("linear", "yarn"):
        return None
    original = rotary.get("original_max_position_embeddings")
    return None if original is None else int(original * rotary["factor"])
