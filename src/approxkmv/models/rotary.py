"""Rotary embeddings for more positions than a model was trained on."""

from __future__ import annotations

from typing import Any

from approxkmv.errors import CaptureError, SourceError


def scale_rotary(config: Any, method: str, factor: float) -> None:
    """Change a configuration so that its model accepts `factor` times as many positions.

    linear divides positions by the factor (Chen et al., 2023); yarn does so for low frequencies and sharpens the
    softmax slightly (Peng et al., 2024), both as implemented in transformers. Methods that depend on the length of the
    text are not offered: the first n tokens of a long text would differ from a text of n tokens.

    Raises CaptureError for a model without rotary embeddings, or with already scaled ones.
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
    """The original number times the factor, where scale_rotary or the checkpoint's rope_parameters say so, or None."""
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None)
    if not isinstance(rotary, dict) or rotary.get("rope_type") not in ("linear", "yarn"):
        return None
    original, factor = rotary.get("original_max_position_embeddings"), rotary.get("factor")
    # Without a factor, yarn goes as far as the positions that the checkpoint says.
    return None if original is None or factor is None else int(original * factor)


def refuse_unknown_types(config: Any, name: str) -> None:
    """Raise SourceError for a type of rotary embedding that transformers does not have; `name` is that of the model."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = ("default", *ROPE_INIT_FUNCTIONS)
    for part in _parts(config):
        # That of images, which are refused as such.
        if (kind := part.get("rope_type", "default")) not in (*known, "axial"):
            raise SourceError(
                f"{name}: its configuration has rotary embeddings of the type {kind!r}, but transformers has "
                f"{', '.join(known)}: correct rope_type in config.json"
            )


def refuse_two_answers(config: Any, written: dict[str, Any], name: str) -> None:
    """Raise SourceError where config.json states the rotary embedding twice and differently.

    It may stand in rope_parameters or, as earlier releases of transformers wrote it, in rope_theta and rope_scaling;
    where there are both, transformers takes one of each without a word.

    Args:
        config: what transformers made of the file. written: the file's object. name: the model's, in the message.
    """
    text = written.get("text_config")
    text = text if isinstance(text, dict) else written
    new, old = (part if isinstance(part := text.get(key), dict) else {} for key in ("rope_parameters", "rope_scaling"))
    bases = [part.get("rope_theta") for part in _parts(config)]
    stated = [part["rope_theta"] for part in (text, new, old) if isinstance(part.get("rope_theta"), (int, float))]
    lost = [f"rope_theta {base}" for base in stated if bases and base not in bases]
    lost += [f"{key} {new[key]} and {old[key]}" for key in sorted(new.keys() & old.keys()) if new[key] != old[key]]
    if lost:
        raise SourceError(
            f"{name}: config.json states the rotary embedding twice, in different ways ({lost[0]}): "
            "keep rope_parameters alone, with what is right"
        )


def length_that_changes(config: Any) -> int | None:
    """The number of tokens beyond which the rotary embedding depends on the text's length; None if it never does.

    longrope (the 128K variants of Phi-3) has a second set of factors for texts beyond the original length, and
    transformers chooses by the longest text of a batch; dynamic scaling changes with every length beyond the model's
    positions.
    """
    kinds = {str(part.get("rope_type")): part for part in _parts(config)}
    lengths = [kinds["longrope"]["original_max_position_embeddings"]] if "longrope" in kinds else []
    if any("dynamic" in kind for kind in kinds):
        lengths.append(config.get_text_config().max_position_embeddings)
    return min(lengths, default=None)


def _parts(config: Any) -> list[dict[str, Any]]:
    """The parameters of the rotary embeddings: one dict or, if layers are of several kinds, one for each; or none."""
    rotary = getattr(config.get_text_config(), "rope_parameters", None)
    if not isinstance(rotary, dict):
        return []
    return [rotary] if "rope_type" in rotary else [part for part in rotary.values() if isinstance(part, dict)]
