"""The configuration: its keys, how config.yaml is read and checked, and what a step needs from it."""

from approxkmv.config.keys import Configuration, Perplexity, PlanKeys
from approxkmv.config.paths import relocate
from approxkmv.config.reading import checked, load_config, read_as, settings_file
from approxkmv.config.study import CorpusEntry, ModelEntry, Study, corpus_entry, corpus_of, entry_of, model_of, study_of

__all__ = [
    "Configuration",
    "CorpusEntry",
    "ModelEntry",
    "Perplexity",
    "PlanKeys",
    "Study",
    "checked",
    "corpus_entry",
    "corpus_of",
    "entry_of",
    "load_config",
    "model_of",
    "read_as",
    "relocate",
    "settings_file",
    "study_of",
]
