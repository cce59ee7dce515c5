"""Experiments (i) and (ii) against a plain implementation: torch.topk of every prefix, in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from approxkmv import head_to_tail_ratios, log_kernel, order_ratios
from approxkmv.errors import InputError
from approxkmv.statistics import head_statistics, unmasked_and_masked_statistics
from approxkmv.statistics.exponential import exp_and_sum
from approxkmv.statistics.head_to_tail import ratios_of_prefixes
from approxkmv.statistics.heads import _logits
from approxkmv.statistics.order import SAMPLE, order_logarithms
from approxkmv.statistics.selection import SEED, next_state, select_largest
from approxkmv.statistics.streaming import length_statistics

# What the statistics promise; the pass itself is good to about 1e-11.
RELATIVE = 1e-6


def plain_ratios(logs: torch.Tensor, first: int, causal: bool = False) -> torch.Tensor:
    """c_i by topk of every prefix, each prefix relative to its own largest entry."""
    n = logs.shape[0]
    out = []
    for i in range(first, n + 1):
        part = logs[:i, :i]
        entries = part[torch.tril(torch.ones_like(part, dtype=torch.bool))] if causal else part.flatten()
        values = torch.exp(entries - entries.max()).sort(descending=True).values
        # Smallest first, so that the reference loses no digits either.
        out.append(values[i:].flip(0).sum() / values[:i].flip(0).sum())
    return torch.stack(out)


def random_head(seed: int, n: int, d: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        spread * torch.randn(n, d, generator=generator, dtype=torch.float64),
        spread * torch.randn(n, d, generator=generator, dtype=torch.float64),
    )


def growing(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries that grow along the text, so that most of every new row and column enters the head."""
    q, k = random_head(5, n, d, 0.1)
    steps = torch.linspace(0.0, 1.0, n, dtype=torch.float64).unsqueeze(1)
    return q * (1 - 0.9 * steps), k + 8.0 * steps * q.mean(0)


def shrinking(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries that shrink along the text, so that the head takes from the tail at every step."""
    q, k = random_head(6, n, d, 0.3)
    steps = torch.linspace(1.0, 6.0, n, dtype=torch.float64).unsqueeze(1)
    return q * steps**2, k


def jumping(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A token far into the text whose entries exceed all before by e^2000 and more; then another."""
    q, k = random_head(7, n, d, 1.0)
    q[:] = q * 40
    q[n // 2 + 3] = 0.0
    q[n - 5] = 0.0
    return q, k


def constant(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(n, d, dtype=torch.float64), torch.ones(n, d, dtype=torch.float64)


def few_values(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Many ties, also at the cut between head and tail."""
    generator = torch.Generator().manual_seed(8)
    choose = lambda: torch.randint(0, 2, (n, d), generator=generator).double()  # noqa: E731
    return choose(), choose()


HEADS = {
    "diffuse": random_head(0, 150, 16, 0.3),
    "ordinary": random_head(1, 150, 16, 1.2),
    "sharp": random_head(2, 150, 16, 4.0),
    "logits of 10^4": random_head(3, 150, 16, 60.0),
    "growing": growing(150, 16),
    "shrinking": shrinking(150, 16),
    "jumping": jumping(150, 16),
    "all equal": constant(150, 4),
    "many ties": few_values(150, 5),
    "full strips": random_head(4, 144, 8, 1.0),
    "one column": random_head(9, 97, 1, 1.0),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("first", [1, 2, 17, 50])
@pytest.mark.parametrize("head", HEADS)
def test_every_prefix_equals_topk_of_that_prefix(head, first, causal):
    q, k = HEADS[head]
    ours = head_to_tail_ratios(q, k, min_prefix=first, causal=causal)
    expected = plain_ratios(log_kernel(q, k), first, causal)
    assert ours.dtype == torch.float64
    assert ours.shape == (q.shape[0] - first + 1,)
    assert torch.isfinite(ours).all()
    # Below 1e-290 both sides are at the end of float64.
    torch.testing.assert_close(ours, expected, rtol=RELATIVE, atol=1e-290)


def test_a_tiny_tail_keeps_its_digits():
    """Subtracting the head from the sum of all would leave nothing here."""
    n = 60
    logs = torch.full((n, n), -40.0, dtype=torch.float64)
    logs.fill_diagonal_(0.0)
    eye = torch.eye(n, dtype=torch.float64)
    # q = k = r e_i has log K_ij = 0 on the diagonal and -r^2 scale off it.
    ours = head_to_tail_ratios(eye * 40.0**0.5, eye * 40.0**0.5, scale=1.0)
    expected = torch.tensor([(i * i - i) * np.exp(-40.0) / i for i in range(50, n + 1)], dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("jump", [300.0, 730.0, 900.0, 1250.0])
@pytest.mark.parametrize("causal", [False, True])
def test_a_tail_keeps_its_digits_when_an_entry_exceeds_all_before_it(causal, jump):
    """Those lie far above the first entry, and that one e^jump above it."""
    logs = torch.full((24, 24), 560.0, dtype=torch.float64) + torch.linspace(0.0, 1.0, 576).view(24, 24)
    logs[0, 0], logs[20, 19] = 0.0, jump
    out = np.empty(20)
    ratios_of_prefixes(logs.numpy(), 5, causal, out)
    np.testing.assert_allclose(out, plain_ratios(logs, 5, causal), rtol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [150, 220])
def test_the_head_goes_on_taking_the_largest_after_candidates_were_cut(n, causal):
    """Where entries fall along the text it takes from the rest at nearly every prefix."""
    steps = torch.arange(n, dtype=torch.float64)
    logs = torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.02 * (
        steps[:, None] + steps
    )
    ours = np.empty(n - 19)
    ratios_of_prefixes(logs.numpy(), 20, causal, ours)
    np.testing.assert_allclose(ours, plain_ratios(logs, 20, causal), rtol=RELATIVE)


def test_all_equal_entries_give_n_minus_one():
    q, k = constant(64, 3)
    torch.testing.assert_close(head_to_tail_ratios(q, k)[-1], torch.tensor(63.0, dtype=torch.float64))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_order_ratios_equal_sorting(head, causal):
    q, k = HEADS[head]
    n = q.shape[0]
    logs = log_kernel(q, k)
    entries = logs[torch.tril(torch.ones_like(logs, dtype=torch.bool))] if causal else logs.flatten()
    ordered = entries.sort(descending=True).values
    ours = order_ratios(q, k, causal=causal)
    largest = float(logs.abs().max()) + 1
    torch.testing.assert_close(ours.log_next, ordered[n - 1] - ordered[n], rtol=1e-12, atol=1e-14 * largest)
    torch.testing.assert_close(ours.log_double, ordered[n - 1] - ordered[2 * n - 1], rtol=1e-12, atol=1e-14 * largest)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_the_softmax_matrix_equals_sorting(head, causal):
    q, k = HEADS[head]
    n = q.shape[0]
    logs = log_kernel(q, k)
    seen = torch.tril(torch.ones_like(logs, dtype=torch.bool)) if causal else torch.ones_like(logs, dtype=torch.bool)
    softmax = logs.masked_fill(~seen, -torch.inf).softmax(-1)
    ordered = softmax[seen].sort(descending=True).values
    ours = head_statistics(q, k, causal=causal)
    ratio = ordered[n:].flip(0).sum() / ordered[:n].flip(0).sum()
    # exp_and_sum is good to 1e-11; the smallest entries end at 1e-307.
    np.testing.assert_allclose(ours.softmax_ratio, ratio, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(ours.tail_exponent, -np.log(max(float(ordered[n]), 1e-307)) / np.log(n), rtol=1e-9)
    columns = float(n * softmax.square().sum(0).max())
    np.testing.assert_allclose(ours.column_exponent, np.log(columns) / np.log(n), rtol=1e-9, atol=1e-9)


def test_the_softmax_matrix_knows_no_row_factor():
    """Adding to each query a part that all keys answer alike changes K row by row and D^-1 A not at all."""
    q, k = random_head(13, 90, 6, 1.0)
    k[:, 0] = 1.0
    longer = q.clone()
    longer[:, 0] += torch.linspace(0, 20, 90, dtype=torch.float64)
    one, other = head_statistics(q, k), head_statistics(longer, k)
    np.testing.assert_allclose(one.softmax_ratio, other.softmax_ratio, rtol=1e-9)
    assert abs(float(one.ratios[-1] / other.ratios[-1]) - 1) > 0.1


def test_uniform_attention_sits_at_the_ends_of_both_exponents():
    q, k = constant(64, 3)
    uniform = head_statistics(q, k)
    assert float(uniform.tail_exponent) == pytest.approx(1.0, abs=1e-12)
    assert float(uniform.column_exponent) == pytest.approx(0.0, abs=1e-12)
    alone = torch.zeros(64, 3, dtype=torch.float64)
    alone[5, 0] = 1e3
    assert float(head_statistics(q, alone).column_exponent) == pytest.approx(2.0, abs=1e-9)


def test_unmasked_and_masked_together_equal_each_alone():
    q, k = random_head(14, 80, 8, 1.0)
    for together, causal in zip(unmasked_and_masked_statistics(q, k), (False, True), strict=True):
        alone = head_statistics(q, k, causal=np.bool_(causal))
        for field in fields(alone):
            np.testing.assert_array_equal(getattr(together, field.name), getattr(alone, field.name))


def masks_of(n: int) -> dict[str, torch.Tensor]:
    """(n, n) bool, True where a key is seen; the last is no run of neighbours."""
    i, j = torch.arange(n).unsqueeze(1), torch.arange(n)
    scattered = torch.rand(n, n, generator=torch.Generator().manual_seed(3)) < 0.1
    return {
        "causal": j <= i,
        "window": (j <= i) & (j > i - 7),
        "chunks": (j <= i) & (j // 12 == i // 12),
        "window to both sides": (i - j).abs() < 5,
        "prefix": (j <= i) | (j < 20),
        "every key": torch.ones(n, n, dtype=torch.bool),
        "scattered": scattered | torch.eye(n, dtype=torch.bool),
    }


@pytest.mark.parametrize("mask", masks_of(1))
@pytest.mark.parametrize("head", ["ordinary", "logits of 10^4", "jumping", "all equal", "many ties"])
def test_under_any_mask_every_statistic_equals_sorting(head, mask):
    q, k = HEADS[head]
    n, first = len(q), 17
    logs, seen = log_kernel(q, k), masks_of(len(q))[mask]
    every, ours = unmasked_and_masked_statistics(q, k, first, mask=seen)
    # What is beside it is not touched.
    np.testing.assert_array_equal(every.ratios, head_statistics(q, k, first).ratios)
    expected = []
    for i in range(first, n + 1):
        entries = logs[:i, :i][seen[:i, :i]]
        values = torch.exp(entries - entries.max()).sort(descending=True).values
        expected.append(values[i:].flip(0).sum() / values[:i].flip(0).sum())
    np.testing.assert_allclose(ours.ratios, torch.stack(expected), rtol=RELATIVE, atol=1e-290)
    ordered = logs[seen].sort(descending=True).values
    rounding = 1e-14 * (float(logs.abs().max()) + 1)
    np.testing.assert_allclose(ours.log_next, ordered[n - 1] - ordered[n], rtol=1e-12, atol=rounding)
    np.testing.assert_allclose(ours.log_double, ordered[n - 1] - ordered[2 * n - 1], rtol=1e-12, atol=rounding)
    softmax = logs.masked_fill(~seen, -torch.inf).softmax(-1)
    ordered = softmax[seen].sort(descending=True).values
    ratio = ordered[n:].flip(0).sum() / ordered[:n].flip(0).sum()
    np.testing.assert_allclose(ours.softmax_ratio, ratio, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(ours.tail_exponent, -np.log(max(float(ordered[n]), 1e-307)) / np.log(n), rtol=1e-9)
    columns = float(n * softmax.square().sum(0).max())
    np.testing.assert_allclose(ours.column_exponent, np.log(columns) / np.log(n), rtol=1e-9, atol=1e-9)
    if mask == "causal":
        alone = head_statistics(q, k, first, causal=True)
        assert all(np.array_equal(getattr(ours, f.name), getattr(alone, f.name)) for f in fields(alone))


def test_a_mask_that_leaves_too_little_is_one_line():
    q, k = random_head(15, 60, 4, 1.0)
    eye = torch.eye(60, dtype=torch.bool)
    with pytest.raises(InputError, match="leaves 60 entries for 60 tokens"):
        head_statistics(q, k, mask=eye)
    with pytest.raises(InputError, match="own key"):
        head_statistics(q, k, mask=~eye)
    without_one = torch.ones(60, 60, dtype=torch.bool)
    without_one[7, 7] = False
    with pytest.raises(InputError, match="own key"):
        head_statistics(q, k, mask=without_one)
    with pytest.raises(InputError, match="give a bool array"):
        head_statistics(q, k, mask=eye[:59])
    with pytest.raises(InputError, match="causal and mask are both given"):
        head_statistics(q, k, causal=True, mask=torch.ones(60, 60, dtype=torch.bool))


@pytest.mark.parametrize("n", [2, 3, 5, 31, 49, 101])
def test_order_ratios_of_short_texts(n):
    q, k = random_head(n, n, 3, 1.0)
    ordered = log_kernel(q, k).flatten().sort(descending=True).values
    torch.testing.assert_close(order_ratios(q, k).log_double, ordered[n - 1] - ordered[2 * n - 1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("above", [0.25, 1.5, 4.0, 30.0])
def test_order_ratios_whatever_the_sample_suggests(above, causal):
    """About `above` n entries exceed the bound of a sample: too few for K_(n) or K_(2n), enough, too many."""
    n, state, sampled = 1024, SEED, []
    for _ in range(SAMPLE):
        state = next_state(np.uint64(state))
        i, j = (int(state) >> 33) % n, (int(state) >> 3) % n
        sampled.append((max(i, j), min(i, j)) if causal else (i, j))
    rng = np.random.default_rng(0)
    logs = -rng.random((n, n))
    is_sampled = np.zeros((n, n), dtype=bool)
    is_sampled[tuple(np.array(sampled).T)] = True
    seen = np.tril(np.ones((n, n), dtype=bool)) if causal else np.ones((n, n), dtype=bool)
    others = rng.permutation(np.flatnonzero(seen & ~is_sampled))[: int(above * n)]
    logs.flat[others] = 1 + rng.random(len(others))
    # The bound is one of these, for it is their number that a sample is expected to have above it.
    wanted = 4 * n * SAMPLE // int(seen.sum())
    logs[tuple(np.array(sampled[:wanted]).T)] = 0.5 + 0.1 * rng.random(wanted)
    out = np.empty(3)
    order_logarithms(logs, causal, out)
    ordered = np.sort(logs[seen])[::-1]
    assert out.tolist() == [ordered[n - 1], ordered[n], ordered[2 * n - 1]]


def test_batches_chunks_and_kinds_of_array_agree():
    generator = torch.Generator().manual_seed(11)
    q = torch.randn(2, 3, 70, 8, generator=generator)
    k = torch.randn(2, 3, 70, 8, generator=generator)
    whole = head_statistics(q, k)
    small = head_statistics(q, k, memory=1)
    assert whole.ratios.shape == (2, 3, 21)
    np.testing.assert_array_equal(whole.ratios, small.ratios)
    np.testing.assert_array_equal(whole.log_double, small.log_double)
    np.testing.assert_array_equal(whole.ratios, head_to_tail_ratios(q.numpy(), k.numpy()))
    np.testing.assert_array_equal(whole.log_next, order_ratios(q, k).log_next.numpy())
    single = head_to_tail_ratios(q[1, 2], k[1, 2])
    # A matrix product of another batch size may round differently.
    torch.testing.assert_close(torch.from_numpy(whole.ratios[1, 2]), single, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("memory", "sizes"), [(1, [1] * 5), (2 * 8 * 10**2, [2, 2, 1]), (10**9, [5])])
def test_as_many_heads_are_held_as_memory_has_room_for(memory, sizes):
    q = torch.ones(5, 10, 3, dtype=torch.float64)
    assert [len(logits) for _, logits in _logits(q, q, 1.0, memory)] == sizes


def test_a_text_as_long_as_the_first_prefix_has_one_ratio():
    assert head_to_tail_ratios(torch.ones(50, 2), torch.ones(50, 2)).tolist() == pytest.approx([49])


def test_a_constant_factor_per_kernel_changes_nothing():
    """Shifting all keys along one direction that every query shares multiplies K by a constant."""
    q, k = random_head(12, 80, 6, 1.0)
    q[:, 0] = 1.0
    shifted = k.clone()
    shifted[:, 0] += 30.0
    torch.testing.assert_close(head_to_tail_ratios(q, k), head_to_tail_ratios(q, shifted), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: head_to_tail_ratios(torch.ones(60, 2), torch.ones(61, 2)), "60 rows and k has 61"),
        (lambda: head_to_tail_ratios(torch.ones(40, 2), torch.ones(40, 2)), "40 tokens and min_prefix is 50"),
        (lambda: head_to_tail_ratios(torch.ones(60, 2), torch.ones(60, 2), min_prefix=0), "min_prefix"),
        (lambda: head_to_tail_ratios(torch.ones(60, 2) / 0, torch.ones(60, 2)), "NaN or an infinity"),
        (lambda: order_ratios(torch.ones(1, 2), torch.ones(1, 2)), "at least 2"),
        (lambda: order_ratios(torch.ones(2, 2), torch.ones(2, 2), causal=True), "at least 3"),
        (lambda: order_ratios(torch.ones(3, 2), torch.ones(3, 2), causal="False"), "causal is of the type str: give"),
        (
            lambda: head_statistics(torch.ones(60, 2), torch.ones(60, 2), causal=1),
            "causal is of the type int: give True or False",
        ),
        (
            lambda: head_statistics(torch.ones(60, 2), torch.ones(60, 2), causal=torch.ones(60, 60) > 0),
            "causal is of the type Tensor: give True or False",
        ),
    ],
)
def test_bad_input_is_one_clear_line(call, word):
    with pytest.raises(InputError, match=word) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_vector_exponential_is_exact_to_its_bound():
    values = np.linspace(-750.0, 650.0, 200_001)
    out = np.empty_like(values)
    total = exp_and_sum(values, values.size, 0.0, out)
    inside = values >= -707.0
    np.testing.assert_allclose(out[inside], np.exp(values[inside]), rtol=2e-11)
    assert not out[~inside].any()
    assert total == pytest.approx(out.sum(), rel=1e-12)


@pytest.mark.parametrize("kind", ["random", "sorted", "reversed", "equal", "two values"])
def test_selection_puts_the_largest_first(kind):
    values = np.random.default_rng(0).normal(size=1000)
    if kind == "sorted":
        values.sort()
    elif kind == "reversed":
        values = np.sort(values)[::-1].copy()
    elif kind == "equal":
        values[:] = 1.0
    elif kind == "two values":
        values = np.sign(values)
    for count in (1, 10, 500, 999):
        mine = values.copy()
        select_largest(mine, mine.size, count)
        np.testing.assert_array_equal(np.sort(mine[:count]), np.sort(values)[-count:])
        np.testing.assert_array_equal(np.sort(mine), np.sort(values))


_PRINT_BYTES = """
import torch
from approxkmv.statistics import unmasked_and_masked_statistics
from approxkmv.statistics.streaming import length_statistics
generator = torch.Generator().manual_seed(0)
for n in (50, 51, 64, 77):
    for spread in (0.1, 1.2, 2.0):
        q, k = (spread * torch.randn(2, n, 16, generator=generator) for _ in range(2))
        for part in unmasked_and_masked_statistics(q, k):
            print(n, spread, *(value.tobytes().hex() for value in vars(part).values()))
        print(repr(length_statistics(q, k, causal=True)))
"""


@pytest.mark.slow
def test_freshly_compiled_and_cached_code_give_the_same_bytes(tmp_path: Path):
    def run() -> str:
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-c", _PRINT_BYTES], env=environment, capture_output=True, text=True, check=True
        ).stdout

    fresh = run()
    assert list(tmp_path.rglob("approxkmv.statistics.*"))
    assert fresh.count("LengthStatistics") >= 12
    assert run() == fresh


@pytest.mark.slow
def test_the_statistics_have_the_same_bytes_on_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(7, 120, 16, generator=generator) for _ in range(2))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            parts = unmasked_and_masked_statistics(q, k)
            lengths = [
                repr(length_statistics(head_q, head_k, causal=True)) for head_q, head_k in zip(q, k, strict=True)
            ]
        finally:
            torch.set_num_threads(before)
        found.append([*(value.tobytes() for part in parts for value in vars(part).values()), *lengths])
    assert found[0] == found[1] == found[2]
