"""The code around the CUDA kernels, run on a CPU: graphs (recorded by a fake), counts, estimates, hardware limits."""

import math
import os
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from approxkmv.attention import get
from approxkmv.attention.blocks.expansion import Clustering
from approxkmv.attention.blocks.light_keys import MOST_PARTS
from approxkmv.attention.contract import UnavailableError
from approxkmv.compute.counting import counting

triton = pytest.importorskip("triton")
cuda = pytest.importorskip("approxkmv.attention.blocks.cuda.local_expansion")
ours = pytest.importorskip("approxkmv.attention.blocks.cuda.approxkmv")
expansion = pytest.importorskip("approxkmv.attention.blocks.cuda.expansion")
clustering = pytest.importorskip("approxkmv.attention.blocks.cuda.clustering")
fused = pytest.importorskip("approxkmv.attention.blocks.cuda.fused")
graphs = pytest.importorskip("approxkmv.attention.kernels.cuda_graphs")
kernels = pytest.importorskip("approxkmv.attention.kernels.triton")
ahead_of_time = pytest.importorskip("ahead_of_time")

N_Q, N_K, D = 203, 150, 8
GIVEN = {"scale": 0.4, "products": "float32", "directions": 0, "iterations": 2, "sampled": 3}
# An H100 gives a block 227 KiB, other cards that know bfloat16 at least 99.
SHARED, LEAST_SHARED = 227 * 1024, 99 * 1024
EXACT = kernels.exact


def inputs(batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, w, generator=generator) for n, w in ((N_Q, D), (N_K, D), (N_K, 1))]


def plain_listed(q, tiles, clusters, centres, k, v, near, extra):
    """`triton_kernels.listed` without Triton."""
    shape = q.shape[:2]
    out, total, log = torch.empty(*shape, v.shape[2]), torch.full(shape, torch.nan), torch.empty(shape)
    for e in range(len(q)):
        for tile, c in zip(tiles[e], clusters[e].tolist(), strict=True):
            rows = tile[tile >= 0].long()
            logits = q[e, rows] @ k[e, near[e, c]].mT
            logits = (logits if extra is None else logits + extra[e, c]).float()
            log[e, rows] = logits.amax(1).clamp_min(-1e30)
            weights = (logits - log[e, rows].unsqueeze(1)).exp()
            out[e, rows], total[e, rows] = weights @ v[e, near[e, c]].float(), weights.sum(1)
    return out, total, log


@pytest.fixture(autouse=True)
def _without_triton(monkeypatch):
    monkeypatch.setattr(kernels, "listed", plain_listed)
    monkeypatch.setattr(kernels, "exact", lambda q, k, v, scale: (scale * q @ k.mT).softmax(2) @ v)


@pytest.fixture
def recorded(monkeypatch):
    """The number of recorded graphs; all of them answer into the same memory, as graphs that share a pool may."""
    calls = []
    memory = torch.empty(10**5)

    def record(work, device, pool):
        calls.append(pool)

        def replay():
            answer = work()
            return memory[: answer.numel()].view_as(answer).copy_(answer)

        return replay, "pool"

    monkeypatch.setattr(graphs, "_record", record)
    monkeypatch.setattr(graphs, "_has_graphs", lambda device: True)
    monkeypatch.setattr(graphs, "_graphs", type(graphs._graphs)())
    return calls


def eager(tensors, seed, **given):
    with pytest.MonkeyPatch.context() as without_graphs:
        without_graphs.setattr(graphs, "_has_graphs", lambda device: False)
        return cuda.attend(*tensors, seed=seed, **{**GIVEN, **given})


def test_one_graph_serves_every_seed_and_input(recorded):
    answers = [cuda.attend(*inputs(seed=seed % 3), seed=seed, block=20, near=30, **GIVEN) for seed in range(10)]
    assert len(recorded) == 1
    for seed, answer in enumerate(answers):
        assert torch.equal(answer, eager(inputs(seed=seed % 3), seed, block=20, near=30))
    # On the same input, each seed has an answer of its own.
    assert len({tuple(answers[seed].flatten().tolist()) for seed in (0, 3, 6, 9)}) == 4


def test_answers_survive_the_replays_of_other_graphs(recorded):
    answers = {near: cuda.attend(*inputs(), seed=1, block=20, near=near, **GIVEN) for near in (10, 30, 50)}
    # The first has a pool of its own, the others take it.
    assert recorded == [None, "pool", "pool"]
    for near, answer in answers.items():
        assert torch.equal(answer, eager(inputs(), 1, block=20, near=near))


def test_the_graph_that_was_used_longest_ago_goes(recorded, monkeypatch):
    monkeypatch.setattr(graphs, "_GRAPHS", 2)
    for near in (10, 30, 10, 50, 10, 30):
        cuda.attend(*inputs(), seed=0, block=20, near=near, **GIVEN)
    assert len(recorded) == 4  # 10, 30, 50 and 30 again


def test_alternating_settings_keep_their_graphs(recorded):
    """As a sweep times them, one run of each setting in turn: every setting of both grids keeps a graph."""

    def steps(q, near):
        return near * q

    settings = sum(len(get(name).grid) for name in ("local-expansion", "approxkmv"))
    before = graphs.recordings()
    for _ in range(3):
        for near in range(settings):
            graphs.replayed(steps, inputs()[:1], {"near": near})
        assert graphs.recordings() - before == len(recorded) == settings


def test_each_of_several_answers_survives_the_next_replay(monkeypatch):
    """As those of the fused form, an answer and the number of lost rows: a replay writes into the same memory."""
    monkeypatch.setattr(graphs, "_has_graphs", lambda device: True)
    monkeypatch.setattr(graphs, "_graphs", type(graphs._graphs)())

    def record(work, device, pool):
        memory = work()

        def replay():
            for mine, answer in zip(memory, work(), strict=True):
                mine.copy_(answer)
            return memory

        return replay, "pool"

    def both_of(q):
        return q + 1, q.sum(1)

    monkeypatch.setattr(graphs, "_record", record)
    answers = [graphs.replayed(both_of, [torch.full((2, 3), x)], {}) for x in (1.0, 5.0)]
    assert [[int(t.flatten()[0]) for t in both] for both in answers] == [[2, 3], [6, 15]]


def test_inputs_of_another_type_or_shape_have_a_graph_of_their_own(recorded):
    kinds = ((3, torch.bfloat16), (3, torch.float32), (1, torch.float32))
    answers = [graphs.replayed(torch.neg, [torch.full((n,), 1.001).to(kind)], {}) for n, kind in kinds]
    assert len(recorded) == 3
    assert [answer.tolist() for answer in answers] == [[-1.0] * 3, *(pytest.approx([-1.001] * n) for n in (3, 1))]


def test_a_graph_reads_rows_in_one_piece(recorded):
    """Kernels take them for contiguous."""
    pieces = []
    graphs.replayed(lambda t: pieces.append(t.is_contiguous()) or -t, [torch.ones(2, 3).mT], {})
    assert pieces == [True]


def test_each_device_has_graphs_and_memory_of_its_own(monkeypatch):
    pools = []
    monkeypatch.setattr(graphs, "_record", lambda work, device, pool: pools.append(pool) or (work, device))
    monkeypatch.setattr(graphs, "_has_graphs", lambda device: True)
    monkeypatch.setattr(graphs, "_graphs", type(graphs._graphs)())
    for device in ("cpu", "meta", "cpu", "meta"):
        for steps in (torch.neg, torch.abs):
            answer = graphs.replayed(steps, [torch.ones(3, device=device)], {})
            assert answer.device.type == device
    assert pools == [None, torch.device("cpu"), None, torch.device("meta")]


def test_work_runs_on_the_stream_of_recordings_before_it_is_recorded_there(monkeypatch):
    """Each stream waits for the other; a graph cannot record the compilation of kernels."""
    events = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def within(what):
        events.append(what)
        yield

    class Graph:
        def pool(self):
            return "its pool"

        def replay(self):
            events.append("replay")

    fakes = {
        "Stream": lambda device: Stream(f"recordings of {device}"),
        "current_stream": lambda device: Stream(f"current of {device}"),
        "stream": lambda stream: within(f"on {stream.name}"),
        "CUDAGraph": Graph,
        "graph": lambda graph, pool, stream: within(f"recorded on {stream.name} in {pool}"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs._recording_stream.cache_clear()
    replay, pool = graphs._record(lambda: events.append("work") or 7, "a", "a pool")
    assert (replay(), pool) == (7, "its pool")
    assert [event for i, event in enumerate(events) if event != events[i - 1]] == [
        *("recordings of a waits for current of a", "on recordings of a", "work"),
        *("current of a waits for recordings of a", "recorded on recordings of a in a pool", "work", "replay"),
    ]
    graphs._recording_stream.cache_clear()


@pytest.mark.parametrize("first", [True, False])
def test_a_graph_outlives_inference_mode(recorded, first):
    tensors = inputs()
    for inference in (first, not first):
        with torch.inference_mode(inference):
            answer = cuda.attend(*(t.clone() for t in tensors), seed=2, block=20, near=30, **GIVEN)
        assert answer.is_inference() == inference
    assert len(recorded) == 1
    assert torch.equal(answer, eager(tensors, 2, block=20, near=30))


def test_gradients_are_not_recorded(recorded):
    tensors = [t.requires_grad_() for t in inputs()]
    for _ in range(2):
        assert not cuda.attend(*tensors, seed=2, block=20, near=30, **GIVEN).requires_grad
    assert not eager(tensors, 2, block=20, near=30).requires_grad


@pytest.mark.parametrize("block", [N_Q, N_Q + 1, 2**24])
def test_counts_of_one_block(block):
    with counting() as counts:
        eager(inputs(batch=2), 0, block=block, near=30)
    # The centre meets all keys; 7 tiles of 32 rows the near keys, each query the far key.
    assert counts.kernel_evaluations == 2 * (N_K + 224 * 30 + N_Q)
    # There is nothing to cluster.
    assert counts.other_products == 0


def test_counts_of_blocks(recorded):
    for _ in range(2):  # the second time, nothing but a replay
        with counting() as counts:
            cuda.attend(*inputs(), seed=0, block=20, near=30, **GIVEN)
        # Eleven clusters fill up to (203 + 11 * 31) // 32 = 17 tiles.
        assert counts.kernel_evaluations == 11 * N_K + 544 * 30 + N_Q
        # 203 // 33 = 6: k-means sees 34 queries, twice.
        assert counts.other_products == 11 * (N_Q + 2 * 34)


OURS = {"scale": 0.4, "block": 20, "near": 30, "samples": 16, "iterations": 2, "sampled": 3}


def self_attention(n=160, d=8, d_v=2):
    """Queries, keys and values of one sequence, float32 and (1, n, width)."""
    generator = torch.Generator().manual_seed(4)
    q, k = (0.9 * torch.randn(1, n, d, generator=generator) for _ in range(2))
    return q, k, torch.randn(1, n, d_v, generator=generator) + k[..., :1]


@pytest.fixture
def all_estimates(monkeypatch):
    """Include estimates expected to be so far off that their rows are recomputed."""
    monkeypatch.setattr("approxkmv.attention.blocks.reach._OFF", 1e9)


@pytest.mark.slow
@pytest.mark.usefixtures("all_estimates")
@pytest.mark.parametrize("d_v", [1, 2, 5])
@pytest.mark.parametrize("keys", ["as many", "fewer", "the queries"])
def test_numerators_and_row_sums_are_unbiased(keys, d_v):
    """20 fixed combinations of the rows of each sum, within 4.5 standard errors over 200 seeds.

    False alarms: 120 normal variables pass 4.5 with probability under 1e-3; the seeds are fixed.
    """
    q, k, v = self_attention(d_v=d_v)
    if keys == "fewer":
        k, v = k[:, :130], v[:, :130]
    elif keys == "the queries":
        k = q = 1.6 * q
    n_q, n_k = q.shape[1], k.shape[1]
    logits = OURS["scale"] * q[0].double() @ k[0].double().mT
    # The sums are of keys less their mean.
    log_sum = (logits - OURS["scale"] * q[0].double() @ k[0].double().mean(0).unsqueeze(1)).logsumexp(1)
    right = torch.cat([torch.ones(n_q, 1).double(), logits.softmax(1) @ v[0].double()], 1)
    found = []
    rest = {name: OURS[name] for name in ("scale", "samples")}
    clustering = Clustering(**{name: value for name, value in OURS.items() if name not in rest})
    for seed in range(200):
        random = ours.random_inputs(q, OURS["block"], OURS["samples"], torch.Generator().manual_seed(seed))
        numerators, row_sums, logs = ours.sums(
            q, k, v, *random, clustering=clustering, with_own_keys=n_q == n_k, **rest
        )
        both = torch.cat([row_sums.unsqueeze(2), numerators[..., :-1]], 2)[0].double()
        found.append(both * (logs[0].double() - log_sum).exp().unsqueeze(1))
    found = torch.stack(found)
    signs = 2.0 * torch.randint(2, (20, n_q), generator=torch.Generator().manual_seed(5)).double() - 1
    signs[0] = 1.0
    combined = torch.einsum("cn,snw->scw", signs, found)
    gap = combined.mean(0) - torch.einsum("cn,nw->cw", signs, right)
    error = combined.std(0) / 200**0.5
    assert bool((gap.abs() < 4.5 * error).all()), (gap / error).abs().max()
    # The test could have seen a bias of one part in a hundred of the row sums.
    assert float(error[0, 0]) * 4.5 < 0.01 * n_q


def test_error_falls_as_one_over_the_root_of_the_budget():
    """Sixteen times the samples, a quarter of the deviation; 60 seeds know it to about a tenth."""
    q, k, v = self_attention()
    right = (OURS["scale"] * q.double() @ k.double().mT).softmax(2) @ v.double()
    gaps = []
    for samples in (8, 128):
        given = {**OURS, "directions": 0, "samples": samples}
        answers = torch.stack([ours.attend(q, k, v, seed=seed, **given) for seed in range(60)]).double()
        gaps.append(float((answers - right).square().mean().sqrt()))
    assert 2.8 < gaps[0] / gaps[1] < 5.7


@pytest.mark.usefixtures("all_estimates")
def test_the_own_key_is_exact_where_it_matters_most():
    """K = Q: a query's own key outweighs the others. One query more, and no key is a query's own."""
    q = 1.3 * torch.randn(1, 300, 12, generator=torch.Generator().manual_seed(0))
    v = torch.randn(1, 300, 1, generator=torch.Generator().manual_seed(1))
    right = (q.double() @ q.double().mT).softmax(2) @ v.double()
    given = {**OURS, "scale": 1.0, "block": 30, "near": 40, "directions": 0}
    gaps = []
    for queries in (q, torch.cat([q, q[:, :1]], 1)):
        answers = [ours.attend(queries, q, v, seed=seed, **given)[:, :300] for seed in range(5)]
        gaps.append(sum(float((answer - right).norm() / right.norm()) for answer in answers) / 5)
    assert gaps[0] < 0.25 < 2 * gaps[0] < gaps[1]


@pytest.mark.parametrize("d_v", [1, 2, 12])
@pytest.mark.parametrize("method", [cuda, ours])
def test_an_offset_of_the_values_moves_the_answer_by_it(method, d_v):
    """To float32's rounding: 2^-24 of the offset for each term, whose errors may add up to some tens of them."""
    q, k, v = self_attention(d_v=d_v)
    given = {"directions": 0, **(OURS if method is ours else {**GIVEN, "block": 20, "near": 30})}
    plain, moved = (method.attend(3 * q, k, v + by, seed=0, **given) for by in (0.0, 1000.0))
    assert float((moved - 1000 - plain).abs().max()) < 3e-3


@pytest.mark.usefixtures("all_estimates")
@pytest.mark.parametrize("long", [30.0, 100.0])
@pytest.mark.parametrize("method", [cuda, ours])
def test_one_long_key_has_its_weight_in_every_row(method, long):
    """0.05 where one side has nearly all. A row is recomputed only if its sum is not positive."""
    given = {"directions": 0, **(OURS if method is ours else {**GIVEN, "block": 20, "near": 30})}
    q, k, _ = (3 * t for t in self_attention())
    k = k / 3
    k[0, 17] *= long
    weight = (0.4 * q.double() @ k.double().mT).softmax(2)[..., 17:18]
    with counting() as counts:
        out = method.attend(q, k, torch.eye(160)[None, :, 17:18], seed=0, **given)
    assert counts.recomputed_rows <= 3
    assert int((weight > 0.99).sum()) > 30
    clear = (weight - 0.5).abs() > 0.49
    assert float((out - weight)[clear].abs().max()) < 0.05


@pytest.mark.parametrize("largest", [300.0, 1e3, 1e4])
@pytest.mark.parametrize("method", [cuda, ours])
def test_the_heaviest_key_of_each_row_has_its_weight(method, largest):
    """Rows of nearly one weight. float32 knows a logit to 2^-24 of its size for each of some terms: 1 % at 10,000."""
    q, k, _ = self_attention()
    scale = largest / float((q @ k.mT).abs().max())
    given = {"directions": 0, **(OURS if method is ours else {**GIVEN, "block": 20, "near": 30}), "scale": scale}
    out = method.attend(q, k, torch.eye(160)[None], seed=0, **given)
    assert float((out - (scale * q.double() @ k.double().mT).softmax(2)).abs().max()) < 0.02


def test_a_row_far_from_its_block_is_made_exactly():
    q, k, v = inputs()
    q[0, 5] *= 300
    given = {**GIVEN, "block": 20, "near": 30}
    assert (
        abs(float(cuda.attend(q, k, v, seed=0, **given)[0, 5, 0] - (0.4 * q @ k.mT).softmax(2)[0, 5] @ v[0, :, 0]))
        < 1e-4
    )


def test_approxkmv_by_a_graph_is_approxkmv_without(recorded):
    tensors = self_attention()
    given = {**OURS, "directions": 0}
    answers = [ours.attend(*tensors, seed=seed, **given) for seed in range(3)]
    assert len(recorded) == 1
    with pytest.MonkeyPatch.context() as without_graphs:
        without_graphs.setattr(graphs, "_has_graphs", lambda device: False)
        for seed, answer in enumerate(answers):
            assert torch.equal(answer, ours.attend(*tensors, seed=seed, **given))
    assert not torch.equal(answers[0], answers[1])


def test_a_centre_without_queries_stays_where_it_is():
    """The second, which is the first one's equal, has none at first; then it is the nearest."""
    q = torch.tensor([5.0, 5.0, 5.0, 0.1]).view(1, 4, 1)
    labels = expansion.labels_of_queries(q, torch.ones(1, 1, 1), torch.tensor([0]), 2, 1, 4)
    assert labels.tolist() == [[1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("usual", "long", "number", "apart"),
    [(0.5, 4.1, 2, 2), (0.5, 3.9, 2, 0), (0.5, 4.1, 3, 0), (2, 8.1, 2, 2), (2, 7.9, 2, 0)],
)
def test_keys_stand_apart_by_four_nats_and_four_times_the_others(usual, long, number, apart):
    """At most one key in sixteen, here two."""
    keys = torch.full((1, 32, 1), float(usual))
    keys[0, :number] = long
    assert int(expansion.stand_apart(torch.tensor([[[1.0], [-1.0]]]), keys).sum()) == apart


def test_the_clustering_of_a_call():
    """No more queries in a block than there are; exact where near keys are all keys, or blocks are of one query."""
    given = {"near": 30, "directions": 8, "iterations": 2, "sampled": 3}
    found = expansion.clustering_for({**given, "block": 2**24}, N_Q, N_K)
    assert (found.block, found.directions) == (N_Q, 0)
    assert expansion.clustering_for({**given, "block": 20, "near": N_K - 1}, N_Q, N_K)
    assert expansion.clustering_for({**given, "block": 20, "near": N_K}, N_Q, N_K) is None
    assert expansion.clustering_for({**given, "block": 20}, 1, N_K) is None


def test_an_own_key_without_weight_is_not_taken_for_near():
    q, k, v = self_attention()
    clustering = Clustering(block=160, near=30, iterations=1, sampled=3)
    e = expansion.expand(q, k, v, torch.tensor([0]), clustering, scale=0.4, products=torch.float32)
    e.weights.mul_(0.0)
    near = e.own_keys().log[0] == -torch.inf
    assert near.nonzero().flatten().tolist() == e.chosen[0, 0].sort().values.tolist()


def test_lost_rows_are_made_exactly_and_no_others(monkeypatch):
    """Some rows at a time, and whichever of their columns is lost."""
    monkeypatch.setattr(expansion, "_EXACT_LOGITS", 2 * N_K)
    q, k, v = inputs(batch=2)
    v = torch.cat([v, v + 1], 2).bfloat16()
    out = torch.zeros(2, N_Q, 2).bfloat16()
    out[0, [3, 5, 8], 0], out[1, 7] = torch.nan, torch.inf
    lost = ~out.isfinite().all(2)
    with counting() as counts:
        out = expansion.exactly_where_lost(out, q, k, v, 0.4)
    assert (counts.recomputed_rows, counts.kernel_evaluations) == (4, 4 * N_K)
    right = (0.4 * q @ k.mT).softmax(2) @ v.float()
    assert torch.allclose(out[lost].float(), right[lost], rtol=2**-8, atol=1e-6)
    assert not out[~lost].any()


@pytest.mark.parametrize("samples", [64, 3])
@pytest.mark.parametrize("variances", [(0.1, 1.0, 2.0), (0.0, 9.0, 12.0), (0.0, 0.0, 0.0)])
def test_a_clusters_samples_follow_the_deviation_of_its_rows(variances, samples):
    """Equally many where no row deviates; at least four, but no more than asked for, and at most twice the average."""
    labels = torch.arange(3).repeat_interleave(torch.tensor([10, 10, 20]))[None]
    given = {"variances": torch.tensor(variances)[labels], "log_weight": torch.zeros(1, 40)}
    row_sums = torch.ones(1, 40)
    # Half of each row's weight is light, and all of the last row's, whose sum is lost
    row_sums[0, -1] = torch.nan
    e = SimpleNamespace(tiles=expansion.Tiles.of(labels, 3), **given)
    found = ours.budgets(e, row_sums, torch.zeros(1, 40), samples).flatten()
    s = torch.tensor(variances).double().clamp_max(10)
    deviation = (torch.tensor([0.25, 0.25, 0.95 * 0.25 + 0.05]) * (s.exp() - 1 - s)).sqrt()
    right = samples * deviation / ((deviation * torch.tensor([10, 10, 20])).sum() / 40)
    right = right.nan_to_num(samples).clamp(min(4, samples), 2 * samples).round()
    assert float((found - right).abs().max()) <= (0 if float(s.max()) == 0 else 1)


@pytest.mark.parametrize("method", [cuda, ours])
def test_answers_are_of_the_type_of_the_values(method):
    given = {"directions": 0, **(OURS if method is ours else {**GIVEN, "block": 20, "near": 30})}
    assert method.attend(*(t.bfloat16() for t in inputs()), seed=0, **given).dtype == torch.bfloat16


def test_a_near_key_is_never_drawn():
    """Nor by the lowest of all random numbers, though the first keys are near."""
    q, k, v = inputs()
    k[0, :30] *= 3
    first = torch.zeros(1, dtype=torch.int64)
    clustering = Clustering(block=N_Q, near=30, iterations=1, sampled=3)
    points = torch.zeros(1, 1, 16, dtype=torch.float64)
    sums = ours.sums(q, k, v, first, points, clustering=clustering, scale=0.4, samples=16, with_own_keys=False)
    assert all(t.isfinite().all() for t in sums)


def test_rows_of_noise_are_made_exactly(monkeypatch):
    tensors = inputs(batch=2)

    def sums(q, k, v, *random, **given):
        row_sums = torch.ones(2, N_Q)
        row_sums[1, 5:8] = -1.0
        row_sums[1, 8] = 0.9 / MOST_PARTS
        return torch.ones(2, N_Q, 2), row_sums, torch.zeros(2, N_Q)

    monkeypatch.setattr(ours, "sums", sums)
    out = ours.attend(*tensors, seed=0, directions=0, **OURS)
    q, k, v = tensors
    right = (OURS["scale"] * q @ k.mT).softmax(2) @ v
    mean = v.mean(1, keepdim=True)
    made = (out - mean - 1).abs() > 1e-5
    assert made.nonzero().tolist() == [[1, i, 0] for i in range(5, 9)]
    # Rounding of sums of 150 terms
    assert torch.allclose(out[made], right[made], atol=1e-5)


def test_counts_of_approxkmv():
    with counting() as counts:
        ours.attend(*inputs(), seed=0, directions=0, **OURS)
    # Eleven clusters in up to 17 tiles; near keys, room for twice the samples, and the far key.
    assert counts.kernel_evaluations == 11 * N_K + 544 * (30 + 32) + N_Q
    assert counts.other_products == 11 * (N_Q + 2 * 34)
    with counting() as counts:
        ours.attend(*self_attention(), seed=0, directions=0, **{**OURS, "block": 160})
    # One block: no more room than samples. Each query has a key of its own.
    assert counts.kernel_evaluations == 160 + 160 * (30 + 16 + 1 + 1)


@pytest.mark.parametrize("make", [inputs, self_attention])
def test_blocks_of_one_query_are_exact_as_on_a_cpu(make):
    """Their centres would meet all keys, and their bits and samples take 7 GB at 131,072 queries."""
    q, k, v = make()
    right = (0.4 * q @ k.mT).softmax(2) @ v
    for attend, given in ((cuda.attend, GIVEN), (ours.attend, {**OURS, "directions": 0})):
        with counting() as counts:
            assert torch.equal(attend(q, k, v, seed=0, **{**given, "block": 1, "near": 30}), right)
        assert counts.kernel_evaluations == q.shape[1] * k.shape[1]
        assert counts.other_products == 0


def test_first_centres():
    """Every 203 // 11 = 18th query, starting at the first modulo 18."""
    q, k, _ = inputs()
    spread = k.square().mean(1, keepdim=True)
    found = [expansion.labels_of_queries(q, spread, torch.tensor([first]), 11, 2, 3) for first in (0, 5, 18)]
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize(("n", "clusters"), [(203, 11), (64, 1), (1, 1), (40, 40), (100, 7)])
def test_a_tile_holds_queries_of_one_cluster(n, clusters):
    """Each query once, also with empty clusters, and no more tiles than memory is allocated for."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(clusters, (3, n), generator=generator) if n > clusters else torch.arange(n).repeat(3, 1)
    labels[0] = labels[0].clamp_max(clusters // 2)
    tiles = expansion.Tiles.of(labels, clusters)
    assert tiles.queries.shape == (3, expansion.most_tiles(n, clusters), expansion.TILE)
    for e in range(3):
        assert tiles.queries[e].flatten().sort().values[-n:].tolist() == list(range(n))
        for rows, cluster in zip(tiles.queries[e], tiles.clusters[e], strict=True):
            assert set(labels[e, rows[rows >= 0].long()].tolist()) <= {int(cluster)}
    assert torch.equal(tiles.counts.long(), torch.stack([one.bincount(minlength=clusters) for one in labels]))


def clustered_inputs(n=8192, d=32, seed=0):
    """Queries and keys around common centres, and a value that follows the keys."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(n // 90, d, generator=generator)
    q, k = (
        centres[torch.randint(len(centres), (n,), generator=generator)] + 0.7 * torch.randn(n, d, generator=generator)
        for _ in range(2)
    )
    return q[None], k[None], (k[:, :1] + 0.5 * torch.randn(n, 1, generator=generator))[None]


def test_clusters_are_not_cut():
    """The answers are those of the CPU's blocks, which are whole clusters: a tenth of the error covers their starts."""
    q, k, v = clustered_inputs(2048)
    scale = 32**-0.5
    right = (scale * q @ k.mT).softmax(2) @ v
    given = {"block": 128, "near": 128, "iterations": 3, "sampled": 16, "products": "float32", "directions": 32}
    answers = [
        cuda.attend(q, k, v, scale=scale, seed=0, **given),
        get("local-expansion").compute(q, k, v, scale=scale, seed=0, **given),
    ]
    on_cuda, on_cpu = (float((answer - right).norm()) for answer in answers)
    assert on_cuda < 1.1 * on_cpu


def test_a_kernel_too_large_for_the_chip_is_unavailable(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            def launch(*_, **__):
                raise triton.OutOfResources(300_000, 232_448, "shared memory")

            return launch

    monkeypatch.setattr(kernels, "_exact_kernel", Kernel())
    monkeypatch.setattr(kernels, "exact", EXACT)
    with pytest.raises(
        UnavailableError, match="more shared memory than cpu has: 300000, but there are 232448"
    ) as error:
        kernels.exact(*inputs(), 0.4)
    assert "\n" not in str(error.value)
    for d, d_v in ((257, 1), (1, 257)):
        with pytest.raises(UnavailableError, match="up to 256 columns"):
            kernels.exact(torch.ones(1, 5, d), torch.ones(1, 5, d), torch.ones(1, 5, d_v), 0.4)


def test_kernels_run_on_the_device_of_their_inputs(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: current.append(device) or nullcontext())
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        with kernels.on_device(device):
            pass
    assert current == [torch.device("cuda", 1), -1]


def test_rows_are_widened_to_whole_sixteens():
    for d, width in ((1, 16), (16, 16), (24, 32), (100, 112)):
        wide = kernels.widened(torch.ones(2, 3, d), 16)
        assert wide.sum(2).tolist() == [[d] * 3] * 2
        assert wide.shape[2] == width


KERNELS = pytest.mark.parametrize("name", ["_exact_kernel", "_listed_kernel"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


def spilled(made):
    """Bytes of a thread's stack, which only spills take."""
    if not ahead_of_time.DISASSEMBLER.is_file():
        pytest.skip("Triton came without cuobjdump, which reads the registers of a compiled kernel")
    return ahead_of_time.resources(made)[1]


@compiles
@DTYPES
@KERNELS
@pytest.mark.slow
def test_the_widest_inputs_fit_on_the_chip(name, dtype):
    for d_v in (1, 256):
        assert ahead_of_time.of_exact_or_listed(name, 256, d_v, dtype).metadata.shared <= SHARED


@compiles
@DTYPES
@KERNELS
@pytest.mark.slow
def test_inputs_of_usual_widths_fit_on_smaller_chips(name, dtype):
    for d_v in (1, 128):
        made = ahead_of_time.of_exact_or_listed(name, 128, d_v, dtype, capability=89, num_stages=1)
        assert made.metadata.shared <= LEAST_SHARED


def test_what_does_not_fit_is_launched_without_pipelined_loads():
    from approxkmv.compute.launching import launched

    stages = []

    class Kernel:
        def __getitem__(self, grid):
            def launch(*_, num_stages=3):
                stages.append((grid, num_stages))
                if num_stages > 1:
                    raise triton.OutOfResources(147_456, LEAST_SHARED, "shared memory")

            return launch

    launched(Kernel(), (2, 3), torch.ones(1))
    assert stages == [((2, 3), 3), ((2, 3), 1)]


@compiles
@DTYPES
@KERNELS
@pytest.mark.slow
@pytest.mark.parametrize(("d", "d_v"), [(64, 1), (64, 64), (100, 1), (100, 100)])
def test_no_kernel_spills_registers(name, d, d_v, dtype):
    made = ahead_of_time.of_exact_or_listed(name, d, d_v, dtype)
    # Triton 3.6 spills a few of the widest near keys in float32 as long as their loads are pipelined.
    widest = name == "_listed_kernel" and (d_v, dtype) == (100, torch.float32)
    assert spilled(made) <= (64 if widest and triton.__version__.startswith("3.6.") else 0)
    assert "cp.async" in made.asm["ptx"]
    assert "serialized" not in ahead_of_time.remarks(made)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "given"),
    [
        *((name, {}) for name in ahead_of_time.FUSED),
        *((name, {"summing": False}) for name in ("nearest_kernel", "means_kernel", "rows_kernel")),
        *((name, {"clusters": 1}) for name in ("sample_kernel", "far_kernel")),
    ],
)
@pytest.mark.parametrize(("d", "d_v"), [(64, 1), (64, 64), (100, 1), (100, 100), (64, 128), (128, 128)])
def test_no_kernel_of_the_fused_form_spills_registers(name, given, d, d_v):
    made = ahead_of_time.of_the_fused_form(name, d, d_v, **given)
    assert spilled(made) == 0
    assert made.metadata.shared <= SHARED
    # Products of a step run together: else each waits until the one before is done.
    assert "serialized" not in ahead_of_time.remarks(made)


@compiles
def test_one_compilation_serves_inputs_of_many_lengths():
    """A stage of benchmarks/gpu.py compiled most kernels in three to five forms, for lengths in 16s, others, and 1."""
    for name, module in ahead_of_time.FUSED.items():
        numbers = [one for one in getattr(module, name).params if not one.is_constexpr and "pointer" not in one.name]
        own = {one.name for one in numbers if not one.do_not_specialize}
        # Strides of rows, and what is no length
        assert own <= {"padded", "piece", "room", "sample", "words"} | set(ahead_of_time.TYPES), name


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(("d", "d_v"), [(64, 1), (64, 64), (100, 1), (100, 100)])
def test_the_products_with_the_weights_run_together(d, d_v):
    """Of the four of a step of the pass over all keys: the compiler waits for each of the two that make the logits."""
    made = ahead_of_time.of_the_fused_form("far_kernel", d, d_v)
    order = re.findall(r"wgmma\.(commit|wait)_group", made.asm["ptx"])
    # The last wait stands behind the loop.
    assert order == ["commit", "wait", "commit", "wait", "commit", "commit", "wait", "wait"]


@compiles
@pytest.mark.slow
# The widest heads, of Gemma, have loads that are not pipelined: see compute/launching.py.
@pytest.mark.parametrize(("width", "options"), [(64, {}), (128, {}), (256, {"num_stages": 1})])
def test_the_kernel_of_statistics_spills_no_registers(width, options):
    from approxkmv.statistics import largest_cuda as largest

    kernel = largest._strip_kernel
    constants = {"LISTS": largest._LISTS, "BM": largest._ROWS, "BN": largest._KEYS, "BD": width}
    numbers = [a for a in kernel.arg_names if "pointer" not in a]
    made = ahead_of_time.compiled(kernel, constants, {}, numbers, **options)
    assert spilled(made) == 0
    assert made.metadata.shared <= SHARED
    if width <= 128:
        made = ahead_of_time.compiled(kernel, constants, {}, numbers, capability=89, num_stages=1)
        assert made.metadata.shared <= LEAST_SHARED


class Launches(TorchDispatchMode):
    """Counts the operations that are at least one kernel each on a GPU: all but views and allocations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        free = func.is_view or func.overloadpacket.__name__ in ("empty", "empty_like", "new_empty", "_unsafe_view")
        self.count += not free
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("near", "n_k"), [(1, 100), (4, 131_072), (8, 8193), (20, 170), (128, 1100), (512, 131_072), (2048, 10**6)]
)
def test_a_sample_is_small_and_a_list_long_enough(near, n_k):
    """More keys than `room` are above the rank-th of a sample as often as a Poisson variable is below `rank`."""
    stride, rank, room = fused.listing(near, n_k)
    assert n_k // stride <= 8192
    assert stride == -(-n_k // 8192) or rank >= 8 or stride == 1
    assert rank >= 1
    assert rank == 1 or abs(stride * rank - near) <= stride / 2
    mean = room / stride
    assert sum(math.exp(i * math.log(mean) - mean - math.lgamma(i + 1)) for i in range(rank)) < 2e-6
    assert room % 64 == 0


def test_what_has_a_fused_form():
    """Up to 128 columns, but not two values, whose tilt is no one row; a threshold within the half of the sample."""
    sizes = [(1100, 128, 1, 40), (1100, 20, 128, 40), (1100, 20, 3, 40), (170, 20, 1, 80)]
    assert all(fused.fits(*size) for size in sizes)
    sizes = [(1100, 129, 1, 40), (1100, 20, 129, 40), (1100, 20, 2, 40), (170, 20, 1, 90)]
    assert not any(fused.fits(*size) for size in sizes)


@pytest.mark.parametrize(("keys", "own"), [(150, 0), (N_Q, N_Q)])
def test_evaluations_of_the_fused_form(keys, own):
    """At eleven centres all keys, one in three again, and 30 near ones; 30 in 17 tiles of 32, the far key, its own."""
    at_centres = 11 * (keys + keys // 3 + 30)
    assert fused.evaluations(2, N_Q, keys, 11, 30) == 2 * (at_centres + 544 * 30 + N_Q + own)


@pytest.mark.parametrize(("clusters", "kind"), [(2**15 - 1, torch.int16), (2**15 + 5, torch.int32)])
def test_labels_of_many_clusters_have_four_bytes(monkeypatch, clusters, kind):
    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: None

    for name in ("means_kernel", "nearest_kernel"):
        monkeypatch.setattr(clustering, name, Kernel())
    q = torch.ones(1, clusters, 1)
    labels, _ = clustering.labels_of_queries(q, SimpleNamespace(query_mean=0, weight=0), None, clusters, 1, 1)
    assert labels.dtype == kind
    each = torch.arange(clusters)[None]
    tiles = expansion.Tiles.of(each, clusters)
    assert torch.equal(tiles.queries[..., 0], each.int())


def test_kernels_per_call(monkeypatch):
    """They do not depend on sizes, and docs/gpu.md says how many there are."""
    document = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    q, k, v = self_attention(d=16, d_v=1)
    first = torch.zeros(1, dtype=torch.int64)

    def listed(q, *others):
        return q[..., :1], q[..., 0], q[..., 0]

    class Kernel:
        launched = 0

        def __getitem__(self, grid):
            Kernel.launched += 1
            return lambda *_, **__: None

    for name, module in ahead_of_time.FUSED.items():
        monkeypatch.setattr(module, name, Kernel())
    monkeypatch.setattr(kernels, "listed", listed)
    for block, label in ((160, "one block"), (20, "blocks")):
        one = {"clustering": Clustering(block=block, near=30, iterations=3, sampled=3), "scale": 0.4}
        with Launches() as few:
            Kernel.launched = 0
            fused.steps(q, k, v, first, **one)
        with Launches() as local:
            cuda.steps(q, k, v, first, products=torch.float32, **one)
        points = torch.zeros(1, -(-160 // block), 16, dtype=torch.float64)
        with Launches() as sampling:
            ours.steps(q, k, v, first, points, samples=16, with_own_keys=True, **one)
        # The Triton kernels: those of the fused form; once over near keys, in `approxkmv` once more over the sample.
        line = f"| {label} | {few.count + Kernel.launched} | {local.count + 1} | {sampling.count + 2} |"
        assert line in document, f"docs/gpu.md lacks the line {line}"
