"""A small study that the pipeline runs in seconds: random models, a few texts and a folder to run it in."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

# Before transformers is imported anywhere: nothing here asks a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

from approxkmv import cli, progress

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"w{i}" for i in range(60)]


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


def save_model(folder: Path, family: str, seed: int = 0) -> None:
    """A random model of two layers and four heads; weights large enough that heads differ."""
    import transformers

    torch.manual_seed(seed)
    shared = {"vocab_size": len(WORDS) + 2, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shared |= {"intermediate_size": 32, "max_position_embeddings": 128, "initializer_range": 0.3}
    if family == "bert":
        model = transformers.BertModel(transformers.BertConfig(**shared))
    else:
        model = transformers.LlamaModel(transformers.LlamaConfig(**shared, num_key_value_heads=2))
    model.save_pretrained(folder)
    save_tokenizer(folder)


def save_texts(path: Path) -> None:
    """Eight texts; text 2 is shorter than the minimum of the study, text 5 longer than the maximum."""
    draw = random.Random(1)
    lengths = [30, 45, 12, 60, 22, 75, 51, 38]
    lines = [
        json.dumps({"title": f"text {i}", "context": " ".join(draw.choices(WORDS, k=length)), "questions": ["w1 w2"]})
        for i, length in enumerate(lengths)
    ]
    path.write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Project:
    """A folder to run in, with a configuration, and where to find the commands if not beside this Python."""

    folder: Path
    commands: Path | None = None

    @property
    def results(self) -> Path:
        return self.folder / "results" / "tiny"

    def configure(self, **changes: Any) -> None:
        """Write config.yaml; changes replace keys of the study."""
        study = {"models": ["bert", "llama"], "corpus": "words", "min_tokens": 20, "min_prefix": 10}
        study |= {"max_tokens": 60, "prefixes": [10, 20, 40, 60], "shard_contexts": 3, "batch_tokens": 200}
        config = {
            "study": "tiny",
            "models": {
                "bert": {"source": "path:bert"},
                "llama": {"source": "path:llama", "label": "a Llama"},
            },
            "corpora": {"words": {"source": "path:words.jsonl"}},
            "studies": {"tiny": study | changes},
        }
        self.write(config)

    def read(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "config.yaml").read_text())

    def write(self, config: Mapping[str, Any]) -> None:
        (self.folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))

    def environment(self) -> dict[str, str]:
        """That of its processes, with the commands of this project first."""
        found = environment()
        return found | {"PATH": f"{self.commands}{os.pathsep}{found['PATH']}"} if self.commands else found

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start Snakemake on this project in a process group of its own."""
        command = [str(self.commands / "snakemake")] if self.commands else [sys.executable, "-m", "snakemake"]
        return subprocess.Popen(
            [*command, *arguments, "--snakefile", str(ROOT / "Snakefile")],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def snakemake(self, *arguments: str) -> tuple[int, str]:
        """Run Snakemake on this project; its exit code and what it printed."""
        process = self.start("--cores", "2", *arguments)
        output, _ = process.communicate(timeout=600)
        return process.returncode, output

    def approxkmv(self, *arguments: str) -> tuple[int, str]:
        """Run the command line in this project, in this process (imports of torch and transformers cost seconds).

        Returns its exit code and what it printed.
        """
        printed = io.StringIO()
        progress.LOG.handlers.clear()  # of a test before, they would print elsewhere
        before = os.getcwd(), sys.argv
        os.chdir(self.folder)
        sys.argv = ["approxkmv", *arguments]
        try:
            with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
                cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os.chdir(before[0])
            sys.argv = before[1]
            progress.LOG.handlers.clear()
        return code, printed.getvalue()

    def approxkmv_process(self, *arguments: str) -> tuple[int, str]:
        """The same as a process of its own, as a person runs it."""
        done = subprocess.run(
            ["approxkmv", *arguments], cwd=self.folder, env=environment(), capture_output=True, text=True, timeout=300
        )
        return done.returncode, done.stderr + done.stdout


def kill_when(project: Project, point: Callable[[], object], *targets: str) -> None:
    """Start Snakemake and kill it with all that it started, kill -9, as soon as the point is reached."""
    process = project.start("--cores", "2", *targets)
    deadline = time.monotonic() + 300
    while not point():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    # It ends when nothing is left that could print.
    process.communicate()


def environment() -> dict[str, str]:
    """This process's environment, with the commands of its Python first and no hub."""
    first = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": f"{first}{os.pathsep}{os.environ['PATH']}"}
