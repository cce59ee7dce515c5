"""GGUF files, dequantised once so that every later load reads plain safetensors."""

from __future__ import annotations

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
    from approxkmv.models.loading import load_backbone, load_tokenizer

    model = load_backbone(location, dtype=torch.float32, attention="eager")
    tokenizer = load_tokenizer(location)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
