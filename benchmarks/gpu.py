"""Check and time everything that runs on a GPU, in stages that a limited time can be cut into.

    PYTHONPATH=src python benchmarks/gpu.py --out results/gpu [--stages 0-7] [--minutes 8] [--commit SHA] [--interpret]

Needs torch, NumPy and Triton. Each stage is a process with a limit of its own. A row is appended to OUT/rows.jsonl, and
on the disk, as soon as it is known; what has a row there is not done again, so the same command goes on where an
earlier one ended; rows that other code made are refused. A stage that the minutes end goes on in the next command.
What breaks, ends its process or is cut off twice has a row with the reason, is not tried again, and stops nothing else.
Exit code 0: all stages are finished; 3: some wait for the next command; 1: one failed, or a check does not hold.
--interpret runs each stage on small inputs on a CPU, which shows that they run and nothing about their speed.

0 the machine and its ceilings; 1 kernels against float64; 2 graphs; 3 exact attention; 4 the paper's Figure 5; 5 our
methods at n = 131,072; 6 sharper inputs; 7 statistics of one long head. First those that say how fast our methods are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
# Seconds after which a stage is stopped: 21 minutes together.
LIMITS = {0: 60, 1: 240, 2: 90, 3: 120, 4: 210, 5: 230, 6: 240, 7: 90}
# The order in which they run: a GPU that is lent for some minutes may not be lent again.
ORDER = (0, 4, 5, 7, 3, 1, 2, 6)
# With fewer seconds left a stage would only start.
LEAST = 30
# Longest lengths, and those of the sweeps.
FULL = {"long": 131_072, "width": 64, "figure": (4096, 8192, 16384), "split": (8192,), "batch": 8, "ceiling": 8192}
FULL |= {"repeats": 5}
SMALL = {"long": 192, "width": 16, "figure": (96,), "split": (64,), "batch": 2, "ceiling": 32, "repeats": 1}
EXACT = ("exact-naive", "exact-sdpa", "exact-sdpa-bf16", "exact-fused")
SWEPT = (*EXACT, "mean", "uniform", "own-key", "kdeformer", "hyperattention", "local-expansion", "approxkmv")


def digest() -> str:
    """What identifies the code that is measured, also where git does not say its commit."""
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests" / "gpu").glob("*.py"), Path(__file__).resolve()]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:12]


CODE = digest()
# How a process ends whose time is over
CUT = "cut off twice, for want of time or because it hangs"


class Rows:
    """Rows of one stage, in a file that holds those of all."""

    def __init__(self, path: Path, stage: int) -> None:
        self.path, self.stage = path, stage
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            # A row that was cut off must not spoil the next one.
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
        rows = [row for row in read_rows(path) if row["stage"] == stage]
        self.known = {row["what"] for row in rows if "cut" not in row}
        self.cut = {row["what"] for row in rows if "cut" in row}
        self.begun = path.with_name(f"begun-{stage}")

    def add(self, what: str, **row: Any) -> None:
        """Append a row and have it on the disk."""
        line = json.dumps({"stage": self.stage, "what": what, "code": CODE, **row}, default=str)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.known.add(what)
        print(line, flush=True)

    @contextmanager
    def unless_it_breaks(self, what: str) -> Iterator[None]:
        """Where the block breaks, a row with the reason, so that what follows it is measured."""
        import torch

        try:
            yield
        except Exception as error:  # of the compiler, of a launch, of the device, or of a check
            self.add(what, holds=False, reason=f"{type(error).__name__}: {error}"[:2000])
            # An error of the device stays until its process ends; the next process goes on behind this row.
            torch.cuda.synchronize()

    def without(self, whats: list[str]) -> Iterator[str]:
        """Those of which there is no row yet."""
        for what in whats:
            if what not in self.known:
                self.begun.write_text(what, encoding="utf-8")
                yield what
                self.begun.unlink(missing_ok=True)

    def after(self, ended: str) -> bool:
        """Note what a process that `ended` in this way had begun; returns whether it is not tried again."""
        what = self.begun.read_text(encoding="utf-8") if self.begun.exists() else ""
        self.begun.unlink(missing_ok=True)
        if not what or what in self.known:
            return False
        # Once may be for the little time that was left.
        if ended == CUT and what not in self.cut:
            self.add(what, cut=True)
            return False
        self.add(what, holds=False, reason=ended)
        return True


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that was cut off counts as none."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def timed(runs: dict[str, Callable[[int], object]], repeats: int = 9) -> dict[str, dict[str, Any]]:
    """By name: quartiles of the device's seconds and the median of the host's, or the reason why there are none."""
    import torch

    from approxkmv.sweep.measure import host_seconds, interleaved_seconds, quartiles

    device = torch.device("cuda")
    seconds, failures = interleaved_seconds(runs, device, "wall", min(2, repeats), repeats, 1)
    found: dict[str, dict[str, Any]] = {name: {"reason": reason} for name, reason in failures.items()}
    for name, taken in seconds.items():
        low, middle, high = quartiles(taken)
        found[name] = {"seconds_q1": low, "seconds": middle, "seconds_q3": high}
        found[name]["host_seconds"] = host_seconds(runs[name], device, min(3, repeats), 1)
    return found


def machine_and_ceilings(rows: Rows, sizes: dict[str, Any], given: argparse.Namespace) -> None:
    """Stage 0."""
    import torch

    from approxkmv.sweep.measure import machine

    try:
        said = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    except OSError as error:
        said = str(error)
    found: dict[str, Any] = {"machine": machine("cuda"), "commit": given.commit, "nvidia-smi": said}
    n = sizes["ceiling"]
    numbers = torch.randn(n * n, device="cuda")
    squares = {kind: numbers.view(n, n).to(kind) for kind in (torch.bfloat16, torch.float32)}
    small = torch.ones(8, device="cuda")
    graph, nodes = torch.cuda.CUDAGraph(), 200
    small.add_(1)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(nodes):
            small.add_(1)
    runs = {
        "copy": lambda _: numbers.clone(),
        "bfloat16 product": lambda _: squares[torch.bfloat16] @ squares[torch.bfloat16],
        "float32 product": lambda _: squares[torch.float32] @ squares[torch.float32],
        "graph": lambda _: graph.replay(),
    }
    seconds = {name: one["seconds"] for name, one in timed(runs).items()}
    found["ceilings"] = ceilings_of(seconds, n, nodes)
    (given.out / "machine.json").write_text(json.dumps(found, indent=2, default=str), encoding="utf-8")
    rows.add("machine", **found)


def ceilings_of(seconds: dict[str, float], n: int, nodes: int) -> dict[str, float]:
    """From the seconds of a copy of n^2 float32, of products of (n, n) matrices, and of a graph of so many nodes."""
    return {
        "copy_bytes_per_second": 8 * n * n / seconds["copy"],
        "bfloat16_flops": 2 * n**3 / seconds["bfloat16 product"],
        "float32_flops": 2 * n**3 / seconds["float32 product"],
        "seconds_per_graph_node": seconds["graph"] / nodes,
    }


def kernels(rows: Rows, sizes: dict[str, Any], given: argparse.Namespace) -> None:
    """Stage 1: kernels against float64, small and at the longest length, where 256 rows are compared."""
    import check_kernels
    import torch

    from approxkmv.attention.kernels import triton as triton_kernels
    from approxkmv.sweep.measure import errors

    check_kernels.DEVICE = "cuda"
    # A test of its own runs all of them in the interpreter.
    checks = ["check_tiles"] if given.interpret else [check.__name__ for check in check_kernels.CHECKS]
    for name in rows.without(checks):
        with rows.unless_it_breaks(name):
            getattr(check_kernels, name)()
            rows.add(name, holds=True)
    n, d = sizes["long"], sizes["width"]
    for what in rows.without([f"exact {kind} d_v={d_v}" for kind in ("bfloat16", "float32") for d_v in (1, d)]):
        with rows.unless_it_breaks(what):
            _, kind, width = what.split()
            q, k, v = (t.to("cuda") for t in heads(n, d, int(width[4:])))
            q, k, v = (t.to(getattr(torch, kind)) for t in (q, k, v))
            out = triton_kernels.exact(q, k, v, d**-0.5)
            some = torch.linspace(0, n - 1, min(n, 256), device="cuda").long()
            right = (d**-0.5 * q[:, some].double() @ k.double().mT).softmax(2) @ v.double()
            # float32 products are three of tf32, which the interpreter does not imitate.
            rows.add(what, n=n, error=errors(out[:, some], right, v)[0])


def heads(n: int, d: int, d_v: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Queries and keys (1, n, d) around common centres, as tokens are, and values (1, n, d_v) that follow the keys."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, n // 64), d, generator=generator)
    labels = torch.randint(len(centres), (2, n), generator=generator)
    q, k = (centres[labels[i]] + 0.7 * torch.randn(n, d, generator=generator) for i in range(2))
    v = k[:, :d_v] + 0.5 * torch.randn(n, d_v, generator=generator)
    return q[None], k[None], v[None]


def graphs(rows: Rows, sizes: dict[str, Any], given: argparse.Namespace) -> None:
    """Stage 2: a replay equals an eager run, and no graph is recorded while settings alternate."""
    import check_kernels
    import torch

    from approxkmv.attention import get
    from approxkmv.attention.blocks.cuda import fused
    from approxkmv.attention.kernels import cuda_graphs

    check_kernels.DEVICE = "cuda"
    q, k, v = (t.to("cuda") for t in heads(sizes["figure"][0], sizes["width"], 1))
    method = get("local-expansion")
    for products in rows.without(["float32", "bfloat16"]):
        with rows.unless_it_breaks(products):
            parameters = method.parameters({"block": 32, "near": 16, "products": products})
            run = partial(method.compute, q, k, v, scale=sizes["width"] ** -0.5, **parameters)
            # k-means adds in any order: a rounding may move a query to another cluster.
            of_fused = patch.object(fused, "labels_of_queries", check_kernels.rolled_and_counted)
            with check_kernels.labelled_by(check_kernels.rolled), of_fused:
                answers = [run(seed=seed) for seed in range(3)]
                with patch.object(cuda_graphs, "_has_graphs", lambda device: False):
                    gaps = [check_kernels.gap(run(seed=seed), answer, v) for seed, answer in enumerate(answers)]
            before = cuda_graphs.recordings()
            for seed in range(3):
                run(seed=seed)
            recorded = cuda_graphs.recordings() - before
            holds = recorded == 0 and max(gaps) < 1e-6
            rows.add(products, largest_gap=max(gaps), recorded_again=recorded, holds=holds)
            torch.cuda.synchronize()


def exact(rows: Rows, sizes: dict[str, Any], given: argparse.Namespace) -> None:
    """Stage 3: the exact rows, with the backend that torch's attention ran on."""
    import torch

    from approxkmv.attention import UnavailableError, get
    from approxkmv.attention.exact import sdpa

    long, d = sizes["long"], sizes["width"]
    shapes = {
        f"n={sizes['figure'][-1]} batch={sizes['batch']} d=100 d_v=1": (sizes["figure"][-1], sizes["batch"], 100, 1),
        f"n={long} batch=1 d={d} d_v=1": (long, 1, d, 1),
        f"n={long} batch=1 d={d} d_v={d}": (long, 1, d, d),
    }
    wanted = [f"{shape} {kind}" for shape in shapes for kind in ("bfloat16", "float32")]
    for what in rows.without(wanted):
        with rows.unless_it_breaks(what):
            shape, kind = what.rsplit(" ", 1)
            n, batch, width, d_v = shapes[shape]
            dtype = getattr(torch, kind)
            tensors = [t.expand(batch, -1, -1).to("cuda", dtype).contiguous() for t in heads(n, width, d_v)]
            runs, refused = {}, {}
            for name in EXACT:
                if name == "exact-naive" and n == long:
                    continue
                method = get(name)
                run = partial(method.compute, *tensors, scale=width**-0.5, seed=0, **method.defaults)
                try:
                    run()
                    runs[name] = lambda _, run=run: run()
                except (UnavailableError, torch.OutOfMemoryError) as error:
                    refused[name] = str(error).splitlines()[0]
            backends = {str(key[0]) + str(key[3]): backend for key, backend in sdpa._fastest.items()}
            rows.add(what, times=timed(runs, sizes["repeats"]), refused=refused, backends=backends)


def swept(rows: Rows, workload: str, n: int, batch: int, given: argparse.Namespace) -> None:
    """One case of a sweep, by the sweep itself."""
    import csv

    from approxkmv.sweep import SweepSettings, run_sweep

    parameters = {
        "local-expansion": [{"block": 32, "near": 16}],
        "approxkmv": [{"block": 32, "near": 16, "samples": 8}],
    }
    few = {"parameters": parameters, "seeds": [0], "tuning_seeds": [9], "inputs": 1, "repeats": 1, "warmups": 1}
    small = {**few, "methods": ["exact-naive", "exact-sdpa", "mean", *parameters]}
    settings = {
        "device": "cuda",
        "dtype": "bfloat16",
        "methods": list(SWEPT),
        "workloads": [{"name": workload, "lengths": [n], "batches": [batch]}],
        **(small if given.interpret else {}),
    }
    table = given.out / f"{workload}-{n}-{batch}.csv"
    run_sweep(SweepSettings.from_mapping(settings), table, {"made by": "benchmarks/gpu.py", "commit": given.commit})
    with table.open(encoding="utf-8") as file:
        rows.add(f"{workload} n={n} batch={batch}", rows=list(csv.DictReader(file)))


def figure5(rows: Rows, sizes: dict[str, Any], given: argparse.Namespace) -> None:
    """Stage 4."""
    for n in sizes["figure"]:
        for what in rows.without([f"glove-paper n={n} batch={sizes['batch']}"]):
            with rows.unless_it_breaks(what):
                swept(rows, "glove-paper", n, sizes["batch"], given)


def ours(rows: Rows, sizes: dict[str, Any], given: argparse.Namespace) -> None:
    """Stage 5: settings of our methods at the longest length, cheap ones first, until one errs by 0.05 |v| or less.

    One value column, as in the paper, and with `local-expansion` as many as the keys have, as in a model.
    """
    import torch

    from approxkmv.attention import get

    n, d = sizes["long"], sizes["width"]
    for name, d_v in (("local-expansion", 1), ("local-expansion", d), ("approxkmv", 1)):
        for what in rows.without([f"{name} d_v={d_v}"]):
            with rows.unless_it_breaks(what):
                settings_of(name, d_v, rows, sizes, given)
    for _ in rows.without(["profile"]):
        with rows.unless_it_breaks("profile"):
            tensors = [t.to("cuda", torch.bfloat16) for t in heads(n, d, 1)]
            method = get("local-expansion")
            setting = {"block": 32, "near": 16} if given.interpret else {"block": 192, "near": 384}
            parameters = method.parameters(setting)
            run = partial(method.compute, *tensors, scale=d**-0.5, seed=0, **parameters)
            run()
            with torch.profiler.profile() as profile:
                run()
                torch.cuda.synchronize()
            rows.add("profile", kernels=profile.key_averages().table(sort_by="cuda_time_total", row_limit=60))
    undecided(rows, sizes, given)


def settings_of(name: str, d_v: int, rows: Rows, sizes: dict[str, Any], given: argparse.Namespace) -> None:
    """A row of each setting of a method."""
    import torch

    from approxkmv.attention import UnavailableError, get
    from approxkmv.compute.counting import counting
    from approxkmv.sweep.measure import errors
    from approxkmv.sweep.tuning import MOST_RECOMPUTED

    n, d = sizes["long"], sizes["width"]
    earlier = {row["what"]: row for row in read_rows(rows.path) if row["stage"] == rows.stage}
    wide = [t.to("cuda") for t in heads(n, d, d_v)]
    right = get("exact-fused")(*wide).double()
    tensors = [t.bfloat16() for t in wide]
    baseline = partial(get("exact-sdpa").compute, *tensors, scale=d**-0.5, seed=0, backend="fastest")
    baseline()
    method = get(name)
    small = {"block": 32, "near": 16} if name == "local-expansion" else {"block": 64, "near": 16, "samples": 8}
    for setting in [small] if given.interpret else method.grid:
        parameters = method.parameters(setting)
        what = f"{name} d_v={d_v} {json.dumps(setting)}"
        run = partial(method.compute, *tensors, scale=d**-0.5, seed=0, **parameters)
        for _ in rows.without([what]):
            with rows.unless_it_breaks(what):
                try:
                    with counting() as counts:
                        out = run()
                    of_values, of_answer = errors(out, right, tensors[2])
                    raced = {"ours": lambda _, run=run: run(), "exact-sdpa": lambda _, run=baseline: run()}
                    times = timed(raced, sizes["repeats"])
                    found = {"n": n, "error": of_values, "error_of_answer": of_answer, "times": times}
                    # Rows of a broken kernel would be made again exactly, and their error be small.
                    found["recomputed_rows"] = counts.recomputed_rows
                except (UnavailableError, torch.OutOfMemoryError) as refusal:
                    found = {"n": n, "reason": str(refusal).splitlines()[0]}
                earlier[what] = found
                rows.add(what, **found)
        one = earlier.get(what, {})
        if one.get("error", 1.0) <= 0.05 and one["recomputed_rows"] <= MOST_RECOMPUTED * n:
            break


def undecided(rows: Rows, sizes: dict[str, Any], given: argparse.Namespace) -> None:
    """Choices that only a GPU can settle: the sides of each in a row."""
    choices = {
        "iterations of k-means, programs on a multiprocessor": iterations_and_programs,
        "copies of a graph's inputs": copies,
        "near keys in float32 with pipelined loads and without": pipelined_loads,
    }
    for what in rows.without(list(choices)):
        with rows.unless_it_breaks(what):
            runs, more = choices[what](sizes, given)
            rows.add(what, compared=timed(runs, sizes["repeats"]), **more)


# By name, what is timed; more for the row
Compared = tuple[dict[str, Callable[[int], object]], dict[str, Any]]


def recorded(tensors: list[Any], **setting: int) -> tuple[Callable[[], Any], Any, Any]:
    """A call of local expansion, its answer and its graph, recorded anew."""
    from approxkmv.attention import get
    from approxkmv.attention.kernels import cuda_graphs

    cuda_graphs._graphs.clear()
    method, scale = get("local-expansion"), tensors[0].shape[2] ** -0.5
    run = partial(method.compute, *tensors, scale=scale, seed=0, **method.parameters(setting))
    return run, run(), next(iter(cuda_graphs._graphs.values()))


def iterations_and_programs(sizes: dict[str, Any], given: argparse.Namespace) -> Compared:
    """Graphs of the fused form, and how they err."""
    from approxkmv.attention import get
    from approxkmv.attention.blocks.cuda import fused
    from approxkmv.sweep.measure import errors

    wide = [t.to("cuda") for t in heads(sizes["long"], sizes["width"], 1)]
    right, tensors = get("exact-fused")(*wide).double(), [t.bfloat16() for t in wide]
    setting = {"block": 32, "near": 16} if given.interpret else {"block": 192, "near": 384}
    runs, gaps, multiprocessors = {}, {}, fused._MULTIPROCESSORS
    for iterations, programs in ((3, 3), (2, 3), (1, 3), (3, 1), (3, 2), (3, 4), (3, 6)):
        with patch.object(fused, "_MULTIPROCESSORS", multiprocessors * programs // 3):
            _, out, graph = recorded(tensors, iterations=iterations, **setting)
        name = f"{iterations}, {programs}"
        runs[name] = lambda _, graph=graph: graph.replay()
        gaps[name] = errors(out, right, tensors[2])[0]
    return runs, {"errors": gaps}


def copies(sizes: dict[str, Any], given: argparse.Namespace) -> Compared:
    """A call of Figure 5's largest case, its graph alone, and the copies of its inputs."""
    import torch

    inputs = heads(sizes["figure"][-1], 100, 1)
    tensors = [t.expand(sizes["batch"], -1, -1).to("cuda", torch.bfloat16).contiguous() for t in inputs]
    run, _, graph = recorded(tensors, block=2**24, near=16)
    pairs = list(zip(graph.inputs, tensors, strict=False))
    return {
        "call": lambda _: run(),
        "graph": lambda _: graph.replay(),
        "copies": lambda _: [mine.copy_(theirs) for mine, theirs in pairs],
    }, {}


def pipelined_loads(sizes: dict[str, Any], given: argparse.Namespace) -> Compared:
    """Near keys in float32 of the widest values, of which Triton 3.6 spills some registers."""
    import torch

    from approxkmv.attention.blocks.cuda import expansion
    from approxkmv.attention.kernels import triton as triton_kernels

    n = sizes["figure"][-1]
    q, k, v = (t.to("cuda") for t in heads(n, 112, 100))
    options, clusters = triton_kernels._options, -(-n // 128)
    tiles = expansion.Tiles.of(torch.arange(n, device="cuda")[None] // 128, clusters)
    near = torch.arange(min(512, n), device="cuda").expand(1, clusters, -1)
    centres = tiles.means(q)

    def near_keys(_: int, **stages: int) -> object:
        with patch.object(triton_kernels, "_options", lambda *widths: options(*widths) | stages):
            return triton_kernels.listed(q, tiles.queries, tiles.clusters, centres, k, v, near, None)

    return {"with": near_keys, "without": partial(near_keys, num_stages=1)}, {}


def sharper(rows: Rows, sizes: dict[str, Any], given: argparse.Namespace) -> None:
    """Stage 6."""
    for workload, lengths in (("glove-sharp", sizes["figure"]), ("glove-split", sizes["split"])):
        for n in lengths:
            for what in rows.without([f"{workload} n={n} batch=1"]):
                with rows.unless_it_breaks(what):
                    swept(rows, workload, n, 1, given)


def statistics(rows: Rows, sizes: dict[str, Any], given: argparse.Namespace) -> None:
    """Stage 7: statistics of one long head, as they are called."""
    import torch

    from approxkmv import attention_statistics
    from approxkmv.statistics.largest_cuda import largest_of
    from approxkmv.statistics.streaming import length_statistics

    def c_alone(q: torch.Tensor, k: torch.Tensor) -> tuple[float, ...]:
        scale = q.shape[1] ** -0.5
        return largest_of(q, k, scale, -0.5 * scale * q.double().square().sum(1)).finish()

    def ratios(q: torch.Tensor, k: torch.Tensor) -> tuple[float, ...]:
        found = attention_statistics(q, k)
        return tuple(float(value) for value in (found.ratio, found.log_next, found.log_double, found.softmax_ratio))

    def everything(q: torch.Tensor, k: torch.Tensor) -> object:
        return length_statistics(q, k)[0][0]

    forms = {"c and order ratios": c_alone, "attention_statistics": ratios, "length_statistics": everything}
    lengths = [n for n in (sizes["long"] // 8, sizes["long"] // 4, sizes["long"] // 2, sizes["long"]) if n > 64]
    for what in rows.without([f"{form} n={n}" for form in forms for n in lengths]):
        with rows.unless_it_breaks(what):
            form, n = what.split(" n=")[0], int(what.split("=")[1])
            q, k, _ = (t[0].to("cuda") for t in heads(n, sizes["width"], 1))
            taken = []
            for _ in range(1 if given.interpret else 3):
                torch.cuda.synchronize()
                start = time.perf_counter()
                found = forms[form](q, k)
                torch.cuda.synchronize()
                taken.append(time.perf_counter() - start)
                if taken[-1] > 2:
                    break
            rows.add(what, seconds=min(taken), found=found)


STAGES = (machine_and_ceilings, kernels, graphs, exact, figure5, ours, sharper, statistics)


def chosen(text: str) -> list[int]:
    """0-7 or 1,4,5 as numbers of stages."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    if not found or not set(found) <= set(LIMITS):
        raise ValueError
    return sorted(set(found))


def one_stage(stage: int, given: argparse.Namespace) -> None:
    """A stage, in this process."""
    sys.path[:0] = [str(ROOT / "tests" / "gpu")]
    if given.interpret:
        import mock_cuda

        mock_cuda.install()
    import torch

    rows = Rows(given.out / "rows.jsonl", stage)
    start = time.perf_counter()
    with torch.inference_mode():
        STAGES[stage](rows, SMALL if given.interpret else FULL, given)
    rows.add("finished", seconds=time.perf_counter() - start)


def exit_code(command: list[str], environment: dict[str, str], path: Path, stage: int, seconds: float) -> int | None:
    """Of a stage's process, None if it ran out of time; another goes on where one that broke had got further."""
    end = time.monotonic() + seconds
    # What a command that was killed had begun
    Rows(path, stage).after(CUT)
    while True:
        known = Rows(path, stage).known
        try:
            left = max(1.0, end - time.monotonic())
            code = subprocess.run(command, env=environment, cwd=ROOT, check=False, timeout=left).returncode
        except subprocess.TimeoutExpired:
            Rows(path, stage).after(CUT)
            return None
        if code == 0:
            return code
        if not Rows(path, stage).after(f"its process ended with code {code}") and Rows(path, stage).known == known:
            return code


def main() -> int:
    """Run the stages that are not finished and fit into the time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows, also of those of earlier commands")
    parser.add_argument("--stages", type=chosen, default=list(LIMITS), help="as 0-7 or 1,4; default all")
    parser.add_argument("--minutes", type=float, default=8.0, help="a stage that they end waits for the next command")
    parser.add_argument("--commit", help="of these files, where git does not say")
    parser.add_argument("--interpret", action="store_true", help="small inputs on a CPU")
    parser.add_argument("--one", type=int, choices=list(LIMITS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    # Before torch is imported, which may take many of the seconds of a command on a new machine
    end = time.monotonic() + 60 * given.minutes
    # Stages run in the folder of the checkout.
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.one is not None:
        one_stage(given.one, given)
        return 0
    if not given.interpret:
        import torch

        if not torch.cuda.is_available():
            print("gpu: torch finds no CUDA device; --interpret runs the stages small on a CPU", file=sys.stderr)
            return 2
    if any(row.get("code") != CODE for row in read_rows(given.out / "rows.jsonl")):
        print(f"gpu: {given.out} has rows that other code made: name another folder", file=sys.stderr)
        return 2
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if given.interpret else {})}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    waiting, failed = [], []
    for stage in sorted(given.stages, key=ORDER.index):
        if "finished" in Rows(given.out / "rows.jsonl", stage).known:
            continue
        left = end - time.monotonic()
        if left < LEAST:
            waiting.append(stage)
            continue
        command = [sys.executable, str(Path(__file__).resolve()), "--one", str(stage), "--out", str(given.out)]
        command += ["--interpret"] * given.interpret + (["--commit", given.commit] if given.commit else [])
        # The interpreter on a busy CPU is slow, and not what the limits are for.
        limit = LIMITS[stage] * (5 if given.interpret else 1)
        done = exit_code(command, environment, given.out / "rows.jsonl", stage, min(limit, left))
        if done is None and left < limit:
            waiting.append(stage)
        elif done != 0:
            failed.append(stage)
            print(f"gpu: stage {stage} {'ran out of its time' if done is None else 'failed'}", file=sys.stderr)
    if waiting:
        print(f"gpu: stages {waiting} do not fit into this command: run it again", file=sys.stderr)
    rows = read_rows(given.out / "rows.jsonl")
    wrong = [row["what"] for row in rows if row["stage"] in given.stages and not row.get("holds", True)]
    if wrong:
        print(f"gpu: these checks do not hold: {', '.join(wrong)}", file=sys.stderr)
    return 1 if failed or wrong else 3 if waiting else 0


if __name__ == "__main__":
    sys.exit(main())
