"""GGUF files, dequantised once so that later loads read plain safetensors."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch

from approxkmv.errors import CaptureError, SourceError
from approxkmv.files import file_sha256
from approxkmv.models.folders import complete
from approxkmv.models.sources import ModelLocation

# Metadata that transformers need not read: weights of another shape or number would not load.
SEEN_IN_WEIGHTS = frozenset(
    {
        "attention.key_length",
        "attention.value_length",
        "block_count",
        "context_length",
        "decoder_block_count",
        "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
        "feed_forward_length",
    }
)


def convert_gguf(location: ModelLocation, destination: Path) -> ModelLocation:
    """Write a GGUF model as config, tokenizer and float32 safetensors, completely or not at all.

    Quantised weights keep their values: each is written as the number that its block's scale and its code represent,
    so the folder computes the same as the file. A causal model keeps its language-model head.

    Args:
        location: with a gguf_file.
        destination: the folder to create; it takes 4 bytes per weight.
    Raises:
        SourceError: not a GGUF location, a file that transformers cannot read or of which it ignores something, or a
            destination with other content.
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
    from safetensors.torch import save_file

    from approxkmv.models.loading import causal_class, load_backbone, load_causal_model, load_config
    from approxkmv.models.tokenizer import load_tokenizer

    require_gguf_packages()
    try:
        causal_class(load_config(location))
        load = load_causal_model
    except CaptureError:
        load = load_backbone
    model = load(location, dtype=torch.float32, attention="eager")
    refuse_dropped(location, model)
    load_tokenizer(location).save_pretrained(folder)
    # Not model.save_pretrained: it refuses models read from a GGUF file, although their weights are plain by now.
    weights = folder / "model.safetensors"
    # Of names that share a tensor, such as the embeddings and a tied head, keep the first; the others are tied to it.
    names = {tensor.data_ptr(): name for name, tensor in reversed(model.state_dict().items())}
    tensors = {name: model.state_dict()[name].contiguous() for name in names.values()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    shutil.copymode(folder / "config.json", weights)  # safetensors files are readable by the owner only


def refuse_dropped(location: ModelLocation, model: Any) -> None:
    """Raise SourceError, by name, for anything in a GGUF file that transformers silently ignores.

    Args:
        location: with a gguf_file. model: what was read from it.
    """
    import gguf
    from transformers.integrations import GGUF_CONFIG_MAPPING
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    from approxkmv.models.loading import reading

    config = model.config
    with reading(location, "metadata"):
        reader = gguf.GGUFReader(str(location.folder / str(location.gguf_file)))
        metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
        architecture = metadata["general.architecture"]
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
        known = get_gguf_hf_weights_map(model, processor)
    taken: Any = GGUF_CONFIG_MAPPING.get(config.model_type.removesuffix("_text"), {})
    dropped = [
        f"{key} = {value}"
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
        and not _kept(key.removeprefix(f"{architecture}."), value, metadata, taken, config)
    ]
    dropped += [
        tensor.name
        for tensor in reader.tensors
        if tensor.name not in known
        and tensor.name.removesuffix(".weight") not in known
        # The head of a model that is not causal is not needed.
        and (tensor.name != "output.weight" or model.get_output_embeddings() is not None)
    ]
    if dropped:
        raise SourceError(
            f"{location.folder / str(location.gguf_file)}: transformers leaves out {dropped[0]} of the GGUF file, "
            "without which it would be another model: use the model's safetensors"
        )


def _kept(key: str, value: Any, metadata: dict[str, Any], taken: Any, config: Any) -> bool:
    """Whether the model uses a metadata value, named without its architecture."""
    rotary = getattr(config, "rope_parameters", None) or {}  # Gemma 3 has one per layer kind
    if key.startswith("rope.scaling."):
        return metadata.get(f"{metadata['general.architecture']}.rope.scaling.type") == "none"
    if key.startswith("rope.freq_base"):
        own = rotary.get("sliding_attention" if key.endswith("_swa") else "full_attention", rotary)
        return bool(abs(own.get("rope_theta", 0) - value) <= 1e-6 * value)
    if taken.get(key) or key in SEEN_IN_WEIGHTS:
        return True
    if key == "rope.dimension_count":
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        parts = [part for part in rotary.values() if isinstance(part, dict)] or [rotary]
        return any(int(width * part.get("partial_rotary_factor", 1.0)) == value for part in parts)
    return bool(getattr(config, key.rpartition(".")[2], None) == value)


def require_gguf_packages() -> None:
    """Raise SourceError unless the packages that transformers needs to read GGUF are installed."""
    absent = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if absent:
        raise SourceError(f"reading GGUF needs the package {' and '.join(absent)}: pip install {' '.join(absent)}")
