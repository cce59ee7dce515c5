"""Check the CUDA kernels against float64: python tests/gpu/check_kernels.py

With TRITON_INTERPRET=1 the checks run in Triton's interpreter on a CPU, under a memory checker.
"""

import os
import sys
import traceback
from contextlib import contextmanager, nullcontext

import interpreter
import torch
from sanitizer import watched

from approxkmv.attention.blocks.cuda import approxkmv as approxkmv_cuda
from approxkmv.attention.blocks.cuda import clustering as clustering_cuda
from approxkmv.attention.blocks.cuda import expansion as expansion_cuda
from approxkmv.attention.blocks.cuda import fused
from approxkmv.attention.blocks.cuda import local_expansion as local_expansion_cuda
from approxkmv.attention.blocks.expansion import Clustering
from approxkmv.attention.blocks.reach import REACH, most_off
from approxkmv.attention.kernels import cuda_graphs
from approxkmv.attention.kernels import triton as triton_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# bfloat16 keeps 8 bits: its inputs are exact here, its weights and answers are rounded to 2^-9 of their size.
LARGEST = {torch.float32: 2e-5, torch.bfloat16: 4e-3}
INPUTS = 3


def inputs(batch, n_q, n_k, d, d_v, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n_q, d), (n_k, d), (n_k, d_v))
    q, k, v = (torch.randn(batch, *shape, generator=generator) for shape in shapes)
    return tuple(t.to(device=DEVICE, dtype=dtype) for t in (q, k, v))


def exact(q, k, v, scale):
    return (scale * q.double() @ k.double().mT).softmax(-1) @ v.double()


def apart_in_memory(t):
    """t, whose rows are not in one piece."""
    return t.mT.contiguous().mT


def gap(out, right, v):
    return float((out.double() - right).norm() / v.double().norm())


def check_exact():
    """With logits of about 1, and of hundreds, of which the largest are among the first keys."""
    shapes = ((70, 90, 24, 1), (33, 129, 100, 5), (64, 64, 16, 16), (5, 127, 40, 3), (17, 40, 256, 200))
    for dtype in (torch.float32, torch.bfloat16):
        for n_q, n_k, d, d_v in shapes:
            q, k, v = map(apart_in_memory, inputs(2, n_q, n_k, d, d_v, dtype, n_q))
            for long in (1, 40):
                k[:, :5] *= long
                out = triton_kernels.exact(q, k, v, d**-0.5)
                found = gap(out, exact(q, k, v, d**-0.5), v)
                print(f"exact {dtype} {n_q} x {n_k}, d {d}, d_v {d_v}, {long} times as long: {found:.2e}")
                assert found < LARGEST[dtype] * (10 if long > 1 else 1)
                assert out.dtype == dtype


def dealt(labels, clusters):
    return expansion_cuda.Tiles.of(labels, clusters)


def plain_listed(q, labels, k, v, near, extra):
    """What `triton_kernels.listed` computes, query by query in float64: the answer, and the log of the row sums."""
    q, k, v = (t.double() for t in (q, k, v))
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=torch.float64, device=q.device)
    log = torch.empty_like(out[..., 0])
    for e in range(q.shape[0]):
        for i in range(q.shape[1]):
            some = near[e, labels[e, i]]
            logits = k[e, some] @ q[e, i]
            logits = logits if extra is None else logits + extra[e, labels[e, i]].double()
            out[e, i], log[e, i] = logits.softmax(0) @ v[e, some], logits.logsumexp(0)
    return out, log


def check_listed():
    """Sums over a cluster's own keys, with weights and without, against the same sums in float64.

    The logits reach hundreds, and rounding is relative to a query's distance from its centre, not to those.
    """
    shapes = ((75, 3, 90, 37, 16, 1), (70, 2, 80, 33, 48, 6), (15, 3, 50, 7, 112, 5))
    for dtype in (torch.float32, torch.bfloat16):
        for n, clusters, n_k, near, d, d_v in shapes:
            q, k, v = inputs(2, n, n_k, d, d_v, dtype, n)
            generator = torch.Generator().manual_seed(1)
            chosen = torch.stack([torch.randperm(n_k, generator=generator)[:near] for _ in range(2 * clusters)])
            chosen = chosen.view(2, clusters, near).to(DEVICE)
            labels = torch.randint(clusters, (2, n), generator=generator).to(DEVICE)
            tiles = dealt(labels, clusters)
            centres = 10 * torch.randn(2, clusters, d, generator=generator).to(DEVICE)
            q = tiles.of_queries(centres) + 0.1 * q.float()
            k = k.float()
            weights = torch.randn(2, clusters, near, generator=generator)
            # Some are not there at all.
            weights[..., 1::3] = -torch.inf
            for extra in (None, apart_in_memory(weights.to(DEVICE))):
                of_tiles = tiles.queries, tiles.clusters, apart_in_memory(centres)
                rows = map(apart_in_memory, (k, v, chosen))
                sums, total, log = triton_kernels.listed(apart_in_memory(q), *of_tiles, *rows, extra)
                right, right_log = plain_listed(q, labels, k, v, chosen, extra)
                found = gap(sums / total.unsqueeze(2), right, v)
                apart = float((log.double() + total.double().log() - right_log).abs().max())
                name = "without weights" if extra is None else "with weights"
                print(
                    f"listed {dtype} {name}, {clusters} clusters of {n}, {near} keys, d {d}, d_v {d_v}: "
                    f"{found:.2e} {apart:.2e}"
                )
                # float32 knows a logit of some hundred to 1e-5.
                assert found < (2e-4 if dtype == torch.float32 else 1e-2)
                assert apart < (2e-4 if dtype == torch.float32 else 2e-2)
            _, _, log = triton_kernels.listed(
                q, *of_tiles, k, v, chosen, torch.full_like(weights, -torch.inf).to(DEVICE)
            )
            assert bool((log < -1e29).all())


def plain_local_expansion(q, k, v, scale, labels, near):
    """The method on given clusters of the queries, one by one in float64."""
    q, k, v = scale * q.double(), k.double(), v.double()
    k = k - k.mean(1, keepdim=True)
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=torch.float64, device=q.device)
    for e in range(q.shape[0]):
        for cluster in labels[e].unique():
            rows = (labels[e] == cluster).nonzero().flatten()
            centre = q[e, rows].mean(0)
            variance = (q[e, rows] - centre).square().mean(0)
            logs = k[e] @ centre + 0.5 * k[e].square() @ variance
            chosen = logs.topk(near).indices
            weights = logs.exp().index_fill(0, chosen, 0.0)
            far_key, far_value = ((weights.unsqueeze(1) * t[e]).sum(0) / weights.sum() for t in (k, v))
            delta = q[e, rows] - centre
            value = far_value.expand(len(rows), -1)
            tilted = v.shape[2] <= 2
            if tilted:
                together = (weights.unsqueeze(1) * (k[e] - far_key)).mT @ (v[e] - far_value) / weights.sum()
                value = value + delta @ together
            far = (delta @ far_key + weights.sum().log() - 0.5 * variance @ far_key.square()).exp()
            near_weights = (q[e, rows] @ k[e, chosen].mT).exp()
            numerators = near_weights @ v[e, chosen] + far.unsqueeze(1) * value
            row_sums = near_weights.sum(1) + far
            if q.shape[1] == k.shape[1]:
                # A far key of the query's own exactly, in place of its share
                light = torch.ones_like(weights).index_fill(0, chosen, 0.0)[rows]
                own = (q[e, rows] * k[e, rows]).sum(1).exp()
                share = far * weights[rows] / weights.sum()
                seen = share * (1 + (delta * (k[e, rows] - far_key)).sum(1))
                row_sums = row_sums + light * (own - seen)
                numerators = numerators + (light * (own - (seen if tilted else share))).unsqueeze(1) * v[e, rows]
                if not tilted:
                    # The weights of a row add up to one.
                    numerators = numerators - (light * (seen - share)).unsqueeze(1) * value
            out[e, rows] = numerators / row_sums.unsqueeze(1)
    return out


@contextmanager
def labelled_by(labels_of_queries):
    """Other clusters of the queries: those of k-means depend on the order in which a GPU adds."""
    original = expansion_cuda.labels_of_queries
    expansion_cuda.labels_of_queries = labels_of_queries
    try:
        yield
    finally:
        expansion_cuda.labels_of_queries = original


def check_tiles():
    """Every query once, with as many centres as queries, and clusters that stay empty."""
    first = torch.full((1,), 3, device=DEVICE)
    q, k, _ = inputs(2, 37, 20, 6, 1, torch.float32, 0)
    for queries, clusters in ((q, 5), (q, 37), (q[:, :1].expand(-1, 37, -1), 5)):
        spread = k.var(1, correction=0, keepdim=True)
        labels = expansion_cuda.labels_of_queries(queries, spread, first, clusters, 3, 2)
        found = dealt(labels, clusters).queries.flatten(1).sort(1).values[:, -37:]
        assert torch.equal(found.long(), torch.arange(37, device=DEVICE).expand(2, -1))
    print("tiles: each query once")


def check_clustering():
    """Samples, k-means and tiles in few kernels are those of torch."""
    first = torch.full((1,), 3, device=DEVICE)
    for n_q, n_k, d, d_v, clusters, scale in (
        (150, 170, 20, 1, 9, 0.3),
        (1100, 70, 100, 5, 40, 0.3),
        # So small that keys apart are those that move logits by four, whatever the others do
        (40, 608, 16, 4, 40, 0.05),
        (70, 70, 24, 1, 2, 0.3),
    ):
        q, k, v = inputs(2, n_q, n_k, d, d_v, torch.float32, n_q)
        # Apart from zero and from each other, so that no two centres are equally near
        q, k, v = 3 * q + 5, k - 7, v + 2
        # A sixteenth of the first keys stand apart, of the second one more, which are no exceptions.
        few = n_k // 16
        k[0, :few] *= 30
        k[1, : few + 1] *= 30
        s = clustering_cuda.Sampled.of(q, k, v, scale)
        some_q, some_k, some_v = (t[:, :: max(1, t.shape[1] // 512)] for t in (q, k, v))
        variance = scale**2 * some_q.var(1, correction=0)
        squares = (some_k - some_k.mean(1, keepdim=True)).square()
        spreads = (squares * variance.unsqueeze(1)).sum(2)
        bar = (16 * spreads.median(1).values).clamp_min(16)
        bar[1] = torch.inf
        usual = (spreads <= bar.unsqueeze(1)).unsqueeze(2).float()
        right = (some_q.mean(1), variance, some_k.mean(1), (squares * usual).sum(1) / usual.sum(1), bar[:, None])
        right = (*right, some_v.mean(1), scale * right[3].pow(expansion_cuda.METRIC_POWER))
        ranks = torch.zeros(2, 1, 2, -(-d // 16) * 16, device=DEVICE)
        ranks[:, 0, :, :d] = torch.stack([scale * right[0], 0.5 * variance], 1)
        # bfloat16 keeps 8 bits, and the interpreter cuts the others off.
        assert float((s.ranks.float() - ranks.flatten(2)).abs().max() / ranks.abs().max()) < 2**-7
        assert int((usual == 0).sum()) == few
        assert s.bar[1] == torch.inf
        for name, one in zip(list(s.__dataclass_fields__)[:-1], right, strict=True):
            assert torch.allclose(getattr(s, name), one, rtol=1e-4, atol=0), name

        for sampled in (3, 10**6):
            labels, counts = clustering_cuda.labels_of_queries(q, s, first, clusters, 2, sampled)
            plain = expansion_cuda.labels_of_queries(q, s.key_spread.unsqueeze(1), first, clusters, 2, sampled)
            # Products in bfloat16 move queries between two centres that are almost equally near.
            same = float((labels == plain).float().mean())
            print(f"clustering, {clusters} clusters of {n_q}, d {d}, {sampled} sampled: {same:.3f} as in float32")
            assert same > 0.9
            assert torch.equal(counts.long(), torch.stack([one.bincount(minlength=clusters) for one in labels.long()]))
            queries, of_tile, ends = clustering_cuda.tiles_of(labels, counts, clusters)
            tiles = expansion_cuda.Tiles.of(labels.long(), clusters)
            assert torch.equal(queries, tiles.queries)
            assert torch.equal(ends, tiles.ends)
            assert torch.equal(of_tile[of_tile >= 0], tiles.clusters[(queries >= 0).any(2)])
        one = clustering_cuda.one_cluster(q)
        tiles = expansion_cuda.Tiles.of(torch.zeros_like(labels), 1)
        assert torch.equal(one[0], tiles.queries)
        assert torch.equal(one[1], tiles.clusters)

    # All queries in the first cluster, whose tiles may be all there are: a centre is of at most sixteen of them.
    for n, clusters, step in ((33, 2, 1), (40, 3, 1), (1300, 2, 3)):
        q, _, _ = inputs(1, n, 1, 20, 1, torch.float32, n)
        counts = torch.tensor([[n, *[0] * (clusters - 1)]], dtype=torch.int32, device=DEVICE)
        labels = torch.zeros(1, n, dtype=torch.int16, device=DEVICE)
        queries, _, ends = clustering_cuda.tiles_of(labels, counts, clusters)
        found = clustering_cuda.ranks_of(q, queries, ends, 0.3)[0, 0].float().view(2, 32)[:, :20]
        some = 0.3 * q[0, torch.arange(n, device=DEVICE) // 32 % step == 0]
        right = torch.stack([some.mean(0), 0.5 * some.var(0, correction=0)])
        assert float(((found - right).abs() / right.abs()).max()) < 2**-7

    # A centre without queries stays where it is.
    totals, _, _ = inputs(1, 3, 3, 16, 1, torch.float32, 0)
    counts = torch.tensor([[4, 0, 2]], dtype=torch.int32, device=DEVICE)
    centres, norms = torch.full_like(totals, 5.0, dtype=torch.bfloat16), torch.full((1, 3), 7.0, device=DEVICE)
    right = (totals / counts.unsqueeze(2)).nan_to_num(5.0, 5.0, 5.0)
    clustering_cuda.means_kernel[(1, 1)](
        totals, totals, totals, counts, centres, norms, totals, counts, 3, 1, 3,
        FIRST=False, **clustering_cuda.launches(16, 1)["means_kernel"],
    )  # fmt: skip
    assert float((centres - right).abs().max()) < 0.02
    assert torch.allclose(norms, right.square().sum(2).index_fill(1, torch.tensor([1], device=DEVICE), 7.0))
    assert not bool(totals.any() or counts.any())


def check_threshold():
    """Fewer than `rank` numbers exceed it, but for 0.001 as many, unless they are 80 below the largest."""
    x, rank = inputs(1, 4, 100, 100, 1, torch.float32, 0)[0][0] - 9, 7
    x[2], x[3, 0] = -3, 200
    bound = torch.empty(4, device=DEVICE)
    fused.kernels.threshold_kernel[(4,)](x, bound, 100, rank, ROOM=128)
    assert bool(((x > bound[:, None]).sum(1) < rank).all())
    assert bool(((x > bound[:, None] - 0.001).sum(1) >= rank)[:3].all())
    assert abs(float(bound[3]) - 120) < 0.001
    print("threshold: below the numbers wanted")


def check_lists():
    """Bits of 1 in words become the places of the bits, in their order: in empty words, full ones and those between."""
    generator = torch.Generator().manual_seed(0)
    near = torch.rand(2, 3, 1100, 32, generator=generator) < 0.05
    near[0, 0], near[0, 1, :2], near[1, 2, 7:] = False, True, False
    words = (near.long() << torch.arange(32)).sum(3)
    words = torch.where(words < 2**31, words, words - 2**32).int().to(DEVICE)
    for room in (64, 4096):
        counts = torch.empty(2, 3, dtype=torch.int32, device=DEVICE)
        lists = torch.full((2, 3, room), -1, dtype=torch.int32, device=DEVICE)
        fused.kernels.lists_kernel[(3, 2)](words, counts, lists, 1100, room, BN=512)
        assert torch.equal(counts.cpu().long(), near.flatten(2).sum(2))
        for e in range(2):
            for c in range(3):
                right = near[e, c].flatten().nonzero().flatten()[:room]
                assert torch.equal(lists[e, c, : len(right)].cpu().long(), right)
                assert bool((lists[e, c, len(right) :] == -1).all())
    print("lists: each near key once, in order")


def check_local_expansion():
    shapes = (
        (150, 170, 20, 1, 16, 80),
        (90, 100, 100, 5, 32, 40),
        (10, 60, 20, 2, 16, 24),
        (33, 50, 24, 3, 1, 7),
        (90, 90, 20, 1, 32, 20),
        (60, 60, 20, 4, 16, 9),
    )
    first = torch.full((1,), 3, device=DEVICE)
    for n_q, n_k, d, d_v, block, near in shapes:
        q, k, v = inputs(2, n_q, n_k, d, d_v, torch.float32, n_q)
        block = min(block, n_q)
        spread = k.var(1, correction=0, keepdim=True)
        labels = expansion_cuda.labels_of_queries(q, spread, first, -(-n_q // block), 2, 8)
        right = plain_local_expansion(q, k, v, d**-0.5, labels, near)
        for dtype in (torch.float32, torch.bfloat16):
            with labelled_by(lambda *_, labels=labels: labels):
                clustering = Clustering(block=block, near=near, iterations=2, sampled=8)
                out = local_expansion_cuda.steps(q, k, v, first, clustering, scale=d**-0.5, products=dtype)
            found = gap(out, right, v)
            print(f"local expansion, products {dtype}, {n_q} x {n_k}, d {d}, d_v {d_v}, blocks of {block}: {found:.2e}")
            # Rounded, the ranking may take other near keys.
            assert found < (LARGEST[dtype] if dtype == torch.float32 else 2e-2)


def check_approxkmv():
    """More samples make a smaller error, and so do more near keys; all of them none."""
    q, k, v = inputs(2, 170, 170, 20, 1, torch.float32, 3)
    right = exact(q, k, v, 0.3)
    given = {"scale": 0.3, "block": 16, "directions": 0, "iterations": 2, "sampled": 8}

    def error(near, samples, seeds=4):
        found = [approxkmv_cuda.attend(q, k, v, seed=s, near=near, samples=samples, **given) for s in range(seeds)]
        return sum(gap(out, right, v) for out in found) / seeds

    found = [error(20, 8), error(20, 128), error(80, 8), error(170, 8, 1)]
    print(f"approxkmv, 20 near and 8 or 128 samples, 80 near, all: {found}")
    assert found[1] < 0.5 * found[0]
    assert found[2] < 0.7 * found[0]
    assert found[3] < LARGEST[torch.float32]


def check_errors():
    """More near keys make a smaller error, all of them none."""
    for dtype, products in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        q, k, v = inputs(2, 150, 170, 20, 1, dtype, 3)
        right = exact(q, k, v, 20**-0.5)
        given = {"scale": 20**-0.5, "seed": 0, "products": products, "directions": 0, "iterations": 2, "sampled": 8}
        found = [gap(local_expansion_cuda.attend(q, k, v, block=16, near=m, **given), right, v) for m in (20, 80, 170)]
        mean = gap(v.double().mean(1, keepdim=True).expand_as(right), right, v)
        print(f"local expansion {dtype}, 20, 80, 170 of 170 keys: {found}, mean {mean:.3f}")
        assert found[1] < found[0] < 0.7 * mean
        assert found[2] < LARGEST[dtype]
        # A block larger than all queries together is all of them.
        one = gap(local_expansion_cuda.attend(q, k, v, block=2**24, near=20, **given), right, v)
        print(f"local expansion {dtype}, one block: {one:.3f}")
        assert one < 1.5 * mean


@contextmanager
def replaced(**given):
    """Other functions of `fused` for a while; graphs recorded with the original ones would not notice."""
    originals = {name: getattr(fused, name) for name in given}
    cuda_graphs._graphs.clear()
    for name, other in given.items():
        setattr(fused, name, other)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(fused, name, original)
        cuda_graphs._graphs.clear()


def check_fused():
    """In bfloat16, with all keys in the sample, what the method is in float64 on the same clusters.

    The ranking is rounded, and keys within 0.001 of the threshold may be near or far.
    """
    first = torch.full((1,), 3, device=DEVICE)
    # Of 1,100 keys there are two pieces.
    shapes = ((150, 170, 20, 1, 16, 40), (90, 100, 100, 5, 32, 20), (90, 90, 20, 1, 32, 20), (70, 70, 24, 4, 70, 9))
    shapes += ((150, 1100, 20, 1, 16, 40), (90, 1100, 16, 3, 32, 40))
    # Of few keys a query's own, which most of these do not have near, is a large part.
    equal = ((40, 40, 20, 1, 40, 3), (24, 24, 20, 4, 12, 3))
    for dtype in (torch.float32, torch.bfloat16):
        for n_q, n_k, d, d_v, block, near in shapes + equal:
            q, k, v = inputs(2, n_q, n_k, d, d_v, dtype, n_q)
            if n_q < 50:
                # Values that follow the keys, and queries to one side of them: the answer, and its far key, are long.
                q, k, v = q + 2, q, v + q[..., :1]
            clusters = -(-n_q // block)
            spread = k.float().var(1, correction=0, keepdim=True)
            labels = expansion_cuda.labels_of_queries(q.float(), spread, first, clusters, 2, 8)
            # The first query alone, in a tile of its own
            labels[0, 1:] = torch.where(labels[0, 1:] == labels[0, 0], (labels[0, 1:] + 1) % clusters, labels[0, 1:])
            right = plain_local_expansion(q, k, v, d**-0.5, labels, near)

            def given(q, s, first, clusters, *_, labels=labels):
                counts = torch.stack([one.bincount(minlength=clusters) for one in labels])
                return labels.to(torch.int16), counts.to(torch.int32)

            with replaced(labels_of_queries=given, listing=lambda near, n_k: (1, near + 1, 64)):
                clustering = Clustering(block=block, near=near, iterations=2, sampled=8)
                out, lost = fused.steps(q, k, v, first, clustering, scale=d**-0.5)
            found = gap(out, right, v)
            print(f"fused {dtype}, {n_q} x {n_k}, d {d}, d_v {d_v}, blocks of {block}: {found:.2e}")
            assert found < 5e-3
            assert out.dtype == dtype
            assert int(lost) == 0


def check_sample():
    """A threshold from one key in 16, of keys of which each 16th is 0: a sample of these would make all others near."""
    near = 128
    q, k, v = inputs(2, 70, 1100, 16, 1, torch.bfloat16, 0)
    q, k = 0.5 + 0.1 * q, k + 1
    k[:, ::16] = 0
    assert fused.listing(near, 1100) == (16, 8, 512)
    first = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    out, lost = fused.steps(q, k, v, first, Clustering(70, near, 0, 2, 8), scale=1.0)
    found = gap(out, exact(q, k, v, 1.0), v)
    print(f"sample: {found:.2e}, {int(lost)} lost")
    assert found < 4e-3
    assert int(lost) == 0
    # A list that is too short loses the rows, and no more than there are.
    with replaced(listing=lambda near, n_k: (16, 8, 8)):
        _, lost = fused.steps(q, k, v, first, Clustering(70, near, 0, 2, 8), scale=1.0)
    assert int(lost) == 2 * 70


def of_one_block(q, k, v, near, apart=0):
    """Answers of one block, fused and in float32, with these near keys besides so many that stand apart."""
    first = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with replaced(listing=lambda near, n_k: (1, near + 1, 64)):
        yield "fused", fused.steps(q, k, v, first, Clustering(q.shape[1], near, 0, 2, 8), scale=1.0)[0]
    clustering = Clustering(q.shape[1], near + apart, 0, 2, 8)
    yield "float32", local_expansion_cuda.steps(q, k, v, first, clustering, scale=1.0, products=torch.float32)


def check_apart():
    """Keys that stand apart are near, even one that weighs little at the centre, and take no other key's place."""
    q, k, v = inputs(1, 500, 170, 16, 1, torch.float32, 0)
    q, k = 0.1 * q, 0.3 * k
    # Two keys that outweigh all others, each for half of the queries
    q[..., :3], k[..., :3] = torch.tensor([0.0, 5.0, 2.5], device=DEVICE), 0.0
    q[:, ::2, 2] *= -1
    k[:, 4:6, 1:3] = torch.tensor([[2.0, 1.0], [2.0, -1.0]], device=DEVICE)
    # One query to the side, for which keys count that weigh little for all others: the last, nothing at the centre
    q[:, 7, 0] = 10
    k[:, :4, :2] = torch.tensor([[10.0, 1.0]] * 3 + [[13.0, -4.0]], device=DEVICE)
    v[:, 3:6] = torch.tensor([[9.0], [3.0], [-3.0]], device=DEVICE)
    right = exact(q, k, v, 1.0)
    for name, out in of_one_block(q, k, v, 2, apart=4):
        off = float((out - right).abs().max())
        print(f"apart, {name}: {off:.2e}")
        assert off < 0.1


def check_span():
    """A row whose far keys outweigh its near ones by more than 80 nats is lost: what it sees is an extrapolation."""
    q, k, v = inputs(1, 1100, 800, 16, 1, torch.float32, 0)
    q, k = torch.zeros_like(q), 0.1 * k
    q[..., 1], q[:, 1, 0], k[..., 0] = 10, 10, 0
    # One near key, against the query to the side; of the far ones two that are heavy, and for it by no means equal
    k[:, :3, :2] = torch.tensor([[-4.0, 1.4], [6.0, 1.2], [3.0, 1.2]], device=DEVICE)
    for name, out in of_one_block(q, k, v, 1):
        lost = out.isnan().flatten()
        print(f"span, {name}: {int(lost.sum())} lost")
        assert lost.nonzero().flatten().tolist() == [1]


def check_one_key():
    """Where one key outweighs all others by more than float32 holds, no far key is left, and no row is lost."""
    q, k, v = inputs(1, 40, 100, 16, 1, torch.float32, 0)
    q, k = 0.1 * q, 0.1 * k
    q[..., 0], k[:, 0, 0] = 10, 30
    for name, out in of_one_block(q, k, v, 3):
        off = float((out - v[:, :1]).abs().max())
        print(f"one key, {name}: {off:.2e}")
        assert off < 1e-2


def check_reach():
    """Rows that are lost are those of `beyond_reach`: some for their variance alone, some for their sum alone."""
    n, near, scale = 150, 6, 1.0
    _, k, v = inputs(1, 2, n, 16, 1, torch.float32, 0)
    # Queries of rising lengths along the near keys, which outweigh all others together, and across them
    k[:, :near] *= 2.2
    q = k[:, :near].repeat(1, 5, 1) * torch.linspace(0, 1.5, 30, device=DEVICE)[:, None]
    # Most at 0, or one near key would outweigh the others at the centre by more than the 80 nats that near keys span
    q = torch.cat([q, q.roll(1, 2), torch.zeros(1, 240, 16, device=DEVICE)], 1)
    first = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with replaced(listing=lambda near, n_k: (1, near + 1, 64)):
        out, number = fused.steps(q, k, v, first, Clustering(300, near, 0, 2, 8), scale=scale)
    keys = (k - k.mean(1, keepdim=True))[0].double()
    centre, variance = q[0].double().mean(0), q[0].double().var(0, correction=0)
    ranked = keys @ centre + 0.5 * keys.square() @ variance
    order = ranked.argsort(descending=True)
    weights = ranked[order[near:]].exp()
    far_key, delta = weights @ keys[order[near:]] / weights.sum(), q[0].double() - centre
    far_log = delta @ far_key + weights.sum().log() - 0.5 * variance @ far_key.square()
    known = (q[0].double() @ keys[order[:near]].mT).logsumexp(1)
    variances = delta.square() @ keys.square().mean(0)
    off = torch.nn.functional.logsigmoid(far_log - known) + 0.5 * variances - most_off(n - near)
    clear = (off.abs() > 0.3) & ((variances - REACH).abs() > 1)
    lost = (off > 0) | (variances > REACH)
    print(f"reach: {int(lost.sum())} of {len(lost)} rows lost, {int((~clear).sum())} in doubt")
    assert bool(((off > 0) & (variances < REACH) & clear).any())
    assert bool(((off < 0) & (variances > REACH) & clear).any())
    assert bool((~lost & clear).any())
    assert torch.equal(out[0, :, 0].isnan()[clear], lost[clear])
    assert int(number) == int(out.isnan().sum())


def check_fused_extremes():
    """Equal logits, a key a hundred times as long, lists that are too short for all near keys, own keys that count."""
    from approxkmv.compute.counting import counting

    q, k, v = inputs(2, 150, 150, 20, 1, torch.bfloat16, 3)
    given = {"scale": 20**-0.5, "seed": 0, "products": "bfloat16", "directions": 0, "iterations": 2, "sampled": 8}
    given |= {"block": 16, "near": 20}

    def compared(q, k, v):
        with counting() as counts:
            out = local_expansion_cuda.attend(q, k, v, **given)
        return gap(out, exact(q, k, v, given["scale"]), v), counts.recomputed_rows

    equal = compared(torch.zeros_like(q), k, v)
    k_long = k.clone()
    k_long[:, 17] *= 100
    with replaced(listing=lambda near, n_k: (1, near, 8)):
        short = compared(q, k, v)
    long = compared(q, k_long, v)
    print(f"fused, equal logits: {equal}, a long key: {long}, short lists: {short}")
    # A column whose sums overflow: its rows are made again, whatever the other columns are.
    v_long = torch.cat([v, v + 1e37, v, v], 2)
    answer = local_expansion_cuda.attend(q, k, v_long, **given)
    right = exact(q, k, v_long, given["scale"])
    huge, others = (gap(answer[..., some], right[..., some], v_long[..., some]) for some in ([1], [0, 2, 3]))
    print(f"fused, a column of huge values: {huge}, the others: {others}")
    assert max(huge, others) < 4e-3
    # bfloat16 keeps 8 bits of an answer.
    assert equal[0] < 4e-3
    assert equal[1] == 0
    assert long[0] < 0.05
    assert short[0] < 4e-3
    assert short[1] == 300
    # K = Q: a query's own key, near or far, counts once, or the error would be several times that of the plain form.
    q = 1.5 * q
    own, recomputed = compared(q, q, v)
    right = exact(q, q, v, given["scale"])
    plain = gap(local_expansion_cuda.attend(q, q, v, **(given | {"products": "float32"})), right, v)
    print(f"fused, own keys: {own}, {recomputed} rows recomputed; plain {plain}")
    assert own < 1.3 * plain
    assert recomputed == 0


def rolled(q, spread, first, clusters, *_):
    """Clusters of the queries that depend on `first` and on nothing that is rounded."""
    n = q.shape[1]
    return ((torch.arange(n, device=q.device) + first) % n * clusters // n).expand(len(q), -1)


def rolled_and_counted(*given):
    """The same for `fused`, with how many queries each cluster has."""
    labels = rolled(*given)
    counts = torch.zeros(len(labels), given[3], dtype=torch.int32, device=labels.device)
    return labels.to(torch.int16), counts.scatter_add_(1, labels, torch.ones_like(labels, dtype=torch.int32))


def check_graphs():
    """CUDA graphs: one for all seeds, each answer that of its own inputs and seed, in inference mode and out of it."""
    given = {"block": 16, "iterations": 2, "sampled": 8}
    near = (20, 30)
    problems = [inputs(2, 150, 170, 20, 1, torch.float32, seed) for seed in range(INPUTS)]
    cuda_graphs._graphs.clear()
    with labelled_by(rolled):
        answers = {}
        for seed in range(10):
            for m in near:
                with torch.inference_mode(seed % 2 == 0):
                    q, k, v = (t.clone() for t in problems[seed % INPUTS])
                    answers[seed, m] = local_expansion_cuda.attend(
                        q, k, v, scale=0.3, seed=seed, products="float32", directions=0, near=m, **given
                    )
        assert len(cuda_graphs._graphs) == len(near)
        assert len({graph.pool for graph in cuda_graphs._graphs.values()}) == 1
        for (seed, m), answer in answers.items():
            q, k, v = problems[seed % INPUTS]
            first = torch.full((1,), seed, device=DEVICE)
            clustering = expansion_cuda.clustering_for({"near": m, **given}, q.shape[1], k.shape[1])
            right = local_expansion_cuda.steps(q, k, v, first, clustering, scale=0.3, products=torch.float32)
            assert gap(answer, right.double(), v) < LARGEST[torch.float32]
        assert gap(answers[0, 20], answers[INPUTS, 20].double(), problems[0][2]) > LARGEST[torch.float32]
    cuda_graphs._graphs.clear()
    print("graphs: one for all seeds, answers as without")


def check_second_device():
    """Kernels and graphs on a device that is not the current one."""
    q, k, v = (t.to("cuda:1") for t in inputs(2, 150, 170, 20, 1, torch.float32, 3))
    right = exact(q, k, v, 0.3)
    assert gap(triton_kernels.exact(q, k, v, 0.3), right, v) < LARGEST[torch.float32]
    given = {"products": "float32", "directions": 0, "iterations": 2, "sampled": 8}
    answer = local_expansion_cuda.attend(q, k, v, scale=0.3, seed=0, block=16, near=120, **given)
    mean = gap(v.double().mean(1, keepdim=True).expand_as(right), right, v)
    assert gap(answer, right, v) < 0.5 * mean
    print("a second device: as the first")


CHECKS = (
    check_exact,
    check_listed,
    check_tiles,
    check_clustering,
    check_threshold,
    check_lists,
    check_local_expansion,
    check_approxkmv,
    check_errors,
    check_fused,
    check_sample,
    check_apart,
    check_span,
    check_one_key,
    check_reach,
    check_fused_extremes,
)


def main():
    if not INTERPRETED and not torch.cuda.is_available():
        sys.exit("check_kernels: torch finds no CUDA device; set TRITON_INTERPRET=1 to check in the interpreter")
    if INTERPRETED:
        interpreter.prepare()
    checks = list(CHECKS)
    if not INTERPRETED:
        checks += [check_graphs] + [check_second_device] * (torch.cuda.device_count() > 1)
    failed = []
    with watched() if INTERPRETED else nullcontext() as sanitizer:
        for check in checks:
            try:
                check()
            except Exception:  # of the compiler, of a launch, of the device, or of the check: the others say more
                traceback.print_exc()
                failed.append(check.__name__)
    if sanitizer:
        print(f"memory: {sanitizer.accesses} accesses")
        assert not sanitizer.faults, "\n".join(sanitizer.faults)
    if failed:
        sys.exit(f"check_kernels: these do not hold: {', '.join(failed)}")


if __name__ == "__main__":
    main()
