"""Read a model's configuration, weights and tokenizer with transformers, quietly and completely."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto import modeling_auto as auto
from transformers.utils import logging

from approxkmv.errors import CaptureError, SourceError, one_line
from approxkmv.models.checking import (
    check_folder,
    read_object,
    rotary_frequencies,
    weight_shapes,
    weights_of_gguf,
    whole_numbers,
)
from approxkmv.models.recording import ADVICE
from approxkmv.models.rotary import refuse_two_answers, refuse_unknown_types
from approxkmv.models.sources import ModelLocation
from approxkmv.progress import on_terminal
from approxkmv.typed import shown

# A backbone's pooler comes after the last attention layer: nothing captured passes through it.
AFTER_ATTENTION = re.compile(r"(^|\.)pooler\.")
# Saved by older releases of transformers but now computed by the classes: not weights.
COMPUTED = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias)$")
# Heads that other libraries save beside the model, of values (TRL) and of embeddings (ColBERT), and one that has this
# name in files alone (GPT-NeoX).
OTHER_HEADS = ("v_head", "linear", "embed_out")
HEADS = (
    auto.MODEL_FOR_PRETRAINING_MAPPING,
    auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    auto.MODEL_FOR_MASKED_LM_MAPPING,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
)
SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
MAX_LAYERS = 1_000  # several times the deepest model; building many more in vain takes minutes
LAYERS: tuple[str, ...] = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
LAYERS += ("encoder_layers", "decoder_layers", "num_decoder_layers")
# Of these transformers or torch make as many entries, or fail, without looking at them.
MOST = {"num_labels": 1_000_000, "max_position_embeddings": 2**31, **dict.fromkeys(LAYERS, MAX_LAYERS)}
# A configuration asks for at most so many numbers, or times those in the files; packed codes are up to 16 to a number.
FEW_NUMBERS, MOST_TIMES = 2**30, 32


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, load reports or warnings from transformers; errors still raise."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def name_of(location: ModelLocation) -> str:
    """The folder, or the GGUF file, as messages name it."""
    return str(location.folder / location.gguf_file) if location.gguf_file else str(location.folder)


@contextlib.contextmanager
def reading(location: ModelLocation, what: str) -> Iterator[None]:
    """Within the block, any exception over a bad file becomes one line that names the location and `what`."""
    try:
        yield
    except (SourceError, CaptureError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, KeyError) and "approxkmv_" in str(error):
            raise CaptureError(
                f"{name_of(location)}: a part of the model does not use the attention interface of transformers: "
                f"{ADVICE}"
            ) from error
        # transformers raises OSError, ValueError, KeyError, ImportError, RuntimeError and more for a bad folder.
        raise SourceError(f"{name_of(location)}: the {what} cannot be read ({one_line(error)})") from error


def source_options(location: ModelLocation) -> dict[str, Any]:
    """What every call of transformers' loaders is given: nothing is fetched, and no code of the model's is run."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if location.gguf_file is not None:
        options["gguf_file"] = location.gguf_file
    return options


def _changed(attention: str | None) -> dict[str, Any]:
    """What a checkpoint may ask for in its configuration and does not get.

    Its attentions would be refused, and change no number; another implementation would hand over no queries and keys,
    or be a kernel that transformers loads from the hub and runs.
    """
    return {"output_attentions": False, "_attn_implementation": attention, "_experts_implementation": None}


def _weight_options(location: ModelLocation) -> dict[str, Any]:
    if location.gguf_file is None:
        return {"use_safetensors": True}
    # Later releases can also multiply with packed weights in special kernels; here every weight is dequantised.
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def load_config(location: ModelLocation) -> Any:
    """The model's configuration. Raises SourceError if the folder has none that transformers knows."""
    if location.gguf_file is None:
        check_folder(location.folder, name_of(location))
        written = read_object(location.folder / "config.json", name_of(location))
        for part in (written, *(part for part in written.values() if isinstance(part, dict))):
            for size, most in MOST.items():
                if isinstance(part.get(size), int) and part[size] > most:
                    raise SourceError(
                        f"{name_of(location)}: config.json says {size} is {shown(part[size])}: correct it"
                    )
    with quiet(), reading(location, "configuration"):
        config = AutoConfig.from_pretrained(location.folder, **_changed(None), **source_options(location))
    text = config.get_text_config()
    for size in SIZES:
        value = getattr(text, size, None)
        limit = MAX_LAYERS if size == "num_hidden_layers" else 2**31
        if isinstance(value, int) and not 0 < value < limit:
            raise SourceError(f"{name_of(location)}: its configuration says {size} is {value}: correct config.json")
    refuse_unknown_types(config, name_of(location))
    if location.gguf_file is None:
        refuse_two_answers(config, written, name_of(location))
    return config


def backbone_class(config: Any) -> Any:
    """The class that AutoModel would build for a configuration. Raises CaptureError unless it reads text."""
    try:
        found = auto.MODEL_MAPPING[type(config)]
    except KeyError as error:
        raise CaptureError(f"{type(config).__name__}: transformers has no backbone for this configuration") from error
    first: Any = found[0] if isinstance(found, tuple) else found
    if first.main_input_name != "input_ids":
        raise CaptureError(f"{first.__name__} takes {first.main_input_name}, not token ids: choose a model of text")
    if hasattr(first, "get_text_features"):
        raise CaptureError(
            f"{first.__name__} pairs a model of text with another one: save its text model alone, with the "
            "save_pretrained of its class (CLIPTextModel of CLIP), and name that folder"
        )
    return first


def causal_class(config: Any) -> Any:
    """The causal language model's class for a configuration. Raises CaptureError if the model is not one."""
    name = type(config).__name__
    # Encoders have such a class too, for use as decoders, and say so in their configuration.
    is_encoder = type(config) in auto.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if type(config) not in auto.MODEL_FOR_CAUSAL_LM_MAPPING or is_encoder or config.is_encoder_decoder:
        raise CaptureError(f"{name} is not that of a causal language model: its tokens are not predicted one by one")
    found: Any = auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def load_causal_model(location: ModelLocation, *, dtype: torch.dtype, attention: str, config: Any = None) -> Any:
    """The model with its language-model head; otherwise like load_backbone."""
    return _load(AutoModelForCausalLM, location, dtype, attention, config)


def load_backbone(location: ModelLocation, *, dtype: torch.dtype, attention: str, config: Any = None) -> Any:
    """The model without a head, in evaluation mode, on the CPU.

    Args:
        dtype: of the weights. attention: the name of a registered attention implementation.
        config: a modified result of load_config; None uses the one in the files.
    Raises:
        SourceError: files that cannot be read, or missing weights, which transformers would fill with random numbers.
    """
    return _load(AutoModel, location, dtype, attention, config)


def _load(kind: Any, location: ModelLocation, dtype: torch.dtype, attention: str, config: Any) -> Any:
    # The GGUF reader shows a progress bar that no setting turns off: allow it on a terminal only.
    silent = location.gguf_file is not None and not on_terminal()
    no_bar = contextlib.redirect_stderr(io.StringIO()) if silent else contextlib.nullcontext()
    _refuse_more_than_the_files(kind, location, load_config(location) if config is None else config)
    with quiet(), no_bar, reading(location, "model"):
        model, info = kind.from_pretrained(
            location.folder,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **(_changed(attention) if config is None else {"config": config}),
            **source_options(location),
            **_weight_options(location),
        )
    if info["mismatched_keys"]:
        key, in_file, in_model = min(info["mismatched_keys"])
        raise SourceError(
            f"{name_of(location)}: {len(info['mismatched_keys'])} weights are not of the size that the configuration "
            f"says, first {key}: {tuple(in_file)} in the file, {tuple(in_model)} in the model: correct config.json"
        )
    missing = sorted(key for key in info["missing_keys"] if not AFTER_ATTENTION.search(key) and _random(model, key))
    if missing:
        raise SourceError(
            f"{name_of(location)}: {len(missing)} weights of {type(model).__name__} are not in the file, first "
            f"{missing[0]}: they would be random, so the model is not used"
        )
    shapes = {} if location.gguf_file else weight_shapes(location.folder, name_of(location))
    prefix = f"{model.base_model_prefix}."
    if twice := sorted(key for key in shapes if prefix + key in shapes):
        raise SourceError(f"{name_of(location)}: {twice[0]} is in the file with {prefix} before its name and without")
    # Building the classes with heads takes seconds.
    is_head = functools.cache(functools.partial(_is_head, model.config))
    unknown = sorted(key for key in info["unexpected_keys"] if _matters(model, key, shapes, is_head))
    if unknown:
        raise SourceError(
            f"{name_of(location)}: {len(unknown)} weights in the file do not belong to {type(model).__name__}, first "
            f"{unknown[0]}: without them it would be another model, so it is not used"
        )
    if location.gguf_file is None:
        _refuse_what_is_read_otherwise(location, model, scaled=config is not None)
    return model.eval()


def _refuse_more_than_the_files(kind: Any, location: ModelLocation, config: Any) -> None:
    """Raise SourceError for a size with which the model would have many times the numbers in the files.

    transformers allocates what it misses in them, which may be more than there is memory.
    """
    with quiet(), reading(location, "model"), torch.device("meta"):
        model = kind.from_config(copy.deepcopy(config), dtype=torch.float32)
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if location.gguf_file is None:
        there = sum(map(math.prod, weight_shapes(location.folder, name_of(location)).values()))
        advice = "correct the sizes in config.json, or copy all its files"
    else:
        with reading(location, "metadata"):
            there = weights_of_gguf(location.folder / location.gguf_file)
        advice = "fetch or copy the file again"
    if wanted > max(FEW_NUMBERS, MOST_TIMES * there):
        raise SourceError(
            f"{name_of(location)}: by its configuration {type(model).__name__} has {wanted:,} weights, but there are "
            f"{there:,} in the files: {advice}"
        )


def _refuse_what_is_read_otherwise(location: ModelLocation, model: Any, scaled: bool) -> None:
    """Raise SourceError, by name, for weights that transformers would misinterpret.

    It recomputes the frequencies of rotary embeddings and ignores those in the file, and it reads codes of weights
    without their quantisation as weights. `scaled` says that the frequencies are changed on purpose.
    """
    computed = [buffer for key, buffer in model.named_buffers() if key.endswith("inv_freq")]
    for key, saved in rotary_frequencies(location.folder, name_of(location)).items():
        # The saved frequencies may be in half precision.
        near = (x.shape == saved.shape and torch.allclose(x, saved.to(x), rtol=1e-2, atol=1e-6) for x in computed)
        if not scaled and not any(near):
            raise SourceError(
                f"{name_of(location)}: {key} in the file is not what the configuration says of the rotary embedding, "
                "and would be left out: write its scaling into config.json, as rope_parameters"
            )
    numbers = {key for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    prefix = f"{model.base_model_prefix}."
    for key in sorted(whole_numbers(location.folder, name_of(location))):
        if key in numbers or key.removeprefix(prefix) in numbers or f"{prefix}{key}" in numbers:
            raise SourceError(
                f"{name_of(location)}: {key} is saved as integers, which are codes of the weights, not the "
                "weights: save the model without quantisation"
            )


def _random(model: Any, key: str) -> bool:
    """Whether a weight missing from the file would be random; positional sinusoids, for instance, are computed."""
    return "Sinusoidal" not in type(model.get_submodule(key.rpartition(".")[0])).__name__


def _matters(model: Any, key: str, shapes: dict[str, list[int]], is_head: Callable[[str], bool]) -> bool:
    """Whether a weight in the file that the model's class does not know may affect what the model computes.

    Those of a head do not: they lie outside the prefix of the model's own weights (bert. or model.), under a name that
    a class of the same architecture, or a library that trains such heads, uses for its head.
    """
    shape = shapes.get(key, [])
    # One number for all heads; a learned bias has one per head.
    causal_mask = key.endswith(".bias") and shape[:-2] == [1, 1] and shape[-1] == shape[-2]
    if AFTER_ATTENTION.search(key) or COMPUTED.search(key) or causal_mask:
        return False
    part = key.partition(".")[0]
    if key.startswith(f"{model.base_model_prefix}.") or part in _parts(model):
        return True
    return not is_head(part)


def _is_head(config: Any, part: str) -> bool:
    return part in OTHER_HEADS or any(part in _parts(head) for head in _with_heads(config))


def _parts(model: Any) -> set[str]:
    tensors = [*model.named_parameters(recurse=False), *model.named_buffers(recurse=False)]
    return {name for name, _ in [*model.named_children(), *tensors]}


def _with_heads(config: Any) -> Iterator[Any]:
    """The models with heads that transformers has for a configuration, without allocating their weights."""
    for mapping in HEADS:
        found: Any = mapping.get(type(config), ())
        for kind in found if isinstance(found, tuple) else (found,):
            with torch.device("meta"):
                yield kind(config)
