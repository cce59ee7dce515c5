"""Every bad input of the catalogue ends with one line and exit code 2."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from bad_inputs import all_cases, configuration, is_one_line, tables

CASES = all_cases()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.name}")
def test_a_bad_input_is_one_line(case, tmp_path):
    code, printed = case.run(tmp_path)
    assert is_one_line(code, printed), (code, printed)


READERS = {**tables.SHARDS, **tables.READERS}


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_the_tables_that_are_damaged_there_are_read_when_they_are_whole(reader, tmp_path):
    tables.whole(tmp_path)
    code, printed = tables.read(reader, READERS[reader][0], tmp_path)
    assert code == 0, printed


def test_the_configuration_that_is_made_bad_there_is_taken_as_it_is(tmp_path):
    code, printed = configuration.check(tmp_path, configuration.GOOD)
    assert code == 0, printed
    # What is only checked leaves no trace.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "model", "words.txt"]


@pytest.mark.parametrize("name", ["forty thousand anchors", "a hundred thousand entries", "more than a megabyte"])
def test_what_is_no_configuration_is_refused_soon(tmp_path, name):
    start = time.process_time()
    code, printed = configuration.check(tmp_path, configuration.FILES[name])
    assert (code, time.process_time() - start < 2.0) == (2, True), printed


def test_no_two_cases_have_one_name():
    assert not [names for names, count in Counter((c.kind, c.name) for c in CASES).items() if count > 1]
