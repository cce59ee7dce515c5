"""docs/add-a-method.md, followed to the letter on a copy of the package: one file and one line add a method.

The sweep then runs it and the figures draw it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

USE = """
import approxkmv, torch
from approxkmv.attention import get, methods
from approxkmv.compute.counting import counting
assert approxkmv.__file__.startswith({folder!r}), approxkmv.__file__
assert "my-method" in methods()
q, k, v = torch.randn(2, 9, 4), torch.randn(2, 12, 4), torch.randn(2, 12, 3)
exact = get("exact-fused")(q, k, v, scale=0.5)
with counting() as counts:
    out = get("my-method")(q, k, v, scale=0.5, step=1)
assert counts.kernel_evaluations == 2 * 9 * 12
assert torch.allclose(out, exact, atol=1e-5)
"""

SWEEP = """
from pathlib import Path

import approxkmv, numpy as np
from approxkmv.figures import crossover, error_vs_time, speedup, style, sweep_table
from approxkmv.sweep import SweepSettings, run_sweep

assert approxkmv.__file__.startswith({folder!r}), approxkmv.__file__
np.save("vectors.npy", np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32))
run_sweep(
    SweepSettings.from_mapping(
        {{
            "workloads": [{{"name": "glove-split", "lengths": [60, 120], "path": "vectors.npy"}}],
            "methods": ["exact-fused", "mean", "my-method"],
            "targets": [0.5],
            "repeats": 2,
            "warmups": 0,
            "threads": 1,
        }}
    ),
    Path("sweep.csv"),
    {{}},
    say=print,
)
drawn = []
style.save = crossover.save = lambda figure, stem: drawn.append(figure) or []
for module in (speedup, error_vs_time, crossover):
    module.draw(Path("sweep.csv"), Path(module.__name__))
# Speed-ups name what reaches the target at the ends of the lines, the others name every method in a legend.
assert "my-method" in [text.get_text() for text in drawn[0].axes[0].texts]
assert {{"mean", "my-method"}} <= {{text.get_text() for text in drawn[1].legends[0].get_texts()}}
found = sweep_table.looks(sweep_table.read_sweep(Path("sweep.csv")))
assert list(found) == ["mean", "exact-fused", "my-method"], found
assert len({{(look['color'], look['marker']) for look in found.values()}}) == 3, found
# In the crossovers methods are the names of the rows.
assert "my-method" in [label.get_text() for label in drawn[2].axes[0].get_yticklabels()]
"""


@pytest.mark.slow
def test_one_file_and_one_line_add_a_method(tmp_path):
    text = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
    module, line = (textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```$", text, re.S | re.M))
    shutil.copytree(ROOT / "src" / "approxkmv", tmp_path / "approxkmv", ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "approxkmv" / "attention"
    (package / "trivial" / "my_method.py").write_text(module, encoding="utf-8")
    registry = (package / "__init__.py").read_text(encoding="utf-8")
    start = "_MODULES = {\n"
    assert start in registry
    (package / "__init__.py").write_text(registry.replace(start, f"{start}    {line}"), encoding="utf-8")

    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> None:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run("-c", USE.format(folder=str(tmp_path)))
    run("-c", SWEEP.format(folder=str(tmp_path)))
    tests = [str(ROOT / "tests" / "unit" / f"test_attention_{part}.py") for part in ("contract", "counting")]
    # Its own tests alone; none would be an error of pytest's (5), so that this cannot pass on nothing.
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "my-method", f"--rootdir={tmp_path}", *tests)
