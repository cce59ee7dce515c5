"""What a YAML file may hold, where its bounds lie, and the line that a mistake is said to be on."""

from __future__ import annotations

import re

import pytest

from approxkmv.errors import ConfigError
from approxkmv.yaml_text import read_yaml, refuse_what_is_not_plain

# Written out, so that another bound is noticed.
LARGEST_FILE, MOST_ENTRIES = 262_144, 10_000


def read(folder, text: str | bytes):
    (folder / "a.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(folder / "a.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("\ufeffa: 1", {"a": 1}),
        ("[0, -1, 1_000, 0.5, -0.5, 00.5, '017', '1:30']", [0, -1, 1000, 0.5, -0.5, 0.5, "017", "1:30"]),
        ("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}", {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}),
        ("[" * 30 + "]" * 30, None),
        ("# " + "x" * (LARGEST_FILE - 2), None),
        ("[" + "1," * (MOST_ENTRIES - 1) + "]", None),
    ],
)
def test_what_is_read(tmp_path, text, value):
    found = read(tmp_path, text)
    assert value is None or found == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(
            (f"\n\na: {number}", f"read {number} as a decimal number, at line 3")
            for number in ("017", "+017", "0_7", "00", "1:30", "-1:30", "1_0:30.5")
        ),
        ("a: 1\n\nb: [", "is not YAML at line 3"),
        ("a: 1\nb: 2\na: 3", "has the key 'a' twice, again at line 3"),
        ("\n? [a]\n: 1", "a key that is not a word, at line 2"),
        ("\na: &a [*a]", "the value that starts at line 2 contains itself"),
        ("\n" + "[" * 40 + "]" * 40, "nested too deeply for a configuration, at line 2"),
        ("# " + "x" * (LARGEST_FILE - 1), "more than 262,144 bytes"),
        ("[" + "1," * MOST_ENTRIES + "]", "more than 10,000 entries once its aliases are expanded"),
        ("- " + "x" * 16 * MOST_ENTRIES, "more than 10,000 entries once its aliases are expanded"),
        ("[" + "1," * (2 * MOST_ENTRIES) + "]", "more than 10,000 entries: it"),
        (b"a: \xff", "is not UTF-8 text"),
    ],
)
def test_what_is_refused_and_where(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(tmp_path, text)


def test_numbers_up_to_32_bits_and_printable_texts_are_plain():
    refuse_what_is_not_plain({"a": [2**32 - 1, 1 - 2**32, 0.0, True, None, "naïve – \U0001f600"]})
    for value in (2**32, -(2**32), float("nan"), float("-inf"), 1e300):
        with pytest.raises(ConfigError, match=r"config.a.0 is .*: numbers are finite and at most 4,294,967,295"):
            refuse_what_is_not_plain({"a": [value]})
    for mark in "\n\t\x7f\u2028\u2029\ud800":
        with pytest.raises(ConfigError, match=r"config.a has .* in it, which is not a printable character"):
            refuse_what_is_not_plain({"a": f"x{mark}y"})
        with pytest.raises(ConfigError, match=r"config: a key has .* in it"):
            refuse_what_is_not_plain({f"x{mark}": 1})
    for value, message in (({5: 1}, "has the key 5, which is not text"), ((1, 2), "is a tuple: write a number")):
        with pytest.raises(ConfigError, match=message):
            refuse_what_is_not_plain(value)
