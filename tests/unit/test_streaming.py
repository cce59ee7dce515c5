"""Statistics of long texts, computed in strips, against the code that holds the whole kernel and against sorting."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import fields

import numpy as np
import pytest
import torch

from approxkmv import log_kernel
from approxkmv.errors import InputError, NonFiniteError
from approxkmv.statistics import head_statistics
from approxkmv.statistics.largest import Largest
from approxkmv.statistics.streaming import LengthStatistics, add_strip_by_torch, every_key, length_statistics
from approxkmv.statistics.streaming_cpu import add_strip, count_keys, keys_holding

# What is promised; both sides are good to about 1e-11.
RELATIVE = 1e-6
SHARES = (0.9, 0.99)


def random_head(seed: int, n: int, d: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (spread * torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    return q, k


def rising(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every strip exceeds all before, so that the candidates are cut again and again."""
    q, k = random_head(5, n, d, 0.1)
    steps = torch.linspace(1.0, 0.0, n, dtype=torch.float64).unsqueeze(1)
    return q + 9 * steps, k


def few_values(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    q, k = (torch.randint(0, 2, (n, d), generator=generator).double() for _ in range(2))
    return q, k


N = 333
HEADS = {
    "diffuse": random_head(0, N, 16, 0.3),
    "ordinary": random_head(1, N, 16, 1.2),
    "logits of 10^4": random_head(2, N, 16, 60.0),
    "rising": rising(N, 16),
    "falling": tuple(x.flip(0) for x in rising(N, 16)),
    "many ties": few_values(N, 5),
    "all equal": (torch.ones(N, 4, dtype=torch.float64), torch.ones(N, 4, dtype=torch.float64)),
}


_I = torch.arange(N)
SPANS = {
    "causal": torch.stack([0 * _I, _I + 1], 1),
    "window": torch.stack([(_I - 6).clamp_min(0), _I + 1], 1),
    "chunks": torch.stack([_I // 20 * 20, _I + 1], 1),
    "window to both sides": torch.stack([(_I - 9).clamp_min(0), (_I + 10).clamp_max(N)], 1),
    "prefix": torch.stack([0 * _I, (_I + 1).clamp_min(70)], 1),
    "no key before its query": torch.stack([_I, 0 * _I + N], 1),
    "in no order": torch.stack([(_I - 97 * _I % 40).clamp_min(0), (_I + 1 + _I % 30).clamp_max(N)], 1),
    "every key": every_key(N),
}
"""Of each query, the first key that it sees and the end of them."""


def seen_by(spans: torch.Tensor) -> torch.Tensor:
    """(n, n) bool of spans."""
    place = torch.arange(len(spans))
    return (place >= spans[:, :1]) & (place < spans[:, 1:])


def keys_by_sorting(logs: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    logs = logs.masked_fill(~seen, -torch.inf)
    mass = logs.softmax(1).sort(1, descending=True).values.cumsum(1)
    # A hair under the share: a uniform row reaches 0.9 exactly, give or take the rounding of its sum.
    return torch.stack([(mass < share - 1e-12).sum(1) + 1 for share in SHARES], 1)


@pytest.mark.parametrize("mask", SPANS)
@pytest.mark.parametrize("block", [40, 2048])
@pytest.mark.parametrize("head", HEADS)
def test_strips_equal_the_whole_kernel(head, block, mask):
    q, k = HEADS[head]
    found = length_statistics(q, k, spans=SPANS[mask], block=block)[0]
    if mask == "causal":
        assert found == length_statistics(q, k, causal=True, block=block)[0]
    for ours, seen in zip(found, (seen_by(every_key(N)), seen_by(SPANS[mask])), strict=True):
        expected = head_statistics(q, k, N, mask=seen)
        np.testing.assert_allclose(ours.ratio, expected.ratios[-1], rtol=RELATIVE, atol=1e-290)
        np.testing.assert_allclose(ours.softmax_ratio, expected.softmax_ratio, rtol=RELATIVE, atol=1e-290)
        # Differences of logarithms whose size sets their rounding.
        absolute = 1e-13 * (1 + float(log_kernel(q, k).abs().max()))
        np.testing.assert_allclose(ours.log_next, expected.log_next, rtol=RELATIVE, atol=absolute)
        np.testing.assert_allclose(ours.log_double, expected.log_double, rtol=RELATIVE, atol=absolute)
        # The small-n code ends at 1e-307, this one does not.
        if float(expected.tail_exponent) * math.log(N) < 700:
            np.testing.assert_allclose(ours.tail_exponent, expected.tail_exponent, rtol=RELATIVE)
        if head != "all equal":
            counts = keys_by_sorting(log_kernel(q, k), seen).double()
            np.testing.assert_allclose(ours.mean_keys, counts.mean(0), rtol=RELATIVE)
            np.testing.assert_allclose(ours.median_keys, np.median(counts.numpy(), 0))
            assert ours.largest_keys == tuple(counts.amax(0).int().tolist())


def test_the_median_of_an_even_number_of_rows_lies_between_two():
    """Causal rows of equal weights: the 32nd and 33rd of 64 need 29 and 30 keys for 0.9, 32 and 33 for 0.99."""
    ones = torch.ones(64, 4, dtype=torch.float64)
    assert length_statistics(ones, ones, causal=True)[0][1].median_keys == (29.5, 32.5)


def test_a_strip_has_a_row_at_least():
    q, k = HEADS["ordinary"]
    one, whole = (length_statistics(q[:90], k[:90], block=block)[0][0] for block in (1, 2048))
    assert (one.ratio, one.mean_keys) == (pytest.approx(whole.ratio), whole.mean_keys)


def test_uniform_rows_need_their_share_of_keys():
    found = length_statistics(*HEADS["all equal"])[0][0]
    # One more or less by the rounding of the sum.
    np.testing.assert_allclose(found.mean_keys, [math.ceil(share * N) for share in SHARES], atol=1)
    assert found.ratio == pytest.approx(N - 1, rel=1e-12)


@pytest.mark.parametrize("mask", SPANS)
@pytest.mark.parametrize("head", HEADS)
def test_plain_torch_and_the_compiled_loop_agree(head, mask):
    q, k = HEADS[head]
    logs = log_kernel(q, k)
    results = []
    for add in (add_strip, add_strip_by_torch):
        kernel, softmax = Largest(N, logs.device), Largest(N, logs.device)
        keys: list[torch.Tensor] = []
        for first in range(0, N, 50):
            add(kernel, softmax, keys, logs[first : first + 50], first, SPANS[mask])
        results.append((*kernel.finish(), *softmax.finish()))
        counts = torch.cat(keys)
        results[-1] += (*counts.double().mean(0).tolist(),) if head != "all equal" else ()
    np.testing.assert_allclose(*results, rtol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("block", [40, 2048])
@pytest.mark.parametrize("head", [name for name in HEADS if name != "all equal"])
def test_a_gpu_finds_what_the_cpu_finds(head, block):
    q, k = HEADS[head]
    there = length_statistics(q.cuda(), k.cuda(), causal=True, block=block)[0]
    here = length_statistics(q, k, causal=True, block=block)[0]
    absolute = 1e-13 * (1 + float(log_kernel(q, k).abs().max()))
    for ours, theirs in zip(there, here, strict=True):
        for name in (field.name for field in fields(LengthStatistics)):
            np.testing.assert_allclose(
                getattr(ours, name), getattr(theirs, name), rtol=RELATIVE, atol=absolute, err_msg=name
            )


@pytest.mark.parametrize("kind", ["random", "equal", "two values", "one large"])
def test_keys_holding_a_share_come_first(kind):
    weights = np.random.default_rng(0).exponential(size=500)
    if kind == "equal":
        weights[:] = 1.0
    elif kind == "two values":
        weights = np.where(weights > 1, 2.0, 1.0)
    elif kind == "one large":
        weights[77] = 1e6
    for share in (0.0001, 0.5, 0.9001, 0.99, 1.0):
        goal = share * weights.sum()
        mine = weights.copy()
        found = keys_holding(mine, mine.size, goal)
        mass = np.sort(weights)[::-1].cumsum()
        # The last share may need one key fewer or more by the rounding of the sum.
        assert abs(found - (int((mass < goal * (1 - 1e-13)).sum()) + 1)) <= (share == 1.0)
        np.testing.assert_array_equal(np.sort(mine[:found]), np.sort(weights)[-found:])


def test_an_entry_just_above_the_least_that_is_kept_takes_its_place():
    """Of n = 2 four are kept, from 16 on only what exceeds the least of them; 5 is the fourth, and 1 was."""
    kept, first, then = Largest(2, torch.device("cpu")), [10.0, 9.0, 8.0, 1.0, *[0.0] * 14], [5.0, 0.5]
    for strip in (first, then):
        kept.add_strip(torch.tensor(strip, dtype=torch.float64))
    tail = sum(math.exp(x) for x in [8.0, 1.0, *first[4:], *then])
    assert kept.finish() == (pytest.approx(tail / (math.exp(10) + math.exp(9))), 9.0, 8.0, 5.0)


@pytest.mark.parametrize("size", range(1, 12))
def test_a_goal_is_held_to_the_last_digit_and_one_that_rounding_keeps_out_of_reach_by_all_keys(size):
    for weights in (np.ones(size), np.arange(1.0, size + 1), np.arange(size, 0.0, -1)):
        mass = np.sort(weights)[::-1].cumsum()
        assert [keys_holding(weights.copy(), size, goal) for goal in mass] == [*range(1, size + 1)]
        assert keys_holding(weights.copy(), size, mass[-1] * (1 + 1e-12)) == size


def test_weights_of_equal_digits_below_the_bins_or_of_zero_are_counted_as_by_sorting():
    """Sixteenths of powers of 2 are edges of bins; below 2^-24 there is one bin; hidden keys have the weight 0."""
    rng = np.random.default_rng(0)
    shares = np.array([0.3, 0.5, 0.75, 0.9, 0.99, 1 - 1e-7, 1 - 1e-8, 1 - 1e-10])
    for size in (7, 40, 64, 100):
        for powers in ([0, -1], [0, -1, -2, -3], [0, -1, -30], [0, -28, -29, -30, -40]):
            weights = 2.0 ** rng.choice(powers, size) * rng.choice([1, 17 / 16], size) * (rng.random(size) < 0.9)
            weights = np.minimum(weights, 1.0)
            weights[rng.integers(size)] = 1.0
            found = np.empty(len(shares), np.int64)
            count_keys(weights.copy(), size, weights.sum(), shares, found)
            mass = np.sort(weights)[::-1].cumsum()
            assert found.tolist() == [int((mass < share * weights.sum()).sum()) + 1 for share in shares]


@pytest.mark.parametrize("seen", [[1.0, 0.5], [1.0, 1e-9, 1e-10], [1.0] * 40])
def test_keys_of_no_weight_are_never_counted(seen):
    """Nor where the sum of all is below the share by rounding."""
    weights, found = np.array([*seen, *[0.0] * 5]), np.empty(1, np.int64)
    count_keys(weights, len(weights), sum(seen) * (1 + 1e-12), np.array([1.0]), found)
    assert found[0] == len(seen)


def test_a_share_that_the_larger_keys_hold_to_the_last_digit_needs_no_more():
    found = np.empty(2, np.int64)
    count_keys(np.array([0.5, 1.0, 0.25, 0.25]), 4, 2.0, np.array([0.5, 0.75]), found)
    assert found.tolist() == [1, 2]


def test_several_heads_equal_each_alone_and_kinds_of_array_agree():
    q, k = (torch.stack([random_head(seed, 90, 8, 1.0)[i] for seed in (1, 2, 3)]) for i in (0, 1))
    together = length_statistics(q, k, causal=True)
    assert len(together) == 3
    for head in range(3):
        alone = length_statistics(q[head].numpy(), k[head].numpy(), causal=True)[0]
        for one, other in zip(together[head], alone, strict=True):
            assert one.ratio == pytest.approx(other.ratio, rel=1e-12)
            assert one.mean_keys == other.mean_keys


@pytest.mark.slow
def test_nothing_of_size_n_squared_is_held():
    q, k = random_head(3, 3000, 4, 0.5)
    length_statistics(q[:100], k[:100])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tracemalloc.start()
        largest = 0

        class Watched(Largest):
            def add(self, values, log_far):
                nonlocal largest
                super().add(values, log_far)
                largest = max(largest, self._count)

        kernel = Watched(3000, q.device)
        from approxkmv.statistics.streaming import _strips

        strips = 0
        for first, logits in _strips(q[None], k[None], 0.5, 256):
            assert logits.numel() <= 256 * 256
            add_strip(kernel, Largest(3000, q.device), [], logits[0], first, every_key(3000))
            strips += 1
        assert strips > 100
        # NumPy's own memory; torch's strips are bounded above.
        assert tracemalloc.get_traced_memory()[1] < 3000 * 3000
        assert largest <= 12 * 3000
    finally:
        tracemalloc.stop()
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("add", [add_strip, add_strip_by_torch])
def test_logits_beyond_their_type_are_one_line(add, value):
    logits = torch.zeros(3, 9, dtype=torch.float64)
    logits[1, 4] = value
    row = "row 4 is" if add is add_strip else "rows 3 and after is"
    with pytest.raises(NonFiniteError, match=f"a logit of {row} beyond") as caught:
        add(Largest(9, logits.device), Largest(9, logits.device), [], logits, 3, every_key(9))
    assert "\n" not in str(caught.value)


def test_bad_input_is_one_line():
    with pytest.raises(InputError, match="at least 3"):
        length_statistics(torch.ones(2, 4), torch.ones(2, 4))
    ones = torch.ones(5, 4)
    for span in ([0, 0], [3, 2], [-1, 3], [2, 6]):
        with pytest.raises(InputError, match="at least one of 5 keys"):
            length_statistics(ones, ones, spans=torch.tensor([[0, 5]] * 4 + [span]))
    for size in (1, 2):
        spans = torch.tensor([[0, size]] * 4 + [[4, 5]])
        with pytest.raises(InputError, match=f"leave {4 * size + 1} entries for 5 tokens"):
            length_statistics(ones, ones, spans=spans)
    spans = np.array([[0, 2]] * 3 + [[2, 5], [4, 5]], np.uint16)
    assert np.isfinite(length_statistics(ones, ones, spans=spans)[0][1].log_double), "10 entries are enough"
    for wrong in (spans.astype(float), spans.astype(complex), spans.astype(bool), spans.astype(str), spans.tolist()):
        with pytest.raises(InputError, match="whole numbers"):
            length_statistics(ones, ones, spans=wrong)
        if isinstance(wrong, np.ndarray) and wrong.dtype.kind != "U":
            with pytest.raises(InputError, match="whole numbers"):
                length_statistics(ones, ones, spans=torch.from_numpy(wrong))
    assert length_statistics(torch.ones(3, 4), torch.ones(3, 4), causal=True)[0][1].ratio == pytest.approx(1.0)
    with pytest.raises(InputError, match="heads, n, d"):
        length_statistics(torch.ones(5, 4), torch.ones(6, 4))
    huge = torch.full((4, 3), 1e200, dtype=torch.float64)
    with pytest.raises(InputError, match="so large"):
        length_statistics(huge, huge)


def test_answers_do_not_depend_on_the_number_of_threads():
    q, k = (torch.stack(x) for x in zip(*(random_head(seed, 600, 16, 1.2) for seed in range(3)), strict=True))
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(length_statistics(q, k, causal=True, block=64))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
