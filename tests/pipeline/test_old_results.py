"""No old result is taken for a new one: other weights, other texts, another study, a killed run, a second run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from small_project import ROOT, Project, environment, kill_when, save_model

from approxkmv.errors import BusyError, TableError
from approxkmv.files import file_sha256, hash_file, read_table, write_parquet
from approxkmv.lock import hold, try_lock
from approxkmv.results import shards
from approxkmv.results.locations import origin
from approxkmv.results.shards import origin_of, read_shards, write_shard
from approxkmv.steps.cleaning import leftovers, remove_damaged, remove_half_written, remove_leftovers
from approxkmv.steps.page import make_page
from approxkmv.steps.show import lines

HEADS = "results/tiny/tables/heads_bert.csv"


def line_of(output: str) -> str:
    """The one line that was printed for the user."""
    found = [line for line in output.splitlines() if line.startswith("approxkmv: ")]
    assert len(found) == 1, output
    assert "Traceback" not in output
    return found[0]


def replace_weights(project: Project, seed: int) -> None:
    """Put other weights of the same sizes at the same path, older than everything here, as a moved file may be."""
    folder = project.folder / "bert"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    if folder.is_symlink():
        folder.unlink()
    save_model(folder, "bert", seed=seed)
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == sizes
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))


@pytest.mark.slow
def test_weights_that_are_replaced_around_a_stopped_run_leave_no_shard_of_the_old_ones(project: Project):
    project.configure(models=["bert"], contexts=6)
    code, output = project.snakemake(HEADS)
    assert code == 0, output
    folder = project.results / "statistics" / "bert"
    old = {path.name: path.read_bytes() for path in folder.glob("*.heads.parquet")}
    assert len(old) == 2
    replace_weights(project, seed=5)

    def one_is_new() -> bool:
        try:
            return any(path.read_bytes() != old.get(path.name) for path in folder.glob("[!.]*.heads.parquet"))
        except FileNotFoundError:  # removed since it was listed, to be made anew
            return False

    kill_when(project, one_is_new, HEADS)
    code, output = project.snakemake(HEADS)
    assert code == 0, output
    assert len({origin_of(path) for path in folder.glob("*.heads.parquet")}) == 1
    # Step by step, without a workflow that could take anything for granted.
    assert project.approxkmv("fetch", "--model", "bert", "--out", "location.json")[0] == 0
    for shard in range(2):
        options = ["--location", "location.json", "--texts", "results/tiny/texts.parquet", "--shard", str(shard)]
        outputs = ["--out", "qk.safetensors", "--contexts-out", "contexts.csv"]
        assert project.approxkmv("extract", "--model", "bert", *options, *outputs)[0] == 0
        outputs = ["--heads-out", "heads.parquet", "--prefixes-out", "prefixes.parquet"]
        assert project.approxkmv("statistics", "--model", "bert", "--activations", "qk.safetensors", *outputs)[0] == 0
        for kind in ("heads", "prefixes"):
            made = (project.folder / f"{kind}.parquet").read_bytes()
            assert (folder / f"{shard:04d}.{kind}.parquet").read_bytes() == made


def test_weights_that_change_before_a_step_reads_them_stop_it(project: Project):
    assert project.approxkmv("fetch", "--model", "bert", "--out", "location.json")[0] == 0
    assert project.approxkmv("texts", "--out", "texts.parquet")[0] == 0
    replace_weights(project, seed=5)
    code, output = project.approxkmv(
        *("extract", "--model", "bert", "--location", "location.json", "--texts", "texts.parquet", "--shard", "0"),
        *("--out", "out.safetensors", "--contexts-out", "contexts.csv"),
    )
    assert code == 2
    assert "is not the one that location.json was written for" in line_of(output)
    assert not (project.folder / "out.safetensors").exists()


def test_shards_of_two_origins_are_refused_in_one_table(tmp_path: Path, monkeypatch):
    # What columns there are is of no account here.
    monkeypatch.setattr(shards, "read_shard_table", lambda path, kind: read_table(path))
    folder, texts = tmp_path / "statistics" / "bert", tmp_path / "texts.parquet"
    write_parquet(texts, pd.DataFrame({"index": [0, 1]}))
    a, b = (f"model bert, weights {weights}, texts {file_sha256(texts)}" for weights in "ab")
    for shard, made_of in enumerate([a, b]):
        write_shard(folder / f"{shard:04d}.contexts.csv", pd.DataFrame({"context": [shard]}), made_of)
        write_shard(folder / f"{shard:04d}.heads.parquet", pd.DataFrame({"context": [shard]}), a)
    assert len(read_shards(folder, "bert", texts, 1, "heads.parquet")) == 1
    with pytest.raises(TableError, match=r"0000.contexts.csv.*0001.contexts.csv come from different weights or texts"):
        read_shards(folder, "bert", texts, 1, "contexts.csv")
    # Queries and keys were captured anew and their statistics not yet.
    write_shard(folder / "0000.contexts.csv", pd.DataFrame({"context": [0]}), b)
    with pytest.raises(TableError, match="different weights or texts"):
        read_shards(folder, "bert", texts, 1, "contexts.csv", "heads.parquet")
    # A version before wrote no model.
    write_shard(folder / "0000.contexts.csv", pd.DataFrame({"context": [0]}), a.removeprefix("model bert, "))
    write_shard(folder / "0001.contexts.csv", pd.DataFrame({"context": [1]}), a)
    assert [len(table) for table in read_shards(folder, "bert", texts, 1, "contexts.csv", "heads.parquet")] == [2, 2]
    assert remove_damaged(tmp_path) == [], "while there is no location nothing is known of the weights"
    (folder / "0001.heads.parquet").write_bytes(b"")
    assert len(remove_damaged(tmp_path)) == 1


def test_texts_that_cannot_be_read_do_not_keep_a_run_from_making_them_again(project: Project, monkeypatch):
    monkeypatch.chdir(project.folder)
    assert project.approxkmv("texts", "--out", "results/tiny/texts.parquet")[0] == 0
    shutil.copy(project.folder / "config.yaml", project.results / "config.yaml")
    shard = project.results / "statistics" / "bert" / "0000.contexts.csv"
    shard.parent.mkdir(parents=True)
    shard.write_text("context\n")
    (project.results / "texts.parquet").write_bytes(b"")
    with pytest.raises(TableError, match=r"texts\.parquet"):
        leftovers(project.results)
    assert ["has no checksum" in line for line in remove_damaged(project.results)] == [True]


def test_a_location_of_changed_weights_goes_before_a_run_and_old_shards_once_there_is_a_new_one(
    project: Project, monkeypatch
):
    monkeypatch.chdir(project.folder)
    assert project.approxkmv("fetch", "--model", "bert", "--out", "results/tiny/models/bert.json")[0] == 0
    assert project.approxkmv("texts", "--out", "results/tiny/texts.parquet")[0] == 0
    shard = project.results / "statistics" / "bert" / "0000.contexts.csv"
    write_shard(shard, pd.DataFrame({"context": [0]}), "weights of before, texts of before")
    remove_half_written(project.results)
    assert (project.results / "models" / "bert.json").exists()
    made_of_it = project.results / "tables" / "heads_bert.csv"
    made_of_it.parent.mkdir()
    made_of_it.write_text("layer,head\n")
    assert ["other weights or texts" in line for line in remove_damaged(project.results)] == [True]
    assert not shard.exists()
    assert not made_of_it.exists()
    now = origin(project.results / "models" / "bert.json", project.results / "texts.parquet", "bert")
    for kept, named in [(True, now), (True, now.removeprefix("model bert, ")), (False, now.replace("bert", "llama"))]:
        write_shard(shard, pd.DataFrame({"context": [0]}), named)
        assert (remove_damaged(project.results) == []) == shard.exists() == kept
    replace_weights(project, seed=5)
    remove_half_written(project.results)
    assert not (project.results / "models" / "bert.json").exists()


def test_a_shard_whose_checksum_a_kill_has_prevented_is_made_again(tmp_path: Path):
    shards = [tmp_path / "statistics" / "bert" / f"000{shard}.contexts.csv" for shard in range(2)]
    for shard in shards:
        write_shard(shard, pd.DataFrame({"context": [0]}), "weights a, texts t")
    made_of_them = tmp_path / "tables" / "heads_bert.csv"
    made_of_them.parent.mkdir()
    made_of_them.touch()
    hash_file(shards[1]).unlink()
    assert ["no checksum" in line for line in remove_damaged(tmp_path)] == [True]
    assert [path.exists() for path in (*shards, made_of_them)] == [True, False, False]


@pytest.mark.slow
def test_an_older_corpus_under_the_same_name_is_read_again(project: Project):
    texts = "results/tiny/texts.parquet"
    assert project.snakemake(texts)[0] == 0
    before = (project.results / "texts.parquet").read_bytes()
    corpus = project.folder / "words.jsonl"
    lines_before = corpus.read_text()
    corpus.unlink()
    corpus.write_text(lines_before.replace("w1 ", "w2 "))
    os.utime(corpus, (1e9, 1e9))
    code, output = project.snakemake(texts)
    assert code == 0, output
    assert (project.results / "texts.parquet").read_bytes() != before


def results_of(results: Path) -> set[Path]:
    return {p for kind in ("tables", "figures", "statistics") for p in (results / kind).rglob("*") if p.is_file()}


def write_settings(results: Path, **changes: object) -> None:
    """Change the study in the configuration that the workflow put beside its results."""
    config = yaml.safe_load((results / "config.yaml").read_text())
    config["studies"]["tiny"] |= changes
    (results / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.slow
def test_what_an_earlier_study_left_is_named_shown_no_more_and_removed_when_asked(finished, project: Project):
    shutil.copytree(finished[0].results, project.results)
    everything = results_of(project.results)
    assert leftovers(project.results) == []
    project.configure(models=["bert"])
    write_settings(project.results, models=["bert"])
    left = set(leftovers(project.results))
    assert left == {path for path in everything if "llama" in str(path.relative_to(project.results))}
    assert left
    shown = lines(project.results)
    assert not [line for line in shown if line.startswith("a Llama")]
    assert [line for line in shown if line.startswith("bert")]
    named = [line for line in shown if "of an earlier study" in line]
    assert len(named) == 1
    # Of this folder: without --config, Snakemake's own rule is for the study that config.yaml names.
    assert named[0].endswith(f"; `approxkmv clean {project.results}` removes them")
    code, output = project.snakemake("clean_leftovers")
    assert code == 0, output
    assert not [path for path in left if path.exists()]
    assert all(path.exists() for path in everything - left)
    assert "of an earlier study" not in output


@pytest.mark.slow
def test_what_a_run_before_its_end_has_not_made_again_is_said(finished, tmp_path: Path):
    results = tmp_path / "tiny"
    shutil.copytree(finished[0].results, results)
    shown = lines(results)
    write_settings(results, contexts=6, min_tokens=25, readings_texts=2)
    changed = "contexts, min_tokens, readings_texts"
    of_before = f"  made with other settings than the study's now ({changed}): run it again"
    assert [line for line in lines(results) if line not in shown] == [of_before, of_before]
    write_settings(results, contexts=None, min_tokens=20, readings_texts=8, operator={})
    (results / "tables" / "overview_llama.json").unlink()
    assert [line for line in lines(results) if line not in shown] == ["not made yet: llama, operator"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, ""),
        ({"cache": "elsewhere"}, ""),
        ({"targets": [0.2]}, "targets"),
        ({"workloads": [{"name": "glove-split", "lengths": [1024]}], "repeats": 3}, "workloads, repeats"),
    ],
)
def test_a_sweep_of_other_settings_is_said_to_be_one(tmp_path: Path, changes, named):
    config = yaml.safe_load((ROOT / "config.yaml").read_text()) | {"study": "embedded"}
    config["sweeps"][config["studies"]["embedded"]["sweep"]] |= changes
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copytree(ROOT / "results" / "reference" / "embedded" / "tables", tmp_path / "tables")
    found = [line for line in lines(tmp_path) if "other settings" in line]
    assert found == ([f"  made with other settings than the study's now ({named}): run it again"] if named else [])


@pytest.mark.parametrize(
    ("part", "changes", "named"),
    [
        ("complexity", {}, ""),
        ("complexity", {"rows": 8, "sizes": [256, 512, 1024]}, "sizes, rows"),
        ("operator", {}, ""),
        ("operator", {"epsilons": [0.2]}, "epsilons"),
        ("perplexity", {}, ""),
        ("operator", {"path": "other.npy"}, "path"),
        ("perplexity", {"tokens": [512], "plan": {"target": 0.2}}, "tokens, plan"),
        ("perplexity", {"methods": {"mean": [{}]}}, "methods"),
    ],
)
def test_another_part_of_other_settings_is_said_to_be_one(tmp_path: Path, part, changes, named):
    config = yaml.safe_load((ROOT / "config.yaml").read_text()) | {"study": part}
    config["studies"][part][part] |= changes
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copytree(ROOT / "results" / "reference" / part / "tables", tmp_path / "tables")
    found = [line for line in lines(tmp_path) if "other settings" in line]
    assert found == (
        [f"{part}: made with other settings than the study's now ({named}): run it again"] if named else []
    )


@pytest.mark.slow
def test_statistics_of_other_settings_do_not_outlive_a_run_of_one_table(copied: Project):
    """Queries and keys are gone after that run, so they are not newer than what was not asked for."""
    folder = copied.results / "statistics" / "bert"
    before = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    copied.configure(models=["bert"], dtype="bfloat16")
    assert copied.snakemake(HEADS)[0] == 0
    code, output = copied.snakemake()
    assert code == 0, output
    assert [name for name, old in before.items() if (folder / name).read_bytes() == old] == []


@pytest.mark.slow
def test_a_label_or_a_bound_measures_nothing_again(copied: Project):
    config = copied.read()
    config["models"]["bert"] |= {"label": "a BERT", "paper_bound": 3}
    config["corpora"]["words"]["label"] = "some words"
    copied.write(config)
    code, output = copied.snakemake("--dry-run", "--quiet", "host")
    assert code == 0, output
    run = set(re.findall(r"^(?:local)?rule (\w+):", output, re.M))
    assert {"summary", "max_ratios"} <= run
    assert run.isdisjoint({"fetch", "texts", "extract", "statistics", "attention", "readings"}), output


@pytest.mark.slow
def test_what_an_earlier_study_left_is_not_made_again(copied: Project):
    copied.configure(models=["bert"], contexts=3)
    assert copied.snakemake()[0] == 0
    left = leftovers(copied.results)
    assert {path.parent.name for path in left} >= {"bert", "llama"}
    table = copied.results / "tables" / "heads_bert.csv"
    written = table.stat().st_mtime_ns
    code, output = copied.snakemake()
    assert code == 0, output
    assert "is up to date" in output
    assert "regenerated" not in output
    assert table.stat().st_mtime_ns == written
    assert leftovers(copied.results) == left


def test_a_folder_that_is_now_of_long_texts_has_neither_facts_nor_statistics_of_others(finished, tmp_path: Path):
    results = tmp_path / "tiny"
    shutil.copytree(finished[0].results, results)
    write_settings(results, lengths=[10, 20], models=["bert"])
    (results / "statistics" / "bert" / "0000.lengths.parquet").touch()
    left = {path.relative_to(results).as_posix() for path in leftovers(results)}
    assert {f"statistics/bert/0000.{kind}.parquet" for kind in ("heads", "prefixes", "attention", "readings")} <= left
    assert not {"statistics/bert/0000.lengths.parquet", "statistics/bert/0000.contexts.csv"} & left
    remove_half_written(results)
    # Figures of growth prefer them.
    assert [(results / "tables" / f"overview_{model}.json").exists() for model in ("bert", "llama")] == [False, True]


def test_every_table_and_figure_of_a_study_is_known_to_the_search_for_leftovers(finished, tmp_path: Path):
    """Of a study without models and parts all that the workflow wrote is left over: no kind of file is forgotten."""
    results = tmp_path / "tiny"
    shutil.copytree(finished[0].results, results)
    write_settings(results, models=[], complexity={})
    assert results_of(results) == set(leftovers(results))


@pytest.mark.parametrize(
    ("study", "part", "left"),
    [
        ("perplexity", {}, []),
        ("perplexity", {"plan": None}, ["plan.json"]),
        ("complexity", {}, ["perplexity.csv", "plan.json"]),
    ],
)
def test_the_plan_of_an_earlier_study_is_left_over(tmp_path: Path, study: str, part: dict[str, None], left: list[str]):
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    config["studies"]["perplexity"]["perplexity"] |= part
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"study": study}))
    (tmp_path / "tables").mkdir()
    for name in ("perplexity.csv", "plan.json"):
        (tmp_path / "tables" / name).touch()
    assert [path.name for path in leftovers(tmp_path)] == left


def test_links_among_what_is_left_over_are_removed_and_not_what_they_name(tmp_path: Path):
    shutil.copy(ROOT / "config.yaml", tmp_path)
    for name in ("kept", "elsewhere", "figures", "statistics/linked"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "figures" / "growth_other.png").symlink_to("gone.png")
    (tmp_path / "statistics" / "linked" / "0000").symlink_to(tmp_path / "kept")
    # Statistics on another disk
    (tmp_path / "statistics" / "other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "0000.heads.parquet").touch()
    assert len(remove_leftovers(tmp_path)) == 3
    assert [(tmp_path / name).exists() for name in ("kept", "elsewhere", "figures")] == [True, True, False]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_part_that_a_study_no_longer_has_is_neither_shown_nor_on_the_page(tmp_path: Path):
    config = yaml.safe_load((ROOT / "config.yaml").read_text()) | {"study": "embedded"}
    config["studies"]["embedded"] = {"operator": config["studies"]["operator"]["operator"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for study in ("operator", "embedded", "lengths", "complexity", "perplexity"):
        shutil.copytree(ROOT / "results" / "reference" / study, tmp_path, dirs_exist_ok=True)
    make_page(tmp_path / "tables", tmp_path, "a study", tmp_path / "figures")
    page = (tmp_path / "index.html").read_text()
    assert re.findall('id="figure-(.*?)"', page) == ["operator"]
    assert re.findall("<summary>(.*?)</summary>", page) == ["operator"]
    assert [word for word in ("SmolLM2", "Attention methods", "erplexity", "paper's claims") if word in page] == []
    assert [line.split(":")[0] for line in lines(tmp_path)] == ["of an earlier study", "figures"]


KILLED_BEFORE_CLEANING = """
import os, signal, sys
from snakemake.cli import main
from snakemake.dag import DAG

async def handle_temp(self, job):
    if job.rule.name == "statistics":
        os.killpg(0, signal.SIGKILL)

DAG.handle_temp = handle_temp
sys.argv[0] = "snakemake"
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_kill_between_the_statistics_and_their_cleaning_leaves_no_activations_after_the_next_run(project: Project):
    project.configure(models=["bert"], contexts=3)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_BEFORE_CLEANING, "--snakefile", str(ROOT / "Snakefile"), "--cores", "2", HEADS],
        cwd=project.folder,
        env=project.environment(),
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=600,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = list((project.results / "activations").rglob("*.safetensors"))
    assert len(left) == 1
    written = (project.results / "statistics" / "bert" / "0000.heads.parquet").stat().st_mtime_ns
    code, output = project.snakemake(HEADS)
    assert code == 0, output
    assert not list((project.results / "activations").rglob("*.safetensors"))
    assert (project.results / "statistics" / "bert" / "0000.heads.parquet").stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_and_the_lock_dies_with_its_holder(project: Project):
    second: list[tuple[int, str]] = []

    def refused() -> bool:
        if not (project.results / "texts.parquet").exists():
            return False
        second.append(project.snakemake(HEADS))
        return True

    # As installed, and so slow enough to be met
    kill_when(Project(project.folder), refused, HEADS)
    code, output = second[0]
    assert code == 2
    assert "a run of study tiny is under way already, by process " in line_of(output)
    code, output = project.snakemake("results/tiny/models/bert.json", "results/tiny/texts.parquet")
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--dry-run"], ["--report", "report.html"], ["--summary"], ["--list-rules"]])
def test_what_runs_nothing_is_not_held_up_by_a_run_and_changes_nothing(finished, arguments):
    project, _ = finished
    half = project.results / "statistics" / "bert" / f".0000.heads.{2**22 + 1}.parquet"
    half.write_bytes(b"half")
    settings = (project.results / "config.yaml").read_bytes()
    lock = try_lock(project.folder / ".snakemake" / "tiny.lock")
    assert lock is not None
    try:
        code, output = project.snakemake(*arguments)
    finally:
        lock.close()
        assert half.exists()
        half.unlink()
    assert code == 0, output
    assert (project.results / "config.yaml").read_bytes() == settings


def test_a_lock_is_free_when_its_process_has_gone(tmp_path: Path):
    path = tmp_path / "tiny.lock"
    code = f"from pathlib import Path; from approxkmv.lock import hold; hold(Path({str(path)!r}), 'x'); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=environment())
    try:
        while not (path.is_file() and path.read_text()):
            assert holder.poll() is None
            time.sleep(0.02)
        with pytest.raises(BusyError, match=f"a run is under way already, by process {holder.pid} of"):
            hold(path, "a run")
    finally:
        holder.kill()
        holder.wait()
    lock = try_lock(path)
    assert lock is not None
    lock.close()
