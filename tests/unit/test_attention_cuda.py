"""The code around the CUDA kernels, run on a CPU: graphs (recorded by a fake), counts, estimates, hardware limits."""

import pytest
import torch

from approxkmv.attention import get
from approxkmv.attention.blocks.light_keys import MOST_PARTS
from approxkmv.attention.contract import UnavailableError
from approxkmv.compute.counting import counting

triton = pytest.importorskip("triton")
cuda = pytest.importorskip("approxkmv.attention.blocks.cuda.local_expansion")
ours = pytest.importorskip("approxkmv.attention.blocks.cuda.approxkmv")
expansion = pytest.importorskip("approxkmv.attention.blocks.cuda.expansion")
graphs = pytest.importorskip("approxkmv.attention.kernels.cuda_graphs")
kernels = pytest.importorskip("approxkmv.attention.kernels.triton")

N_Q, N_K, D = 203, 150, 8
GIVEN = {"scale": 0.4, "products": "float32", "directions": 0, "iterations": 2, "sampled": 3}
# An H100 gives a block 227 KiB.
SHARED = 227 * 1024
EXACT = kernels.exact


def inputs(batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, w, generator=generator) for n, w in ((N_Q, D), (N_K, D), (N_K, 1))]


def plain_listed(q, k, v, near, extra, block, scale):
    """`triton_kernels.listed` without Triton."""
    out, total, log = torch.empty(*q.shape[:2], v.shape[2]), torch.empty(q.shape[:2]), torch.empty(q.shape[:2])
    for e in range(len(q)):
        for b in range(near.shape[1]):
            rows = slice(b * block, (b + 1) * block)
            logits = scale * q[e, rows] @ k[e, near[e, b]].mT
            logits = (logits if extra is None else logits + extra[e, b]).float()
            log[e, rows] = logits.amax(1).clamp_min(-1e30)
            weights = (logits - log[e, rows].unsqueeze(1)).exp()
            out[e, rows], total[e, rows] = weights @ v[e, near[e, b]].float(), weights.sum(1)
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
    # On the same input, the seed does something.
    assert not torch.equal(answers[0], answers[3])


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
    # The centre meets all keys; each query its near keys and the far key.
    assert counts.kernel_evaluations == 2 * (N_K + N_Q * 31)
    # 203 // 3 = 67: k-means sees the queries 0, 67, 134 and 201, twice, and all of them at the end.
    assert counts.other_products == 2 * (N_Q + 2 * 4)


def test_counts_of_blocks(recorded):
    for _ in range(2):  # the second time, nothing but a replay
        with counting() as counts:
            cuda.attend(*inputs(), seed=0, block=20, near=30, **GIVEN)
        # Eleven blocks, the last one padded: 220 queries.
        assert counts.kernel_evaluations == 11 * N_K + 220 * 31
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
    for seed in range(200):
        random = ours.random_inputs(q, OURS["block"], OURS["samples"], torch.Generator().manual_seed(seed))
        numerators, row_sums, logs = ours.sums(q, k, v, *random, with_own_keys=n_q == n_k, **OURS)
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


def test_rows_of_noise_are_made_exactly(monkeypatch):
    tensors = inputs(batch=2)
    monkeypatch.setattr(kernels, "exact", lambda q, k, v, scale: torch.full((1, q.shape[1], 1), 7.0))

    def sums(q, k, v, *random, **given):
        row_sums = torch.ones(2, N_Q)
        row_sums[1, 5:8] = -1.0
        row_sums[1, 8] = 0.9 / MOST_PARTS
        return torch.ones(2, N_Q, 2), row_sums, torch.zeros(2, N_Q)

    monkeypatch.setattr(ours, "sums", sums)
    out = ours.attend(*tensors, seed=0, directions=0, **OURS)
    assert (out == 7.0).sum() == 4
    assert bool((out[1, 5:9] == 7.0).all())


def test_counts_of_approxkmv():
    with counting() as counts:
        ours.attend(*inputs(), seed=0, directions=0, **OURS)
    # Eleven blocks, the last one padded; near keys, room for twice the samples, and the far key.
    assert counts.kernel_evaluations == 11 * N_K + 220 * (30 + 32 + 1)
    assert counts.other_products == 11 * (N_Q + 2 * 34)
    with counting() as counts:
        ours.attend(*self_attention(), seed=0, directions=0, **{**OURS, "block": 160})
    # One block: no more room than samples. Each query has a key of its own.
    assert counts.kernel_evaluations == 160 + 160 * (30 + 16 + 1 + 1)


def test_first_centres():
    """Every 203 // 11 = 18th query, starting at the first modulo 18."""
    q, k, _ = inputs()
    spread = k.square().mean(1, keepdim=True)
    orders = [expansion.order_of_queries(q, spread, torch.tensor([first]), 11, 2, 3) for first in (0, 5, 18)]
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])


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
    with pytest.raises(UnavailableError, match="up to 256 columns"):
        kernels.exact(*(t.expand(-1, -1, 257) for t in (inputs()[2],) * 3), 0.4)


@pytest.mark.skipif(kernels._INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["_exact_kernel", "_listed_kernel"])
def test_the_widest_inputs_fit_on_the_chip(name, dtype):
    """Compiled for an H100; no GPU is needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, name)
    keys = "KEYS" if name == "_exact_kernel" else "NEAR"
    for d, d_v in ((256, 1), (256, 256)):
        options = kernels._options(d, d_v, dtype)
        stages = {"num_stages": options.pop("num_stages")} if "num_stages" in options else {}
        constants = {**options, keys: 512, "BM": 64, "BN": 32 if dtype == torch.float32 or keys == "NEAR" else 64}
        pointers = dict.fromkeys(
            ("q_pointer", "k_pointer", "v_pointer"), "*fp32" if dtype == torch.float32 else "*bf16"
        )
        others = ("extra_pointer", "out_pointer", "total_pointer", "log_pointer")
        pointers |= {"near_pointer": "*i32", **dict.fromkeys(others, "*fp32")}
        constants |= {"EXTRA": True} if keys == "NEAR" else {}
        types = {**dict.fromkeys(constants, "constexpr"), **pointers, "scale": "fp32"}
        signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
        # Addresses and sizes that are multiples of 16 are what loads ahead of time need.
        numbers = [i for i, argument in enumerate(kernel.arg_names) if argument not in (*constants, "scale")]
        attributes = {(i,): [["tt.divisibility", 16]] for i in numbers}
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=stages)
        assert compiled.metadata.shared <= SHARED
