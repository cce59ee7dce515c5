"""What `pytest -m quick` runs: every test that is not marked slow."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.quick)
