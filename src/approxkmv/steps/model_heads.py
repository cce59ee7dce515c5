"""Queries, keys and values of chosen heads on two long texts: the model-qk workload of the sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from approxkmv.config import CorpusEntry
from approxkmv.corpora import read_corpus
from approxkmv.errors import ConfigError, InputError
from approxkmv.files import written_whole
from approxkmv.models import CapturableModel, ModelLocation
from approxkmv.progress import LOG


def capture_heads(
    model_name: str,
    location: ModelLocation,
    texts: Sequence[tuple[CorpusEntry, Path]],
    tokens: int,
    heads: Sequence[tuple[int, int]],
    rotary_scaling: Mapping[str, Any] | None = None,
) -> None:
    """Write q, k, v (heads, tokens, d) of the first corpus's first document, and of the second corpus's second one.

    A document that is too short is followed by every second one after it, so that the two share no text.

    Args:
        model_name: written into the files. location: of the model.
        texts: two corpora, for measuring and for tuning, each with the file to write.
        tokens: the length of each text. heads: (layer, head) pairs, counted from 0.
        rotary_scaling: see CapturableModel.load.
    Raises:
        ConfigError: a document that is too short, a head that the model does not have. InputError: more tokens than the
        model has positions, or heads of layers with different scales or widths.
    """
    from safetensors.torch import save_file

    of_texts = [read_corpus(corpus.source, corpus.sha256) for corpus, _ in texts]
    if len(of_texts[1]) < 2:
        raise ConfigError(f"corpus {texts[1][0].name} has one document; a sweep needs a second one for tuning")
    model = CapturableModel.load(location, rotary_scaling=rotary_scaling)
    for what in ([model.mask] if model.has_own_masks else []) + [*model.left_out]:
        LOG.info("a sweep over heads of this model leaves out: %s", what)
    for layer, head in heads:
        if layer >= model.n_layers or head >= model.n_heads:
            raise ConfigError(
                f"capture.heads asks for layer {layer}, head {head}, but the model has {model.n_layers} layers of "
                f"{model.n_heads} heads, counted from 0"
            )
    for first, ((corpus, path), documents) in enumerate(zip(texts, of_texts, strict=True)):
        text, names, ids = "", [], []
        for document in documents[first::2]:
            text += ("\n\n" if text else "") + document.context
            names.append(document.name)
            ids = model.tokenizer(text, verbose=False)["input_ids"][:tokens]
            if len(ids) == tokens:
                break
        else:
            raise ConfigError(
                f"{', '.join(map(repr, names))} of corpus {corpus.name} have {len(ids)} tokens together, but {tokens} "
                "are needed"
            )
        captured = model.capture([ids], values=True)[0]
        scales = {float(captured.scales[layer]) for layer, _ in heads}
        if len(scales) > 1 or captured.values is None:
            raise InputError("the chosen heads have different scales of their logits: choose heads of one scale")
        widths = {captured.layers[layer].widths for layer, _ in heads}
        if len(widths) > 1:
            raise InputError("the chosen heads have different widths: choose heads of one width")
        # Without the zeros behind a narrow layer's columns, which would slow every method down.
        d, d_v = widths.pop() or (None, None)
        tensors = {
            name: torch.stack([tensor[layer, head, :, :width] for layer, head in heads]).contiguous()
            for name, tensor, width in (
                ("q", captured.queries, d),
                ("k", captured.keys, d),
                ("v", captured.values, d_v),
            )
        }
        metadata = {
            "model": model_name,
            "scale": repr(scales.pop()),
            "heads": " ".join(f"{layer}.{head}" for layer, head in heads),
            "text": "; ".join(names),
        }
        with written_whole(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
