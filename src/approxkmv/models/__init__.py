"""From the string that names a model to the queries and keys of its attention.

location = fetch(parse_source("hub:google-bert/bert-base-uncased@REVISION"), Path("models/bert"))
model = CapturableModel.load(location)
captured = model.capture([model.tokenize(text, 512) for text in texts])
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from approxkmv.lazy import attributes
from approxkmv.models.sources import ModelLocation, ModelSource, parse_source

if TYPE_CHECKING:
    from approxkmv.models.capture import CapturableModel as CapturableModel
    from approxkmv.models.fetching import fetch as fetch
    from approxkmv.models.gguf_weights import convert_gguf as convert_gguf
    from approxkmv.models.recording import Captured as Captured
    from approxkmv.models.recording import NonFiniteActivation as NonFiniteActivation

# Imported on first use, so that model sources in a configuration can be checked without torch.
_NAMES = {
    "capture": ["CapturableModel"],
    "fetching": ["fetch"],
    "gguf_weights": ["convert_gguf"],
    "recording": ["Captured", "NonFiniteActivation"],
}
__all__ = [*chain(*_NAMES.values()), "ModelLocation", "ModelSource", "parse_source"]
__getattr__ = attributes(__name__, _NAMES)
