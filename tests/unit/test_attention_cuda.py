"""What surrounds the CUDA kernels, on a CPU: graphs (recorded by a stand-in), counts, limits of the chip."""

import pytest
import torch

from approxkmv.attention.contract import UnavailableError
from approxkmv.attention.counting import counting

triton = pytest.importorskip("triton")
cuda = pytest.importorskip("approxkmv.attention.local_expansion_cuda")
kernels = pytest.importorskip("approxkmv.attention.triton_kernels")

N_Q, N_K, D = 203, 150, 8
GIVEN = {"scale": 0.4, "products": "float32", "directions": 0, "iterations": 2, "sampled": 3}
# An H100 gives a block 227 KiB.
SHARED = 227 * 1024


def inputs(batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, w, generator=generator) for n, w in ((N_Q, D), (N_K, D), (N_K, 1))]


def plain_listed(q, k, v, near, far_log, far_value, block, scale):
    """`triton_kernels.listed` without Triton."""
    out = torch.empty_like(far_value)
    for e in range(len(q)):
        for b in range(near.shape[1]):
            rows = slice(b * block, (b + 1) * block)
            logits = torch.cat([scale * q[e, rows] @ k[e, near[e, b]].mT, far_log[e, rows].unsqueeze(1)], 1)
            weights = logits.softmax(1)
            out[e, rows] = weights[:, :-1] @ v[e, near[e, b]] + weights[:, -1:] * far_value[e, rows]
    return out


@pytest.fixture(autouse=True)
def _without_triton(monkeypatch):
    monkeypatch.setattr(kernels, "listed", plain_listed)


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

    monkeypatch.setattr(cuda, "_record", record)
    monkeypatch.setattr(cuda, "_has_graphs", lambda device: True)
    monkeypatch.setattr(cuda, "_graphs", type(cuda._graphs)())
    return calls


def eager(tensors, seed, **given):
    with pytest.MonkeyPatch.context() as without_graphs:
        without_graphs.setattr(cuda, "_has_graphs", lambda device: False)
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
    monkeypatch.setattr(cuda, "_GRAPHS", 2)
    for near in (10, 30, 10, 50, 10, 30):
        cuda.attend(*inputs(), seed=0, block=20, near=near, **GIVEN)
    assert len(recorded) == 4  # 10, 30, 50 and 30 again


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


def test_first_centres():
    """Every 203 // 11 = 18th query from the first on, which is counted modulo 18."""
    q, k, _ = inputs()
    orders = [cuda.order_of_queries(q, k, torch.tensor([first]), 11, 2, 3) for first in (0, 5, 18)]
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])


def test_a_kernel_too_large_for_the_chip_is_unavailable(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            def launch(*_, **__):
                raise triton.OutOfResources(300_000, 232_448, "shared memory")

            return launch

    monkeypatch.setattr(kernels, "_exact_kernel", Kernel())
    with pytest.raises(UnavailableError, match="more shared memory than cpu has: 300000, there are 232448") as error:
        kernels.exact(*inputs(), 0.4)
    assert "\n" not in str(error.value)
    with pytest.raises(UnavailableError, match="up to 256 columns"):
        kernels.exact(*(t.expand(-1, -1, 257) for t in (inputs()[2],) * 3), 0.4)


@pytest.mark.skipif(kernels._INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["_exact_kernel", "_listed_kernel"])
def test_the_widest_inputs_fit_on_the_chip(name, dtype):
    """Compiled for an H100, which needs none."""
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
        pointers |= {"near_pointer": "*i32", "log_pointer": "*fp32", "value_pointer": "*fp32", "out_pointer": "*fp32"}
        types = {**dict.fromkeys(constants, "constexpr"), **pointers, "scale": "fp32"}
        signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
        # Addresses and sizes that are multiples of 16 are what loads ahead of time need.
        numbers = [i for i, argument in enumerate(kernel.arg_names) if argument not in (*constants, "scale")]
        attributes = {(i,): [["tt.divisibility", 16]] for i in numbers}
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=stages)
        assert compiled.metadata.shared <= SHARED
