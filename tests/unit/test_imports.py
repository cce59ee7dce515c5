"""A rule's list of package files is what its command imports, as compared with sys.modules after the import."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from approxkmv.imports import ROOT, _imported, command_files, files_behind

RULES = Path(__file__).resolve().parents[2] / "workflow" / "rules"
# The module in which a command's work is done: of every rule that names its files. A figure's is known only later.
NAMED = [name for path in sorted(RULES.glob("*.smk")) for name in re.findall(r'package\("(\w+)"', path.read_text())]
STEPS = {name: f"approxkmv.steps.{name}" for name in NAMED if name != "figure"}
STEPS |= {"sweep": "approxkmv.sweep.run", "plan": "approxkmv.perplexity.planning"}
# One process a step would import torch each time; children of one that has it import the package alone.
CODE = """
import importlib, json, os, sys
import matplotlib, numba, numpy, pandas, torch, transformers
from transformers import AttentionInterface, AutoModel
import approxkmv.config
apart = {name for name in sys.modules if name.startswith("approxkmv.")}
for step in sys.argv[1:]:
    if os.fork() == 0:
        for name in apart:
            del sys.modules[name]
        sys.modules["approxkmv.config"] = type(sys)("approxkmv.config")
        sys.modules["approxkmv.config"].__getattr__ = lambda name: object
        importlib.import_module(step)
        del sys.modules["approxkmv.config"]
        files = [module.__file__ for name, module in sys.modules.items() if name.startswith("approxkmv")]
        print(json.dumps([step, files]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[Path]]:
    """The package's files behind sys.modules after the import of each step; of the configuration's only its name."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *STEPS.values()], capture_output=True, text=True, check=True, timeout=300
    )
    return {step: {Path(file).resolve() for file in files} for step, files in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("command", STEPS)
def test_every_module_that_a_step_loads_is_in_its_list(loaded, command):
    files = loaded[STEPS[command]]
    assert ROOT / "errors.py" in files
    assert files <= set(command_files(command))


def test_every_rule_has_its_step():
    assert {"fetch", "extract", "attention", "attention_table", "summary", "page", "operator"} <= set(STEPS)


def test_what_is_imported_in_a_function_or_through_a_package_is_in_the_list():
    # extract asks `approxkmv.models` for CapturableModel, which the package gets from capture.py on demand.
    assert ROOT / "models" / "capture.py" in command_files("extract")
    assert ROOT / "models" / "openai_gpt.py" in command_files("extract")
    assert ROOT / "provenance.py" in command_files("summary")
    assert ROOT / "results" / "shards.py" in command_files("summary")


def test_a_module_named_in_a_string_is_in_the_list():
    assert ROOT / "statistics" / "row_loops.py" in command_files("attention")
    trials = ROOT / "attention" / "blocks" / "trials.py"
    assert ROOT / "attention" / "blocks" / "loops" / "expansion.py" in files_behind(trials)
    assert ROOT / "attention" / "searched" / "loops.py" in files_behind(ROOT / "attention" / "searched" / "trials.py")


@pytest.mark.parametrize(
    "code",
    [
        "if x:\n    pass\nelse:\n    {}",
        "if x:\n    pass\nelif y:\n    {}",
        "if TYPE_CHECKING:\n    pass\nelse:\n    {}",
        "try:\n    pass\nexcept OSError:\n    {}",
        "try:\n    pass\nfinally:\n    {}",
        "for x in y:\n    pass\nelse:\n    {}",
        "with x:\n    {}",
        "match x:\n    case 1:\n        {}",
        "class A:\n    def f(self):\n        {}",
    ],
)
def test_imports_are_found_in_every_branch(code):
    for words in ("import approxkmv.words", "from approxkmv import words", "from approxkmv.words import counted"):
        assert ROOT / "words.py" in _imported(ast.parse(code.format(words)))
    assert not list(_imported(ast.parse("if TYPE_CHECKING:\n    import approxkmv.words")))


def test_a_list_is_in_the_order_of_names_and_holds_the_packages_between():
    files = files_behind(ROOT / "steps" / "extract.py")
    assert files == sorted(files)
    # What asks a package for a name runs the package too.
    on_demand = list(_imported(ast.parse("from approxkmv.models import CapturableModel")))
    assert {ROOT / "__init__.py", ROOT / "models" / "__init__.py", ROOT / "models" / "capture.py"} <= set(on_demand)


def test_not_everything_depends_on_everything():
    names = {command: {str(p.relative_to(ROOT)) for p in command_files(command)} for command in STEPS}
    assert not [
        name for name in names["statistics"] if name.startswith(("models/", "corpora/", "attention/", "sweep/"))
    ]
    assert not [name for name in names["extract"] if name.startswith(("statistics/heads", "attention/", "figures/"))]
    drawn = {str(p.relative_to(ROOT)) for p in command_files("figure", "figures/max_ratios.py")}
    assert {"figures/max_ratios.py", "figures/heatmap.py", "figures/style.py"} <= drawn
    assert not [name for name in drawn if name.startswith(("models/", "statistics/heads", "figures/growth"))]
    assert not [name for found in names.values() for name in found if name.startswith(("config/", "cli/"))]


def test_a_methods_module_is_in_the_sweeps_list():
    assert ROOT / "attention" / "blocks" / "local_expansion.py" in command_files("sweep", "attention")
    assert ROOT / "search" / "vamana.py" in command_files("sweep", "attention")


def test_every_rule_names_its_own_command():
    for path in RULES.glob("*.smk"):
        for rule in re.split(r"^ *(?:rule|checkpoint)\b", path.read_text(), flags=re.M)[1:]:
            if command := re.search(r"approxkmv ([\w-]+)", rule):
                assert re.findall(r'package\(\s*"(\w+)"', rule) == [command[1].replace("-", "_")], rule


@pytest.mark.slow
def test_the_lists_of_all_rules_cost_little_more_than_reading_each_file_once():
    # Beside the time to parse the package, since a bound in seconds would be one on the machine
    code = (
        "import ast, sys, time; from approxkmv.imports import ROOT, command_files; times = [time.process_time()];"
        "[ast.parse(path.read_bytes()) for path in ROOT.rglob('*.py')]; times.append(time.process_time());"
        "[command_files(command, 'attention') for command in sys.argv[1:]]; times.append(time.process_time());"
        "print((times[2] - times[1]) / (times[1] - times[0]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *STEPS], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 3
