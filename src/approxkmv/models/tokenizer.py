"""A model's tokenizer: of the right model, and splitting text as its file says."""

from __future__ import annotations

import importlib.util
from typing import Any

from transformers import AutoTokenizer

from approxkmv.errors import SourceError
from approxkmv.models.loading import load_config, name_of, quiet, reading, source_options
from approxkmv.models.sources import ModelLocation

# tokenizer.ggml.pre of byte-level vocabularies that transformers splits as GPT-2's: those that are split so, and those
# whose digits are split off one by one before that (llama.cpp, llama-vocab.cpp).
SPLIT_AS_GPT2 = frozenset({"default", "gpt-2", "jais", "mpt", "olmo", "phi-2", "trillion"})
DIGITS_APART = frozenset({"codeshell", "command-r", "exaone", "mellum2", "minerva-7b", "refact", "smollm", "starcoder"})


def load_tokenizer(location: ModelLocation) -> Any:
    """The model's tokenizer. Raises SourceError if the folder has none that can be read, or that of another model."""
    try:
        with quiet(), reading(location, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(location.folder, **source_options(location))
            if location.gguf_file:
                split_as_stated(location, tokenizer)
            tokenizer("A word, and \u2202\u6587.")  # a vocabulary without its unknown token fails where one is met
    except SourceError as error:
        # transformers' message names whichever package it tried last.
        pieces = sorted(path.name for path in location.folder.iterdir() if path.suffix in (".model", ".spm"))
        if not pieces or location.gguf_file or importlib.util.find_spec("sentencepiece"):
            raise
        raise SourceError(
            f"{name_of(location)}: its tokenizer is for the package SentencePiece ({pieces[0]}): "
            "pip install sentencepiece protobuf, or save a tokenizer.json there"
        ) from error
    tokenizer.truncation_side = "right"  # of a long text its beginning is kept, whatever the checkpoint asks for
    # Without these files transformers builds a tokenizer with an empty vocabulary, to which every text is unknown.
    files = list(tokenizer.vocab_files_names.values())
    if location.gguf_file is None and files and not any((location.folder / file).is_file() for file in files):
        raise SourceError(f"{name_of(location)}: the folder has no tokenizer ({' or '.join(files)}): save it there too")
    rows = getattr(load_config(location).get_text_config(), "vocab_size", None)
    # Excludes tokens added later: some models never embed them, and no text contains them.
    if isinstance(rows, int) and tokenizer.vocab_size > rows:
        raise SourceError(
            f"{name_of(location)}: its tokenizer has {tokenizer.vocab_size} tokens but the model embeds {rows}: "
            "it belongs to another model: save the right one there"
        )
    return tokenizer


def split_as_stated(location: ModelLocation, tokenizer: Any) -> None:
    """Make the tokenizer of a GGUF file split text as its `tokenizer.ggml.pre` says, where transformers does not.

    Raises SourceError for a byte-level vocabulary of a kind that nothing here knows how to split.
    """
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, get_gguf_tokenizer

    file = location.folder / str(location.gguf_file)
    _, stated, _ = get_gguf_tokenizer(str(file))
    split = stated.get("pre_tokenizer_type", "default")
    if stated.get("tokenizer_type") != "gpt2" or split in SPLIT_AS_GPT2 or split in GGUF_PRE_TOKENIZER_SPLITS:
        return
    if split not in DIGITS_APART:
        raise SourceError(
            f"{file}: transformers ignores tokenizer.ggml.pre = {split}, how the file's tokenizer splits text: "
            "use the model's own folder with its tokenizer.json"
        )
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
