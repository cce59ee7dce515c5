"""GGUF files, dequantised once so that every later load reads plain safetensors."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import torch

from approxkmv.errors import SourceError
from approxkmv.models.fetching import complete, file_sha256
from approxkmv.models.sources import ModelLocation


def convert_gguf(location: ModelLocation, destination: Path) -> ModelLocation:
    """Write a GGUF model as config, tokenizer and float32 safetensors, whole or not at all.

    Quantised weights stay what they are: each is written as the number that its block's scale and code stand for, so
    the folder and the file compute the same. Only the backbone is kept, without the head that predicts tokens.

    Args:
        location: a location with a gguf_file.
        destination: the folder to make; it takes 4 bytes per weight.
    Raises:
        SourceError: not a GGUF location, a file that transformers cannot read, or a destination with other content.
    """
    if location.gguf_file is None:
        raise SourceError(f"{location.folder}: there is no GGUF file to convert here")
    file = location.folder / location.gguf_file
    hashes = {location.gguf_file: file_sha256(file)}

    def fill(folder: Path) -> dict[str, str]:
        write_dequantised(location, folder)
        return hashes

    return complete(Path(destination), f"path:{file}", hashes, fill)


def write_dequantised(location: ModelLocation, folder: Path) -> None:
    """Write config, tokenizer and float32 safetensors of a GGUF model into an existing folder. Raises SourceError."""
    from safetensors.torch import save_model

    from approxkmv.models.loading import load_backbone, load_tokenizer

    require_gguf_packages()
    model = load_backbone(location, dtype=torch.float32, attention="eager")
    load_tokenizer(location).save_pretrained(folder)
    # Not model.save_pretrained: it refuses whatever was read from a GGUF, although the weights are plain by now.
    weights = folder / "model.safetensors"
    save_model(model, str(weights), metadata={"format": "pt"})
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    shutil.copymode(folder / "config.json", weights)  # safetensors writes for the owner only


def require_gguf_packages() -> None:
    """Raise SourceError unless the packages with which transformers reads GGUF are installed."""
    absent = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if absent:
        raise SourceError(f"reading GGUF needs the package {' and '.join(absent)}: pip install {' '.join(absent)}")
