"""Causal attention in chunks of queries: near the exact answer, blind to later keys, exact where blocks lose a row."""

import pytest
import torch

from approxkmv.attention import get
from approxkmv.attention.blocks import chunks, local_expansion
from approxkmv.attention.blocks.compiled import block_loops
from approxkmv.attention.blocks.expansion import Clustering
from approxkmv.attention.blocks.reach import stand_apart
from approxkmv.attention.causal import Flash
from approxkmv.compute import loops as compute_loops
from approxkmv.compute.counting import counting

pytestmark = pytest.mark.usefixtures("one_thread")


def heads(n, d, d_v, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (spread * torch.randn(n, d, generator=generator) for _ in range(2))
    return q, k, torch.randn(n, d_v, generator=generator) + 0.3 * k[:, :1]


def exact(q, k, v, scale=1.0):
    logits = scale * q.double() @ k.double().mT
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1) @ v.double()


@pytest.fixture(params=["compiled", "torch"])
def loops(request, monkeypatch):
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(compute_loops, "numba_works", lambda: False)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 128 queries, or 256 of more than 512, where a user has 2,048 or 4,096."""
    monkeypatch.setattr(chunks, "EXACT_BELOW", 128)


BLOCKS = {"block": 32, "near": 32, "directions": 8}
FORMS = [
    ("approxkmv", {"samples": 256}),
    *(("local-expansion", {"products": form}) for form in ("float32", "bfloat16")),
    # One block, with compiled loops by a path of its own
    ("local-expansion", {"products": "float32", "directions": 0}),
]


def attend(name, q, k, v, scale, **given):
    """`causal` as a sweep times it, without checks of its input."""
    given = {**get(name).defaults, **BLOCKS, **given}
    return get(name).causal(q[None], k[None], v[None], scale=scale, seed=3, **given)[0]


def relative(out, right):
    return float((out.double() - right).norm() / right.norm())


@pytest.mark.usefixtures("loops", "small_chunks")
@pytest.mark.parametrize(("name", "given"), FORMS)
@pytest.mark.parametrize("d_v", [1, 2, 5, 24])
def test_chunks_approach_the_exact_answer(name, given, d_v):
    """The error falls with the near keys, to rounding; zero or the mean of the values would err far more."""
    q, k, v = heads(1100, 9, d_v, spread=0.7)
    right = exact(q, k, v)
    errors = [relative(attend(name, q, k, v, 1.0, near=near, **given), right) for near in (8, 32, 128)]
    means = v.double().cumsum(0) / torch.arange(1, 1101).unsqueeze(1)
    # Of one block, whose keys are near all its queries or none, less of the error is gone.
    assert errors[0] < (0.7 if given.get("directions") == 0 else 0.6) * relative(means, right)
    assert errors[2] < errors[0]
    # All in one chunk
    whole = attend(name, q, k, v, 1.0, near=600, **given)
    assert relative(whole, right) < (0.01 if given == {"products": "bfloat16"} else 1e-5)


@pytest.mark.usefixtures("loops", "small_chunks")
@pytest.mark.parametrize(("name", "given"), FORMS)
@pytest.mark.parametrize(("n", "d", "d_v"), [(1024, 8, 24), (1000, 9, 2), (650, 64, 64), (641, 21, 1), (900, 40, 7)])
def test_chunks_see_no_later_key(name, given, n, d, d_v):
    """Keys and values that are NaN, or others, after a chunk: its rows and all before are the same bits.

    Products of bfloat16 numbers that read past the rows of their keys would read NaN. (Without compiled loops a later
    chunk raises an exception at a NaN among the keys before it.)
    """
    q, k, v = heads(n, d, d_v)
    before = attend(name, q, k, v, 0.4, **given)
    assert bool(before.isfinite().all())
    others = torch.nan if block_loops() else 5.0
    for end, other in (((n - 1) // 256 * 256, torch.nan), (512, others), (256, others), (256, 1e6)):
        k[end:], v[end:] = other, other
        assert torch.equal(before[:end], attend(name, q, k, v, 0.4, **given)[:end])


@pytest.mark.usefixtures("loops", "small_chunks")
@pytest.mark.parametrize(("name", "given"), FORMS)
@pytest.mark.parametrize("d_v", [2, 5])
@pytest.mark.parametrize("first", [257, 300])
def test_chunks_see_no_later_value_of_their_own(name, given, d_v, first):
    """Values of 0, but for large ones from inside a chunk on: all rows before are 0."""
    q, k, v = heads(700, 9, d_v)
    v[:first], v[first:] = 0, 1e6
    out = attend(name, q, k, v, 0.4, **given)
    assert float(out[:first].abs().max()) == 0
    assert float(out[first:].abs().max()) > 1e3


@pytest.mark.usefixtures("loops", "small_chunks")
@pytest.mark.parametrize(("name", "given"), FORMS)
def test_nearly_uniform_attention_in_chunks_errs_little(name, given):
    """Blocks err by squares of logits of about 0.03, also where the keys move on after the first chunk.

    A row in which the first key of its chunk, of value 5 where others are about 1, were summed twice would err by 0.02.
    bfloat16 rounds 5 to 2^-9 of it.
    """
    q, k, v = heads(700, 9, 2, spread=0.1)
    v[[256, 512]] = 5
    q, k[256:] = q + 1, k[256:] + 0.1
    gap = (attend(name, q, k, v, 1.0, **given).double() - exact(q, k, v)).abs().max()
    assert gap < (0.01 if given == {"products": "bfloat16"} else 5e-4)


@pytest.mark.usefixtures("loops", "small_chunks")
@pytest.mark.parametrize(("name", "given"), FORMS)
def test_chunks_of_keys_that_drift(name, given):
    """Each chunk's keys lie elsewhere and weigh more than those before, to every query alike: blocks err little.

    Relative to a mean of the keys that is not theirs, a chunk's part would have up to e times its weight.
    """
    q, k, v = heads(900, 9, 2, spread=0.05)
    drift = torch.linspace(0, 2, 900)
    q[:, 0] += 1
    k[:, 0] += drift
    gap = attend(name, q, k, v + drift.unsqueeze(1), 1.0, **given).double() - exact(q, k, v + drift.unsqueeze(1))
    assert gap.abs().max() < (0.03 if given == {"products": "bfloat16"} else 3e-3)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("name", "given"), FORMS)
def test_chunks_do_not_depend_on_a_common_offset(name, given):
    """Of values, to the rounding of their sum; of keys, to that of their products, which triangles do not centre."""
    q, k, v = heads(900, 16, 5)
    right = exact(q, k, v, 0.4)
    error = relative(attend(name, q, k, v, 0.4, **given), right)
    assert relative(attend(name, q, k, v + 1e3, 0.4, **given) - 1e3, right) < 1.01 * error + 1e-3
    assert relative(attend(name, q, k, 1e9 * v, 0.4, **given) / 1e9, right) == pytest.approx(error, rel=1e-2)
    assert relative(attend(name, q, k + 2, v, 0.4, **given), right) < 1.2 * error + 0.02


@pytest.mark.usefixtures("loops", "small_chunks")
@pytest.mark.parametrize(("name", "given"), FORMS)
@pytest.mark.parametrize("at", [0, 100, 300])
def test_a_key_that_stands_apart_is_summed_exactly_in_chunks(name, given, at):
    """A key of 30 times the norm of the others, in the first chunk, whose keys give the axes, or in a later one.

    Half of the queries attend to it alone, so the error falls; it would be about one if the key were left out.
    """
    q, k, v = heads(700, 16, 5)
    without = relative(attend(name, q, k, v, 0.25, **given), exact(q, k, v, 0.25))
    k[at] *= 30
    assert len(stand_apart(q, k, 0.25)) == 1
    assert relative(attend(name, q, k, v, 0.25, **given), exact(q, k, v, 0.25)) < 0.5 * without


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("name", "given"), FORMS)
def test_rows_that_chunks_lose_are_computed_exactly(name, given):
    """Logits of up to some hundreds, of which blocks know nothing."""
    q, k, v = heads(900, 16, 5, spread=4.0)
    with counting() as counts:
        out = attend(name, q, k, v, 1.0, **given)
    assert counts.recomputed_rows > 300
    # bfloat16 rounds logits of hundreds to one
    assert relative(out, exact(q, k, v)) < (0.2 if given == {"products": "bfloat16"} else 0.02)


@pytest.mark.usefixtures("small_chunks")
def test_a_lost_row_counts_the_keys_before_its_chunk(monkeypatch):
    q, k, v = heads(900, 8, 5)

    def nothing(q, side, generator, parameters, **given):
        return torch.full((len(q), 5), torch.nan), torch.zeros(len(q))

    monkeypatch.setattr(local_expansion, "answers", nothing)
    with counting() as counts:
        out = attend("local-expansion", q, k, v, 1.0, products="float32")
    assert (out.double() - exact(q, k, v)).abs().max() < 1e-5
    assert (counts.kernel_evaluations, counts.other_products) == (900 * 901 // 2, 0)
    assert counts.recomputed_rows == 900 - 256


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_a_chunk_has_the_keys_before_it(low):
    """No more and no fewer, of which two stand apart, and logs for them as they are."""
    q, k, v = heads(500, 9, 5)
    k[[100, 300]] *= 30
    flash = Flash(q, k, v, 0.25, 128, low)
    earlier = chunks.EarlierKeys(q, k, v, flash, Clustering(directions=4))
    assert [here.start for here, _ in earlier] == [128, 256, 384]
    for here, apart in earlier:
        side, shifts = earlier.before(here, apart)
        n = here.start
        assert side.apart.tolist() == [at for at in (100, 300) if at < n]
        assert torch.equal(side.k[:, :9], k[:n])
        assert torch.equal(side.v, v[:n])
        assert torch.equal(side.values, v[:n].to(low))
        assert torch.allclose(side.keys[:, :9].float(), k[:n] - k[:128].mean(0), rtol=0.01, atol=1e-5)
        assert torch.equal(side.features[:, 4:], side.keys)
        assert torch.allclose(shifts, 0.25 * q[here] @ side.mean[:9], atol=1e-5)
        # Its spread is theirs along the first chunk's axes: keys may come to vary later.
        others = torch.tensor([at not in (100, 300) for at in range(n)])
        spread = (side.keys[others, :9].float() @ side.axes[:9]).var(0, correction=0)
        assert torch.allclose(side.spread, spread, rtol=0.02)


@pytest.mark.usefixtures("small_chunks")
def test_compiled_loops_and_torch_lose_about_the_same_rows_of_one_block(monkeypatch):
    """Their variances are estimated from other samples of the rows."""
    pytest.importorskip("numba")
    q, k, v = heads(900, 16, 5, spread=1.5)
    # The keys before each chunk have another mean.
    q, k[256:] = q + 1, k[256:] + 1
    given = {"products": "float32", "directions": 0, "near": 16}
    found = []
    for works in (True, False):
        monkeypatch.setattr(compute_loops, "numba_works", lambda works=works: works)
        with counting() as counts:
            out = attend("local-expansion", q, k, v, 0.5, **given)
        found.append((counts.recomputed_rows, relative(out, exact(q, k, v, 0.5))))
    (lost, error), (others, other) = found
    assert 50 < lost < 500
    assert lost == pytest.approx(others, rel=0.1)
    assert error == pytest.approx(other, rel=0.1)
