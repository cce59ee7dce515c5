"""A damaged, dishonest or oversized archive is refused in one line, and an intact one is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bad_inputs.archives import (
    ARRAYS,
    GOOD,
    INSIDE,
    PACKAGES,
    WHEELS,
    array,
    bad_array,
    bad_package,
    bad_wheel,
    package,
    wheel,
)

from approxkmv.models.fetching import unzip
from approxkmv.models.sources import parse_source
from approxkmv.sweep.word_vectors import read_package, word_vectors


@pytest.mark.parametrize(
    ("bad", "make", "says"),
    [(bad, *case[1:]) for bad, cases in ((bad_wheel, WHEELS), (bad_package, PACKAGES)) for case in cases],
    ids=[case[0] for case in [*WHEELS, *PACKAGES]],
)
def test_a_bad_archive_is_one_line_that_says_so(tmp_path, bad, make, says):
    code, printed = bad(tmp_path, make)
    assert (code, printed.count("\n")) == (2, 1), printed
    assert says in printed
    assert sum(path.stat().st_size for path in (tmp_path / "unpacked").rglob("*") if path.is_file()) < 25 << 20


@pytest.mark.parametrize(("file", "make"), [case[1:] for case in ARRAYS], ids=[case[0] for case in ARRAYS])
def test_a_bad_array_is_one_line(tmp_path, file, make):
    code, printed = bad_array(tmp_path, file, make)
    assert (code, printed.count("\n")) == (2, 1), printed
    assert Path(file).name in printed


def test_whole_ones_are_read(tmp_path):
    (tmp_path / "tiny.whl").write_bytes(wheel())
    unzip(tmp_path / "tiny.whl", parse_source(f"pypi:tiny==1/{INSIDE}"), tmp_path / "unpacked")
    assert {f"{INSIDE}/{path.name}": path.read_bytes() for path in (tmp_path / "unpacked").iterdir()} == GOOD
    (tmp_path / "words.tgz").write_bytes(package())
    vectors = read_package(tmp_path / "words.tgz", "words.json", "npm:words@1")
    assert vectors.tolist() == [[1.0, 2.0], [4.0, 5.0]]
    numbers = np.arange(6, dtype=np.float32)
    (tmp_path / "x.npy").write_bytes(array(data=numbers.tobytes()))
    assert word_vectors(str(tmp_path / "x.npy")).tolist() == numbers.reshape(3, 2).tolist()
