"""Configurations that are no YAML, ask for what there is not, or hold what no study could be made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bad_inputs import Case, command


def good() -> dict[str, Any]:
    """A configuration with every part, which config check takes."""
    study = {"models": ["m"], "corpus": "c", "min_tokens": 20, "min_prefix": 10, "prefixes": [10, 20], "sweep": "s"}
    parts = {
        "complexity": {},
        "perplexity": {"model": "m", "corpus": "c", "tokens": [64], "methods": {"hyperattention": [{}]}},
    }
    capture = {"model": "m", "corpus": "c", "tokens": 64, "heads": [[0, 1]]}
    workloads = [{"name": "glove-paper", "lengths": [64]}, {"name": "model-qk", "lengths": [64]}]
    return {
        "study": "tiny",
        "models": {"m": {"source": "path:model"}},
        "corpora": {"c": {"source": "path:words.txt"}},
        "sweeps": {"s": {"capture": capture, "workloads": workloads, "methods": ["mean"]}},
        "studies": {"tiny": study | parts},
    }


def prepare(folder: Path) -> None:
    """The files that the good configuration names."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "bert"}')
    (folder / "model" / "model.safetensors").touch()
    (folder / "words.txt").write_text("One.\n\nTwo.\n")


def check(folder: Path, data: bytes) -> tuple[int, str]:
    prepare(folder)
    (folder / "config.yaml").write_bytes(data)
    return command(folder, "config", "check")


def changed(place: str, value: Any, folder: Path) -> tuple[int, str]:
    """The good configuration with another value at a place like studies.tiny.seed."""
    config = good()
    part: Any = config
    *above, last = place.split(".")
    for key in above:
        part = part[int(key)] if isinstance(part, list) else part[key]
    part[int(last) if isinstance(part, list) else last] = value
    return check(folder, yaml.safe_dump(config).encode())


def removed(place: str, folder: Path) -> tuple[int, str]:
    config = good()
    part: Any = config
    *above, last = place.split(".")
    for key in above:
        part = part[key]
    del part[last]
    return check(folder, yaml.safe_dump(config).encode())


GOOD = yaml.safe_dump(good()).encode()
BOMB = b"a0: &a0 [x, x]\n" + b"".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n".encode() for i in range(1, 60))
MERGES = b"a0: &a0 {k: 1}\n" + b"".join(
    f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}, *a{i - 1}], k{i}: 1}}\n".encode() for i in range(1, 28)
)
FILES: dict[str, bytes] = {
    "an empty file": b"",
    "comments alone": b"# nothing\n",
    "a text": b"embedded\n",
    "a list": b"- study\n",
    "a number": b"5\n",
    "two documents": GOOD + b"---\n" + GOOD,
    "a bracket that is not closed": b"study: [tiny\n",
    "a quotation that is not closed": b'study: "tiny\n',
    "a tab before a key": b"models:\n\tm: {source: path:model}\n",
    "an indentation that fits nothing": b"models:\n  m:\n source: x\n",
    "an alias of nothing": b"study: *tiny\n",
    "an object of Python": b"study: !!python/object/apply:os.system ['true']\n",
    "a tag that nobody knows": b"study: !other tiny\n",
    "Latin-1": b"# Os\xe9\n" + GOOD,
    "UTF-16": GOOD.decode().encode("utf-16"),
    "a null byte": b"study: ti\0ny\n",
    "a control character": b"study: ti\x07ny\n",
    "JSON cut short": json.dumps(good()).encode()[:-9],
    "a key twice": GOOD + b"study: tiny\n",
    "a key twice, far inside": GOOD.replace(b"    source: path:model", b"    source: a\n    source: b"),
    "a list as a key": GOOD + b"? [a, b]\n: 1\n",
    "an object as a key": GOOD + b"? {a: b}\n: 1\n",
    "a number as a key": GOOD + b"5: 1\n",
    "nothing as a key": GOOD + b"null: 1\n",
    "yes as a key": GOOD.replace(b"studies:", b"studies:\n  yes: {complexity: {}}"),
    "a date as a key": GOOD.replace(b"studies:", b"studies:\n  2024-01-01: {complexity: {}}"),
    "a day that there is not": GOOD + b"other: 2024-13-45\n",
    "a word as a truth value": GOOD + b"other: !!bool perhaps\n",
    "a word as a time": GOOD + b"other: !!timestamp soon\n",
    "a number of 6,000 digits": GOOD + b"other: " + b"9" * 6000 + b"\n",
    "lists nested 100,000 deep": b"study: " + b"[" * 100_000 + b"]" * 100_000,
    "lists nested 500 deep": b"study: " + b"[" * 500 + b"]" * 500,
    "objects nested 100 deep": b"study: " + b"{a: " * 100 + b"1" + b"}" * 100,
    "a list that holds itself": b"study: &a [*a]\n",
    "an object that holds itself": b"&a study: &b {x: *b}\n",
    "an object that holds itself, far inside": b"study: &a\n  b:\n    c: [1, {d: *a}]\n",
    "aliases of aliases": BOMB,
    "merged aliases of aliases": MERGES,
    "aliases in a parameter": GOOD + BOMB.replace(b"a59", b"parameters"),
    "more than a megabyte": GOOD + b"# " + b"x" * 2**20,
    "a hundred thousand entries": b"study: [" + b"1," * 100_000 + b"1]\n",
    "forty thousand anchors": b"".join(b"a%d: &a%d 1\n" % (number, number) for number in range(40_000)),
    "nine thousand aliases of a long text": b"a: &a " + b"x" * 100_000 + b"\nb: [" + b"*a," * 9_000 + b"]\n",
    "nine thousand aliases": b"a: &a [1, 1]\nb: [" + b"*a," * 9_000 + b"]\n",
    "a program": b"\x7fELF\x02\x01\x01\0\xff\xfe",
    "a whole number of no digits": GOOD + b'other: !!int ""\n',
    "a number of no digits": GOOD + b'other: !!float "_"\n',
    "a character beyond all": GOOD.replace(b"study: tiny", b'study: "\\UFFFFFFFF"'),
    "a number of 300 sixtieths": GOOD + b"other: 1" + b":59" * 300 + b".5\n",
    "a number in sixtieths": GOOD.replace(b"tokens: 64", b"tokens: 1:04"),
    "a number in eighths": GOOD.replace(b"tokens: 64", b"tokens: 0100"),
    "a list as a whole number": GOOD.replace(b"tokens: 64", b"tokens: !!int [6, 4]"),
    "an object as a number": GOOD.replace(b"tokens: 64", b"tokens: !!float {a: 64}"),
    "half of a character": GOOD.replace(b"study: tiny", b'study: "\\ud800"'),
}
HUGE = 2**64
CHANGES: list[tuple[str, str, Any]] = [
    # What is not there, with a name near it
    ("an unknown key", "modles", {}),
    ("an unknown key of a study", "studies.tiny.min_token", 3),
    ("an unknown key of a model", "models.m.sha265", "0" * 64),
    ("an unknown key of a corpus", "corpora.c.hash", "0" * 64),
    ("an unknown key of a sweep", "sweeps.s.target", [0.1]),
    ("an unknown key of a workload", "sweeps.s.workloads.0.length", [64]),
    ("an unknown key of perplexity", "studies.tiny.perplexity.method", {}),
    ("an unknown study", "study", "tinny"),
    ("an unknown model", "studies.tiny.models", ["n"]),
    ("an unknown corpus", "studies.tiny.corpus", "words"),
    ("an unknown sweep", "studies.tiny.sweep", "t"),
    ("an unknown method", "sweeps.s.methods", ["meen"]),
    ("an unknown workload", "sweeps.s.workloads.0.name", "glove"),
    ("an unknown unit", "studies.tiny.unit", "paragraph"),
    ("an unknown type", "studies.tiny.dtype", "float64"),
    ("an unknown device", "studies.tiny.device", "gpu"),
    ("an unknown clock", "sweeps.s.clock", "sun"),
    ("an unknown model of a capture", "sweeps.s.capture.model", "n"),
    ("an unknown corpus of a capture", "sweeps.s.capture.corpus", "n"),
    ("an unknown corpus for tuning", "sweeps.s.capture.tuning_corpus", "n"),
    ("an unknown model of perplexity", "studies.tiny.perplexity.model", "n"),
    ("an unknown corpus of perplexity", "studies.tiny.perplexity.corpus", "n"),
    ("an unknown method of perplexity", "studies.tiny.perplexity.methods", {"unifrom": [{}]}),
    ("an unknown parameter of perplexity", "studies.tiny.perplexity.methods", {"hyperattention": [{"sample": 1}]}),
    ("a method without a causal form", "studies.tiny.perplexity.methods", {"own-key": [{}]}),
    ("an unknown parameter of a sweep", "sweeps.s.parameters", {"uniform": [{"sample": 1}]}),
    ("parameters of an unknown method", "sweeps.s.parameters", {"unifrom": [{}]}),
    # Sources and files
    ("a source of no form", "models.m.source", "model"),
    ("a source of an unknown kind", "models.m.source", "ftp:model"),
    ("an empty source", "models.m.source", "path:"),
    ("a model without a revision", "models.m.source", "hub:somebody/model"),
    ("a model of three names", "models.m.source", "hub:a/b/c@d"),
    ("a package without a version", "models.m.source", "pypi:package/model"),
    ("a path that leaves a package", "models.m.source", "pypi:package==1.0/../model"),
    ("a model that is not there", "models.m.source", "path:none"),
    ("a model that is a folder of something else", "models.m.source", "path:."),
    ("a corpus that is not there", "corpora.c.source", "path:none.txt"),
    ("a corpus that is a folder", "corpora.c.source", "path:model"),
    ("a corpus of no kind", "corpora.c.source", "path:config.yaml"),
    ("a corpus of an unknown source", "corpora.c.source", "pypi:words==1/x.txt"),
    ("a data set without a revision", "corpora.c.source", "hub:somebody/words"),
    ("a hash that a corpus has not", "corpora.c.sha256", "0" * 64),
    ("a wheel's hash for a folder", "models.m.sha256", "0" * 64),
    ("a hash that a model's file has not", "models.m.files", {"config.json": "0" * 64}),
    ("a hash of a file that there is not", "models.m.files", {"weights.safetensors": "0" * 64}),
    ("a model that is a file", "models.m.source", "path:words.txt"),
    ("a model that is a folder without one", "models.m.source", "path:."),
    ("a hash that is too short", "models.m.sha256", "abc"),
    ("a hash of other letters", "models.m.sha256", "g" * 64),
    ("a hash with a line break", "models.m.sha256", "0" * 64 + "\n"),
    ("a hash that is a number", "models.m.sha256", 5),
    ("a hash of a file that is none", "models.m.files", {"model.safetensors": "abc"}),
    ("word vectors that are not there", "sweeps.s.workloads.0.path", "none.npy"),
    ("heads that are not there", "sweeps.s.workloads.1.path", "none.safetensors"),
    # Numbers
    *(
        (f"a seed of {name}", "studies.tiny.seed", value)
        for name, value in {
            "-1": -1,
            "2^64": HUGE,
            "2^32": 2**32,
            "0.5": 0.5,
            "NaN": float("nan"),
            "infinity": float("inf"),
            "yes": True,
            "a text": "0",
            "nothing": None,
            "a list": [0],
            "10^5000": 10**4000,
        }.items()
    ),
    ("seeds of 2^64 in a sweep", "sweeps.s.seeds", [HUGE]),
    ("seeds for tuning of 2^64", "sweeps.s.tuning_seeds", [HUGE]),
    ("a seed of 2^64 in perplexity", "studies.tiny.perplexity.seed", HUGE),
    ("seeds that tune and measure", "sweeps.s.seeds", [1000]),
    ("no seeds", "sweeps.s.seeds", []),
    ("a thousand million threads", "sweeps.s.threads", 10**9),
    ("no thread", "sweeps.s.threads", 0),
    ("a thousand million threads of an operator", "studies.tiny.operator", {"threads": 10**9}),
    ("half a thread", "sweeps.s.threads", 0.5),
    *(
        (f"a bound of the paper that is {name}", "models.m.paper_bound", value)
        for name, value in {
            "0": 0,
            "below 0": -4.6,
            "NaN": float("nan"),
            "infinite": float("inf"),
            "a text": "4.6",
            "2^64": HUGE,
        }.items()
    ),
    *(
        (f"a target that is {name}", "sweeps.s.targets", [value])
        for name, value in {"0": 0, "NaN": float("nan"), "infinite": float("inf"), "a text": "0.1", "20": 20}.items()
    ),
    ("no targets", "sweeps.s.targets", []),
    ("a band that is NaN", "sweeps.s.band", float("nan")),
    ("a band below 0", "sweeps.s.band", -0.1),
    ("an epsilon that is NaN", "studies.tiny.complexity", {"epsilon": float("nan")}),
    ("an epsilon of 0", "studies.tiny.complexity", {"epsilon": 0}),
    ("two sizes", "studies.tiny.complexity", {"sizes": [64, 128]}),
    ("a size twice", "studies.tiny.complexity", {"sizes": [64, 128, 128]}),
    ("a factor that is infinite", "studies.tiny.rotary_scaling", {"factor": float("inf")}),
    ("a factor that is NaN", "studies.tiny.rotary_scaling", {"factor": float("nan")}),
    ("a factor of 1", "studies.tiny.rotary_scaling", {"factor": 1}),
    ("a scaling that perplexity would leave out", "studies.tiny.rotary_scaling", {"factor": 2}),
    ("a scaling without a factor", "studies.tiny.rotary_scaling", {"method": "yarn"}),
    ("no texts", "studies.tiny.contexts", 0),
    ("2^64 texts", "studies.tiny.contexts", HUGE),
    ("a batch of no tokens", "studies.tiny.batch_tokens", 0),
    ("a batch of 10^30 tokens", "studies.tiny.batch_tokens", 10**30),
    ("shards of nothing", "studies.tiny.shard_contexts", 0),
    ("shards of 10^30 texts", "studies.tiny.shard_contexts", 10**30),
    ("tokens that are a text", "studies.tiny.max_tokens", "many"),
    ("a minimum above the maximum", "studies.tiny.min_tokens", 600),
    ("a first prefix above the minimum of tokens", "studies.tiny.min_prefix", 40),
    ("no prefixes", "studies.tiny.prefixes", []),
    ("prefixes below the first", "studies.tiny.prefixes", [5]),
    ("a prefix twice", "studies.tiny.prefixes", [10, 10]),
    ("a prefix of 2^64", "studies.tiny.prefixes", [10, HUGE]),
    ("lengths beyond the texts", "studies.tiny.lengths", [1024]),
    ("a length of 1", "sweeps.s.workloads.0.lengths", [1]),
    ("no lengths", "sweeps.s.workloads.0.lengths", []),
    ("a length of 10^30", "sweeps.s.workloads.0.lengths", [10**30]),
    ("no batch", "sweeps.s.workloads.0.batches", [0]),
    ("two columns", "sweeps.s.workloads.0.columns", ["two"]),
    ("one row of word vectors", "sweeps.s.workloads.0.rows", 1),
    ("more rows than there are word vectors", "sweeps.s.workloads.0.lengths", [10**7]),
    ("word vectors of another kind", "sweeps.s.workloads.0.path", "config.yaml"),
    ("no cache", "cache", ""),
    ("a revision that leads elsewhere", "models.m.source", "hub:a/b@../../x"),
    ("no workloads", "sweeps.s.workloads", []),
    ("a head with one number", "sweeps.s.capture.heads", [[0]]),
    ("a head below 0", "sweeps.s.capture.heads", [[0, -1]]),
    ("no heads", "sweeps.s.capture.heads", []),
    ("a head that is not captured", "sweeps.s.workloads.1.heads", [-1]),
    ("a head beyond the captured ones", "sweeps.s.workloads.1.heads", [0, 1]),
    ("more keys than a capture has tokens", "sweeps.s.workloads.1.lengths", [32, 65]),
    ("more keys in a batch than a capture has tokens", "sweeps.s.workloads.1.batches", [1, 2]),
    ("a capture of no tokens", "sweeps.s.capture.tokens", 0),
    ("no repeats", "sweeps.s.repeats", 0),
    ("warm-ups below 0", "sweeps.s.warmups", -1),
    ("no inputs", "sweeps.s.inputs", 0),
    ("heads of a model that nothing captures", "sweeps.s.capture", None),
    ("perplexity of one token", "studies.tiny.perplexity.tokens", [1]),
    ("perplexity without a method", "studies.tiny.perplexity.methods", {}),
    ("a method without parameter sets", "studies.tiny.perplexity.methods", {"hyperattention": []}),
    ("parameters that are a list", "studies.tiny.perplexity.methods", {"uniform": [[1]]}),
    ("a parameter that is NaN", "sweeps.s.parameters", {"uniform": [{"samples": float("nan")}]}),
    # Names, and parts that are something else
    ("a name with an underscore", "models.my_model", {"source": "path:model"}),
    ("a name with a slash", "models.my/model", {"source": "path:model"}),
    ("a name with a line break behind", "models.m\n", {"source": "path:model"}),
    ("a name with a space", "studies.my study", {"complexity": {}}),
    ("an empty name", "studies.", {"complexity": {}}),
    ("a name of dots", "models", {"..": {"source": "path:model"}}),
    ("a name of 300 letters", "studies." + "x" * 300, {"complexity": {}}),
    ("a label with a line break", "models.m.label", "a\nmodel"),
    ("a label that is a number", "models.m.label", 5),
    ("a label with an escape", "models.m.label", "a \x1b[31mmodel"),
    ("models that are a list", "models", []),
    ("models that are nothing", "models", None),
    ("a model that is a text", "models.m", "path:model"),
    ("a sweep that is a text", "sweeps.s", "w"),
    ("a sweep that is a list", "sweeps.s", [{"workloads": []}]),
    ("a sweep that is nothing", "sweeps.s", None),
    ("a sweep without its name", "sweeps", {"capture": None, "workloads": []}),
    ("a study that is a text", "studies.tiny", "m"),
    ("a study that is nothing", "studies.tiny", None),
    ("a study without anything", "studies.tiny", {}),
    ("models of a study that are a text", "studies.tiny.models", "m"),
    ("a model twice", "studies.tiny.models", ["m", "m"]),
    ("a model without a corpus", "studies.tiny.corpus", None),
    ("a cache that is a list", "cache", ["cache"]),
    ("a cache that is a file", "cache", "words.txt"),
    ("a date for a label", "models.m.label", date(2024, 1, 1)),
    ("bytes for a label", "models.m.label", b"model"),
    ("a set of models", "studies.tiny.models", {"m"}),
]
REMOVED = ["models", "corpora", "studies", "models.m.source", "corpora.c.source", "sweeps.s.workloads"]


def missing(folder: Path) -> tuple[int, str]:
    return command(folder, "config", "check")


def of_a_folder(folder: Path) -> tuple[int, str]:
    (folder / "config.yaml").mkdir()
    return command(folder, "config", "check")


def unwritable(folder: Path) -> tuple[int, str]:
    (folder / "results").write_text("a file")
    return check(folder, GOOD)


def endless(folder: Path) -> tuple[int, str]:
    return command(folder, "config", "check", "--config", "/dev/zero")


def other_study(folder: Path) -> tuple[int, str]:
    prepare(folder)
    (folder / "config.yaml").write_bytes(GOOD)
    return command(folder, "config", "check", "--study", "tinny")


def settings(data: bytes, folder: Path) -> tuple[int, str]:
    """A sweep of a file of its own."""
    (folder / "sweep.json").write_bytes(data)
    return command(folder, "sweep", "--settings", "sweep.json", "--out", "out.csv")


SETTINGS: dict[str, bytes] = {
    "nothing": b"",
    "not JSON": b"workloads: []",
    "a list": b"[]",
    "Latin-1": b'{"device": "\xe9"}',
    "lists nested 100,000 deep": b"[" * 100_000,
    "a number of 6,000 digits": b'{"repeats": ' + b"9" * 6000 + b"}",
    "no workloads": b"{}",
    "workloads that are a text": b'{"workloads": "glove-paper"}',
    "a workload without lengths": b'{"workloads": [{"name": "glove-paper"}]}',
    "a threshold that is NaN": b'{"workloads": [{"name": "glove-paper", "lengths": [64]}], "targets": [NaN]}',
    "a device that there is not": b'{"workloads": [{"name": "glove-paper", "lengths": [64]}], "device": "tpu"}',
    "a seed of 2^64": b'{"workloads": [{"name": "glove-paper", "lengths": [64]}], "seeds": [18446744073709551616]}',
}


def case(name: str, function: Callable[..., tuple[int, str]], *arguments: Any) -> Case:
    return Case("configuration", name, partial(function, *arguments))


CASES = [
    *(case(name, lambda folder, data=data: check(folder, data)) for name, data in FILES.items()),
    *(case(name, changed, place, value) for name, place, value in CHANGES),
    *(case(f"{place} left out", removed, place) for place in REMOVED),
    case("no file", missing),
    case("a folder called config.yaml", of_a_folder),
    case("results that are a file", unwritable),
    case("a file without an end", endless),
    case("a study that is asked for and not there", other_study),
    *(case(f"a sweep's settings: {name}", settings, data) for name, data in SETTINGS.items()),
]
