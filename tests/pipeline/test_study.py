"""A whole study through Snakemake: its output, its agreement with plain code, and that nothing is done twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_project import ROOT, Project

from approxkmv import log_kernel
from approxkmv.models import CapturableModel, ModelLocation
from approxkmv.steps.cleaning import remove_damaged, remove_half_written

INDEX = ROOT / "docs" / "index.md"
TABLES = ["heads_{m}.csv", "context_scaling_{m}.csv", "attention_{m}.csv"]
FIGURES = ["max_ratios_bert", "max_ratios_llama", "order_ratios_bert", "order_ratios_llama", "context_scaling"]
FIGURES += ["attention_support_bert", "attention_support_llama"]
FIGURES += [
    f"{name}_{model}" for name in ("readings", "gauge", "growth", "growth_curves") for model in ("bert", "llama")
]


def fingerprints(results: Path) -> dict[str, str]:
    """Hashes of tables, statistics and figures; not of overviews, which name the command and so the folder."""
    found = [p for kind in ("tables", "statistics", "figures") for p in (results / kind).rglob("*") if p.is_file()]
    return {
        str(p.relative_to(results)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in found
        if not p.name.startswith("overview_")
    }


def test_the_study_writes_its_tables_and_figures(finished):
    project, output = finished
    for model in ("bert", "llama"):
        heads = pd.read_csv(project.results / "tables" / f"heads_{model}.csv")
        assert len(heads) == 8
        assert (heads["contexts"] == 7).all()
        assert np.isfinite(heads.select_dtypes("number")).all(axis=None)
        overview = json.loads((project.results / "tables" / f"overview_{model}.json").read_text())
        assert (overview["texts"], overview["texts_used"], overview["texts_too_short"]) == (8, 7, 1)
        assert overview["texts_cut"] == 1
        assert overview["tokens_max"] == 60
        assert overview["provenance"]["versions"]["torch"]
    for name in FIGURES:
        assert (project.results / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (project.results / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    comparison = pd.read_csv(project.results / "tables" / "paper_comparison.csv")
    assert set(comparison["model"]) == {"bert", "llama"}
    assert set(comparison["holds"]) <= {"yes", "no"}
    assert not (project.results / "activations").exists() or not list(
        (project.results / "activations").rglob("*.safetensors")
    )
    assert "figures: results/tiny/figures" in output
    assert "page: results/tiny/index.html" in output
    page = (project.results / "index.html").read_text()
    assert page.count("<img ") == len(list((project.results / "figures").glob("*.png")))
    assert "Not here, since the tables are not" not in page
    assert "1 too short" in output


def test_the_reference_tables_of_models_have_the_columns_of_todays(finished):
    project, _ = finished

    def names_in(path: Path) -> list[str]:
        return list(pd.read_csv(path, nrows=0)) if path.suffix == ".csv" else sorted(json.loads(path.read_text()))

    compared = set()
    for path in (ROOT / "results" / "reference").glob("*/tables/*_*.*"):
        kind, names = path.stem.rpartition("_")[0], names_in(path)
        small = "llama" if any(name.startswith("masked_") for name in names) else "bert"
        today = project.results / "tables" / f"{kind}_{small}{path.suffix}"
        if today.exists():
            assert names == names_in(today), path
            compared.add(today.name)
    # Tables of readings and gauges name the entries in their rows.
    of_rows = {f"{kind}_llama.csv" for kind in ("readings", "readings_heads", "readings_path", "gauge")}
    made = {path.name for model in ("bert", "llama") for path in (project.results / "tables").glob(f"*_{model}.*")}
    assert compared == {name for name in made if not name.endswith(".sha256")} - of_rows


def test_the_statistics_agree_with_topk_on_captured_tensors(finished):
    project, _ = finished
    texts = pd.read_parquet(project.results / "texts.parquet")
    table = pd.concat(
        [pd.read_parquet(p) for p in sorted((project.results / "statistics" / "llama").glob("*.heads.parquet"))]
    ).set_index(["context", "layer", "head"])
    model = CapturableModel.load(ModelLocation(project.folder / "llama", None))
    for context in (0, 5):
        captured = model.capture([model.tokenize(texts["text"][context], 60)])[0]
        for layer, head in ((0, 0), (1, 3)):
            logs = log_kernel(captured.queries[layer, head], captured.keys[layer, head], float(captured.scales[layer]))
            ratios = []
            for i in range(10, logs.shape[0] + 1):
                values = torch.exp(logs[:i, :i] - logs[:i, :i].max()).flatten()
                top = values.topk(i).values.sum()
                ratios.append(float((values.sum() - top) / top))
            ordered = logs.flatten().sort(descending=True).values
            row = table.loc[(context, layer, head)]
            n = logs.shape[0]
            assert row["tokens"] == n
            # Padding and batching change float32 activations by rounding.
            np.testing.assert_allclose(row["max_ratio"], max(ratios), rtol=1e-4)
            np.testing.assert_allclose(row["last_ratio"], ratios[-1], rtol=1e-4)
            np.testing.assert_allclose(row["log_double"], float(ordered[n - 1] - ordered[2 * n - 1]), atol=1e-4)


@pytest.mark.slow
def test_a_second_run_does_nothing_and_figures_come_from_tables_alone(finished):
    project, _ = finished
    before = fingerprints(project.results)
    start = time.monotonic()
    code, output = project.snakemake()
    assert code == 0
    assert time.monotonic() - start < 60
    assert "extract" not in output
    # As docs/index.md says it; a shell writes out the names.
    row = re.search(r"^\| redraw only the figures \| `snakemake --cores all ([^`]+)`", INDEX.read_text(), re.M)
    before_it = {path: path.stat().st_mtime_ns for path in (project.results / "figures").iterdir()}
    given = row[1].replace("results/embedded/figures/*", " ".join(f"results/tiny/figures/{p.name}" for p in before_it))
    code, output = project.snakemake(*given.split())
    assert code == 0, output
    assert [path.name for path, made in before_it.items() if path.stat().st_mtime_ns == made] == []
    assert "extract" not in output
    assert "statistics" not in output
    assert fingerprints(project.results) == before


@pytest.mark.slow
def test_the_report_is_one_html_file(finished):
    project, _ = finished
    code, output = project.snakemake("--report", "report.html")
    assert code == 0, output
    html = (project.folder / "report.html").read_text()
    assert "largest head-to-tail ratio" in html
    assert "Is a model's attention sparse" in html
    assert "problematic" not in html
    # The report sorts the chapters by name, and makes one table of a chapter's labels.
    chapters, results = (
        json.loads(re.search(rf"var {name} = (\{{.*\}});?\n", html)[1]) for name in ("categories", "results")
    )
    assert sorted(chapters) == ["1. Heads", "2. Length", "3. Definition", "5. Tables"]
    for parts in chapters.values():
        found = [results[path]["labels"] for paths in parts.values() for path in paths]
        assert len({tuple(one) for one in found}) == 1
        assert all(value and value != "none" for one in found for value in one.values())
    assert "paper_comparison" in html


def a_shard_is_done_and_another_under_way(project: Project) -> list[Path]:
    """The finished statistics, once another shard's activations wait for theirs; before that, nothing."""
    waiting = {
        path.relative_to(project.results / "activations") for path in project.results.glob("activations/*/[!.]*")
    }
    # Snakemake removes activations once all steps that read them are finished in its eyes.
    made = sorted((project.results / "statistics").glob("*/[!.]*.heads.parquet"))
    done = [path for path in made if Path(path.parent.name, path.name[:4] + ".safetensors") not in waiting]
    return done if waiting else []


def a_table_is_written(project: Project) -> list[Path]:
    """The statistics of which a table is made, once there is one."""
    models = [path.stem.removeprefix("overview_") for path in (project.results / "tables").glob("overview_*.json")]
    return [path for m in models for path in (project.results / "statistics" / m).glob("[!.]*.heads.parquet")]


@pytest.mark.slow
def test_a_run_that_is_killed_twice_goes_on_and_ends_with_the_same_bytes(finished, project: Project):
    whole = fingerprints(finished[0].results)
    written: dict[Path, int] = {}
    # First with the commands as installed: the finished study was made with faster ones.
    installed = Project(project.folder)
    for started, point in ((installed, a_shard_is_done_and_another_under_way), (project, a_table_is_written)):
        process = started.start("--cores", "2")
        deadline = time.monotonic() + 300
        while not (done := point(project)):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert 0 < len(fingerprints(project.results)) < len(whole), "the kill came after the end"
        written |= {path: path.stat().st_mtime_ns for path in done if path not in written}
    code, output = project.snakemake()
    assert code == 0, output
    for path, time_before in written.items():
        assert path.stat().st_mtime_ns == time_before, f"{path} was regenerated"
    assert fingerprints(project.results) == whole
    assert not list(project.results.rglob(".*"))
    # Tables as installed, too
    folder = "results/tiny/statistics/bert"
    options = ["--model", "bert", "--statistics", folder, "--texts", "results/tiny/texts.parquet", "--out", "again"]
    code, output = installed.approxkmv_process("summary", *options)
    assert code == 0, output
    for name in ("heads_bert.csv", "context_scaling_bert.csv"):
        assert (project.folder / "again" / name).read_bytes() == (project.results / "tables" / name).read_bytes()


def test_half_written_files_are_left_to_living_processes_and_taken_from_dead_ones(tmp_path: Path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    folders = {kind: tmp_path / kind / "bert" for kind in ("activations", "statistics")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    for number in (os.getpid(), ended.pid):
        (folders["activations"] / f".0000.{number}.safetensors").write_bytes(b"half")
        (folders["statistics"] / f".0000.heads.{number}.parquet").write_bytes(b"half")
    headers = (b"half", b"[]", b"{}", b'{"a": 1}', b'{"a": {"data_offsets": []}}', b"[" * 200_000)
    for header in headers:
        damaged = folders["activations"] / "0001.safetensors"
        damaged.write_bytes(len(header).to_bytes(8, "little") + header)
        lines = remove_damaged(tmp_path)
        assert [str(damaged) in line for line in lines] == [True]
        assert not damaged.exists()
    assert len(list(tmp_path.rglob(".*"))) == 4
    remove_half_written(tmp_path)
    assert {path.name for path in tmp_path.rglob(".*")} == {
        f".0000.{os.getpid()}.safetensors",
        f".0000.heads.{os.getpid()}.parquet",
    }


@pytest.mark.slow
def test_damaged_shards_are_found_by_their_checksums_and_made_again(copied: Project):
    project = copied
    before = fingerprints(project.results)
    folder = project.results / "statistics" / "bert"
    halved = [folder / "0001.heads.parquet", folder / "0002.contexts.csv"]
    for path in halved:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    left = project.results / "activations" / "bert" / "0000.safetensors"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"half a file")
    kept = folder / "0000.heads.parquet"
    written = kept.stat().st_mtime_ns
    code, output = project.snakemake("--dry-run")
    assert code == 0, output
    assert all(path.exists() for path in halved), "a dry run changes nothing"
    code, output = project.snakemake()
    assert code == 0, output
    for path in halved:
        assert f"{path.relative_to(project.folder)} does not match its checksum" in output
    assert f"{left.relative_to(project.folder)} is truncated" in output
    assert fingerprints(project.results) == before
    assert kept.stat().st_mtime_ns == written, "an intact shard was regenerated"


def test_the_logs_say_where_the_time_goes(finished):
    logs = finished[0].results / "logs"
    assert "loading" in (logs / "extract_bert_0000.log").read_text()
    assert "kernels" in (logs / "statistics_bert_0000.log").read_text()


@pytest.mark.slow
def test_a_smaller_study_leaves_no_shard_of_the_larger_one_in_its_tables(copied: Project):
    copied.configure(models=["bert"], contexts=3)
    code, output = copied.snakemake()
    assert code == 0, output
    heads = pd.read_csv(copied.results / "tables" / "heads_bert.csv")
    assert heads["contexts"].max() <= 3


@pytest.mark.slow
def test_the_project_runs_from_its_own_root():
    """The default study is the one that config.yaml of the project names."""
    code, output = Project(ROOT).approxkmv_process("config", "check")
    assert code == 0
    assert "embedded" in output


@pytest.mark.slow
def test_nothing_of_a_label_is_html_in_the_report_or_mathematics_in_a_figure(project: Project):
    # The rule of long texts has the label among its parameters, which the report shows.
    project.configure(models=["bert"], contexts=3, lengths=[10, 20])
    config = project.read()
    config["models"]["bert"]["label"] = "</script><b>$x_1$ 模型"
    config["corpora"]["words"]["label"] = "<i>words & $1"
    project.write(config)
    code, output = project.snakemake()
    assert code == 0, output
    assert "length_scaling_bert: 型 模 drawn as boxes" in output
    code, output = project.snakemake("--report", "report.html")
    assert code == 0, output
    page = (project.folder / "report.html").read_text()
    assert "long texts: " in page
    assert "</script><b>" not in page
    assert "<i>words" not in page


def test_what_a_report_shows_of_a_configuration_is_escaped():
    """The report puts the parameters of a rule with a place in it into its HTML as they are."""
    rules = [rule for path in (ROOT / "workflow" / "rules").glob("*.smk") for rule in path.read_text().split("\nrule ")]
    shown = [rule for rule in rules if "report(" in rule and "params:" in rule]
    assert len(shown) > 8
    assert not [rule.split(":")[0] for rule in shown if re.search(r"(?<!escape\()\bstr\(", rule.split("params:")[1])]


@pytest.mark.slow
def test_an_edited_corpus_is_read_again(copied: Project):
    project = copied
    project.configure(models=["bert"])
    before = pd.read_parquet(project.results / "texts.parquet")
    lines = (project.folder / "words.jsonl").read_text().replace("w1 ", "w2 ")
    (project.folder / "words.jsonl").unlink()
    (project.folder / "words.jsonl").write_text(lines)
    code, output = project.snakemake()
    assert code == 0, output
    assert not pd.read_parquet(project.results / "texts.parquet").equals(before)
    assert "extract    bert" in output
