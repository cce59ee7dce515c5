"""Checks of a study before its first job: files exist, texts can be read, outputs can be written."""

from __future__ import annotations

import os
from pathlib import Path

from approxkmv.config import Configuration, Study, corpus_entry, model_of
from approxkmv.corpora import read_corpus
from approxkmv.corpora.passages import cut_into_passages
from approxkmv.corpora.sources import parse_corpus
from approxkmv.errors import ConfigError, TableError
from approxkmv.steps.devices import check_device
from approxkmv.steps.fetch import check_model
from approxkmv.sweep.workloads import cases, check_case


def check_study(config: Configuration, study: Study) -> list[str]:
    """What the study would do, as lines. Raises ConfigError, SourceError or TableError for what would stop it later.

    Nothing is fetched: for a model or data set that is not on this machine only the form of its source is checked.
    """
    lines = [f"study {study.name}{f', takes {study.takes}' if study.takes else ''}"]
    parts = [part for part in (study.perplexity, study.capture) if part is not None]
    for name in dict.fromkeys([*study.models, *(part.model for part in parts)]):
        check_model(model_of(config, name))
    corpora = [part.corpus for part in parts] + [*(study.capture.corpora if study.capture else ())]
    for name in dict.fromkeys(corpora):
        entry = corpus_entry(config, name)
        if isinstance(parse_corpus(entry.source), Path):
            read_corpus(entry.source, entry.sha256)
    if study.corpus:
        lines += _texts(study)
    if study.sweep:
        study.sweep.check_methods()
        for workload in study.sweep.workloads:
            heads = workload.name == "model-qk"
            # Those of a capture are yet to be made.
            local = bool(workload.path) if heads else not (workload.path or "").startswith("npm:")
            files = (workload.path, workload.tuning_path) if heads else (workload.path,)
            for file in filter(None, files if local else ()):
                if not Path(file).is_file():
                    what = "heads" if heads else "word vectors"
                    raise ConfigError(f"sweeps.{study.sweep_name}: the {what} {file} do not exist")
            for case in cases(workload) if local else ():
                check_case(case)
        lines.append(f"  sweep {study.sweep_name}: {', '.join(workload.name for workload in study.sweep.workloads)}")
    if study.complexity:
        lines.append(f"  complexity: n = {', '.join(map(str, study.complexity.sizes))}")
    if study.operator:
        path = study.operator.path
        if path and not path.startswith("npm:") and not Path(path).expanduser().is_file():
            raise ConfigError(f"studies.{study.name}.operator: the word vectors {path} do not exist")
        lines.append(f"  operator: epsilon = {', '.join(map(str, study.operator.epsilons))}")
    if study.perplexity:
        lines.append(f"  perplexity of {study.perplexity.model} with {', '.join(study.perplexity.methods)}")
    check_device(study)
    for folder in (Path("results") / study.name, Path(config.cache) / "models"):
        _check_writable(folder)
    return lines


def _texts(study: Study) -> list[str]:
    assert study.corpus is not None
    asked = "all" if study.contexts is None else f"{study.contexts:,}"
    found = ""
    if isinstance(parse_corpus(study.corpus.source), Path):
        count = len(cut_into_passages(read_corpus(study.corpus.source, study.corpus.sha256), study.unit))
        if not count:
            raise ConfigError(f"the corpus {study.corpus.name} has no text of the unit {study.unit}: choose another")
        # How many windows there are, only a tokenizer says.
        found = f" of {count:,} {'there are' if study.long_texts == 'cut' else 'texts'}"
    kind = "texts" if study.long_texts == "cut" else "windows"
    what = f"{asked} {kind}{found} ({study.unit}) of {study.corpus.label}"
    return [f"  statistics: {', '.join(study.models)} on {what}"] if study.models else []


def _check_writable(folder: Path) -> None:
    # Without creating the folder: a check must leave no trace.
    there = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "may not be written to" if there.is_dir() else "is not a folder"
        raise TableError(f"cannot write {folder}: {there} {what}")
