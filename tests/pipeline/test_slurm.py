"""The small study of two models through a real Slurm, with one job killed: its output equals the local run's bytes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from slurm_support import NoSlurm, small_slurm
from small_project import ROOT, Project
from test_study import fingerprints


@pytest.fixture
def slurm() -> Iterator[dict[str, str]]:
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.skip("not installed: snakemake-executor-plugin-slurm")
    try:
        with small_slurm() as environment:
            yield environment
    except NoSlurm as reason:
        pytest.skip(f"Slurm cannot start here: {reason}")


@pytest.mark.slow
def test_slurm_gives_the_bytes_of_the_local_run_though_one_job_is_killed(slurm, finished, project: Project):
    first = str(sys.executable).rpartition("/")[0]
    environment = slurm | {"PATH": f"{first}:{slurm['PATH']}", "HF_HUB_OFFLINE": "1"}
    # As a person starts it, but for what suits one small node. No target: the default one, with tables and figures.
    arguments = ["--profile", str(ROOT / "profiles" / "slurm"), "--workflow-profile", "none"]
    arguments += ["--cores", "2", "--latency-wait", "10", "--default-resources", "mem_mb=400", "runtime=10"]
    arguments += ["--slurm-init-seconds-before-status-checks", "2", "--seconds-between-status-checks", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), *arguments],
        cwd=project.folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    killed, seen = "", set()
    deadline = time.monotonic() + 900
    while process.poll() is None:
        assert time.monotonic() < deadline
        listed = subprocess.run(["squeue", "-h", "-o", "%i %t"], env=slurm, capture_output=True, text=True).stdout
        running = [line.split()[0] for line in listed.splitlines() if line.endswith(" R")]
        seen |= set(running)
        # The second job, so that something is done and something is lost.
        if not killed and len(seen) >= 2 and running:
            killed = running[-1]
            subprocess.run(["scancel", "--signal=KILL", "--full", killed], env=slurm, check=True)
        time.sleep(0.3)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert killed
    cluster = fingerprints(project.results)
    assert cluster == fingerprints(finished[0].results)
    assert sum(name.endswith(".heads.parquet") for name in cluster) == 6
    assert "results/tiny/figures" in output
    # The texts and two models, two a shard; then tables and figures, so short that some are never seen running.
    assert len(seen) >= 15
