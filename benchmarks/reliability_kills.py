"""Kill runs and restart them: python benchmarks/reliability_kills.py --kills 20 --out kills.csv

A small study (a random model, eight texts) is run through Snakemake without interruption; then again, killed with
SIGKILL at a random moment of each step in turn and restarted each time, until it is complete. The same is done with a
small sweep. A run survives a kill if no file under its final name is truncated, the restart succeeds, and in the end
the study has the same bytes as the undisturbed run, or the sweep has all its rows, including the cases finished before
the kill. Writes the CSV, a row per kill, and its provenance as JSON; exits with code 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count as counting
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "pipeline"))

from small_project import Project, environment, save_model, save_texts  # noqa: E402

from approxkmv.files import is_damaged, write_csv, write_json  # noqa: E402
from approxkmv.provenance import describe  # noqa: E402
from approxkmv.steps.cleaning import is_complete  # noqa: E402

# In the order in which a study runs them; a kill comes within this many seconds of the step's start.
STEPS = ["texts", "fetch", "extract", "statistics", "extract", "statistics", "summary", "growth", "compare", "figure"]
WITHIN = 4.0
SNAKEMAKE = "snakemake --cores 2"
SWEEP = "approxkmv sweep --settings settings.json --out sweep.csv"
LENGTHS = [256, 512, 768, 1024, 1280, 1536, 1792, 2048]


def running(group: int) -> list[str]:
    """The steps that the processes of a group are running."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        try:
            words = process.info["cmdline"] or []
            if os.getpgid(process.pid) == group:
                found |= {step for word, step in pairwise(words) if Path(word).name == "approxkmv"}
        except (psutil.Error, ProcessLookupError):
            continue
    return sorted(found)


def kill_at(process: subprocess.Popen[str], point: Callable[[], object], delay: float = 0.0) -> dict | None:
    """Kill the process group `delay` seconds after the point is reached; None if the run ended before that."""
    start = time.monotonic()
    while process.poll() is None:
        if point():
            time.sleep(delay)
            steps = running(process.pid)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return {"running": " ".join(steps) or "none", "seconds": round(time.monotonic() - start, 1)}
        time.sleep(0.02)
    output, _ = process.communicate()
    if process.returncode != 0:
        print(output, file=sys.stderr)
    return None


def fingerprints(results: Path) -> dict[str, str]:
    """Hashes of the texts, statistics, tables and figures; overviews are hashed without their provenance."""
    found = {}
    for path in sorted(results.rglob("*")):
        kind = path.relative_to(results).parts[0]
        if path.is_file() and kind in ("texts.parquet", "tables", "statistics", "figures"):
            content = path.read_bytes()
            if path.suffix == ".json":
                facts = {key: value for key, value in json.loads(content).items() if key != "provenance"}
                content = json.dumps(facts).encode()
            found[str(path.relative_to(results))] = hashlib.sha256(content).hexdigest()
    return found


def cut_short(results: Path) -> list[str]:
    """Files under their final names that are incomplete."""
    found = []
    for path in results.rglob("[!.]*"):
        if path.suffix == ".sha256":
            shard = path.with_name(path.name.removesuffix(".sha256"))
            if shard.is_file() and is_damaged(shard):
                found.append(str(shard))
        elif path.suffix == ".safetensors" and not is_complete(path):
            found.append(str(path))
        elif path.suffix == ".json":
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                found.append(str(path))
    return found


def project_in(folder: Path) -> Project:
    """A folder with a study of two shards; all share model and texts, since shards record which they belong to."""
    inputs = folder.parent / "inputs"
    if not inputs.is_dir():
        save_model(inputs / "bert", "bert")
        save_texts(inputs / "words.jsonl")
    folder.mkdir()
    for path in inputs.iterdir():
        (folder / path.name).symlink_to(path)
    project = Project(folder)
    project.configure(models=["bert"], contexts=6)
    return project


def kills_of_studies(room: Path, count: int, draw: random.Random) -> list[dict]:
    """A row for each of `count` kills, in one study after another."""
    undisturbed = project_in(room / "undisturbed")
    code, output = undisturbed.snakemake()
    if code:
        raise SystemExit(f"the undisturbed run failed: {output}")
    whole = fingerprints(undisturbed.results)
    rows: list[dict] = []
    while len(rows) < count:
        project = project_in(room / f"study-{len(rows)}")
        chain: list[dict] = []
        for place, step in enumerate(STEPS):
            if len(rows) + len(chain) == count:
                break
            process = project.start("--cores", "2")
            # The step itself may have ended before the last kill.
            later = set(STEPS[place:])
            row = kill_at(process, lambda p=process, s=later: s & set(running(p.pid)), draw.uniform(0, WITHIN))
            if row is None:
                break
            damaged = cut_short(project.results)
            chain.append({"command": SNAKEMAKE, "aimed_at": step} | row | {"whole_files": not damaged})
            print(f"killed: {chain[-1]}", file=sys.stderr)
        code, output = project.snakemake()
        same = code == 0 and fingerprints(project.results) == whole
        if not same:
            print(output, file=sys.stderr)
        left = list((project.results / "activations").rglob("*.safetensors")) + list(project.results.rglob(".*"))
        rows += [row | {"survived": same and not left and row["whole_files"]} for row in chain]
    return rows


def kills_of_sweeps(room: Path, count: int) -> list[dict]:
    """A row for each of `count` kills during a sweep, each after one more finished case."""
    folder = room / "sweeps"
    folder.mkdir()
    np.save(folder / "vectors.npy", np.random.default_rng(0).normal(size=(4096, 16)).astype(np.float32))
    workload = {"name": "glove-split", "lengths": LENGTHS, "path": "vectors.npy"}
    settings = {"methods": ["exact-fused", "mean"], "targets": [0.2], "repeats": 25, "workloads": [workload]}
    (folder / "settings.json").write_text(json.dumps(settings))

    def start(out: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*SWEEP.split()[:-1], out],
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finished(out: str) -> int:
        try:
            return len((folder / f"{out}.part").read_text().splitlines()) - 1
        except FileNotFoundError:
            return 0

    output, _ = start("undisturbed.csv").communicate()
    print(output, file=sys.stderr)
    names = ["workload", "n", "method", "status"]
    expected = pd.read_csv(folder / "undisturbed.csv")
    rows: list[dict] = []
    numbers = counting()
    while len(rows) < count:
        out = f"sweep-{next(numbers)}.csv"
        chain: list[dict] = []
        for case in range(1, len(LENGTHS)):
            if len(rows) + len(chain) == count:
                break
            row = kill_at(start(out), lambda o=out, c=case: finished(o) >= c)
            if row is None:
                break
            chain.append({"command": SWEEP, "aimed_at": f"sweep, case {case + 1}"} | row | {"cases": finished(out)})
            print(f"killed: {chain[-1]}", file=sys.stderr)
        if not chain:
            raise SystemExit("the sweep ended before it could be killed")
        process = start(out)
        output, _ = process.communicate()
        goes_on = f"resumes after the {chain[-1]['cases']} finished by" in output
        same = process.returncode == 0 and pd.read_csv(folder / out)[names].equals(expected[names])
        grew = [row["cases"] for row in chain]
        survived = same and goes_on and grew == sorted(grew) and not (folder / f"{out}.part").exists()
        if not survived:
            print(output, file=sys.stderr)
        rows += [row | {"survived": survived} for row in chain]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="number of kills, a quarter of them during a sweep")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
    parser.add_argument("--out", type=Path, default=Path("results/reliability/kills.csv"))
    given = parser.parse_args()
    start = time.monotonic()
    of_sweeps = given.kills // 4
    with tempfile.TemporaryDirectory(prefix="kills-") as room:
        rows = kills_of_sweeps(Path(room), of_sweeps)
        rows += kills_of_studies(Path(room), given.kills - of_sweeps, random.Random(given.seed))
    table = pd.DataFrame(rows)
    table.insert(0, "kill", range(1, len(table) + 1))
    lost = int((~table["survived"]).sum())
    table["survived"] = table["survived"].map({True: "yes", False: "no"})
    write_csv(given.out, table)
    counts = {"kills": len(table), "survived": len(table) - lost, "seconds": round(time.monotonic() - start)}
    write_json(given.out.with_suffix(".json"), describe({"kills": given.kills, "seed": given.seed}) | counts)
    print(f"{counts['survived']} of {counts['kills']} kills survived, {counts['seconds']} s: {given.out}")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
