"""The paper's study against a local hub: with faults, without, offline with its cache, and offline without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import yaml
from forking import LIBRARIES, OF_THE_HUB, forking_commands
from hub_support import SmallHub, model_repository, served, squad_repository
from small_project import ROOT, environment

CONTEXTS = 7


class Machine:
    """A folder with the project's own configuration, a cache of its own, and a hub."""

    def __init__(self, folder: Path, commands: Path, hub: SmallHub, address: str) -> None:
        self.folder = folder
        self.commands = commands
        self.hub = hub
        self.environment = {n: v for n, v in environment().items() if not n.lower().endswith("_proxy")}
        self.environment |= {"HF_HOME": str(folder / "home"), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
        self.environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "5"}
        self.environment |= {"HF_DATASETS_CACHE": str(folder / "home" / "datasets"), "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
        shutil.copy(ROOT / "config.yaml", folder / "config.yaml")

    def approxkmv(self, *arguments: str, **changes: str) -> tuple[int, str]:
        command = [self.commands / "approxkmv", *arguments]
        run = subprocess.run(
            command, cwd=self.folder, env=self.environment | changes, capture_output=True, text=True, timeout=200
        )
        return run.returncode, run.stdout + run.stderr

    @contextmanager
    def preloaded(self, **changes: str) -> Iterator[None]:
        """From here on with these changes; a study's jobs within the block have imported what reads the environment."""
        self.environment = self.environment | changes
        with forking_commands("impatient", *LIBRARIES, *OF_THE_HUB, environment=self.environment) as self.commands:
            yield

    def snakemake(self, *targets: str, cores: int = 2) -> tuple[int, str]:
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", str(cores)]
        run = subprocess.run(
            [*command, *targets, "--config", "study=paper"],
            cwd=self.folder,
            # Its jobs call the command by its name.
            env=self.environment | {"PATH": f"{self.commands}{os.pathsep}{self.environment['PATH']}"},
            timeout=500,
            capture_output=True,
            text=True,
        )
        return run.returncode, run.stdout + run.stderr


@pytest.fixture(scope="module")
def repositories() -> dict[str, dict[str, bytes]]:
    return {
        "models/google-bert/bert-base-uncased": model_repository("bert"),
        "models/FacebookAI/roberta-base": model_repository("roberta"),
        "models/openai-community/openai-gpt": model_repository("gpt"),
        "datasets/rajpurkar/squad": squad_repository(CONTEXTS),
    }


@pytest.fixture(scope="module")
def commands() -> Iterator[Path]:
    """approxkmv without waits between retries; each process reads the hub's address anew."""
    with forking_commands(*LIBRARIES, "impatient") as folder:
        yield folder


@pytest.fixture
def machine(tmp_path: Path, commands: Path, repositories: dict[str, dict[str, bytes]]) -> Iterator[Machine]:
    hub = SmallHub(repositories)
    with served(hub) as address:
        yield Machine(tmp_path, commands, hub, address)


def only_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("approxkmv: ")]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("fault", SmallHub.FAULTS)
def test_a_fault_of_the_hub_is_one_line_and_the_next_run_is_whole(machine: Machine, fault: str):
    fetch = ("fetch", "--model", "bert-base-uncased", "--out", "bert.json")
    texts = ("texts", "--study", "paper", "--out", "texts.parquet")
    machine.hub.fault = fault
    for command, name in ((fetch, "google-bert/bert-base-uncased"), (texts, "rajpurkar/squad")):
        code, output = machine.approxkmv(*command)
        assert code == 2, output
        assert name in only_line(output)
        assert not (machine.folder / command[-1]).exists()
    machine.hub.fault = None
    for command in (fetch, texts):
        code, output = machine.approxkmv(*command)
        assert code == 0, output
    folder = Path(json.loads((machine.folder / "bert.json").read_text())["folder"])
    expected = machine.hub.repositories["models/google-bert/bert-base-uncased"]
    assert (folder / "model.safetensors").read_bytes() == expected["model.safetensors"]
    assert not (folder / "pytorch_model.bin").exists()
    assert len(pd.read_parquet(machine.folder / "texts.parquet")) == CONTEXTS


@pytest.mark.slow
def test_the_papers_study_with_a_fault_then_whole_then_offline(machine: Machine):
    # One job at a time, so that one fails.
    machine.hub.fault = "cut connection"
    with machine.preloaded():
        code, output = machine.snakemake(cores=1)
        assert code == 2, output
        assert any(name.partition("/")[2] in only_line(output) for name in machine.hub.repositories)
        assert not list((machine.folder / "results" / "paper").glob("tables/*"))
        machine.hub.fault = None
        code, output = machine.snakemake()
        assert code == 0, output
    tables = machine.folder / "results" / "paper" / "tables"
    models = yaml.safe_load((ROOT / "config.yaml").read_text())["studies"]["paper"]["models"]
    for model in models:
        overview = json.loads((tables / f"overview_{model}.json").read_text())
        assert (overview["texts"], overview["texts_too_short"]) == (CONTEXTS, 1)
        assert (overview["layers"], overview["heads"]) == (2, 4)
        assert overview["causal"] == (model == "openai-gpt")
    comparison = pd.read_csv(tables / "paper_comparison.csv")
    assert set(comparison["model"]) == set(models)
    assert not [name for name in machine.hub.sent if name.endswith((".bin", ".onnx"))]
    # All other tables are made of these, and of what these are made of.
    first = {path: path.read_bytes() for kind in ("heads", "gauge") for path in tables.glob(f"{kind}_*.csv")}
    assert len(first) == 2 * len(models)
    shutil.rmtree(machine.folder / "results")
    # A request that the last process left behind is answered within this time.
    time.sleep(2)
    machine.hub.sent.clear()
    wanted = [str(path.relative_to(machine.folder)) for path in first]
    with machine.preloaded(HF_HUB_OFFLINE="1"):
        code, output = machine.snakemake(*wanted)
    assert code == 0, output
    assert not machine.hub.sent
    assert {path: path.read_bytes() for path in first} == first


@pytest.mark.slow
@pytest.mark.parametrize("offline", ["0", "1"])
def test_an_empty_cache_without_a_network_is_one_line(machine: Machine, offline: str):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": offline}
    code, output = machine.approxkmv("fetch", "--model", "roberta-base", "--out", "x.json", **nowhere)
    assert code == 2, output
    assert "FacebookAI/roberta-base" in only_line(output)
    code, output = machine.approxkmv("texts", "--study", "paper", "--out", "texts.parquet", **nowhere)
    assert code == 2, output
    assert "rajpurkar/squad" in only_line(output)
    assert os.listdir(machine.folder).count("texts.parquet") == 0
