"""From the string that names a model to the queries and keys that its attention multiplies.

location = fetch(parse_source("hub:google-bert/bert-base-uncased@REVISION"), Path("models/bert"))
model = CapturableModel.load(location)
captured = model.capture([model.tokenize(text, 512) for text in texts])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from approxkmv.models.sources import ModelLocation, ModelSource, parse_source

if TYPE_CHECKING:
    from approxkmv.models.capture import CapturableModel as CapturableModel
    from approxkmv.models.fetching import fetch as fetch
    from approxkmv.models.gguf_weights import convert_gguf as convert_gguf
    from approxkmv.models.recording import Captured as Captured
    from approxkmv.models.recording import NonFiniteActivation as NonFiniteActivation

# Loaded on first use: a configuration is checked for the sources of models without torch.
_HOME = {
    "CapturableModel": "capture",
    "Captured": "recording",
    "NonFiniteActivation": "recording",
    "convert_gguf": "gguf_weights",
    "fetch": "fetching",
}

__all__ = [
    "CapturableModel",
    "Captured",
    "ModelLocation",
    "ModelSource",
    "NonFiniteActivation",
    "convert_gguf",
    "fetch",
    "parse_source",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
