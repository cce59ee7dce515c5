"""Statistics of attention in tiles, against the whole n x n matrix in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from approxkmv import attention_statistics
from approxkmv.errors import InputError
from approxkmv.statistics import attention, head_statistics, row_loops, rows, spectrum
from approxkmv.statistics.streaming import length_statistics

# What is promised of float32 products with logits up to 30, and of float64 products with logits up to 10^4.
SINGLE, DOUBLE = 1e-5, 1e-6
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
PER_ROW = ("entropy", "support", "largest_weight", "first_mass", "sink_mass")
PER_HEAD = ("mean_entropy", "entropy_quantiles", "ratio", "softmax_ratio", "log_next", "log_double", "column_norm")


def entries(q, k, *, scale=None, seen=None, bias=None, softcap=None, sinks=None):
    """Log weights (..., n_q, n_k) and log of the sinks' shares (..., n_q), and log K, in float64, all of them held."""
    q, k = torch.as_tensor(q).double(), torch.as_tensor(k).double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if k.ndim > 2:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    x = scale * q @ k.mT
    if softcap is not None:
        x = softcap * (x / softcap).tanh()
    if bias is not None:
        x = x + torch.as_tensor(bias).double()
    if seen is not None:
        x = x.masked_fill(~torch.as_tensor(seen), -torch.inf)
    sink = torch.full((*x.shape[:-1], 1), -torch.inf, dtype=torch.float64)
    if sinks is not None:
        sink = torch.as_tensor(sinks).double()[..., None, None].expand(*x.shape[:-1], 1)
    log_p = torch.cat([x, sink], -1).log_softmax(-1).nan_to_num(nan=-torch.inf)
    return log_p[..., :-1], log_p[..., -1], x - 0.5 * scale * q.square().sum(-1, keepdim=True)


def entropy_of(log_p):
    """(..., n): sum - p log p, relative to itself also where one p rounds to 1; 0 for a row without weights."""
    top, place = log_p.max(-1, keepdim=True)
    below = top - log_p
    others = (-below).exp().scatter(-1, place, 0.0)
    moment = (others * below).nan_to_num(nan=0.0).sum(-1)
    found = others.sum(-1).log1p() + moment / (1.0 + others.sum(-1))
    return found.where(top[..., 0] > -torch.inf, 0.0)


def ratios(logs):
    """c and the order ratios of a head's entries: those that exist are sorted."""
    n = logs.shape[-1]
    values = logs.flatten(-2).sort(-1, descending=True).values
    c = (values[..., n:].logsumexp(-1) - values[..., :n].logsumexp(-1)).exp()
    return c, values[..., n - 1] - values[..., n], values[..., n - 1] - values[..., 2 * n - 1]


def reference(q, k, **options):
    """Everything by its definition."""
    log_p, log_sink, log_k = entries(q, k, **options)
    p, sink = log_p.exp(), log_sink.exp()
    entropy = entropy_of(torch.cat([log_p, log_sink.unsqueeze(-1)], -1))
    exists = p.sum(-1) + sink > 0
    kept = torch.where(exists, entropy, torch.nan)
    c, following, double = ratios(log_k)
    return {
        "entropy": entropy,
        "support": entropy.exp() * exists,
        "largest_weight": p.amax(-1),
        "first_mass": p[..., 0],
        "sink_mass": sink,
        "mean_entropy": kept.nanmean(-1).nan_to_num(),
        "entropy_quantiles": torch.from_numpy(
            np.nan_to_num(np.moveaxis(np.nanquantile(kept.numpy(), QUANTILES, axis=-1), 0, -1))
        ),
        "ratio": c,
        "softmax_ratio": ratios(log_p)[0],
        "log_next": following,
        "log_double": double,
        "column_norm": p.shape[-2] * p.square().sum(-2).amax(-1),
        "stable_rank": p.square().sum((-2, -1)) / torch.linalg.matrix_norm(p, 2).square(),
    }


def agree(found, wanted, tolerance, names=(*PER_ROW, *PER_HEAD)):
    for name in names:
        got, right = torch.as_tensor(getattr(found, name)), wanted[name]
        assert got.dtype == torch.float64
        assert got.shape == right.shape, name
        # Relative; absolute for logarithms, which are near 0 where entries are almost equal, and where float64 ends.
        torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance if name.startswith("log") else 1e-290)
    torch.testing.assert_close(torch.as_tensor(found.stable_rank), wanted["stable_rank"], rtol=0.01, atol=0)


def head(seed, *shape, largest=30.0, offset=0.0):
    """Queries and keys whose logits reach up to `largest`, as float32."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    k += offset * torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    longest = (shape[-1] ** -0.5 * q @ k.mT).abs().amax()
    return (q * (largest / longest).sqrt()).float(), (k * (largest / longest).sqrt()).float()


CAUSAL = torch.ones(700, 700, dtype=torch.bool).tril()
HEADS = {
    "diffuse": head(0, 700, 64, largest=1.0),
    "ordinary": head(1, 700, 64, largest=10.0),
    "sharp": head(2, 700, 64),
    "an offset of the keys": head(3, 700, 128, offset=1.0),
    "narrow": head(4, 700, 3),
    "all equal": (torch.ones(700, 4), torch.ones(700, 4)),
    "zero": (torch.zeros(700, 4), torch.zeros(700, 4)),
    "one key for all": (torch.full((700, 8), 2.0), torch.eye(700, 8) * 9),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", HEADS)
def test_everything_by_its_definition(name, dtype):
    q, k = HEADS[name]
    agree(attention_statistics(q, k, dtype=dtype), reference(q, k), SINGLE if dtype == "float32" else DOUBLE)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sink", [None, -40.0, 50.0])
@pytest.mark.parametrize("place", [0, 300, 599])
def test_entropy_of_a_row_that_one_key_holds_is_relative_to_itself(place, sink, dtype):
    # One logit above 599 others by 1 to 60: entropies down to 1e-23.
    gaps = torch.linspace(1.0, 60.0, 9)
    bias = torch.full((9, 600), -30.0)
    bias[:, place] += gaps
    bias[:, 7] -= 1.0
    found = attention_statistics(
        torch.zeros(9, 1),
        torch.zeros(600, 1),
        bias=bias,
        sinks=None if sink is None else torch.tensor(sink),
        dtype=dtype,
    )
    logits = bias.double() if sink is None else torch.cat([bias, torch.full((9, 1), sink)], 1).double()
    torch.testing.assert_close(
        found.entropy, entropy_of(logits), rtol=SINGLE if dtype == "float32" else DOUBLE, atol=0.0
    )


@pytest.mark.parametrize("largest", [100.0, 1e4])
def test_large_logits_in_float64(largest):
    q, k = (x.double() for x in head(5, 300, 16, largest=largest))
    agree(attention_statistics(q, k, dtype="float64"), reference(q, k), DOUBLE)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        ("causal", CAUSAL),
        (7, CAUSAL & ~CAUSAL.tril(-7)),
        (700, CAUSAL),
        (10**30, CAUSAL),
        (torch.stack([torch.arange(700) // 90 * 90, torch.arange(700) + 1], 1), None),
        (CAUSAL, CAUSAL),
        (CAUSAL.numpy() & ~np.tri(700, 700, -600, dtype=bool), None),
    ],
    ids=["causal", "window", "wide window", "wider window", "chunks", "boolean", "numpy"],
)
def test_masks(mask, seen, dtype):
    q, k = HEADS["ordinary"]
    if seen is None and mask.dtype == np.bool_:
        seen = torch.from_numpy(mask)
    elif seen is None:
        place = torch.arange(700)
        seen = (place >= mask[:, :1]) & (place < mask[:, 1:])
    found = attention_statistics(q, k, mask=mask, dtype=dtype)
    agree(found, reference(q, k, seen=seen), SINGLE if dtype == "float32" else DOUBLE)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bias_cap_sinks_and_grouped_keys_of_several_leading_dimensions(dtype):
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(2, 6, 130, 16, generator=generator)
    k = torch.randn(2, 3, 130, 16, generator=generator)
    bias = torch.randn(6, 130, 130, generator=generator)
    options = {"bias": bias, "softcap": 2.0, "sinks": torch.randn(6, generator=generator), "scale": 0.9}
    found = attention_statistics(q, k, mask="causal", dtype=dtype, **options)
    wanted = reference(q, k, seen=CAUSAL[:130, :130], **options)
    agree(found, wanted, SINGLE if dtype == "float32" else DOUBLE)
    # NumPy arrays give NumPy arrays of the same numbers.
    options |= {name: options[name].numpy() for name in ("bias", "sinks")}
    arrays = attention_statistics(q.numpy(), k.numpy(), mask="causal", dtype=dtype, **options)
    for name in (*PER_ROW, *PER_HEAD, "stable_rank", "keys_per_share"):
        assert isinstance(getattr(arrays, name), np.ndarray)
        np.testing.assert_array_equal(getattr(arrays, name), getattr(found, name).numpy())


@pytest.mark.parametrize(("n_q", "n_k"), [(40, 900), (900, 40), (2, 5), (5, 2)])
def test_more_keys_than_queries_and_fewer(n_q, n_k):
    generator = torch.Generator().manual_seed(7)
    q, k = torch.randn(3, n_q, 8, generator=generator), torch.randn(3, n_k, 8, generator=generator)
    names = (*PER_ROW, "mean_entropy", "entropy_quantiles", "column_norm")
    names += ("ratio", "softmax_ratio", "log_next", "log_double") if n_q > 2 else ()
    log_p = entries(q, k)[0]
    wanted = reference(q, k) if n_q > 2 else None
    found = attention_statistics(q, k)
    if wanted is not None:
        agree(found, wanted, SINGLE, names)
    torch.testing.assert_close(found.entropy, torch.special.entr(log_p.exp()).sum(-1), rtol=SINGLE, atol=0)


def test_one_query_and_one_key():
    found = attention_statistics(torch.ones(1, 4), torch.ones(1, 4))
    assert found.entropy.tolist() == [0.0]
    assert found.support.tolist() == found.largest_weight.tolist() == found.first_mass.tolist() == [1.0]
    assert found.keys_per_share.tolist() == [[1, 1]]
    assert float(found.ratio) == float(found.softmax_ratio) == 0.0
    assert float(found.stable_rank) == pytest.approx(1.0)
    with pytest.raises(InputError, match="there are fewer than 2n = 2 entries"):
        _ = found.log_next


def test_the_first_key_never_has_more_than_the_largest_weight():
    """Its logits alone, without those of the other keys, may be rounded otherwise."""
    q, k = head(1, 700, 16)
    q, k[0] = q.abs(), k.abs().amax(0)
    found = attention_statistics(q, k)
    assert bool((found.first_mass <= found.largest_weight).all())
    assert float((found.first_mass == found.largest_weight).double().mean()) > 0.5


def test_no_heads():
    found = attention_statistics(torch.ones(0, 3, 4), torch.ones(0, 3, 4))
    for name in (*PER_ROW, *PER_HEAD, "stable_rank", "keys_per_share"):
        assert getattr(found, name).shape[0] == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_that_see_no_key(dtype):
    q, k = HEADS["ordinary"]
    seen = CAUSAL.clone()
    seen[::3] = False
    wanted = reference(q, k, seen=seen)
    tolerance = SINGLE if dtype == "float32" else DOUBLE
    agree(attention_statistics(q, k, mask=seen, dtype=dtype), wanted, tolerance)
    place = torch.arange(700)
    spans = torch.stack([torch.zeros_like(place), torch.where(place % 3 == 0, 0, place + 1)], 1)
    found = attention_statistics(q, k, mask=spans, dtype=dtype)
    agree(found, wanted, tolerance)
    assert not any(bool(getattr(found, name)[::3].any()) for name in (*PER_ROW, "keys_per_share"))
    # A sink is then all there is.
    found = attention_statistics(q, k, mask=seen, dtype=dtype, sinks=torch.tensor(-3.0))
    agree(found, reference(q, k, seen=seen, sinks=torch.tensor(-3.0)), tolerance)
    assert bool((found.sink_mass[::3] == 1).all())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_row_sees_a_key(dtype):
    q, k = HEADS["narrow"]
    found = attention_statistics(q, k, mask=torch.zeros(700, 700, dtype=torch.bool), dtype=dtype)
    for name in (*PER_ROW, "mean_entropy", "entropy_quantiles", "ratio", "softmax_ratio", "column_norm", "stable_rank"):
        assert float(getattr(found, name).abs().max()) == 0.0, name
    with pytest.raises(InputError, match="K_"):
        _ = found.log_double


def counts_by_sorting(weights, shares):
    mass = np.sort(weights, axis=-1)[..., ::-1].cumsum(-1)
    return np.stack([(mass < share * mass[..., -1:]).sum(-1) + 1 for share in shares], -1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["diffuse", "ordinary", "sharp", "narrow"])
def test_keys_that_hold_a_share(name, dtype):
    q, k = HEADS[name]
    shares = (0.5, 0.9, 0.99, 0.999)
    for mask, seen in (("none", torch.ones_like(CAUSAL)), ("causal", CAUSAL)):
        found = attention_statistics(q, k, mask=mask, shares=shares, dtype=dtype).keys_per_share
        weights = entries(q, k, seen=seen)[0].exp().numpy()
        assert found.dtype == torch.long
        # A share that is reached within a logit's rounding may be held by a key more or less.
        low, high = (counts_by_sorting(weights, [share + change for share in shares]) for change in (-2e-5, 2e-5))
        assert ((found.numpy() >= low) & (found.numpy() <= high)).all()
        # Of half the mass, and of rows on the whole, hardly any.
        assert (found.numpy() == counts_by_sorting(weights, shares)).mean() > (0.97 if dtype == "float32" else 0.9999)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_share_next_to_all_is_held_by_no_more_keys_than_are_seen(dtype):
    """The sum of all weights may miss such a share by its rounding."""
    q, k = HEADS["diffuse"]
    found = attention_statistics(q, k, mask="causal", shares=(1 - 2**-50, 1 - 2**-53), dtype=dtype).keys_per_share
    assert bool((found <= torch.arange(1, 701).unsqueeze(1)).all())
    assert bool((found.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equal_weights_are_counted_as_many(dtype):
    q, k = HEADS["zero"]
    found = attention_statistics(q, k, shares=(0.25, 0.5), mask="causal", dtype=dtype).keys_per_share
    size = torch.arange(1, 701)
    assert torch.equal(found, torch.stack([-(-size // 4), -(-size // 2)], 1))


@pytest.mark.parametrize("name", HEADS)
def test_loops_and_plain_torch_agree(name):
    q, k = HEADS[name]
    tile = (q.shape[1] ** -0.5 * q @ k.mT).masked_fill(~CAUSAL, -1e30)
    tile[5] = -1e30
    sums = []
    for form in (rows, row_loops):
        found = rows.RowSums.of_no_keys(torch.full((700,), -5e29, dtype=torch.float64))
        for part in tile.clone().split(300, 1):
            form.add_tile(part.contiguous(), found)
        sums.append(found)
    for plain, fast in zip(*(vars(s).values() for s in sums), strict=True):
        torch.testing.assert_close(fast, plain, rtol=2e-6, atol=1e-12)
    counts = [form.count_keys(tile, -1e30, (0.5, 0.9)) for form in (rows, row_loops)]
    assert float((counts[0] != counts[1]).double().mean()) < 0.01
    weights, x = tile.exp().clamp_max(1.0).view(2, 350, 700), torch.rand(2, 700)
    images = [torch.ones(2, 700), torch.ones(2, 700)]
    for form, image in zip((rows, row_loops), images, strict=True):
        form.add_gram(weights, x, image)
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


def test_as_the_statistics_of_heads_and_of_lengths_have_it():
    q, k = HEADS["ordinary"]
    found = attention_statistics(q, k, dtype="float64")
    heads = head_statistics(q, k, 700)
    whole = length_statistics(q, k)[0][0]
    assert float(found.ratio) == pytest.approx(float(heads.ratios[0]), rel=1e-8)
    assert float(found.softmax_ratio) == pytest.approx(float(heads.softmax_ratio), rel=1e-8)
    assert float(found.log_next) == pytest.approx(float(heads.log_next), abs=1e-8)
    assert float(found.log_double) == pytest.approx(float(heads.log_double), abs=1e-8)
    assert float(found.column_norm) == pytest.approx(700 ** float(heads.column_exponent), rel=1e-8)
    assert found.keys_per_share.double().mean(0).tolist() == pytest.approx(list(whole.mean_keys), rel=1e-3)


def matrices(n, seed):
    """Logits of matrices whose leading singular value is hard to find: near others, or of few rows."""
    rng = np.random.default_rng(seed)
    blocks = np.repeat(np.arange(n // 10), 10)
    band = -np.abs(np.subtract.outer(np.arange(n), np.arange(n))) / 2.0
    spread = rng.standard_normal((n, n))
    yield "identity", np.where(np.eye(n, dtype=bool), 0.0, -60.0)
    yield (
        "shifted identity and a key of some rows",
        np.where(np.roll(np.eye(n, dtype=bool), 1, 1), 0.0, -60.0)
        + 70.0 * np.outer(np.arange(n) < 3, np.arange(n) == n - 1),
    )
    yield "equal blocks", np.where(np.equal.outer(blocks, blocks), 0.0, -60.0)
    yield "band", band
    yield "wide band", band / 20
    yield "random, diffuse", spread
    yield "random, sharp", 6 * spread
    yield "random, causal", np.where(np.tri(n, dtype=bool), 3 * spread, -60.0)
    yield "keys of unequal weight", spread + 4 * rng.standard_normal(n)
    yield "sharpness by row", spread * 10 * rng.random((n, 1))


@pytest.mark.parametrize("n", [60, 500])
def test_stable_rank_to_one_percent(n, monkeypatch):
    # The larger ones in strips, which are computed again in each pass.
    monkeypatch.setattr(spectrum, "STRIP", 2**16)
    for seed in range(4 if n < 100 else 1):
        for name, bias in matrices(n, seed):
            p = torch.from_numpy(bias).softmax(-1)
            right = float(p.square().sum() / torch.linalg.matrix_norm(p, 2) ** 2)
            # All of the logits come from the bias.
            found = attention_statistics(torch.zeros(n, 1), torch.zeros(n, 1), bias=torch.from_numpy(bias))
            assert float(found.stable_rank) == pytest.approx(right, rel=0.01), name


def test_stable_rank_where_the_iteration_rests_before_its_end():
    # Diagonal blocks of equal weights: singular values near each other, of which the largest comes in late.
    rows = [53, 75, 71, 2, 25, 39, 102, 101, 6, 13, 20, 17, 14, 1, 56, 13, 88, 46, 109, 1]
    keys = [61, 177, 88, 59, 41, 45, 162, 103, 41, 14, 59, 64, 74, 94, 57, 47, 120, 83, 111, 1]
    mask = torch.block_diag(*[torch.ones(a, b) for a, b in zip(rows, keys, strict=True)]).bool()
    n_q, n_k = mask.shape
    p = mask.double() / mask.double().sum(1, keepdim=True)
    right = float(p.square().sum() / torch.linalg.matrix_norm(p, 2) ** 2)
    found = attention_statistics(torch.zeros(n_q, 1), torch.zeros(n_k, 1), mask=mask)
    assert float(found.stable_rank) == pytest.approx(right, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_stable_rank_where_the_start_is_nearly_a_smaller_singular_vector(dtype):
    """898 queries see 900 keys alike, two see one alone. P^T P = 898/900^2 1 1^T + 2 e e^T has two eigenvalues."""
    bias = torch.zeros(900, 900)
    bias[:2, 7] = 200.0
    found = attention_statistics(torch.zeros(900, 4), torch.zeros(900, 4), bias=bias, dtype=dtype)
    largest = np.linalg.eigvals(np.diag([898 / 900**2, 2.0]) @ np.array([[900.0, 1.0], [1.0, 1.0]])).max()
    assert float(found.stable_rank) == pytest.approx((898 / 900 + 2) / largest, rel=1e-2)
    assert largest == pytest.approx(2.0, rel=1e-2)


@pytest.mark.parametrize(("dtype", "sink"), [("float32", 30.0), ("float32", 100.0), ("float64", 400.0)])
def test_norms_of_what_sinks_leave_do_not_underflow(dtype, sink):
    q, k = (x.numpy() for x in head(2, 90, 8))
    found = attention_statistics(q, k, bias=np.full((90, 90), -25.0), sinks=np.array(sink), dtype=dtype)
    logits = torch.as_tensor(q).double() @ torch.as_tensor(k).double().mT / 8**0.5 - 25.0
    # All weights times exp(sink): their square has no float64 for the largest of these sinks.
    p = (logits - torch.log1p((logits - sink).exp().sum(1, keepdim=True))).exp()
    right = p.square().sum() / torch.linalg.matrix_norm(p, 2) ** 2
    assert float(found.stable_rank) == pytest.approx(float(right), rel=0.01)
    norm = 90 * p.square().sum(0).amax() * math.exp(-2 * sink)
    assert float(found.column_norm) == pytest.approx(float(norm), rel=1e-4, abs=1e-300)


def test_sinks_of_each_query():
    generator = torch.Generator().manual_seed(8)
    q, k = torch.randn(2, 30, 4, generator=generator), torch.randn(2, 20, 4, generator=generator)
    sinks = torch.randn(2, 30, generator=generator)
    found = attention_statistics(q, k, sinks=sinks, dtype="float64")
    logits = torch.cat([q.double() @ k.double().mT / 2, sinks.double().unsqueeze(-1)], -1)
    torch.testing.assert_close(found.sink_mass, logits.softmax(-1)[..., -1])
    torch.testing.assert_close(found.entropy, entropy_of(logits.log_softmax(-1)))


def test_no_shares_no_counts_and_a_change_of_an_answer_changes_no_other():
    q, k = head(2, 30, 8)
    for dtype in ("float32", "float64"):
        found = attention_statistics(q, k, shares=(), dtype=dtype)
        assert found.keys_per_share.shape == (30, 0)
        before = float(found.mean_entropy)
        found.entropy.zero_()
        assert float(found.mean_entropy) == before


def peak_memory():
    """The most memory that this process has held since clear_refs, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak of memory")
def test_memory_grows_with_n_and_not_its_square():
    q, k = head(9, 8000, 8)

    def everything(n):
        found = attention_statistics(q[:, :n], k[:, :n], mask="causal")
        return found.first_mass, found.keys_per_share, found.ratio, found.stable_rank

    everything(600)  # what numba takes to compile is not counted
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    everything(8000)
    # One float32 for each pair would be 256 MB.
    assert peak_memory() - before < 150e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": "backwards"}, "mask is 'backwards'"),
        ({"mask": 0}, "mask is 0"),
        ({"mask": True}, "mask is True"),
        ({"mask": 2.0}, "mask is 2.0"),
        ({"mask": None}, "mask is 'NoneType'"),
        ({"mask": torch.ones(5, 6, dtype=torch.bool)}, "mask has shape"),
        ({"mask": torch.ones(6, 3, dtype=torch.long)}, "mask of whole numbers"),
        ({"mask": torch.full((6, 2), 7)}, "mask of whole numbers"),
        ({"k": torch.ones(2, 2, 2, 4), "mask": torch.tensor([[1, 0], [1, 1]] * 3)}, "whole numbers 0 and 1"),
        ({"k": torch.ones(2, 2, 2, 4), "mask": np.ones((6, 2), np.uint8)}, "whole numbers 0 and 1"),
        ({"bias": torch.ones(6)[:5]}, "bias has shape"),
        ({"bias": torch.full((6, 6), torch.nan)}, "bias holds a NaN"),
        ({"bias": torch.full((6, 6), -torch.inf)}, "hide keys with mask"),
        ({"bias": "alibi"}, "bias must be"),
        ({"bias": torch.full((6, 6), -3.4e38)}, "logits may be"),
        ({"sinks": torch.ones(3)}, "sinks has shape"),
        ({"sinks": torch.tensor(torch.inf)}, "sinks holds a NaN"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"softcap": torch.nan}, "softcap is nan"),
        ({"shares": (0.5, 1.0)}, "shares is"),
        ({"shares": 0.5}, "shares is 0.5"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": 1e30}, "logits may be"),
        ({"k": torch.ones(2, 3, 6, 4)}, "differ in width"),
        ({"k": torch.ones(2, 4, 6, 5)}, "differ in width"),
        ({"k": np.ones((2, 4, 6, 4))}, "different kinds"),
        ({"k": torch.full((2, 4, 6, 4), torch.inf)}, "k holds a NaN"),
    ],
)
def test_what_is_refused(change, message):
    options = {"q": torch.ones(2, 4, 6, 4), "k": torch.ones(2, 2, 6, 4)} | change
    with pytest.raises(InputError, match=message) as error:
        attention_statistics(options.pop("q"), options.pop("k"), **options)
    assert "\n" not in str(error.value)


def test_a_window_needs_as_many_queries_as_keys():
    with pytest.raises(InputError, match="spans or a boolean array"):
        attention_statistics(torch.ones(3, 4), torch.ones(5, 4), mask="causal")


def test_what_was_given_may_change_afterwards():
    q, k = (x.clone().double() for x in HEADS["ordinary"])
    found = attention_statistics(q, k, dtype="float64")
    before = float(attention_statistics(q, k, dtype="float64").stable_rank)
    q.zero_(), k.zero_()
    assert float(found.stable_rank) == before


def test_products_beyond_float32_that_cancel():
    q, k = HEADS["ordinary"]
    plain = attention_statistics(q.double(), k.double())
    moved = attention_statistics(q.double() * 2.0**150, k.double() * 2.0**-150)
    assert torch.equal(moved.entropy, plain.entropy)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("largest", [1e8, 1e10, 1e20])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_largest_logits_of_any_size_share_their_row(sign, largest, dtype):
    """Three keys have the largest logit of a row, or one has, and all others have no weight."""
    q, k = torch.full((4, 1), sign), torch.tensor([largest, largest, 0.0, largest]).unsqueeze(1)
    found = attention_statistics(q, k, scale=1.0, dtype=dtype)
    torch.testing.assert_close(found.support, torch.full((4,), 3.0 if sign > 0 else 1.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("short", [0.0, 1e-310, 1e-170])
@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e60])
def test_zeros_beside_what_no_float32_holds(scale, short, dtype):
    """Their products are 0, and the weights equal."""
    short, long = torch.full((5, 3), short, dtype=torch.float64), torch.full((5, 3), 1e49, dtype=torch.float64)
    for q, k in ((short, long), (long, short), (short, short)):
        found = attention_statistics(q, k, scale=scale, dtype=dtype)
        for name in ("support", "largest_weight", "first_mass", "column_norm", "stable_rank"):
            right = {"support": 5.0, "largest_weight": 0.2, "first_mass": 0.2}.get(name, 1.0)
            values = getattr(found, name)
            torch.testing.assert_close(values, torch.full_like(values, right))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [None, 2**14])
def test_answers_do_not_depend_on_the_number_of_threads(size, dtype, monkeypatch):
    # In one piece, and in pieces whose sums are added up.
    if size is not None:
        monkeypatch.setattr(spectrum, "STRIP", size)
        monkeypatch.setattr(attention, "TILE", size)
    q, k = head(5, 3, 300, 16)
    found = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            here = attention_statistics(q, k, mask="causal", dtype=dtype)
            names = (*PER_ROW, *PER_HEAD, "stable_rank", "keys_per_share")
            found.append({name: getattr(here, name) for name in names})
    finally:
        torch.set_num_threads(threads)
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name
