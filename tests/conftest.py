"""What `pytest -m quick` runs, and how pytest's processes share the processors."""

from __future__ import annotations

import os
import random

import pytest

# Before torch is imported here or in what a test starts: threads beyond the processors only wait for each other.
if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(processes))))


# Cases of a parametrised test that are quick.
FEW = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test that is not marked slow is quick, or a few of its cases, always the same ones."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, found in cases.items():
        for item in random.Random(name).sample(found, min(FEW, len(found))):
            item.add_marker(pytest.mark.quick)
