"""Texts: their sources, the passages they are cut into, and the passages that a study uses."""

from approxkmv.corpora.passages import Passage, choose_passages
from approxkmv.corpora.sources import read_corpus

__all__ = ["Passage", "choose_passages", "read_corpus"]
