"""Check that the files in a model's folder are what they claim to be, before transformers reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from approxkmv.errors import SourceError
from approxkmv.models.sources import WANTED_SUFFIXES

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
GGUF_MAGIC = b"GGUF"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_folder(folder: Path, name: str) -> None:
    """Refuse a folder that is not a complete model, or that would be misread without an adapter or custom code.

    Args:
        folder: with config.json and safetensors. name: the model's name in messages.
    Raises:
        SourceError: Git LFS pointers, an adapter, custom code, or files that are truncated, damaged or missing.
    """
    refuse_pointers(folder, name)
    refuse_adapter(folder, name)
    for file in ("config.json", "tokenizer_config.json"):
        if (folder / file).is_file() and read_object(folder / file, name).get("auto_map"):
            raise SourceError(
                f"{name}: {file} has auto_map, which names custom code, which is never run: if "
                "transformers' class computes the same, delete the entry in a copy of the folder and use path:COPY"
            )
    weight_shapes(folder, name)


def refuse_adapter(folder: Path, name: str) -> None:
    """Raise SourceError for a folder with an adapter (LoRA), whose weights transformers ignores or adds by itself."""
    if (folder / "adapter_config.json").is_file():
        raise SourceError(
            f"{name}: adapter_config.json says that this is an adapter (LoRA) to another model: merge the two "
            "(merge_and_unload of the package peft), save the result and name that folder"
        )


def refuse_pointers(folder: Path, name: str) -> None:
    """Raise SourceError if files are Git LFS pointers or links to nowhere."""
    for path in sorted(path for path in folder.iterdir() if path.suffix in WANTED_SUFFIXES):
        refuse_broken_link(path, name)
        if path.is_file() and starts_with(path, LFS_POINTER):
            raise SourceError(
                f"{name}: {path.name} is a Git LFS pointer instead of the file: run `git lfs pull` in its folder"
            )


def refuse_broken_link(path: Path, name: str) -> None:
    """Raise SourceError for a symbolic link to something that does not exist."""
    if path.is_symlink() and not path.exists():
        raise SourceError(f"{name}: {path.name} is a link to {os.readlink(path)}, which does not exist: copy it there")


def starts_with(path: Path, magic: bytes) -> bool:
    """Whether a file begins with these bytes."""
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def read_object(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file. Raises SourceError if the file holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{name}: {path.name} is not UTF-8 JSON ({error}): fetch or copy it again") from error
    if not isinstance(value, dict):
        raise SourceError(f"{name}: {path.name} does not hold a JSON object: fetch or copy it again")
    return value


def weight_shapes(folder: Path, name: str) -> dict[str, list[int]]:
    """The shape of every weight in the safetensors files that transformers would load, from their headers.

    Raises SourceError for a file that is missing, truncated or damaged, or that an index places outside the folder.
    """
    return {key: weight.get_shape() for key, weight in _weights(folder, name)}


def weights_of_gguf(file: Path) -> int:
    """How many numbers the tensors of a GGUF file hold; raises whatever its reader does."""
    import gguf

    return sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(str(file)).tensors)


def whole_numbers(folder: Path, name: str) -> set[str]:
    """The names of weights saved as integers or booleans; raises as weight_shapes."""
    return {
        key for key, weight in _weights(folder, name) if weight.get_dtype()[0] in "IU" or weight.get_dtype() == "BOOL"
    }


def rotary_frequencies(folder: Path, name: str) -> dict[str, Any]:
    """The saved frequencies of rotary embeddings, as tensors (few models save them); raises as weight_shapes."""
    return {key: weight[:] for key, weight in _weights(folder, name) if key.endswith("rotary_emb.inv_freq")}


def _weights(folder: Path, name: str) -> Iterator[tuple[str, Any]]:
    from safetensors import SafetensorError, safe_open

    for path in weight_files(folder, name):
        try:
            with safe_open(path, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118
                    yield key, weights.get_slice(key)
        except (SafetensorError, OSError, ValueError) as error:
            raise SourceError(
                f"{name}: {path.name} is not a complete safetensors file ({error}): fetch or copy it again"
            ) from error


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files that transformers would load; raises as weight_shapes, but for damaged ones."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / WEIGHTS).exists():
        raise SourceError(f"{name}: {WEIGHTS} is not a file: replace it with the file that it should be")
    if not (folder / INDEX).is_file():
        there = sorted(path.name for path in folder.glob("*.safetensors"))
        raise SourceError(
            f"{name}: has {', '.join(there) or 'no weights'}, but transformers reads {WEIGHTS} or {INDEX}"
        )
    index = read_object(folder / INDEX, name)
    named = index.get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise SourceError(f"{name}: {INDEX} has no weight_map from weights to files: fetch or copy it again")
    files = sorted(set(named.values()))
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise SourceError(f"{name}: {INDEX} names {file!r}, which is not a safetensors file in the folder")
        if not (folder / file).is_file():
            raise SourceError(f"{name}: {INDEX} names {file}, which is missing: fetch or copy it again")
    if not isinstance(index.get("metadata"), dict):
        raise SourceError(
            f'{name}: {INDEX} has no metadata, which transformers asks for: add "metadata": {{}} to it in a copy of '
            "the folder and use path:COPY"
        )
    return [folder / file for file in files]
