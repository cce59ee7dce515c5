"""Cost of SQuAD's contexts for a model of BERT-base's shape: python benchmarks/whole_squad.py [--contexts NUMBER]

A random model of 12 x 12 heads and 110 million parameters, with the vocabulary of the default study's BERT, goes
through the pipeline's steps that read every text, on one core and in a folder of its own, with all 2,067 contexts of
the development set or with that many spread over it; each is read in all ways, as in the study `paper`. Writes
results/benchmarks/whole_squad.csv (a row per step: jobs and the processor's seconds, which other work on the machine
hardly changes) and .json (the total time, the peak memory of all processes together, and the peak size of activations
on disk).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil
import torch
import yaml

from approxkmv.config import entry_of, load_config, study_of
from approxkmv.files import write_csv, write_json
from approxkmv.provenance import describe
from approxkmv.steps.fetch import fetch_model

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("results/benchmarks/whole_squad.csv")
MODEL = "bert-shape"
# Those that read every text; the others' times depend little on how many there are.
STEPS = ("extract", "statistics", "attention", "readings")
# What they make of a shard of the study `paper`'s contexts.
MADE = ("heads", "attention", "readings")
SHARD = 100
# In the development set.
CONTEXTS = 2067
GIGABYTE = 1e9


def random_bert(folder: Path) -> None:
    """Save a random model of BERT-base's shape, with the tokenizer of minilm-l6."""
    import transformers

    config = load_config(ROOT / "config.yaml")
    entry = entry_of(study_of(config, "embedded"), "minilm-l6")
    tokenizer = fetch_model(entry, ROOT / config.cache, folder.with_suffix(".json")).folder
    torch.manual_seed(0)
    # Five times the usual standard deviation, so that attention is not uniform.
    transformers.BertModel(transformers.BertConfig(initializer_range=0.1)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(tokenizer / name, folder / name)


def configure(folder: Path, contexts: int | None) -> None:
    """The run's configuration: this many contexts, or all, and everything else as in `paper`: readings of each."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    corpus = config["corpora"]["squad-dev"]
    corpus["source"] = f"path:{ROOT / corpus['source'].removeprefix('path:')}"
    study = config["studies"]["paper"] | {
        "models": [MODEL],
        "corpus": "squad-dev",
        "contexts": contexts,
        "shard_contexts": SHARD,
    }
    new = {
        "study": "whole",
        "models": {MODEL: {"source": f"path:{folder / 'model'}"}},
        "corpora": {"squad-dev": corpus},
        "studies": {"whole": study},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(new), encoding="utf-8")


def targets(contexts: int) -> list[str]:
    """The files that the steps make of each shard."""
    shards = range(-(-contexts // SHARD))
    return [f"results/whole/statistics/{MODEL}/{shard:04d}.{kind}.parquet" for shard in shards for kind in MADE]


def size(folder: Path) -> int:
    """Bytes of the files in a folder; files that disappear meanwhile are skipped."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def watched(command: list[str], folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Run a command; its seconds, its peak memory and activations, sampled twice a second, and each step's CPU time."""
    start = time.perf_counter()
    # The rules use this Python's commands.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(command, cwd=folder, env=os.environ | {"PATH": path})
    root = psutil.Process(process.pid)
    memory = disk = largest = 0
    # Of each process the step and the seconds of the processor so far; the last half second is missed.
    used: dict[int, tuple[str, float]] = {}
    while process.poll() is None:
        found = []
        for one in [root, *root.children(recursive=True)]:
            try:
                # Pages shared with others are counted once for each: an upper bound.
                found.append(one.memory_info().rss)
                words, spent = one.cmdline(), one.cpu_times()
            except psutil.Error:
                continue
            for step in STEPS:
                if step in words and MODEL in words:
                    used[one.pid] = step, spent.user + spent.system
        memory, largest = max(memory, sum(found)), max([largest, *found])
        disk = max(disk, size(folder / "results" / "whole" / "activations"))
        time.sleep(0.5)
    if process.returncode:
        sys.exit(f"whole_squad: the run ended with code {process.returncode}")
    processor = {step: sum(spent for name, spent in used.values() if name == step) for step in STEPS}
    return {
        "seconds": time.perf_counter() - start,
        "memory_of_all_processes_gb": memory / GIGABYTE,
        "memory_of_the_largest_process_gb": largest / GIGABYTE,
        "activations_gb": disk / GIGABYTE,
    }, processor


def table_of(folder: Path, processor: dict[str, float]) -> pd.DataFrame:
    """A row per step: its seconds, and its jobs by their logs, STEP_MODEL.log or STEP_MODEL_SHARD.log of each shard."""
    jobs = {step: len(list(folder.glob(f"{step}_{MODEL}*.log"))) for step in STEPS}
    if not all(jobs.values()):
        raise ValueError(f"{folder} lacks the log of a step: {jobs}")
    return pd.DataFrame([{"step": step, "jobs": jobs[step], "processor": processor[step]} for step in STEPS])


def main() -> None:
    """Run everything, print a table and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":", 1)[0])
    parser.add_argument("--contexts", type=int, help="number of contexts, for a shorter run; all by default")
    contexts = parser.parse_args().contexts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_bert(folder / "model")
        configure(folder, contexts)
        snakemake = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "1"]
        snakemake += targets(contexts or CONTEXTS)
        found, processor = watched(snakemake, folder)
        table = table_of(folder / "results" / "whole" / "logs", processor)
    write_csv(OUT, table)
    write_json(
        OUT.with_suffix(".json"), describe({"contexts": contexts or CONTEXTS, "heads": 144}) | {"measured": found}
    )
    print(table.to_string(index=False))
    print(found)


if __name__ == "__main__":
    main()
