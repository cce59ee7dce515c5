"""Paths in a configuration are relative to the file that names them, wherever a command runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_project import ROOT, Project, environment

from approxkmv.config import load_config, settings_file


def test_a_configuration_in_another_folder_names_files_beside_it(project: Project, monkeypatch):
    config = project.read()
    config["sweeps"] = {"one": {"workloads": [{"name": "model-qk", "path": "heads.safetensors", "lengths": [64]}]}}
    config["sweeps"]["one"]["workloads"].append({"name": "glove-paper", "path": "npm:a@1/b.json", "lengths": [64]})
    project.write(config)
    elsewhere = project.folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    found = load_config(project.folder / "config.yaml")
    assert found.models["bert"].source == "path:../bert"
    assert found.corpora["words"].source == "path:../words.jsonl"
    paths = [workload.path for workload in found.sweeps["one"].workloads]
    assert paths == ["../heads.safetensors", "npm:a@1/b.json"]
    # What a run writes for its steps is read to the same.
    assert load_config(settings_file(found, Path("results") / "x" / "config.yaml")) == found
    # Beside the configuration a path stays as it is written.
    monkeypatch.chdir(project.folder)
    assert load_config(Path("config.yaml")).models["bert"].source == "path:bert"


@pytest.mark.slow
def test_a_study_runs_with_directory_and_with_a_configuration_elsewhere(project: Project, tmp_path):
    project.configure(models=["bert"])
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    code, output = project.snakemake("--directory", str(first), "--configfile", str(project.folder / "config.yaml"))
    assert code == 0, output
    # One file gives the texts, another, in a folder of its own, another model and where that is.
    second.mkdir()
    shutil.copytree(project.folder / "llama", second / "other")
    (second / "more.yaml").write_text("models: {bert: {source: 'path:other'}}\n")
    code, output = project.snakemake("--configfile", "config.yaml", str(second / "more.yaml"), "--dry-run")
    assert code == 0, output
    heads = [folder / "results" / "tiny" / "tables" / "heads_bert.csv" for folder in (first, project.folder)]
    assert heads[0].is_file()
    code, output = project.snakemake(
        "results/tiny/tables/heads_bert.csv", "--configfile", "config.yaml", str(second / "more.yaml")
    )
    assert code == 0, output
    assert heads[0].read_text() != heads[1].read_text()


@pytest.mark.slow
def test_braces_in_a_path_are_no_wildcards_of_snakemake(project: Project):
    (project.folder / "bert").rename(project.folder / "b{er}t")
    texts = project.folder / "w{or}ds.jsonl"
    texts.write_text((project.folder / "words.jsonl").read_text())
    config = project.read()
    config["models"]["bert"]["source"] = "path:b{er}t"
    config["corpora"]["words"]["source"] = f"path:{texts.name}"
    project.write(config)
    made = "results/tiny/models/bert.json", "results/tiny/texts.parquet"
    code, output = project.snakemake(*made)
    assert code == 0, output
    assert "8 texts" in output
    texts.write_text(texts.read_text() + '{"context": "w1 w2"}\n')
    code, output = project.snakemake(*made)
    assert code == 0, output
    assert "9 texts" in output
    assert "fetch" not in output
    # In settings too, of parts that are not run here.
    np.save(project.folder / "v{or}s.npy", np.zeros((40, 4), np.float32))
    capture = {"model": "bert", "corpus": "words", "tokens": 20, "heads": [[0, 0]]}
    workloads = [{"name": "model-qk", "lengths": [8]}, {"name": "glove-split", "lengths": [8], "path": "v{or}s.npy"}]
    config["sweeps"] = {"little": {"methods": ["mean"], "capture": capture, "workloads": workloads}}
    perplexity = {"model": "llama", "corpus": "words", "tokens": [20], "methods": {"mean": [{}]}, "plan": {}}
    config["studies"]["tiny"] = {"sweep": "little", "perplexity": perplexity, "operator": {"path": "v{or}s.npy"}}
    project.write(config)
    code, output = project.snakemake("--dry-run", "--quiet", "host")
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("snakefile", ["Snakefile", "workflow/Snakefile"])
def test_either_snakefile_runs_the_study_from_any_folder(tmp_path, snakefile):
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1", "--quiet", "host"]
    command += ["--snakefile", str(ROOT / snakefile)]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "results/embedded/index.html" in result.stdout


@pytest.mark.slow
def test_a_part_of_a_configuration_changes_that_of_the_checkout_from_any_folder(tmp_path):
    (tmp_path / "part.yaml").write_text("studies: {embedded: {models: [minilm-l6]}}\n")
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1", "--quiet", "host"]
    command += ["--snakefile", str(ROOT / "Snakefile"), "--configfile", "part.yaml"]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "results/embedded/tables/heads_minilm-l6.csv" in result.stdout
    assert "smollm2" not in result.stdout
