"""Check the CUDA kernels against float64 and, on a CUDA machine, time them.

    python tests/gpu/check_kernels.py [TABLE.csv]

With TRITON_INTERPRET=1 the same checks run in Triton's interpreter on a CPU, on smaller inputs and without times.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch

from approxkmv.attention import local_expansion_cuda, triton_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# bfloat16 keeps 8 bits: its inputs are exact here, its weights and answers are rounded to 2^-9 of their size.
LARGEST = {torch.float32: 2e-5, torch.bfloat16: 4e-3}


def inputs(batch, n_q, n_k, d, d_v, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n_q, d), (n_k, d), (n_k, d_v))
    q, k, v = (torch.randn(batch, *shape, generator=generator) for shape in shapes)
    return tuple(t.to(device=DEVICE, dtype=dtype) for t in (q, k, v))


def exact(q, k, v, scale):
    return (scale * q.double() @ k.double().mT).softmax(-1) @ v.double()


def gap(out, right, v):
    return float((out.double() - right).norm() / v.double().norm())


def check_exact():
    for dtype in (torch.float32, torch.bfloat16):
        for n_q, n_k, d, d_v in ((70, 90, 24, 1), (33, 129, 100, 5), (64, 64, 16, 16), (5, 200, 40, 3)):
            q, k, v = inputs(2, n_q, n_k, d, d_v, dtype, n_q)
            found = gap(triton_kernels.exact(q, k, v, d**-0.5), exact(q, k, v, d**-0.5), v)
            print(f"exact {dtype} {n_q} x {n_k}, d {d}, d_v {d_v}: {found:.2e}")
            assert found < LARGEST[dtype]


def check_listed():
    """A block's own keys and one far key, against the same sum in float64."""
    for dtype in (torch.float32, torch.bfloat16):
        for block, blocks, n_k, near, d, d_v in ((24, 3, 90, 37, 20, 1), (70, 2, 80, 33, 36, 6)):
            q, k, v = inputs(2, block * blocks, n_k, d, d_v, dtype, block)
            generator = torch.Generator().manual_seed(1)
            chosen = torch.stack([torch.randperm(n_k, generator=generator)[:near] for _ in range(2 * blocks)]).view(
                2, blocks, near
            )
            far_log = torch.randn(2, block * blocks, generator=generator)
            far_value = torch.randn(2, block * blocks, d_v, generator=generator)
            chosen, far_log, far_value = (t.to(DEVICE) for t in (chosen, far_log, far_value))
            out = triton_kernels.listed(q, k, v, chosen, far_log, far_value, block, 0.3)
            right = torch.empty(2, block * blocks, d_v, dtype=torch.float64, device=DEVICE)
            for e in range(2):
                for b in range(blocks):
                    rows = slice(b * block, (b + 1) * block)
                    weights = (0.3 * q[e, rows].double() @ k[e, chosen[e, b]].double().mT).exp()
                    far = far_log[e, rows].double().exp().unsqueeze(1)
                    sums = weights @ v[e, chosen[e, b]].double() + far * far_value[e, rows].double()
                    right[e, rows] = sums / (weights.sum(1, keepdim=True) + far)
            found = gap(out, right, v)
            print(f"listed {dtype} blocks of {block}, {near} keys, d {d}, d_v {d_v}: {found:.2e}")
            assert found < LARGEST[dtype]


def check_local_expansion():
    for dtype, products in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        q, k, v = inputs(2, 150, 170, 20, 1, dtype, 3)
        right = exact(q, k, v, 20**-0.5)
        given = {"scale": 20**-0.5, "seed": 0, "products": products, "directions": 0, "iterations": 2, "sampled": 8}
        found = [gap(local_expansion_cuda.attend(q, k, v, block=16, near=m, **given), right, v) for m in (20, 80, 170)]
        mean = gap(v.double().mean(1, keepdim=True).expand_as(right), right, v)
        print(f"local expansion {dtype}, 20, 80, 170 of 170 keys: {found}, mean {mean:.3f}")
        assert found[1] < found[0] < 0.7 * mean
        assert found[2] < LARGEST[dtype]
        # A block larger than all queries together is all of them.
        one = gap(local_expansion_cuda.attend(q, k, v, block=2**24, near=20, **given), right, v)
        print(f"local expansion {dtype}, one block: {one:.3f}")
        assert one < 1.5 * mean


def long_inputs(n, d, dtype):
    """Queries and keys (1, n, d) around common centres, as tokens are, and one value column that follows the keys."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(n // 64, d, generator=generator)
    q, k = (
        centres[torch.randint(len(centres), (n,), generator=generator)] + 0.7 * torch.randn(n, d, generator=generator)
        for _ in range(2)
    )
    v = k[:, :1] + 0.5 * torch.randn(n, 1, generator=generator)
    return tuple(t[None].to(device=DEVICE, dtype=dtype) for t in (q, k, v))


def run(method, tensors, scale, given, i):
    return method.compute(*tensors, scale=scale, seed=i, **given)


def measure_long(table, n=131_072, d=64, repeats=9):
    """Every setting of local-expansion against every exact row at one long length: error, time, what cannot run."""
    from approxkmv.attention import UnavailableError, get
    from approxkmv.sweep.measure import errors, interleaved_seconds, quartiles

    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = long_inputs(n, d, dtype)
        right = get("exact-fused")(q.float(), k.float(), v.float()).double()
        runs, found = {}, {}
        settings = [(name, get(name).defaults) for name in ("exact-naive", "exact-sdpa", "exact-fused", "mean")]
        settings += [
            ("local-expansion", get("local-expansion").parameters(given)) for given in get("local-expansion").grid
        ]
        for name, given in settings:
            label = f"{name} {given}"
            try:
                found[label] = errors(get(name)(q, k, v, **given), right, v)[0]
            except UnavailableError as refusal:
                rows.append({"dtype": str(dtype), "n": n, "method": label, "reason": str(refusal)})
                continue
            runs[label] = partial(run, get(name), (q, k, v), d**-0.5, given)
        seconds = interleaved_seconds(runs, torch.device(DEVICE), "wall", 2, repeats, 3)
        for label, taken in seconds.items():
            low, middle, high = quartiles(taken)
            row = {"dtype": str(dtype), "n": n, "method": label, "error": found[label], "seconds": middle}
            rows.append({**row, "seconds_q1": low, "seconds_q3": high})
    rows.append(measure_statistics(n, d))
    write(table, rows)


def measure_statistics(n, d):
    """c, order ratios and keys per row of one head at a long length, both masks, on the device."""
    import time

    from approxkmv.statistics.streaming import length_statistics

    q, k, _ = long_inputs(n, d, torch.float32)
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        length_statistics(q, k)
        taken.append(time.perf_counter() - started)
    return {"dtype": "float64", "n": n, "method": "length_statistics, one head", "seconds": min(taken)}


def write(table, rows):
    """The rows as CSV, and the machine beside them as JSON."""
    import csv
    import json

    from approxkmv.sweep.run import machine

    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(
            file, ["dtype", "n", "method", "error", "seconds", "seconds_q1", "seconds_q3", "reason"]
        )
        writer.writeheader()
        writer.writerows(rows)
    record = {"made by": "tests/gpu/check_kernels.py", "machine": machine(DEVICE)}
    table.with_suffix(".json").write_text(json.dumps(record, indent=2), encoding="utf-8")


def measure(table):
    """The sweep of the word vectors, in both types."""
    from approxkmv.sweep import SweepSettings, run_sweep

    for dtype in ("bfloat16", "float32"):
        settings = SweepSettings.from_mapping(
            {
                "device": "cuda",
                "dtype": dtype,
                "workloads": [
                    {"name": "glove-sharp", "lengths": [4096, 8192, 16384], "batches": [1, 8]},
                    {"name": "glove-split", "lengths": [4096, 8192], "batches": [1, 8]},
                ],
            }
        )
        run_sweep(settings, table.with_name(f"{table.stem}-{dtype}.csv"), {"made by": "tests/gpu/check_kernels.py"})


if __name__ == "__main__":
    if not INTERPRETED and not torch.cuda.is_available():
        sys.exit("check_kernels: torch finds no CUDA device; set TRITON_INTERPRET=1 to check in the interpreter")
    check_exact()
    check_listed()
    check_local_expansion()
    if not INTERPRETED:
        where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("sweep-cuda.csv")
        measure_long(where.with_name(f"{where.stem}-long.csv"))
        measure(where)
