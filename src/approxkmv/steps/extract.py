"""Text to queries and keys: one shard of a study's texts through one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from approxkmv.config import Study
from approxkmv.errors import CaptureError, ConfigError, NonFiniteError
from approxkmv.models.recording import Captured, NonFiniteActivation
from approxkmv.progress import LOG, Times, progress
from approxkmv.results.activations import write_activations
from approxkmv.results.locations import origin
from approxkmv.results.shards import shard_count, write_shard
from approxkmv.steps.fetch import load_model
from approxkmv.steps.texts import read_shard

if TYPE_CHECKING:
    from approxkmv.models import CapturableModel


# The share of unknown tokens above which a shard's numbers say little of the texts
MANY_UNKNOWN = 0.05


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, each at most batch_tokens with its padding.

    A text longer than batch_tokens is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def extract(
    study: Study,
    model_name: str,
    location: Path,
    texts: Path,
    shard: int,
    out: Path,
    contexts_out: Path,
    times: Times | None = None,
) -> tuple[int, int, int]:
    """Write the activations of a shard (safetensors) and what became of each of its texts (CSV).

    Returns how many texts were used, how many were too short, and how many were cut; `times` gets the seconds of each
    part.

    The CSV has the columns context, name, tokens, cut (tokens beyond the limit), used (False: shorter than the
    minimum) and, the same in each row, causal (whether the model attends only backwards), mask (which keys its queries
    see) and left_out (what its attention includes but K does not, joined by semicolons).

    Raises NonFiniteError naming model, layer, head and context; ConfigError for a device that does not exist or a model
    with too few positions for any text; CaptureError for lengths at which the model would read a text differently.
    """
    if shard >= (count := shard_count(texts, study.shard_contexts)):
        raise ConfigError(f"there is no shard {shard}: {texts} makes {count} of them, counted from 0")
    passages = read_shard(texts, shard, study.shard_contexts)
    made_of = origin(location, texts, model_name)
    times = Times() if times is None else times
    with times.of("loading"):
        model = load_model(study, model_name, location)
    limit = study.max_tokens if model.max_positions is None else min(study.max_tokens, model.max_positions)
    if limit < study.min_tokens:
        raise ConfigError(
            f"model {model_name} has {limit} positions, and study {study.name} takes texts of at least min_tokens "
            f"{study.min_tokens}: lower min_tokens and min_prefix, or leave the model out"
        )
    # Without the model's own limit, so that what is cut can be counted.
    with times.of("tokens"):
        tokens = [model.tokenizer(passage.text, verbose=False)["input_ids"] for passage in passages]
        cut = [
            model.tokenize(passage.text, limit) if len(t) > limit else t
            for passage, t in zip(passages, tokens, strict=True)
        ]
    used = [len(t) >= study.min_tokens for t in cut]
    if model.has_own_masks:
        LOG.info("model %s: masked statistics are over %s", model_name, model.mask)
    for what in model.left_out:
        LOG.info("model %s, not in K: %s", model_name, what)
    require_true_prefixes(study, model_name, model, [len(t) for t in cut])
    taken = [i for i, use in enumerate(used) if use]
    tokenizer = model.tokenizer
    unknown, of_all = sum(cut[i].count(tokenizer.unk_token_id) for i in taken), sum(len(cut[i]) for i in taken)
    if unknown > MANY_UNKNOWN * of_all:
        LOG.info(
            "model %s: %d of %d tokens are unknown to its tokenizer, and all the same to the model: does it read the "
            "language of these texts?",
            *(model_name, unknown, of_all),
        )
    marks = {tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id}
    special = {passages[i].index: torch.tensor([token in marks for token in cut[i]]) for i in taken}
    captured: dict[int, Captured] = {}
    title = f"extract    {model_name}, shard {shard}"
    with progress(total=of_all, unit="token", title=title) as bar:
        for batch in batches_by_length([len(cut[i]) for i in taken], study.batch_tokens):
            members = [taken[i] for i in batch]
            with times.of("model"):
                try:
                    results = model.capture([cut[i] for i in members])
                except NonFiniteActivation as error:
                    context = passages[members[error.index]].index
                    raise NonFiniteError(
                        f"model {model_name}, layer {error.layer}, head {error.head}, context {context}: a query or "
                        "key is NaN or infinite; try dtype float32, or check the model's weights"
                    ) from error
            for i, one in zip(members, results, strict=True):
                captured[passages[i].index] = replace(one, queries=one.queries.cpu(), keys=one.keys.cpu())
                bar.update(len(cut[i]))
    with times.of("writing"):
        write_activations(out, captured, special, made_of, causal=model.is_causal, own_masks=model.has_own_masks)
    write_shard(
        contexts_out,
        pd.DataFrame(
            {
                "context": [p.index for p in passages],
                "name": [p.name for p in passages],
                "tokens": [len(t) for t in cut],
                "cut": [len(whole) - len(part) for whole, part in zip(tokens, cut, strict=True)],
                "used": used,
                "causal": model.is_causal,
                "mask": model.mask,
                "left_out": "; ".join(model.left_out),
            }
        ),
        made_of,
    )
    return len(taken), len(passages) - len(taken), sum(len(t) > limit for t in tokens)


def require_true_prefixes(study: Study, name: str, model: CapturableModel, tokens: Sequence[int]) -> None:
    """Refuse lengths at which the start of a text has other queries and keys than a text that ends there."""
    change = model.changes_beyond
    if change is None:
        return
    for n in tokens:
        wrong = [length for length in study.lengths if length < n and n > change >= length]
        if wrong:
            raise CaptureError(
                f"model {name}: its rotary embedding changes beyond {change:,} tokens, so the first {wrong[0]:,} of "
                f"a text of {n:,} differ from a text of {wrong[0]:,}: set max_tokens to {change:,}, or all "
                "lengths above it"
            )
