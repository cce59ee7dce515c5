"""Readings of the definition against plain code, what leaves attention as it is, and the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models_support import captured_of, save_activations

from approxkmv.config import load_config, study_of
from approxkmv.errors import InputError, TableError
from approxkmv.files import write_parquet
from approxkmv.kernels import log_kernel
from approxkmv.statistics.heads import head_statistics, unmasked_and_masked_statistics
from approxkmv.statistics.readings import POWERS, READINGS, even_places, readings
from approxkmv.steps.readings import measure_readings

HEADS, N, D, FIRST = 3, 60, 16, 20


def heads(seed: int = 0, size: float = 1.0, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (size * torch.randn(HEADS, n, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return q, 2.0 * k + 1.0


def plain(values: np.ndarray, first: int) -> tuple[float, float, float]:
    """Largest c over prefixes, K_(n)/K_(n+1), K_(n)/K_(2n) of a matrix of entries (nan: does not exist)."""
    largest = []
    for i in range(first, len(values) + 1):
        entries = np.sort(values[:i, :i][~np.isnan(values[:i, :i])])[::-1]
        head, tail = entries[:i].sum(), entries[i:].sum()
        largest.append(np.divide(tail, head) if head > 0 else np.nan)
    entries = np.sort(values[~np.isnan(values)])[::-1]
    n = len(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nanmax([*largest, -1.0]), entries[n - 1] / entries[n], entries[n - 1] / entries[2 * n - 1]


def entries_of(name: str, q: torch.Tensor, k: torch.Tensor, mask: np.ndarray | None) -> np.ndarray:
    """The matrix of a reading, as its words say it."""
    s = 1 / np.sqrt(D)
    if name == "softmax":
        a = np.exp(s * (q @ k.mT).numpy())
        a = a if mask is None else a * mask
        a = a / a.sum(-1, keepdims=True)
    elif name == "float32":
        a = np.exp(log_kernel(q, k, s).numpy()).astype(np.float32).astype(np.float64)
    else:
        if name == "centred":
            k = k - k.mean(1, keepdim=True)
        if name == "balanced":
            t = (k.square().mean((1, 2)) / q.square().mean((1, 2))).sqrt().sqrt()[:, None, None]
            q, k = q * t, k / t
            torch.testing.assert_close(q.square().mean((1, 2)), k.square().mean((1, 2)))
        scale = {"sigma": D**-0.25, "unscaled": 1.0}.get(name, s)
        a = np.exp(log_kernel(q, k, scale).numpy())
    return a if mask is None else np.where(mask, a, np.nan)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [name for name in READINGS if name != "no-special"])
def test_each_reading_is_what_its_words_say(name, masked):
    q, k = heads()
    mask = np.tri(N, dtype=bool) if masked else None
    found = readings(q, k, FIRST, mask=mask)[name]
    for head, values in enumerate(entries_of(name, q, k, mask)):
        c, following, double = plain(values, N if name == "softmax" else FIRST)
        np.testing.assert_allclose(found.ratio[head], c, rtol=1e-8)
        np.testing.assert_allclose(np.exp(found.log_next[head]), following, rtol=1e-9)
        np.testing.assert_allclose(np.exp(found.log_double[head]), double, rtol=1e-9)


def test_special_tokens_are_left_out_of_the_matrix():
    q, k = heads()
    special = np.zeros(N, bool)
    special[[0, -1]] = True
    mask = np.tri(N, dtype=bool)
    found = readings(q, k, FIRST, mask=mask, special=special)["no-special"]
    alone = readings(q[:, 1:-1], k[:, 1:-1], FIRST, mask=mask[1:-1, 1:-1])["printed"]
    np.testing.assert_array_equal(found.ratio, alone.ratio)
    np.testing.assert_array_equal(found.log_double, alone.log_double)
    assert (found.ratio != readings(q, k, FIRST, mask=mask)["printed"].ratio).all()


def test_the_printed_reading_is_that_of_the_statistics():
    q, k = heads()
    own, masked = unmasked_and_masked_statistics(q, k, FIRST)
    for mask, statistics in ((None, own), (np.tri(N, dtype=bool), masked)):
        found = readings(q, k, FIRST, mask=mask)
        np.testing.assert_allclose(found["printed"].ratio, statistics.ratios.max(-1), rtol=1e-9)
        np.testing.assert_allclose(found["printed"].log_double, statistics.log_double, atol=1e-10)
        np.testing.assert_allclose(found["softmax"].ratio, statistics.softmax_ratio, rtol=1e-8)
        # The scales between the readings are for the paper's entries, all of them.
        assert set(found) == set(READINGS) | (set(POWERS) if mask is None else set())
    # Each query sees the key after its own, and none beyond.
    ahead = np.tri(N, k=1, dtype=bool)
    found, statistics = readings(q, k, FIRST, mask=ahead)["printed"], head_statistics(q, k, FIRST, mask=ahead)
    np.testing.assert_allclose(found.ratio, statistics.ratios.max(-1), rtol=1e-9)


def test_the_softmax_matrix_is_the_same_in_every_gauge_and_with_shifted_keys_and_c_is_not():
    q, k = heads()
    plain_text, other = readings(q, k, FIRST), readings(3.0 * q, (k - 1.5) / 3.0, FIRST)
    for name in ("softmax", "balanced"):
        shifted = readings(3.0 * q, k / 3.0, FIRST) if name == "balanced" else other
        np.testing.assert_allclose(shifted[name].ratio, plain_text[name].ratio, rtol=1e-8, err_msg=name)
        np.testing.assert_allclose(shifted[name].log_double, plain_text[name].log_double, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(readings(q, k - 1.5, FIRST)["centred"].ratio, plain_text["centred"].ratio, rtol=1e-8)
    assert (np.abs(np.log(other["printed"].ratio / plain_text["printed"].ratio)) > 0.1).all()


def test_a_head_whose_queries_are_all_zero_is_not_balanced_and_the_others_are():
    q, k = heads()
    whole = readings(q, k, FIRST)
    q[1] = 0.0
    found = readings(q, k, FIRST)
    np.testing.assert_array_equal(found["balanced"].ratio[[0, 2]], whole["balanced"].ratio[[0, 2]])
    assert found["balanced"].ratio[1] == found["printed"].ratio[1]
    assert (found["balanced"].ratio[[0, 2]] != found["printed"].ratio[[0, 2]]).all()


def test_powers_lead_from_the_models_scale_to_none():
    q, k = heads()
    found = readings(q, k, FIRST, 0.3)
    powers = {"printed": 1.0, "power 3/4": 0.75, "sigma": 0.5, "power 1/4": 0.25, "unscaled": 0.0}
    for name, power in powers.items():
        statistics = head_statistics(q, k, FIRST, 0.3**power)
        np.testing.assert_allclose(found[name].ratio, statistics.ratios.max(-1), rtol=1e-8, err_msg=name)


def test_underflows_in_float32_are_infinite_or_undefined_and_leave_prefixes_without_c():
    # One entry of a short prefix, then none: K is 0 in float32 but for the first rows.
    q = torch.zeros(1, N, D, dtype=torch.float64)
    k = torch.zeros(1, N, D, dtype=torch.float64)
    k[0, :, 0] = 5.0
    q[0, :, 0] = 60.0
    q[0, -2:, 0] = 5.0
    found = readings(q, k, FIRST)["float32"]
    # Rows of q = k are 1, all others 0: 2 n entries of 1, so that K_(2n) is 1 and no longer prefix is empty.
    np.testing.assert_allclose(found.ratio, 1.0)
    assert (found.log_double[0], found.underflows[0], found.undefined[0]) == (0.0, False, False)
    q[0, -2, 0] = 60.0
    found = readings(q, k, FIRST)["float32"]
    # n entries of 1: the tail is 0, K_(n)/K_(n+1) is infinite.
    assert (found.ratio[0], found.log_next[0], found.log_double[0]) == (0.0, np.inf, np.inf)
    assert (found.underflows[0], found.undefined[0]) == (True, False)
    q[0, -1, 0] = 60.0
    with np.errstate(all="raise"):  # of a caller: what underflows here is meant to
        found = readings(q, k, FIRST)
    assert np.isnan([found["float32"].ratio[0], found["float32"].log_next[0], found["float32"].log_double[0]]).all()
    assert found["float32"].underflows[0]
    assert found["float32"].undefined[0]
    # In logarithms the same head is uniform.
    assert found["printed"].log_double[0] == 0.0


@pytest.mark.parametrize("last", ["query", "key"])
def test_a_prefix_has_a_c_from_its_first_entry_on_be_it_in_a_row_or_in_a_column(last):
    q, k = 5.0 * torch.ones(2, 1, N, 1, dtype=torch.float64)
    # The last query meets all keys but its own, or the last key all queries but its own; nothing else is above 0.
    one, others = (q, k) if last == "query" else (k, q)
    one[0, -1], others[0, :-1] = 60.0, 60.0
    assert readings(q, k, FIRST, 0.25)["float32"].ratio == 0.0


@pytest.mark.parametrize("power", [125.0, 126.5, 149.9, 150.1, 151.0])
def test_an_entry_underflows_where_float32_has_none(power):
    """n entries of 1 and others of 2^-power: of the smallest number, 2^-149, more than a half is rounded up."""
    q, k = np.zeros((2, 1, N, D))
    q[0, 1:, 0] = np.sqrt(2 * power * np.log(2) * np.sqrt(D))
    every = readings(torch.from_numpy(q), torch.from_numpy(k), FIRST)
    # The logarithms know as well what float32 would not hold.
    assert every["printed"].underflows[0] == (power > 150)
    found = every["float32"]
    rounded = np.float32(2.0**-power)
    assert found.underflows[0] == (rounded == 0) == (power > 150)
    assert found.log_double[0] == (np.inf if rounded == 0 else pytest.approx(-np.log(float(rounded))))


def test_without_special_tokens_a_mask_is_that_of_the_others():
    q, k = heads()
    special = np.arange(N) % 5 == 2
    mask = (np.random.default_rng(0).random((N, N)) < 0.3) | np.eye(N, dtype=bool)
    found = readings(q, k, FIRST, mask=mask, special=special)["no-special"]
    statistics = head_statistics(q[:, ~special], k[:, ~special], FIRST, mask=mask[~special][:, ~special])
    np.testing.assert_allclose(found.ratio, statistics.ratios.max(-1), rtol=1e-8)
    np.testing.assert_allclose(found.log_double, statistics.log_double, rtol=1e-8)


def test_a_text_that_is_too_short_without_its_special_tokens_has_no_c():
    q, k = heads(n=FIRST)
    special = np.arange(FIRST) == 0
    found = readings(q, k, FIRST, special=special)
    assert np.isnan([found["no-special"].ratio, found["no-special"].log_next, found["no-special"].log_double]).all()
    assert np.isfinite(found["printed"].ratio).all()
    assert np.isfinite(readings(q[:, :3], k[:, :3], 1)["printed"].log_double).all()
    # Of two tokens a causal mask leaves three entries, no K_(2n).
    found = readings(q[:, :2], k[:, :2], 1, mask=np.tri(2, dtype=bool))
    assert all(np.isnan([one.ratio, one.log_next, one.log_double]).all() for one in found.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(N, D), "k": torch.ones(N, D)}, "must both be"),
        ({"k": torch.ones(HEADS, N - 1, D)}, "must both be"),
        *(({"min_prefix": value}, "min_prefix is") for value in (0, 2.5, True)),
        *(
            ({"mask": value}, "mask must be")
            for value in (np.ones((N, N)), np.ones((N, 1), bool), torch.ones(N, N).bool())
        ),
        *(({"special": value}, "special must be") for value in (np.zeros(N, int), np.zeros(N - 1, bool), [False] * N)),
    ],
)
def test_what_is_no_text_no_prefix_and_no_mask_is_refused(change, message):
    q, k = heads()
    with pytest.raises(InputError, match=message):
        readings(**{"q": q, "k": k, "min_prefix": FIRST} | change)


def test_places_are_spread_and_no_more_than_there_are():
    assert list(even_places(64, 16))[:3] == [0, 4, 8]
    assert list(even_places(64, 16))[-1] == 63
    assert len(list(even_places(64, 16))) == 16
    assert list(even_places(3, 16)) == [0, 1, 2]
    assert list(even_places(1, 16)) == [0]
    assert list(even_places(0, 16)) == []


@pytest.mark.parametrize(("wanted", "measured"), [(1, 1), (5, 5), (7, 7), (None, 11), (50, 11)])
def test_over_all_shards_as_many_texts_are_measured_as_the_study_asks_for(tmp_path, wanted, measured):
    study = study_of(load_config(Path(__file__).parents[2] / "config.yaml"), "embedded")
    study = study.model_copy(update={"readings_texts": wanted, "shard_contexts": 4, "min_prefix": 3})
    numbers = list(range(20, 31))
    write_parquet(tmp_path / "texts.parquet", pd.DataFrame({"index": numbers, "name": "t", "text": "t"}))
    of_shards = []
    for shard in range(3):
        ours = {number: captured_of(*torch.randn(2, 1, 1, 6, 4), 1.0) for number in numbers[4 * shard :][:4]}
        save_activations(tmp_path / "a.safetensors", ours, causal=False)
        count, _ = measure_readings(
            study, "m", tmp_path / "a.safetensors", tmp_path / "texts.parquet", tmp_path / "r.parquet"
        )
        found = pd.read_parquet(tmp_path / "r.parquet")["context"].unique()
        assert len(found) == count
        of_shards.append(count)
    assert sum(of_shards) == measured
    assert max(of_shards) - min(of_shards) <= 1


def test_activations_of_other_texts_are_one_line(tmp_path):
    study = study_of(load_config(Path(__file__).parents[2] / "config.yaml"), "embedded")
    write_parquet(tmp_path / "texts.parquet", pd.DataFrame({"index": [1], "name": "t", "text": "t"}))
    other = captured_of(*torch.randn(2, 1, 1, 6, 4), 1.0)
    save_activations(tmp_path / "a.safetensors", {2: other}, causal=False)
    with pytest.raises(TableError, match="has texts that"):
        measure_readings(study, "m", tmp_path / "a.safetensors", tmp_path / "texts.parquet", tmp_path / "r.parquet")
