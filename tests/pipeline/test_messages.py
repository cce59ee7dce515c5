"""What a run says on a terminal: how far it is, how it ended, and what to open."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from small_project import ROOT, Project


class Terminal:
    """Snakemake on a terminal of its own."""

    def __init__(self, project: Project) -> None:
        reader, writer = pty.openpty()
        commands = project.commands
        start = [sys.executable, "-m", "snakemake"] if commands is None else [str(commands / "snakemake")]
        output = {"stdin": subprocess.DEVNULL, "stdout": writer, "stderr": writer}
        command = [*start, "--cores", "1", "--snakefile", str(ROOT / "Snakefile")]
        command += ["--profile", str(ROOT / "profiles" / "default")]
        # Whoever starts the tests in the background has them ignore interrupts, and programs inherit that.
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        self.process = subprocess.Popen(
            command, cwd=project.folder, env=project.environment(), start_new_session=True, preexec_fn=heard, **output
        )
        os.close(writer)
        self.reader, self.said = reader, ""

    def read(self, until: str = "") -> str:
        """Everything said so far, read until there is `until` or, without, until the end."""
        end = time.monotonic() + 300
        while time.monotonic() < end and not (until and until in self.said):
            try:
                part = os.read(self.reader, 65536)
            except OSError:
                break
            if not part:
                break
            self.said += part.decode(errors="replace").replace("\r\n", "\n")
        return self.said


@pytest.mark.slow
def test_a_run_says_how_far_it_is_and_when_it_is_stopped_and_that_it_is_up_to_date(project: Project):
    project.configure(models=["bert"], takes="about a minute")
    # As installed, since it is interrupted
    first = Terminal(Project(project.folder))
    first.read(until="step 2 of ")
    os.killpg(first.process.pid, signal.SIGINT)
    said = first.read()
    assert first.process.wait() == 130, said
    assert "study tiny takes about a minute" in said
    assert said.rstrip().endswith("stopped; run again to continue"), said
    assert "Traceback" not in said
    second = Terminal(project)
    said = second.read()
    assert second.process.wait() == 0, said
    # The first steps are done, and what the models need is fetched before the rest.
    lines = [line for line in said.splitlines() if line.strip()]
    last = lines[-1]
    assert "page: results/tiny/index.html" in last
    assert any(line.startswith("  c is at most 4.6") for line in lines)
    third = Terminal(project)
    again = third.read()
    assert third.process.wait() == 0, again
    assert "study tiny is up to date" in again
    assert [line for line in again.splitlines() if line.strip()][-1] == last
    assert "step " not in again
