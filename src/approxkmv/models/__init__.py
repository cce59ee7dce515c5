"""From the string that names a model to the queries and keys that its attention multiplies.

location = fetch(parse_source("hub:google-bert/bert-base-uncased@REVISION"), Path("models/bert"))
model = CapturableModel.load(location)
captured = model.capture([model.tokenize(text, 512) for text in texts])
"""

from approxkmv.models.capture import CapturableModel
from approxkmv.models.fetching import fetch
from approxkmv.models.gguf_weights import convert_gguf
from approxkmv.models.recording import Captured, NonFiniteActivation
from approxkmv.models.sources import ModelLocation, ModelSource, parse_source

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
