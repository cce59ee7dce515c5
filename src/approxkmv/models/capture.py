"""Queries and keys of every layer and head of a model, as its own attention multiplies them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from approxkmv.errors import ApproxKMVError, CaptureError, InputError, one_line
from approxkmv.models.masks import plain_spans
from approxkmv.models.recording import ADVICE, Captured, Layer, Recording
from approxkmv.models.rotary import length_that_changes, scaled_positions
from approxkmv.models.sources import ModelLocation
from approxkmv.statistics.entries import CAUSAL, EVERY_KEY, OWN_MASK
from approxkmv.words import counted

# What transformers calls layers of a hybrid that mix tokens without softmax attention, or do not mix them.
WITHOUT_ATTENTION = ("linear_attention", "conv", "mamba", "recurrent", "moe", "mlp")
# And layers that choose keys for each query, or attend to sums of keys.
NOT_PLAIN = ("indexed_attention", "compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CapturableModel:
    """A model without its head, from which each text's queries and keys can be taken.

    >>> model = CapturableModel.load(ModelLocation(Path("all-MiniLM-L6-v2")))       # doctest: +SKIP
    >>> captured = model.capture([model.tokenize("Attention is sparse.", None)])    # doctest: +SKIP
    >>> captured[0].queries.shape                                                   # doctest: +SKIP
    torch.Size([6, 12, 7, 32])

    Of an encoder-decoder model (T5, BART) the encoder is taken: its self-attention over the text. Of a hybrid
    (Qwen3-Next, Jamba) the layers of softmax attention are taken, and counted from 0 among themselves.
    """

    def __init__(
        self,
        backbone: Any,
        location: ModelLocation,
        attending: Sequence[bool],
        device: torch.device,
        encoder_only: bool = False,
    ) -> None:
        """Use CapturableModel.load."""
        self._backbone = backbone
        self._location = location
        self._device = device
        self._tokenizer: Any = None
        self.architecture: str = type(backbone).__name__
        try:
            self._embedded = int(backbone.get_input_embeddings().weight.shape[0])
        except (NotImplementedError, AttributeError) as error:
            raise CaptureError(f"{self.architecture} embeds no tokens: choose a model of text") from error
        self._pad = _pad_token(backbone.config, self._embedded)
        self.name: str = location.gguf_file or location.folder.resolve().name
        self.n_layers = sum(attending)
        self.max_positions = scaled_positions(backbone.config) or max_positions(backbone)
        self.changes_beyond = length_that_changes(backbone.config)
        # Two tokens through the whole model: shapes and causality as they are, not as a configuration words them,
        # and an architecture that cannot be captured is refused before any text is read.
        short, long = self._probe_texts()
        probe = self._probe([short])
        # Damaged weights are reported with the text that meets them, when there is one.
        alone = probe.texts(require_finite=False)[0]
        self.n_heads = int(alone.queries.shape[1])
        self.head_dim = int(alone.queries.shape[3])
        self.layers = alone.layers
        stops = alone.spans[..., 1]
        self.is_causal = bool((stops <= plain_spans(len(short), causal=True)[:, 1]).all())
        every = bool((alone.spans == plain_spans(len(short), causal=False)).all())
        windowed = any(layer.window is not None for layer in self.layers)
        self.has_own_masks = windowed or not (self.is_causal or every)
        self.mask = mask_in_words(self.layers, self.is_causal) if self.is_causal or self.has_own_masks else EVERY_KEY
        self.left_out = (*left_out_in_words(self.layers, encoder_only), *others_in_words(attending))
        padded, longer = self._probe([short, long]).texts(require_finite=False)
        # MobileBERT embeds each token with its right neighbour, so that padding would reach a text's last token.
        self._pads = _agree(alone, padded)
        start = replace(longer, queries=longer.queries[:, :, : len(short)], keys=longer.keys[:, :, : len(short)])
        finite = bool(torch.isfinite(alone.queries).all() and torch.isfinite(alone.keys).all())
        if self.is_causal and finite and not _agree(alone, start):
            raise CaptureError(
                f"{self.architecture} hides later tokens from its attention, and yet they change the queries and keys "
                f"of earlier ones: {ADVICE}"
            )

    @classmethod
    def load(
        cls,
        location: ModelLocation,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        rotary_scaling: Mapping[str, Any] | None = None,
    ) -> CapturableModel:
        """Load a model for capture.

        Args:
            location: what fetch returned.
            dtype: float32, bfloat16 or float16, of the weights and of what is captured.
            device: cpu, cuda or cuda:N.
            rotary_scaling: method (linear or yarn) and factor, to go on where the model's positions end.
        Raises:
            SourceError: files that cannot be read, or missing weights.
            CaptureError: an architecture whose queries and keys cannot be captured, with what to do; a model without
                rotary embeddings where they are to be scaled.
            InputError: an unknown dtype, or a device that is not there.
        """
        # transformers takes seconds to import: not before a model is wanted.
        from approxkmv.models.families import ADAPTERS
        from approxkmv.models.interface import implementation_for, refuse_learned_sparsity
        from approxkmv.models.loading import backbone_class, load_backbone, load_config
        from approxkmv.models.rotary import scale_rotary

        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}: use one of {', '.join(DTYPES)}")
        place = device_named(device)
        config = load_config(location)
        wanted = backbone_class(config)
        attention = "eager" if wanted.__name__ in ADAPTERS else implementation_for(wanted)
        changed = None
        if rotary_scaling is not None:
            scale_rotary(config, rotary_scaling["method"], float(rotary_scaling["factor"]))
            changed = config
        backbone = load_backbone(location, dtype=DTYPES[dtype], attention=attention, config=changed)
        refuse_learned_sparsity(map(type, backbone.modules()))
        if config.is_encoder_decoder:
            backbone = backbone.get_encoder()
        text_config = backbone.config.get_text_config()
        attending = layers_that_attend(text_config)
        if not any(attending):
            raise CaptureError(f"{type(backbone).__name__} does not say that it has layers of attention: {ADVICE}")
        if others := {*NOT_PLAIN} & {*(getattr(text_config, "layer_types", None) or ())}:
            raise CaptureError(
                f"{type(backbone).__name__} has layers of {', '.join(sorted(others))}, in which queries choose their "
                f"keys or see sums of keys: {ADVICE}"
            )
        # One pass per text: a cache of keys would only cost memory.
        backbone.config.use_cache = text_config.use_cache = False
        return cls(backbone.to(place), location, attending, place, encoder_only=bool(config.is_encoder_decoder))

    @property
    def tokenizer(self) -> Any:
        """The model's own tokenizer, loaded when first asked for. Raises SourceError when the folder has none."""
        if self._tokenizer is None:
            from approxkmv.models.tokenizer import load_tokenizer

            self._tokenizer = load_tokenizer(self._location)
        return self._tokenizer

    def tokenize(self, text: str, max_length: int | None = None) -> list[int]:
        """The text's token ids, with the special tokens that the model expects.

        Args:
            text: any text.
            max_length: keep at most this many tokens, special ones included; None: as many as the model has positions.
        Returns:
            At most max_length ids; the special tokens survive the cut.
        Raises:
            InputError: max_length below 1. SourceError: the folder has no tokenizer.
        """
        if max_length is not None and max_length < 1:
            raise InputError(f"max_length is {max_length}: give a positive number of tokens")
        lengths = [length for length in (max_length, self.max_positions) if length is not None]
        options = {"truncation": True, "max_length": min(lengths)} if lengths else {"verbose": False}
        return list(self.tokenizer(text, **options)["input_ids"])

    def capture(self, batch: Sequence[Sequence[int]], *, values: bool = False) -> list[Captured]:
        """Run the texts through the model and take what each layer's attention multiplies.

        Args:
            batch: token ids of each text, of any lengths; shorter ones are padded inside, and the padding is removed.
                A model that padding would reach (MobileBERT) runs texts of different lengths apart, and one whose
                rotary embedding changes beyond a length runs the texts beyond it apart.
            values: whether to take the values too.
        Returns:
            One Captured per text, queries and keys (layers, heads, n, d) in the model's dtype on its device.
        Raises:
            InputError: a text that is empty or longer than the model's positions, or an id that is no token.
            NonFiniteActivation: a NaN or infinite activation, with .layer, .head and .index of the text.
            CaptureError: a layer did not hand its queries and keys over.
        """
        texts = [list(text) for text in batch]
        if not texts:
            return []
        for index, text in enumerate(texts):
            self._check(index, text)
        # Together only what may be: see _pads, and length_that_changes.
        groups: dict[int, list[int]] = {}
        for index, text in enumerate(texts):
            beyond = self.changes_beyond is not None and len(text) > self.changes_beyond
            groups.setdefault(int(beyond) if self._pads else len(text), []).append(index)
        captured: dict[int, Captured] = {}
        for rows in groups.values():
            captured |= dict(zip(rows, self._capture([texts[row] for row in rows], rows, values), strict=True))
        return [captured[index] for index in range(len(texts))]

    def _capture(self, texts: list[list[int]], indices: Sequence[int], values: bool) -> list[Captured]:
        recording = Recording(self.architecture, self.n_layers, [len(text) for text in texts], values)
        self._run(texts, recording, f"a text of {max(recording.lengths)} tokens")
        captured = recording.texts(indices)
        for index, one in zip(indices, captured, strict=True):
            if not self.has_own_masks and not bool(
                (one.spans == plain_spans(one.spans.shape[1], self.is_causal)).all()
            ):
                raise CaptureError(
                    f"{self.architecture}: text {index} of the batch is attended to in windows that are not those of "
                    f"the model's configuration as this code reads it: {ADVICE}"
                )
        return captured

    def _check(self, index: int, text: list[int]) -> None:
        if not text:
            raise InputError(f"text {index} of the batch has no tokens")
        if self.max_positions is not None and len(text) > self.max_positions:
            raise InputError(
                f"text {index} of the batch has {len(text)} tokens and {self.name} takes at most "
                f"{self.max_positions}: cut it with tokenize(text, max_length)"
            )
        if min(text) < 0 or max(text) >= self._embedded:
            raise InputError(f"text {index} of the batch has a token id outside 0..{self._embedded - 1}")

    def _run(self, texts: list[list[int]], recording: Recording, what: str) -> None:
        try:
            self._forward(texts, recording)
        except (ApproxKMVError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            # Anything: it comes from inside an architecture that was never run this way.
            raise CaptureError(
                f"{self.architecture} does not run on {what} ({type(error).__name__}: {one_line(error)}): {ADVICE}"
            ) from error

    def _forward(self, texts: list[list[int]], recording: Recording) -> None:
        from approxkmv.models.loading import quiet

        longest = max(recording.lengths)
        ids = torch.full((len(texts), longest), self._pad, dtype=torch.long)
        mask = torch.zeros((len(texts), longest), dtype=torch.long)
        # On the right: positions then count from the text's first token, and a causal model never sees the padding.
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text, dtype=torch.long)
            mask[row, : len(text)] = 1
        # Some architectures log advice as they run.
        with quiet(), torch.inference_mode(), self._recording_calls(recording):
            self._backbone(input_ids=ids.to(self._device), attention_mask=mask.to(self._device))

    def _recording_calls(self, recording: Recording) -> AbstractContextManager[None]:
        from approxkmv.models import interface
        from approxkmv.models.families import ADAPTERS

        adapter = ADAPTERS.get(self.architecture)
        return interface.recording_calls(recording) if adapter is None else adapter(self._backbone, recording)

    def _probe_texts(self) -> tuple[list[int], list[int]]:
        """Two tokens, and the same two with two more."""
        tokens = [token for token in range(min(5, self._embedded)) if token != self._pad] or [0]
        text = [tokens[place % len(tokens)] for place in range(4)]
        return text[:2], text

    def _probe(self, texts: list[list[int]]) -> Recording:
        recording = Recording(self.architecture, self.n_layers, [len(text) for text in texts], probing=True)
        self._run(texts, recording, "token ids alone")
        return recording


def _agree(one: Captured, other: Captured) -> bool:
    """Whether two captures of a text are the same but for rounding."""
    tolerance = 1e-3 if one.queries.dtype == torch.float32 else 5e-2
    return all(
        bool((a.float() - b.float()).abs().max() <= tolerance * a.float().abs().max())
        for a, b in ((one.queries, other.queries), (one.keys, other.keys))
    )


def mask_in_words(layers: Sequence[Layer], causal: bool) -> str:
    """Which keys the queries of a model see, where at least one layer hides some."""
    windows = [layer.window for layer in layers if layer.window is not None]
    if not windows:
        return CAUSAL if causal else OWN_MASK
    sizes = " and ".join(f"{window if causal else window - 1:,}" for window in sorted(set(windows)))
    side = "" if causal else " to each side"
    return f"{OWN_MASK}: windows of {sizes} keys{side} in {len(windows)} of {len(layers)} layers"


def layers_that_attend(config: Any) -> list[bool]:
    """Of each layer of a model whether it has softmax attention; none if its configuration has no number of layers."""
    n_layers = getattr(config, "num_hidden_layers", None)
    kinds = getattr(config, "layer_types", None) or ()
    if isinstance(n_layers, int) and len(kinds) == n_layers:
        return [kind not in WITHOUT_ATTENTION for kind in kinds]
    return [True] * n_layers if isinstance(n_layers, int) else []


def others_in_words(attending: Sequence[bool]) -> tuple[str, ...]:
    """What a hybrid has beside its layers of softmax attention, and which of its layers those are."""
    if all(attending):
        return ()
    others = f"{counted(len(attending) - sum(attending), 'layer')} without softmax attention"
    *some, last = [str(layer) for layer, attends in enumerate(attending) if attends]
    if not some:
        return (f"{others} (the model's layer {last} is layer 0 here)",)
    return (f"{others} (the model's layers {', '.join(some)} and {last} are numbered from 0 here)",)


def left_out_in_words(layers: Sequence[Layer], encoder_only: bool) -> tuple[str, ...]:
    """What a model's attention includes but the kernel of its queries and keys does not."""
    caps = " and ".join(f"{cap:g}" for cap in sorted({layer.softcap for layer in layers if layer.softcap is not None}))
    names = {"softcap": f"logits' cap of {caps}", "sinks": "learned sink", "bias": "bias added to the logits"}
    count = {name: sum(getattr(layer, name) is not None for layer in layers) for name in names}
    found = [f"the {what} in {count[name]} of {len(layers)} layers" for name, what in names.items() if count[name]]
    beside = ["the decoder and its cross-attention (this is the encoder's self-attention)"] if encoder_only else []
    return (*found, *beside)


def device_named(device: str) -> torch.device:
    """cpu, cuda or cuda:N. Raises InputError for another name and for a device that is not there."""
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device is {device!r}: use cpu, cuda or cuda:N") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device is {device!r} and torch sees {torch.cuda.device_count()} CUDA devices: use cpu")
    return place


def _pad_token(config: Any, embedded: int) -> int:
    """The id to pad with: the model's own, which RoBERTa and MPNet count positions by; 0 when it has none."""
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < embedded else 0


def max_positions(backbone: Any) -> int | None:
    """How many tokens a text may have, or None when the architecture sets no limit.

    RoBERTa and its kin count positions from one past the padding's id, so 514 rows of the table serve 512 tokens.
    """
    for name, module in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            start = 0 if module.padding_idx is None else module.padding_idx + 1
            return int(module.num_embeddings - start)
    positions = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None
