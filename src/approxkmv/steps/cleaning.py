"""Files that are half-written, damaged, of other weights or of an earlier study: found and removed around a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from approxkmv.config import Study, load_config, study_of
from approxkmv.errors import TableError
from approxkmv.files import hash_file, is_damaged
from approxkmv.models.folders import is_running
from approxkmv.results.shards import origin_of, shard_count
from approxkmv.steps.fetch import origin, read_location

# What the workflow writes for each model of a study, for each one on long texts, and for each other part of it; beside
# a table its hash.
OF_MODEL = [
    *("tables/heads_{}.csv*", "tables/context_scaling_{}.csv*", "tables/overview_{}.json*", "tables/growth_{}.csv*"),
    *("tables/growth_curves_{}.csv*", "figures/max_ratios_{}.p*", "figures/order_ratios_{}.p*", "figures/growth_{}.p*"),
    "figures/growth_curves_{}.p*",
]
OF_LONG_TEXTS = ["tables/length_scaling_{}.csv*", "tables/lengths_{}.json*", "figures/length_scaling_{}.p*"]
OF_MODELS = ["tables/paper_comparison.csv*", "figures/context_scaling.p*"]
OF_PART = {
    "complexity": ["tables/complexity.*", "tables/complexity_fits.csv*", "figures/complexity.p*"],
    "sweep": [
        *("tables/sweep.*", "tables/sweep_exponents.csv*", "sweep/*", "figures/speedup.p*", "figures/error_vs_time.p*"),
        "figures/crossover.p*",
    ],
    "perplexity": ["tables/perplexity.*"],
}
SHARDS = ["statistics/{}/*", "activations/{}/*"]


def remove_half_written(results: Path) -> None:
    """Remove half-written files that killed runs left, and locations of models that are gone or have changed.

    A half-written file has the number of the process that wrote it in its name; those of living processes stay.
    """
    for path in results.rglob(".*"):
        number = path.name.split(".")[-2] if path.name.count(".") >= 3 else ""
        if path.is_file() and number.isdigit() and not is_running(int(number)):
            path.unlink(missing_ok=True)
    for path in (results / "models").glob("*.json"):
        try:
            read_location(path)
        except TableError:
            path.unlink(missing_ok=True)


def remove_damaged(results: Path) -> list[str]:
    """Remove a study's shards that are not what their hash says, or of other weights or texts than are here now.

    One without a hash goes too, since a kill between the two leaves it so, and activations cut short. Returns a line
    for each. Call it when nothing is being written, before a run: the workflow then makes the files again. What was
    made of them goes as well, since a workflow whose last files are all there does not look for the ones between.
    """
    lines = []
    # Not what starts with a dot: that is half-written, by a living process or as remove_half_written finds it.
    for path in sorted((results / "statistics").glob("*/[!.]*")):
        if path.suffix == ".sha256" or not path.is_file():
            continue
        if not hash_file(path).is_file():
            lines.append(_remove(path, "has no checksum"))
        elif is_damaged(path):
            lines.append(_remove(path, "is not what its checksum says"))
        elif origin_of(path) != (_origin_now(results, path.parent.name) or origin_of(path)):
            lines.append(_remove(path, "is of other weights or texts than are here now"))
    for path in sorted((results / "activations").glob("*/[!.]*.safetensors")):
        if not is_complete(path):
            lines.append(_remove(path, "is not what its checksum says"))
    return lines


def _origin_now(results: Path, model: str) -> str | None:
    """What a model's shards must be of; None while its location or the texts are still to be made."""
    location, texts = results / "models" / f"{model}.json", results / "texts.parquet"
    return origin(location, texts) if location.is_file() and texts.is_file() else None


def _remove(path: Path, why: str) -> str:
    path.unlink()
    hash_file(path).unlink(missing_ok=True)
    if path.suffix != ".safetensors":
        results, model = path.parents[2], path.parent.name
        for pattern in (f"tables/*_{model}.*", f"figures/*_{model}.*", "tables/paper_*", "figures/context_*"):
            for made in results.glob(pattern):
                made.unlink()
    return f"{path} {why}: it is made again"


def is_complete(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says; reads the header alone."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            start = 8 + int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(start - 8)) if start <= size else {}
    except (OSError, ValueError):
        return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return bool(ends) and start + max(ends) == size


def remove_activations(results: Path, but: Collection[str] = ()) -> None:
    """Remove the queries and keys of every shard, once no statistics are to be made of them, but those named.

    A run that was killed after the statistics and before its own cleaning leaves them.
    """
    for path in (results / "activations").glob("*/[!.]*.safetensors"):
        if str(path) not in but:
            path.unlink()


def study_in(results: Path) -> Study | None:
    """The study that the workflow last ran in a folder, of the configuration that it put there; None without one."""
    path = results / "config.yaml"
    return study_of(load_config(path)) if path.is_file() else None


def leftovers(results: Path) -> list[Path]:
    """What the workflow wrote into a study's folder for models, shards and parts that the study no longer has."""
    study = study_in(results)
    if study is None:
        return []
    every = [*OF_MODEL, *OF_LONG_TEXTS, *SHARDS, *OF_MODELS, *(name for names in OF_PART.values() for name in names)]
    wanted = OF_LONG_TEXTS if study.lengths else OF_MODEL
    kept = [pattern.format(model) for model in study.models for pattern in (*wanted, *SHARDS)]
    kept += OF_MODELS if study.models and not study.lengths else []
    kept += [pattern for part, names in OF_PART.items() if getattr(study, part) for pattern in names]
    found = {path for pattern in every for path in results.glob(pattern.format("*"))}
    found -= {path for pattern in kept for path in results.glob(pattern)}
    texts = results / "texts.parquet"
    if study.models and texts.is_file():
        shards = shard_count(texts, study.shard_contexts)
        numbered = (path for kind in SHARDS for path in results.glob(kind.format("*")))
        found |= {path for path in numbered if path.name[:4].isdigit() and int(path.name[:4]) >= shards}
    return sorted(found)


def remove_leftovers(results: Path) -> list[Path]:
    """Remove what leftovers finds, and folders that are empty then; returns what was removed."""
    found = leftovers(results)
    for path in found:
        path.unlink() if path.is_file() else shutil.rmtree(path)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    return found
