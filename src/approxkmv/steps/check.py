"""One model on a few texts, from its source to a verdict: every step of a study, without a configuration."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from approxkmv.config import CorpusEntry, ModelEntry, Study
from approxkmv.errors import SourceError, TableError
from approxkmv.files import read_json
from approxkmv.lock import hold, release
from approxkmv.models.sources import HubSource, ModelSource, PathSource, parse_source
from approxkmv.progress import LOG, Times, step
from approxkmv.steps.texts import read_shard, write_texts
from approxkmv.words import counted
from approxkmv.yaml_text import refuse_what_is_not_plain

# Texts of the checkout that this package runs from.
TEXTS = Path(__file__).resolve().parents[3] / "data" / "squad" / "dev-v1.1.jsonl.xz"
# The queries and keys on disk at any time take at most this many bytes.
SHARD_BYTES = 1 << 30
# Bytes of memory that Python and its libraries take.
LIBRARIES = 800 << 20
# In a folder of a check while one runs: what it makes, and its lock.
WORK, LOCK = ".work", ".lock"
# Seconds: of one head's statistics per token squared, on one core, and of imports, loading and figures.
PER_ENTRY, BESIDE = 4e-7, 30.0


@dataclass(frozen=True)
class Size:
    """What is known of a model before it is loaded."""

    layers: int
    heads: int
    width: int
    """Of a head."""
    positions: int
    weights: int
    """Bytes of its weight files."""


def study_of_one(source: str, text: Path | None, contexts: int) -> Study:
    """The study that checks a model. Raises SourceError for a source of another form, or without texts."""
    if text is None and not TEXTS.is_file():
        raise SourceError(f"{TEXTS} is not here (the package was installed without its checkout): give --text FILE")
    refuse_what_is_not_plain(str(text), "--text")
    if text is not None and not text.is_file():
        raise SourceError(f"--text {text}: {'it is a folder' if text.is_dir() else 'there is no such file'}")
    name = name_of(parse_source(source))
    label = "SQuAD v1.1 dev" if text is None else text.name[:60]
    return Study(
        name=f"check of {name}",
        models={name: ModelEntry(name=name, label=name[:60], source=source.strip())},
        corpus=CorpusEntry(name="texts", label=label, source=f"path:{text or TEXTS}"),
        sweep=None,
        sweep_name=None,
        contexts=contexts,
    )


def name_of(source: ModelSource) -> str:
    """A name for a model that is fit for file names: the last part of its source."""
    if isinstance(source, PathSource):
        last = source.path.resolve().name.removesuffix(".gguf")
    elif isinstance(source, HubSource):
        last = source.repository.rpartition("/")[2]
    else:
        last = source.name
    return re.sub("[^A-Za-z0-9.-]+", "-", last).strip("-.")[:60] or "model"


def size_of(folder: Path) -> Size | None:
    """The size of a model's folder by its config.json; None where that does not say it."""
    from approxkmv.models.capture import WITHOUT_ATTENTION

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)

        def first(*names: str) -> int:
            return next(int(config[name]) for name in names if config.get(name))

        layers = first("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        layers -= sum(kind in WITHOUT_ATTENTION for kind in config.get("layer_types") or ())
        heads = first("num_attention_heads", "n_head", "n_heads", "num_heads")
        width = int(config.get("head_dim") or first("hidden_size", "n_embd", "dim", "d_model") // heads)
        width = max(width, int(config.get("global_head_dim") or 0))
        positions = int(config.get("max_position_embeddings") or config.get("n_positions") or 512)
    except (OSError, ValueError, TypeError, StopIteration, AttributeError, ArithmeticError, RecursionError):
        return None
    if not all(0 < number < 2**31 for number in (layers, heads, width, positions)):
        return None
    return Size(layers, heads, width, positions, sum(path.stat().st_size for path in folder.glob("*.safetensors")))


def tokens_of(texts: Path, study: Study, size: Size | None) -> list[int]:
    """How many tokens each text will have, roughly: English text has about four tokens for three words."""
    limit = min(study.max_tokens, size.positions if size else study.max_tokens)
    return [min(limit, 2 + len(passage.text.split()) * 4 // 3) for passage in read_shard(texts, 0, 1 << 40)]


def shard_of(size: Size, tokens: list[int]) -> int:
    """How many texts to hold the queries and keys of at a time."""
    return max(1, min(40, SHARD_BYTES // max(1, _bytes(size) * max(tokens))))


def _bytes(size: Size) -> int:
    """Of the queries and keys of one token."""
    return size.layers * size.heads * size.width * 2 * 4


def plan(source: ModelSource, size: Size | None, tokens: list[int], cores: int) -> list[str]:
    """How long a check takes, with how much memory and disk; for a model of unknown size per head."""
    lines = [f"{counted(len(tokens), 'text')} of about {sum(tokens) // len(tokens)} tokens"]
    per_head = PER_ENTRY * sum(n * n for n in tokens) / cores
    on = f"with {counted(cores, 'thread')}"
    if size is None:
        download = _download(source)
        return [
            *lines,
            f"time: about {BESIDE:.0f} s and {per_head:.2g} s for each head of the model, {on}, "
            f"and the download{f' of {_mb(download)}' if download else ''}",
            f"memory: about {_mb(LIBRARIES)} and twice the model's weights as float32; "
            f"disk: its weights, and at most {_mb(SHARD_BYTES)} while it runs",
        ]
    heads, shard = size.layers * size.heads, shard_of(size, tokens)
    held = _bytes(size) * sum(sorted(tokens)[-shard:])
    return [
        *lines,
        f"time: about {BESIDE + heads * per_head:.0f} s for {size.layers} layers of {size.heads} heads, {on}",
        f"memory: about {_mb(LIBRARIES + 2 * size.weights + held)}; disk: {_mb(held)} while it runs, then about 3 MB",
    ]


def _download(source: ModelSource) -> int | None:
    """Bytes of a hub model's weights, according to the hub; None if it does not say."""
    if not isinstance(source, HubSource):
        return None
    from huggingface_hub import HfApi

    try:
        found = HfApi().model_info(source.repository, revision=source.revision, files_metadata=True, timeout=10)
    except Exception:
        # Any error is reported by the fetch that follows.
        return None
    return sum(file.size or 0 for file in found.siblings or () if Path(file.rfilename).match("*.safetensors"))


def _mb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size > 1e9 else f"{max(1, round(size / 1e6))} MB"


LEFT_OUT = (
    "not measured: texts beyond {longest} tokens, other texts, how fast attention methods are and what the model's "
    "answers lose with them (the studies of config.yaml do)"
)


def check(source: str, text: Path | None, contexts: int, out: Path) -> dict[str, Any]:
    """Measure one model on some texts and write OUT: index.html, verdict.json, tables and figures; returns the verdict.

    Everything is made in OUT/.work and put in place at the end. What is printed before the fetch is an estimate.
    Raises SourceError, ConfigError, CaptureError, TableError; BusyError while another check writes OUT.
    """
    study = study_of_one(source, text, contexts)
    (name,) = study.models
    refuse_others(out, parse_source(source))
    hold(out / LOCK, f"a check that writes {out}")
    work = out / WORK
    shutil.rmtree(work, ignore_errors=True)
    try:
        with step("texts"):
            write_texts(study, work / "texts.parquet")
        found = _measure(study, name, work)
        for made in ("tables", "figures", "index.html", "verdict.json"):
            old, new = out / made, work / made
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            new.rename(old)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        release(out / LOCK)
        # Remove the folder if it is empty; rmdir refuses otherwise.
        with contextlib.suppress(OSError):
            out.rmdir()
    return found


def refuse_others(out: Path, source: ModelSource) -> None:
    """Raise TableError unless the folder is new or empty or has an earlier check of this model."""
    name = name_of(source)
    if out.exists() and not out.is_dir():
        raise TableError(f"{out} is not a folder: name another with --out")
    others = [path for path in (out.iterdir() if out.is_dir() else ()) if path.name not in (WORK, LOCK)]
    # A check that was killed while it put its results in place has its tables still in WORK.
    if others and not any((room / "tables" / f"overview_{name}.json").is_file() for room in (out, out / WORK)):
        raise TableError(f"{out} is not empty and has no check of {name}: name another folder with --out")
    earlier = source
    with contextlib.suppress(TableError, SourceError):  # where there is no verdict
        earlier = parse_source(read_json(out / "verdict.json", {"source": str})["source"])
    # Checkpoints of two runs, or two revisions, have one name.
    if _place(earlier) != _place(source):
        raise TableError(f"{out} has a check of {earlier}: name another folder with --out")


def _place(source: ModelSource) -> ModelSource:
    """The source as seen from any folder."""
    return PathSource(source.path.resolve()) if isinstance(source, PathSource) else source


def _measure(study: Study, name: str, work: Path) -> dict[str, Any]:
    # Imported here, since they take seconds, and mistakes should be reported at once.
    import torch

    from approxkmv.files import write_json
    from approxkmv.page.verdict import holds, measured, sentences
    from approxkmv.provenance import describe
    from approxkmv.results.shards import shard_count
    from approxkmv.steps.attention import measure_attention
    from approxkmv.steps.attention_table import write_attention_table
    from approxkmv.steps.compare import compare
    from approxkmv.steps.extract import extract
    from approxkmv.steps.fetch import fetch_model
    from approxkmv.steps.gauge import measure_gauge
    from approxkmv.steps.growth import measure_growth
    from approxkmv.steps.page import make_page
    from approxkmv.steps.readings import measure_readings
    from approxkmv.steps.readings_table import summarise as summarise_readings
    from approxkmv.steps.statistics import measure
    from approxkmv.steps.summary import summarise

    entry = study.models[name]
    source = parse_source(entry.source)
    texts, location, tables = work / "texts.parquet", work / "model.json", work / "tables"
    size = size_of(source.path) if isinstance(source, PathSource) else None
    for line in plan(source, size, tokens_of(texts, study, size), torch.get_num_threads()):
        LOG.info("  %s", line)
    LOG.info("  %s", LEFT_OUT.format(longest=study.max_tokens))
    with step(f"fetch      {name}"):
        folder = fetch_model(entry, Path("cache"), location).folder
    fetched = size_of(folder)
    tokens = tokens_of(texts, study, fetched)
    if fetched is not None:
        study = study.model_copy(update={"shard_contexts": shard_of(fetched, tokens)})
        for line in plan(source, fetched, tokens, torch.get_num_threads())[1:] if size is None else ():
            LOG.info("  %s", line)
    statistics = work / "statistics"
    used = 0
    shards = shard_count(texts, study.shard_contexts)
    for shard in range(shards):
        kinds = ("heads", "prefixes", "attention", "readings")
        heads, prefixes, attention, readings = (statistics / f"{shard:04d}.{kind}.parquet" for kind in kinds)
        activations, contexts = work / "activations.safetensors", statistics / f"{shard:04d}.contexts.csv"
        of = f"texts {shard * study.shard_contexts + 1} to {min(len(tokens), (shard + 1) * study.shard_contexts)}"
        times = Times()
        with step(f"measure    {of} of {len(tokens)}") as notes:
            used += extract(study, name, location, texts, shard, activations, contexts, times)[0]
            measure(name, activations, study.min_prefix, study.prefixes, heads, prefixes, times)
            measure_attention(name, activations, attention, times)
            with times.of("readings"):
                measure_readings(study, name, activations, texts, readings)
            notes.append(f"({times})")
        activations.unlink()
    if not used:
        raise SourceError(
            f"none of {counted(len(tokens), 'text')} has {study.min_tokens} tokens: give longer ones with --text"
        )
    with step("tables"):
        provenance = describe(study.conditions)
        summarise(study, entry, texts, statistics, tables, provenance)
        write_attention_table(study, name, texts, statistics, tables)
        summarise_readings(study, entry, texts, statistics, tables)
        measure_growth(study, name, texts, statistics, tables)
    with step("gauge"):
        measure_gauge(study, name, location, texts, tables)
        compare(tables, [name], tables / "paper_comparison.csv")
    with step("page"):
        make_page(tables, work, study.name)
    (facts,) = measured(tables)
    word, answer = holds(tables, facts)
    # A check from another folder compares its model with this one.
    verdict = {"source": str(_place(source)), "holds": word, "answer": answer, "found": sentences(tables, facts)}
    write_json(work / "verdict.json", verdict | {"provenance": provenance})
    return verdict
