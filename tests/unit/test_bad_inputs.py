"""Every bad input of the catalogue is one line and exit code 2."""

from __future__ import annotations

from collections import Counter

import pytest
from bad_inputs import all_cases, is_one_line

CASES = all_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.name}")
def test_a_bad_input_is_one_line(case, tmp_path):
    code, printed = case.run(tmp_path)
    assert is_one_line(code, printed), (code, printed)


def test_no_two_cases_have_one_name():
    assert not [names for names, count in Counter((c.kind, c.name) for c in CASES).items() if count > 1]
