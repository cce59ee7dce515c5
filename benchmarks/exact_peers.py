"""Exact attention of other libraries beside the exact rows of a sweep: python benchmarks/exact_peers.py

The race divides by the fastest exact row, all of which are torch's products or our loops. Here the same heads are
given to other libraries that are installed (pip install openvino onnx onnxruntime jax) and to torch's flex_attention,
compiled (it needs a C++ compiler): one head, in turn, the processor's time of all threads, casts of inputs and answer
included, and the error of each answer. Writes results/benchmarks/exact_peers.csv and .json; --out changes the name.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from attention_statistics import head
from writing import out_of, times, write

from approxkmv.attention import get

LENGTHS = (8192, 16384)
ROUNDS = 7
D = 64
# Of the longest n x n matrix, in float64
ROWS = 256
OURS = ("exact-sdpa", "exact-fused", "exact-sdpa-bf16", "exact-tiles-bf16")
PACKAGES = ("openvino", "onnx", "onnxruntime", "jax", "jaxlib")
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(name: str, n: int, causal: bool) -> Call:
    """An exact row of the sweep."""
    attend: Call = get(name).attend_causally if causal else get(name)
    return attend


def flex_attention(dtype: torch.dtype, n: int, causal: bool) -> Call:
    """torch's flex_attention as its documents advise: compiled, and with a mask of blocks if causal."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device="cpu") if causal else None

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: Any = compiled(*(x[None, None].to(dtype) for x in (q, k, v)), block_mask=mask)
        return out[0, 0].float()

    return call


def openvino(precision: str, n: int, causal: bool) -> Call:
    """OpenVINO's ScaledDotProductAttention, asked to compute in this precision."""
    import openvino as ov
    from openvino import opset13

    inputs = [opset13.parameter([1, 1, n, D], np.float32) for _ in range(3)]
    model = ov.Model([opset13.scaled_dot_product_attention(*inputs, causal=causal)], inputs)
    compiled = ov.Core().compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
    )
    return lambda q, k, v: torch.from_numpy(compiled([x[None, None].numpy() for x in (q, k, v)])[0])[0, 0]


def onnxruntime(n: int, causal: bool) -> Call:
    """ONNX Runtime's MultiHeadAttention."""
    import onnxruntime
    from onnx import TensorProto, helper

    shaped = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT, shape=[1, n, D])
    node = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v"], ["out"], domain="com.microsoft", num_heads=1, unidirectional=int(causal)
    )
    graph = helper.make_graph([node], "attention", [shaped("q"), shaped("k"), shaped("v")], [shaped("out")])
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=domains, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        given = {name: x[None].numpy() for name, x in zip("qkv", (q, k, v), strict=True)}
        return torch.from_numpy(session.run(None, given)[0])[0]

    return call


def jax(dtype: str, n: int, causal: bool) -> Call:
    """JAX's dot_product_attention, compiled by XLA."""
    # Read when it starts; torch and the others are told by calls.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    import jax

    def attention(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x[None, :, None].astype(dtype) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal)[0, :, 0].astype("float32")

    compiled = jax.jit(attention)
    return lambda q, k, v: torch.from_numpy(np.array(compiled(q.numpy(), k.numpy(), v.numpy())))


PEERS: dict[str, Callable[[int, bool], Call]] = {
    **{name: partial(ours, name) for name in OURS},
    "flex_attention of torch, float32": partial(flex_attention, torch.float32),
    "flex_attention of torch, bfloat16": partial(flex_attention, torch.bfloat16),
    "OpenVINO, float32": partial(openvino, "f32"),
    "OpenVINO, bfloat16": partial(openvino, "bf16"),
    "ONNX Runtime, float32": onnxruntime,
    "JAX, float32": partial(jax, "float32"),
    "JAX, bfloat16": partial(jax, "bfloat16"),
}


def error(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> float:
    """|answer - attention| / |attention| over ROWS rows spread over the text, against float64."""
    rows = torch.linspace(0, len(q) - 1, ROWS).long()
    logits = D**-0.5 * q[rows].double() @ k.double().mT
    if causal:
        logits[torch.arange(len(k)) > rows[:, None]] = -torch.inf
    right = logits.softmax(1) @ v.double()
    return float((out[rows].double() - right).norm() / right.norm())


def measure(n: int, causal: bool, left_out: dict[str, str]) -> Iterator[dict[str, object]]:
    """A row for each peer that runs; `left_out` receives the reasons of the others."""
    q, k = head(n, D, 12.0)
    v = torch.randn(n, D, generator=torch.Generator().manual_seed(1))
    calls: dict[str, Callable[[], object]] = {}
    errors = {}
    for name, make in PEERS.items():
        try:
            call = partial(make(n, causal), q, k, v)
            errors[name] = error(call(), q, k, v, causal)
        except Exception as reason:
            left_out[f"{name}, n = {n}{', causal' if causal else ''}"] = f"{type(reason).__name__}: {reason}"[:200]
            continue
        calls[name] = call
    seconds = times(calls, ROUNDS, time.process_time)
    least = min(statistics.median(seconds[name]) for name in OURS)
    for name, taken in seconds.items():
        low, middle, high = np.quantile(taken, [0.25, 0.5, 0.75])
        yield {
            "what": name,
            "ours": "yes" if name in OURS else "no",
            "n": n,
            "causal": "yes" if causal else "no",
            "ms_q1": 1e3 * low,
            "ms": 1e3 * middle,
            "ms_q3": 1e3 * high,
            "times_our_fastest": middle / least,
            "error": errors[name],
        }


def main() -> None:
    """Measure everything, print a table and write it."""
    out = out_of(__doc__, "exact_peers")
    torch.set_num_threads(1)
    left_out: dict[str, str] = {}
    table = pd.DataFrame([row for n in LENGTHS for causal in (False, True) for row in measure(n, causal, left_out)])
    found = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    settings = {"rounds": ROUNDS, "d": D, "threads": 1, "clock": "cpu", "peers": found, "left_out": left_out}
    write(out, table, settings)
    print(table.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    for name, reason in left_out.items():
        print(f"left out: {name} ({reason})")


if __name__ == "__main__":
    with torch.no_grad():
        main()
