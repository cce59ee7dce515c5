"""Commands that start in a tenth of a second, forked from a process that has already imported their libraries.

A test study has thirty jobs, each of which spends seconds importing torch, transformers, pandas or matplotlib and an
instant computing. A forked command has its own process, arguments, folder, environment and output. It is not a child of
the process that started it but dies with it, as does all that it started, in a process group of its own.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

LIBRARIES = ["numba", "pandas", "pyarrow.parquet", "safetensors.torch"]
LIBRARIES += ["matplotlib.backends.backend_agg", "matplotlib.backends.backend_pdf"]
# These read the hub's address and cache when they are imported.
OF_THE_HUB = ["transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama", "datasets"]
OF_THE_HUB += ["preloaded"]
COMMANDS = {"approxkmv": "approxkmv.cli", "snakemake": "snakemake.cli"}
_CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"3"], [0, 1, 2])
server.sendall(json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode() + b"\\n")
sys.exit(int(server.makefile().readline() or 1))
"""


@contextmanager
def forking_commands(*modules: str, environment: Mapping[str, str] | None = None) -> Iterator[Path]:
    """A folder for PATH with the commands, these modules preloaded; both are removed when the block ends.

    The environment, by default this process's, is that in which the modules are imported.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, address = Path(name), f"{name}/socket"
        for command in COMMANDS:
            (folder / command).write_text(_CLIENT.format(python=sys.executable, address=address))
            (folder / command).chmod(0o755)
        command = [sys.executable, __file__, address, *modules]
        server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield folder
        finally:
            server.kill()
            server.communicate()


def _serve(address: str, modules: list[str]) -> None:
    for module in (*COMMANDS.values(), *modules):
        importlib.import_module(module)
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    print("ready", flush=True)
    while True:
        # The other end of its input is closed when pytest ends, however it does.
        if sys.stdin in select.select([listening, sys.stdin], [], [])[0]:
            sys.exit()
        asking, _ = listening.accept()
        if keeper := os.fork():
            asking.close()
            # It leaves at once what it has started.
            os.waitpid(keeper, 0)
        elif os.fork():
            os._exit(0)
        else:
            listening.close()
            break
    _, files, *_ = socket.recv_fds(asking, 1, 3)
    sys.argv, folder, environment = json.loads(asking.makefile().readline())
    os.setpgid(0, 0)
    if command := os.fork():
        # Whoever asks says nothing more: if there is something to read it is the end, since it was killed.
        if asking in select.select([asking, os.pidfd_open(command)], [], [])[0]:
            os.killpg(0, signal.SIGKILL)
        _, status = os.waitpid(command, 0)
        asking.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    asking.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # torch reads it when it is imported; Snakemake sets it for each job.
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    code = 1
    try:
        importlib.import_module(COMMANDS[Path(sys.argv[0]).name]).main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # To take all those libraries down again is no less work than to import them.
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2:])
