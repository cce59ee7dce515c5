"""Keys and queries far larger than the rest, and logits up to 10,000: no row silently loses its heaviest key."""

from pathlib import Path

import numpy as np
import pytest
import torch

from approxkmv.attention import get
from approxkmv.attention.blocks import chunks
from approxkmv.attention.blocks.light_keys import MOST_PARTS
from approxkmv.attention.blocks.reach import stand_apart, with_keys_apart
from approxkmv.attention.causal import exact_sums
from approxkmv.compute import loops as compute_loops
from approxkmv.compute.counting import counting

pytestmark = pytest.mark.usefixtures("one_thread")

# Settings that approximate at these lengths
FEW = {
    "approxkmv": {"block": 40, "near": 24},
    "local-expansion": {"block": 40, "near": 24},
    "clustered": {"block": 40, "near": 3},
}
ONE_BLOCK = {name: {**FEW[name], "block": 2**24, "directions": 0} for name in ("approxkmv", "local-expansion")}
SETTINGS = [*FEW.items(), *ONE_BLOCK.items()]


@pytest.fixture(params=["compiled", "torch"])
def loops(request, monkeypatch):
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(compute_loops, "numba_works", lambda: False)


def heads(n, seed, d=16, n_k=None):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(m, d, generator=generator) for m in (n, n_k or n))


def attend(name, q, k, v, given, scale):
    """The answer, and how many of its rows were recomputed exactly."""
    with counting() as counts:
        out = get(name)(q[None], k[None], v[None], scale=scale, seed=5, **given)[0]
    return out.double(), counts.recomputed_rows


def weights_of(q, k, scale):
    return (scale * q.double() @ k.double().mT).softmax(1)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("long", [30.0, 100.0])
@pytest.mark.parametrize("n_k", [400, 700])
@pytest.mark.parametrize(("name", "given"), SETTINGS)
def test_one_long_key_has_its_weight_in_every_row(name, given, n_k, long):
    """Half of the rows attend to that key alone, the others not at all. These are as accurate as without it: about as
    many of their keys are near."""
    for seed in range(3):
        q, k = heads(400, seed, n_k=n_k)
        values = torch.randn(n_k, 1, generator=torch.Generator().manual_seed(seed)) + k[:, :1]
        plain, before = attend(name, q, k, values, given, 0.4)
        usual = float((plain - weights_of(q, k, 0.4) @ values.double()).square().mean().sqrt())
        k[17] *= long
        weights = weights_of(q, k, 0.4)
        assert int((weights[:, 17] > 0.9).sum()) > 100
        v = torch.cat([torch.eye(n_k)[:, 17:18], values], 1)
        out, again = attend(name, q, k, v, given, 0.4)
        # At most one row in a hundred more than without it, since the draws differ: a few estimates are noise anyway.
        assert again <= before + 4
        assert before <= (4 if name == "approxkmv" else 0)
        # What the others' sum is off by moves this weight where neither outweighs the other.
        clear = (weights[:, 17] - 0.5).abs() > 0.49
        assert float((out - weights @ v.double())[clear, 0].abs().max()) < 0.05
        rest = weights[:, 17] < 0.01
        assert float((out - weights @ v.double())[rest, 1].square().mean().sqrt()) < 1.5 * usual + 1e-3


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("largest", [300.0, 1e3, 1e4])
@pytest.mark.parametrize("n", [1, 2, 30, 300, 1000])
@pytest.mark.parametrize(("name", "given"), SETTINGS)
def test_the_heaviest_key_of_each_row_has_its_weight(name, given, n, largest):
    """Rows of nearly one weight. float32 knows a logit to 2^-24 of its size for each of some terms: 1 % at 10,000."""
    q, k = heads(n, n)
    scale = largest / float((q @ k.mT).abs().max())
    weights = weights_of(q, k, scale)
    # Keys share columns: the column of a row's heaviest key then holds its weight and what others add to it.
    columns = torch.arange(n) % 64
    out, _ = attend(name, q, k, torch.eye(64)[columns], given, scale)
    right = weights @ torch.eye(64).double()[columns]
    assert float((out - right).abs().max()) < 0.02


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize(("name", "given"), SETTINGS)
def test_a_key_seven_times_as_long_is_not_lost(name, given):
    q, k = heads(400, 1, d=64)
    k[17] *= 7
    weights = weights_of(q, k, 0.2)
    sharp = weights[:, 17] > 0.9
    assert int(sharp.sum()) > 50
    out, _ = attend(name, q, k, torch.eye(400)[:, 17:18], given, 0.2)
    assert float((out - weights[:, 17:18])[sharp].abs().max()) < 0.2


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("largest", [30.0, 40.0, 60.0])
@pytest.mark.parametrize(("name", "given"), SETTINGS)
def test_between_what_is_in_reach_and_what_is_far_out(name, given, largest):
    """Logits whose far sums a few keys make up: rows of nearly one weight lose it, and few of them unnoticed."""
    q, k = heads(1000, 2, d=64)
    scale = largest / float((q @ k.mT).abs().max())
    weights = weights_of(q, k, scale)
    columns = torch.eye(64)[torch.arange(1000) % 64]
    out, _ = attend(name, q, k, columns, given, scale)
    sharp = weights.amax(1) > 0.9
    assert int(sharp.sum()) > 90
    gaps = (out - weights @ columns.double()).abs().amax(1)[sharp]
    assert float((gaps > 0.3).double().mean()) < 0.1


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("n_k", [400, 700])
@pytest.mark.parametrize(("name", "given"), SETTINGS)
def test_a_key_that_stands_apart_has_its_weight_wherever_the_keys_lie(name, given, n_k):
    """Beside short keys, whose sum is known, of any common offset: it multiplies all weights of a row by one factor."""
    q, k = heads(400, 0, d=4, n_k=n_k)
    k *= 0.1
    k[17] = torch.tensor([5.0, -3.0, 1.0, 1.0])
    # With as many queries as keys it is this one's own, which counts once.
    q[17] = k[17] / 6
    assert stand_apart(q, k, 1.0).tolist() == [17]
    weights = weights_of(q, k, 1.0)[:, 17:18]
    assert int(((weights - 0.5).abs() < 0.45).sum()) > 60
    for offset in (0.0, 1.0):
        out, again = attend(name, q, k + offset, torch.eye(n_k)[:, 17:18], given, 1.0)
        assert float((out - weights).abs().max()) < 0.02
        assert again == 0


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize(("name", "given"), SETTINGS)
def test_long_queries_do_not_spoil_their_block(name, given):
    q, k = heads(400, 3)
    values = torch.randn(400, 1, generator=torch.Generator().manual_seed(1)) + k[:, :1]
    others = torch.ones(400, dtype=torch.bool)
    others[[5, 100]] = False
    gaps = []
    for long in (1.0, 200.0):
        q[~others] *= long
        out, again = attend(name, q, k, values, given, 0.4)
        gap = out - weights_of(q, k, 0.4) @ values.double()
        gaps.append(float(gap[others].square().mean().sqrt()))
        # The long ones, and those that k-means had put beside them
        assert again <= 10
    assert float(gap[~others].abs().max()) < 0.02
    # Twice: the few worst rows of a sampled answer make most of its gap.
    assert gaps[1] < 2 * gaps[0] + 1e-3


@pytest.mark.usefixtures("loops")
def test_no_estimate_is_mostly_noise():
    """Where the sample and its estimate by the far key nearly cancel, a quotient may be anything: 2,000 here."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1000, 64, generator=generator) for _ in "qk")
    q, k = (x * (0.3 * torch.randn(1000, 1, generator=generator)).exp() for x in (q, k))
    scale = 20 / float((q @ k.mT).abs().max())
    values = torch.eye(64)[torch.arange(1000) % 64]
    again = 0
    for seed in range(4):
        with counting() as counts:
            given = {"block": 40, "near": 24, "samples": 8, "seed": seed, "scale": scale}
            out = get("approxkmv")(q[None], k[None], values[None], **given)
        assert float(out.abs().max()) < MOST_PARTS
        again += counts.recomputed_rows
    assert again < 0.2 * 4 * 1000


def test_what_stands_apart():
    q, k = heads(500, 0)
    assert len(stand_apart(q, k, 1.0)) == 0
    # However long, of logits under a nat nothing needs to stand apart.
    k[7] *= 50
    assert len(stand_apart(q, k, 0.001)) == 0
    assert stand_apart(q, k, 1.0).tolist() == [7]
    # Logits of this key vary three or five times as much as those of the others, of 40 nats.
    for times, found in ((3, []), (5, [7])):
        k[7] = times
        assert stand_apart(q, k, 10.0).tolist() == found
    k[:100] *= 100
    assert len(stand_apart(q, k, 1.0)) == 0
    # Of keys of one length, four times that of the others is the bar.
    q, k = (torch.nn.functional.normalize(x) for x in heads(4000, 1, d=64))
    for long, found in ((3.5, []), (4.5, [7])):
        k[7] = long * torch.nn.functional.normalize(k[7], dim=0)
        assert stand_apart(q, k, 100.0).tolist() == found


def test_sums_over_keys_apart_are_relative_to_the_mean_of_the_others_too():
    q, k = heads(50, 0)
    k, v = k + 1, torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    rest = exact_sums(0.4 * q, k[2:] - 1, v[2:])
    numerators, row_sums, logs = with_keys_apart(rest, np.arange(2), q, k, v, torch.ones(16), 0.4)
    logits = 0.4 * q.double() @ (k - 1).double().mT
    torch.testing.assert_close(logs + row_sums.log(), logits.logsumexp(1).float(), rtol=0, atol=1e-5)
    answers = numerators / row_sums.unsqueeze(1)
    torch.testing.assert_close(answers, (logits.softmax(1) @ v.double()).float(), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("name", ["approxkmv", "local-expansion"])
def test_one_long_key_in_the_causal_form(name, monkeypatch):
    """In chunks of 256, of whose rows none is made again."""
    monkeypatch.setattr(chunks, "EXACT_BELOW", 128)
    q, k = heads(700, 0)
    k[17] *= 60
    logits = (0.4 * q.double() @ k.double().mT).masked_fill(torch.ones(700, 700, dtype=torch.bool).triu(1), -torch.inf)
    weights = logits.softmax(1)[:, 17:18]
    with counting() as counts:
        out = get(name).attend_causally(
            *(t[None] for t in (q, k, torch.eye(700)[:, 17:18])), scale=0.4, seed=5, **FEW[name]
        )[0]
    assert counts.kernel_evaluations < 0.9 * 700 * 701 / 2
    assert counts.recomputed_rows == 0
    clear = (weights - 0.5).abs() > 0.49
    assert int(clear.sum()) > 500
    assert float((out - weights)[clear].abs().max()) < 0.05


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize(("name", "given"), SETTINGS)
def test_no_row_of_a_model_is_made_again(name, given):
    with np.load(Path(__file__).parents[1] / "data" / "minilm_squad_heads.npz") as arrays:
        q, k = (torch.from_numpy(arrays[name]) for name in "qk")
    with counting() as counts:
        get(name)(q, k, k[..., :1].contiguous(), seed=5, **given)
    assert counts.recomputed_rows == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "given"), [(name, {}) for name in FEW])
def test_the_heaviest_key_at_the_default_settings(name, given):
    q, k = heads(4096, 1)
    scale = 1e3 / float((q @ k.mT).abs().max())
    columns = torch.arange(4096) % 64
    out, _ = attend(name, q, k, torch.eye(64)[columns], given, scale)
    right = weights_of(q, k, scale) @ torch.eye(64).double()[columns]
    assert float((out - right).abs().max()) < 0.02
