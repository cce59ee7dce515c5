"""A causal language model whose attention can be replaced, and its perplexity on one text."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from approxkmv.errors import CaptureError, InputError, NonFiniteError
from approxkmv.files import file_sha256
from approxkmv.models.capture import DTYPES, device_named, layers_that_attend, max_positions
from approxkmv.models.checking import weight_files
from approxkmv.models.interface import refuse_learned_sparsity
from approxkmv.models.loading import causal_class, load_causal_model, load_config
from approxkmv.models.rotary import scaled_positions
from approxkmv.models.sources import ModelLocation
from approxkmv.models.tokenizer import load_tokenizer
from approxkmv.perplexity.replacement import REPLACED, Replacement, replaced
from approxkmv.sweep.measure import running_out_of_memory

_ROWS = 512  # rows of logits, which have a column per token of the vocabulary, widened to float32 at a time


@dataclass(frozen=True)
class Perplexity:
    """One run of a text through the model."""

    perplexity: float
    """exp of the mean negative log probability (natural) of every token but the first, given those before it."""
    seconds: float
    """Of the forward pass."""
    attention_seconds: float
    """Of the attention in the chosen layers."""
    recomputed_share: float
    """Share of the queries in these layers whose approximate answer was lost and recomputed exactly."""


def _contents(location: ModelLocation) -> str:
    folder = location.folder
    if location.gguf_file:
        return file_sha256(folder / location.gguf_file)
    files = [folder / "config.json", *weight_files(folder, str(folder))]
    return hashlib.sha256("".join(f"{path.name} {file_sha256(path)}\n" for path in files).encode()).hexdigest()


class CausalModel:
    """Use CausalModel.load."""

    def __init__(self, model: Any, location: ModelLocation, device: torch.device) -> None:
        """Raises CaptureError for learned sparse attention, and for predictions that depend on later tokens."""
        refuse_learned_sparsity(map(type, model.modules()))
        self._model = model
        self._location = location
        self.device = device
        kinds = layers_that_attend(model.config.get_text_config())
        self.n_layers = len(kinds)
        # Those of softmax attention: all but in a hybrid.
        self.attending = [layer for layer, attends in enumerate(kinds) if attends]
        if not self.attending:
            raise CaptureError(f"{type(model).__name__} has no layers of softmax attention")
        self.max_positions = scaled_positions(model.config) or max_positions(model)
        one, other = self._logits([3, 4, 5, 6]), self._logits([3, 4, 5, 7])
        # Logits that are no numbers are reported with the text that meets them.
        if not torch.allclose(one[:3].float(), other[:3].float(), rtol=1e-3, atol=1e-3, equal_nan=True):
            raise CaptureError(f"{type(model).__name__} sees later tokens: perplexity needs a causal model")

    @classmethod
    def load(cls, location: ModelLocation, *, dtype: str = "float32", device: str = "cpu") -> CausalModel:
        """Load a causal language model.

        Args:
            location: what fetch returned. dtype: float32, bfloat16 or float16. device: cpu, cuda or cuda:N.
        Raises:
            SourceError: files that cannot be read, or missing weights.
            CaptureError: the model is not causal, or does not use transformers' attention interface.
            InputError: an unknown dtype, or a device that does not exist. UnavailableError: too little memory.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}: use one of {', '.join(DTYPES)}")
        place = device_named(device)
        wanted = causal_class(load_config(location))
        if not (wanted._can_set_attn_implementation() and wanted._supports_sdpa):
            raise CaptureError(f"{wanted.__name__} does not let its attention be replaced by plain softmax attention")
        with running_out_of_memory("the model"):
            return cls(load_causal_model(location, dtype=DTYPES[dtype], attention=REPLACED).to(place), location, place)

    def tokens(self, documents: Sequence[str], count: int) -> list[int]:
        """The first `count` tokens of the documents, joined by blank lines. Raises InputError if there are fewer."""
        tokenizer = load_tokenizer(self._location)
        text, ids = "", []
        for document in documents:
            text += ("\n\n" if text else "") + document
            # Almost every text has at least as many tokens as words: this avoids tokenizing it again and again.
            if len(text.split()) >= count:
                ids = tokenizer(text, verbose=False)["input_ids"]
                if len(ids) >= count:
                    break
        else:
            ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) < count:
            raise InputError(f"the text has {len(ids)} tokens, but {count} were requested")
        return list(ids[:count])

    def check_length(self, count: int) -> None:
        """Raise InputError for fewer than two tokens, or for more than the model has positions."""
        if count < 2 or (self.max_positions is not None and count > self.max_positions):
            raise InputError(f"the text has {count} tokens: give 2 to {self.max_positions or 'any number'}")

    def identity(self) -> str:
        """Identifies the weights, the configuration and the dtype, the same wherever and whenever they were copied."""
        return f"{_contents(self._location)} {self._model.dtype}"

    def perplexity(self, ids: Sequence[int], replacement: Replacement) -> Perplexity:
        """Perplexity of the text `ids` with the replacement's method in its layers, and the time taken.

        Raises InputError for fewer than two tokens or more than the model has positions, CaptureError if a layer
        cannot be replaced, UnavailableError if the method cannot run, NonFiniteError if the logits hold a NaN.
        """
        self.check_length(len(ids))
        start = time.perf_counter()
        with replaced(replacement):
            logits = self._logits(ids)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start - replacement.warm_up_seconds
        if replacement.calls != len(replacement.layers):
            advice = "" if {*replacement.layers} <= {*self.attending} else f": choose among {self.attending}"
            raise CaptureError(
                f"{type(self._model).__name__}: {replacement.calls} of {len(replacement.layers)} layers handed their "
                f"attention over{advice}"
            )
        targets = torch.tensor(ids[1:], device=logits.device)
        total = 0.0
        for i in range(0, len(targets), _ROWS):
            some = logits[i : i + _ROWS][: len(targets) - i].float()
            total += float(torch.nn.functional.cross_entropy(some, targets[i : i + _ROWS], reduction="sum"))
        mean = total / len(targets)
        if not math.isfinite(mean):
            raise NonFiniteError(f"the logits of {type(self._model).__name__} are not finite at {len(ids):,} tokens")
        return Perplexity(
            perplexity=math.exp(mean) if mean < 700 else math.inf,
            seconds=seconds,
            attention_seconds=replacement.seconds,
            recomputed_share=replacement.recomputed_rows / max(replacement.rows, 1),
        )

    def _logits(self, ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = self._model(
                input_ids=torch.tensor([list(ids)], device=self.device), use_cache=False
            ).logits
        return logits[0]
