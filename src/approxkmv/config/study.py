"""What a step needs from a configuration: a study with its models, its corpus and its sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from approxkmv.config.keys import Configuration, Corpus, Model, StudySettings
from approxkmv.config.reading import known, naming
from approxkmv.errors import ConfigError
from approxkmv.sweep.settings import CaptureSettings, SweepSettings


class ModelEntry(Model):
    """A model of the catalogue with its name."""

    name: str
    label: str


class CorpusEntry(Corpus):
    """A corpus with its name."""

    name: str
    label: str


class Study(StudySettings):
    """A study with everything it needs."""

    name: str
    models: Mapping[str, ModelEntry]
    corpus: CorpusEntry | None
    sweep: SweepSettings | None
    sweep_name: str | None

    @property
    def capture(self) -> CaptureSettings | None:
        """The heads of a model that its sweep uses."""
        return self.sweep.capture if self.sweep else None

    @property
    def conditions(self) -> dict[str, Any]:
        """Under what conditions its models are measured, for the record of how their tables were made."""
        of_texts = {"unit", "contexts", "seed", "min_tokens", "max_tokens", "long_texts"}
        of_models = {"dtype", "device", "batch_tokens", "rotary_scaling"}
        of_statistics = {"lengths"} if self.lengths else {"min_prefix", "prefixes", "readings_texts"}
        return self.model_dump(mode="json", include=of_texts | of_models | of_statistics)


def study_of(config: Configuration, name: str | None = None) -> Study:
    """The study of a configuration, by name or the one it selects. Raises ConfigError for an unknown name."""
    name = config.study if name is None else name
    known(name, config.studies, "study is")
    keys = config.studies[name]
    if keys.perplexity is not None:
        # Only for the study that runs: this imports torch.
        from approxkmv.perplexity.settings import chosen_methods

        with naming(f"studies.{name}.perplexity.methods"):
            chosen_methods(keys.perplexity.methods)
    sweep = None if keys.sweep is None else config.sweeps[keys.sweep]
    for user in (keys.perplexity, sweep.capture if sweep else None):
        if user is not None:
            model_of(config, user.model)
            corpus_entry(config, user.corpus)
    if sweep and sweep.capture and sweep.capture.tuning_corpus:
        corpus_entry(config, sweep.capture.tuning_corpus)
    found = {
        "models": {model: model_of(config, model) for model in keys.models},
        "corpus": None if keys.corpus is None else corpus_entry(config, keys.corpus),
        "sweep": sweep,
        "sweep_name": keys.sweep,
    }
    return Study(name=name, **(dict(keys) | found))


def model_of(config: Configuration, name: str) -> ModelEntry:
    """A model of the catalogue. Raises ConfigError for an unknown name or a bad source.

    Checked here and not with the configuration: a source that is not pinned stops only the studies that use it.
    """
    from approxkmv.models.sources import parse_source

    known(name, config.models, "the model asked for is")
    model = config.models[name]
    with naming(f"models.{name}.source"):
        parse_source(model.source)
    return ModelEntry(**(dict(model) | {"name": name, "label": model.label or name}))


def corpus_entry(config: Configuration, name: str) -> CorpusEntry:
    """A corpus. Raises ConfigError for an unknown name or a bad source, as model_of does."""
    from approxkmv.corpora.sources import parse_corpus

    known(name, config.corpora, "the corpus asked for is")
    corpus = config.corpora[name]
    with naming(f"corpora.{name}.source"):
        parse_corpus(corpus.source)
    return CorpusEntry(**(dict(corpus) | {"name": name, "label": corpus.label or name}))


def entry_of(study: Study, model: str) -> ModelEntry:
    """A model of a study. Raises ConfigError for an unknown name."""
    known(model, study.models, f"study {study.name} is asked for the model")
    return study.models[model]


def corpus_of(study: Study) -> CorpusEntry:
    """The corpus of a study that has models. Raises ConfigError when it has none."""
    if study.corpus is None:
        raise ConfigError(f"study {study.name} has no corpus: it measures no model")
    return study.corpus
