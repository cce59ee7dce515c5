"""Texts: where they come from, into which passages they are cut, and which passages a study takes."""

from approxkmv.corpora.passages import Passage, choose_passages
from approxkmv.corpora.sources import read_corpus

__all__ = ["Passage", "choose_passages", "read_corpus"]
