"""Find and remove half-written, damaged or outdated files, and those of an earlier study, around a run."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection
from itertools import chain
from pathlib import Path

from approxkmv.config import Study, load_config, study_of
from approxkmv.errors import TableError
from approxkmv.files import hash_file, is_damaged
from approxkmv.models.folders import is_running
from approxkmv.results.locations import origin, read_location
from approxkmv.results.shards import origin_of, shard_count

# What the workflow writes for each model of a study, for each model on long texts, and for each other part; a table
# has its hash beside it.
OF_MODEL = [
    *("tables/heads_{}.csv*", "tables/context_scaling_{}.csv*", "tables/overview_{}.json*"),
    *("figures/max_ratios_{}.p*", "figures/order_ratios_{}.p*"),
    *("tables/readings_{}.csv*", "tables/readings_path_{}.csv*"),
    *("tables/readings_heads_{}.csv*", "figures/readings_{}.p*"),
    *("tables/gauge_{}.csv*", "figures/gauge_{}.p*"),
    *("tables/attention_{}.csv*", "figures/attention_support_{}.p*"),
]
OF_LONG_TEXTS = ["tables/length_scaling_{}.csv*", "tables/lengths_{}.json*", "figures/length_scaling_{}.p*"]
OF_GROWTH = [
    *("tables/growth_{}.csv*", "tables/growth_curves_{}.csv*", "figures/growth_{}.p*", "figures/growth_curves_{}.p*"),
]
OF_MODELS = ["tables/paper_comparison.csv*", "figures/context_scaling.p*"]
OF_PART = {
    "complexity": ["tables/complexity.*", "tables/complexity_fits.csv*", "figures/complexity.p*"],
    "operator": ["tables/operator.*", "figures/operator.p*"],
    "sweep": [
        *("tables/sweep.*", "tables/sweep_exponents.csv*", "sweep/*", "figures/speedup.p*", "figures/error_vs_time.p*"),
        "figures/crossover.p*",
    ],
    "perplexity": ["tables/perplexity.*"],
}
OF_PLAN = ["tables/plan.json*"]
SHARDS = ["statistics/{}/*", "activations/{}/*"]


def remove_half_written(results: Path) -> None:
    """Remove half-written files of killed runs, locations of models that are gone or have changed, and facts of before.

    The name of a half-written file contains the number of the process that wrote it; those of living processes stay.
    In a folder that is now one of long texts, figures would take the earlier facts of a model for the present ones.
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
    study = study_in(results)
    for model in study.models if study and study.lengths else ():
        (results / "tables" / f"overview_{model}.json").unlink(missing_ok=True)


def remove_damaged(results: Path) -> list[str]:
    """Remove shards of a study that do not match their hash, or were made from other weights or texts than the present.

    Shards without a hash are removed too, since a kill can leave them so, and truncated activations. Returns a line for
    each. Call it before a run, when nothing is being written: the workflow then regenerates the files. Everything made
    from them is removed as well, since a workflow whose last files exist does not check the intermediate ones. What an
    earlier study left is not in use, and stays until it is cleaned.
    """
    lines, left = [], set[Path]()
    with contextlib.suppress(TableError):  # over texts that this run may make again
        left = set(leftovers(results))
    # Skip names that start with a dot: half-written, by a living process or left to remove_half_written.
    for path in sorted((results / "statistics").glob("*/[!.]*")):
        if path.suffix == ".sha256" or path in left or not path.is_file():
            continue
        if not hash_file(path).is_file():
            lines.append(_remove(path, "has no checksum"))
        elif is_damaged(path):
            lines.append(_remove(path, "does not match its checksum"))
        elif (now := _origins_now(results, path.parent.name)) and origin_of(path) not in now:
            lines.append(_remove(path, "was made from other weights or texts"))
    for path in sorted((results / "activations").glob("*/[!.]*.safetensors")):
        if not is_complete(path):
            lines.append(_remove(path, "is truncated"))
    return lines


def _origins_now(results: Path, model: str) -> list[str]:
    """The origins a model's shards may have, the latter of earlier versions; none without its location or texts."""
    location, texts = results / "models" / f"{model}.json", results / "texts.parquet"
    if not (location.is_file() and texts.is_file()):
        return []
    found = origin(location, texts, model)
    return [found, found.removeprefix(f"model {model}, ")]


def _remove(path: Path, why: str) -> str:
    path.unlink()
    hash_file(path).unlink(missing_ok=True)
    if path.suffix != ".safetensors":
        results, model = path.parents[2], path.parent.name
        for pattern in (f"tables/*_{model}.*", f"figures/*_{model}.*", "tables/paper_*", "figures/context_*"):
            for made in results.glob(pattern):
                made.unlink()
    return f"{path} {why}: it will be regenerated"


def is_complete(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says; reads only the header."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            start = 8 + int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(start - 8)) if start <= size else {}
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return bool(ends) and start + max(ends) == size
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def remove_activations(results: Path, but: Collection[str] = ()) -> None:
    """Remove the queries and keys of every shard from which no more statistics are to be computed, except those named.

    They are left behind by a run that was killed after the statistics and before its own cleanup.
    """
    for path in (results / "activations").glob("*/[!.]*.safetensors"):
        if str(path) not in but:
            path.unlink()


def study_in(results: Path) -> Study | None:
    """The study that the workflow last ran in a folder, from the configuration it left there; None if there is none."""
    path = results / "config.yaml"
    return study_of(load_config(path)) if path.is_file() else None


def leftovers(results: Path) -> list[Path]:
    """What the workflow wrote into a study's folder for models, shards and parts that are no longer in the study."""
    study = study_in(results)
    if study is None:
        return []
    every = [*OF_MODEL, *OF_LONG_TEXTS, *OF_GROWTH, *SHARDS, *OF_MODELS, *OF_PLAN, *chain(*OF_PART.values())]
    wanted = OF_LONG_TEXTS if study.lengths else OF_MODEL
    kept = [pattern.format(model) for model in study.models for pattern in (*wanted, *OF_GROWTH, *SHARDS)]
    kept += OF_MODELS if study.models and not study.lengths else []
    kept += OF_PLAN if study.perplexity and study.perplexity.plan else []
    kept += [pattern for part, names in OF_PART.items() if getattr(study, part) for pattern in names]
    found = {path for pattern in every for path in results.glob(pattern.format("*"))}
    found -= {path for pattern in kept for path in results.glob(pattern)}
    texts = results / "texts.parquet"
    if study.models and texts.is_file():
        shards = shard_count(texts, study.shard_contexts)
        numbered = (path for kind in SHARDS for path in results.glob(kind.format("*")))
        found |= {path for path in numbered if path.name[:4].isdigit() and int(path.name[:4]) >= shards}
    # In a folder that was once of long texts, or of others.
    of_statistics = results.glob("statistics/*/*.parquet*")
    found |= {path for path in of_statistics if (".lengths." in path.name) != bool(study.lengths)}
    return sorted(found)


def remove_leftovers(results: Path) -> list[Path]:
    """Remove what `leftovers` finds, and folders that are then empty; returns what was removed.

    Raises TableError for a folder that is not a study's.
    """
    if study_in(results) is None:
        raise TableError(f"{results} is no folder of a study: name one that a run has made, such as results/embedded")
    found = leftovers(results)
    for path in found:
        path.unlink() if path.is_file() or path.is_symlink() else shutil.rmtree(path)
        # Refused for a folder that is not empty, or a link to one.
        with contextlib.suppress(OSError):
            path.parent.rmdir()
    return found
