"""A small local hub: three models and a SQuAD in the hub's layout, and faults on demand."""

from __future__ import annotations

import http.server
import io
import json
import random
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pandas as pd
import torch

WORDS = ["river", "winter", "album", "church", "energy", "planet", "school", "market", "king", "number", "The", "of"]


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def model_repository(family: str) -> dict[str, bytes]:
    """Files of a random model of two layers and four heads, under the names that the real repository has."""
    import tokenizers
    import transformers
    from transformers import OpenAIGPTConfig, RobertaConfig

    torch.manual_seed(0)
    draw = random.Random(0)
    corpus = [sentence(draw, 20) for _ in range(20)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if family == "bert":
            special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
            vocabulary = [*special, *[word.lower() for word in WORDS]]
            (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
            (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
        elif family == "roberta":
            trained = tokenizers.ByteLevelBPETokenizer()
            special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
            trained.train_from_iterator(corpus, vocab_size=300, special_tokens=special)
            trained.save_model(name)
        else:
            plain = tokenizers.CharBPETokenizer(lowercase=True, unk_token="<unk>")
            plain.train_from_iterator(corpus, vocab_size=100, special_tokens=["<unk>"])
            plain.save_model(name)
        shared = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
        if family == "bert":
            model = transformers.BertModel(
                transformers.BertConfig(**shared, vocab_size=len(vocabulary), initializer_range=0.3)
            )
        elif family == "roberta":
            config = RobertaConfig(**shared, vocab_size=300, max_position_embeddings=514, initializer_range=0.3)
            model = transformers.RobertaModel(config)
        else:
            gpt = OpenAIGPTConfig(
                vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3
            )
            model = transformers.OpenAIGPTModel(gpt)
        model.save_pretrained(folder)
        # What the real repositories hold besides, and nobody should download.
        extra = {"README.md": b"---\nlicense: mit\n---\n", "pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx"}
        return files_of(folder) | extra


def squad_repository(contexts: int) -> dict[str, bytes]:
    """SQuAD's two Parquet files and its README; the last context is too short for the study."""
    draw = random.Random(1)
    rows = []
    for i in range(contexts):
        context = sentence(draw, 12 if i == contexts - 1 else 60 + 7 * i)
        rows += [
            {
                "id": f"{i}-{j}",
                "title": f"Article {i}",
                "context": context,
                "question": f"Which river {j}?",
                "answers": {"text": ["river"], "answer_start": [0]},
            }
            for j in range(2)
        ]

    def parquet(part: list[dict]) -> bytes:
        buffer = io.BytesIO()
        pd.DataFrame(part).to_parquet(buffer, index=False)
        return buffer.getvalue()

    cut = 2 * (contexts // 2)
    card = (
        "---\ndataset_info:\n  config_name: plain_text\nconfigs:\n- config_name: plain_text\n  data_files:\n"
        "  - split: train\n    path: plain_text/train-*\n"
        "  - split: validation\n    path: plain_text/validation-*\n---\n"
    )
    return {
        "README.md": card.encode(),
        "plain_text/train-00000-of-00001.parquet": parquet(rows[:cut]),
        "plain_text/validation-00000-of-00001.parquet": parquet(rows[cut:]),
    }


class SmallHub:
    """Repositories by "models/OWNER/NAME" or "datasets/OWNER/NAME"; a fault is one of the words below, or None."""

    FAULTS = ("error 500", "cut connection", "wrong size")

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        self.repositories = repositories
        self.fault: str | None = None
        self.sent: list[str] = []


def handler(hub: SmallHub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
                if length is not None and length != len(body):
                    self.wfile.flush()
                    self.close_connection = True

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            self.do_GET(self.rfile.read(size))

        def do_GET(self, sent: bytes = b"") -> None:
            path = self.path.split("?")[0]
            api = re.fullmatch(
                r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(.*))?", path
            )
            file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if api and api[1] in hub.repositories:
                self.about(api[1], api[2], api[3] or "main", api[4] or "", sent)
            elif file and (name := f"{'datasets' if file[1] else 'models'}/{file[2]}") in hub.repositories:
                self.file(name, file[3], file[4])
            else:
                self.answer(404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def about(self, name: str, what: str | None, revision: str, under: str, sent: bytes) -> None:
            if hub.fault == "error 500":
                self.answer(500, b"broken")
                return
            files = hub.repositories[name]
            entries = [
                {"type": "file", "path": p, "size": len(body), "oid": sha256(body).hexdigest()[:40]}
                for p, body in files.items()
            ]
            folders = sorted({p.rpartition("/")[0] for p in files if "/" in p})
            entries += [{"type": "directory", "path": p, "oid": "0" * 40} for p in folders]
            if what == "tree":
                under = under.strip("/").replace("%2F", "/")
                answer: object = [e for e in entries if not under or str(e["path"]).startswith(f"{under}/")]
                if under and not answer:
                    self.answer(404, X_Error_Code="EntryNotFound")
                    return
            elif what == "paths-info":
                asked = json.loads(sent)["paths"] if sent.startswith(b"{") else _form(sent)
                answer = [e for e in entries if e["path"] in asked]
            else:
                siblings = [{"rfilename": p} for p in files]
                answer = {"id": name.partition("/")[2], "sha": revision, "siblings": siblings, "private": False}
                answer |= {"gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
            self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")

        def file(self, name: str, revision: str, path: str) -> None:
            body = hub.repositories[name].get(path)
            if body is None:
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=revision)
                return
            headers = {"ETag": f'"{sha256(body).hexdigest()}"', "X_Repo_Commit": revision, "Accept_Ranges": "bytes"}
            large = path.endswith((".safetensors", ".parquet"))
            if self.command == "HEAD" or not large or hub.fault is None:
                if self.command != "HEAD":
                    hub.sent.append(f"{name}/{path}")
                self.answer(200, body, **headers)
            elif hub.fault == "error 500":
                self.answer(500, b"broken")
            elif hub.fault == "cut connection":
                self.answer(200, body[: len(body) // 2], len(body), **headers)
            else:
                self.answer(200, body[: len(body) // 2], **headers)

    return Handler


def _form(sent: bytes) -> list[str]:
    from urllib.parse import parse_qs

    return parse_qs(sent.decode()).get("paths", [])


@contextmanager
def served(hub: SmallHub) -> Iterator[str]:
    """The address at which the hub answers within the block."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
