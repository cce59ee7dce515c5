"""Cut documents into passages of the unit that a study asks for, and choose among them."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from approxkmv.errors import ConfigError

# A sentence ends at . ! or ? (and closing quotes or brackets), before white space and a capital, digit or quote.
SENTENCE_END = re.compile(r"(?<=[.!?])([\"'”’)\]]*)\s+(?=[\"'“‘(\[]?[A-Z0-9])")
# Where a window may end: after a word, or within what has no white space for longer than words are.
PIECE = re.compile(r"\s*\S{1,30}")


@dataclass(frozen=True)
class Document:
    """A context and the questions that were asked about it (none for plain text)."""

    name: str
    context: str
    questions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Passage:
    """One text to run through the model, with an index that is fixed for a corpus and unit."""

    index: int
    name: str
    text: str


def sentences(text: str) -> list[str]:
    """The sentences of a text by a simple rule, each with its closing quotes and brackets.

    The rule also splits after an abbreviation before a capital (U.S. Army).
    """
    found, start = [], 0
    for end in SENTENCE_END.finditer(text):
        found.append(text[start : end.end(1)])
        start = end.end()
    return [part for part in [*found, text[start:]] if part.strip()]


def cut_into_passages(documents: Iterable[Document], unit: str) -> list[Passage]:
    """One passage per context, per sentence, per question (followed by its context), or per article.

    An article is all contexts of one title, in their order, with a blank line between them.

    Raises ConfigError for question_context when the corpus has no questions, for article when a text has no title.
    """
    passages: list[Passage] = []
    if unit == "article":
        articles: dict[str, list[str]] = {}
        for document in documents:
            if not document.name:
                # All texts without a title would be one article.
                raise ConfigError(f"unit is article, but {document.context[:40]!r} has no title: use context")
            articles.setdefault(document.name, []).append(document.context)
        documents = [Document(name, "\n\n".join(contexts)) for name, contexts in articles.items()]
    for document in documents:
        if unit in ("context", "article"):
            texts: Sequence[str] = [document.context]
        elif unit == "sentence":
            texts = sentences(document.context)
        elif unit == "question_context":
            if not document.questions:
                raise ConfigError(f"unit is question_context, but {document.name!r} has no questions: use context")
            texts = [f"{question.strip()} {document.context}" for question in document.questions]
        else:
            raise ConfigError(f"unit {unit!r} is unknown: use context, sentence, question_context or article")
        passages += [Passage(len(passages) + i, document.name, text) for i, text in enumerate(texts)]
    return passages


def cut_into_windows(passages: Iterable[Passage], limit: int, tokens_of: Callable[[str], int]) -> list[Passage]:
    """Passages of at most `limit` tokens: longer ones are divided, each window as long as it can be.

    All are numbered anew. `tokens_of` counts the tokens of a text, those included that a model adds.
    """
    windows: list[Passage] = []
    for passage in passages:
        texts = list(_windows(passage.text, limit, tokens_of))
        names = [f"{passage.name}, window {i + 1}" if len(texts) > 1 else passage.name for i in range(len(texts))]
        windows += [Passage(len(windows) + i, *window) for i, window in enumerate(zip(names, texts, strict=True))]
    return windows


def _windows(text: str, limit: int, tokens_of: Callable[[str], int]) -> Iterator[str]:
    if tokens_of(text) <= limit:
        yield text
        return
    pieces = PIECE.findall(text)
    start = 0
    while start < len(pieces):

        def tokens(size: int, start: int = start) -> int:
            return tokens_of("".join(pieces[start : start + size]).strip())

        # A piece is at least one token.
        sizes = range(1, min(limit, len(pieces) - start) + 1)
        size = max(1, bisect_right(sizes, limit, key=tokens))
        yield "".join(pieces[start : start + size]).strip()
        start += size


def choose_passages(passages: Sequence[Passage], count: int | None, seed: int) -> list[Passage]:
    """`count` passages drawn at random without replacement, in their original order; all when count is None.

    The draw of a smaller count is a subset of the draw of a larger one with the same seed.
    """
    if count is None:
        return list(passages)
    order = list(range(len(passages)))
    random.Random(seed).shuffle(order)
    return [passages[i] for i in sorted(order[:count])]
