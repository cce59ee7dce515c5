"""DiskANN's graph keeps its guarantee, the indexes find the right neighbours, and the dimension is the space's."""

import math

import numpy as np
import pytest
import torch

from approxkmv.errors import InputError
from approxkmv.kernels import reduce_attention
from approxkmv.search.doubling_dimension import doubling_dimension


def points(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def vamana():
    pytest.importorskip("numba")
    from approxkmv.search import vamana

    return vamana


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_exhaustive_graph_is_shortcut_reachable(vamana, alpha):
    """For every pair p, w: an edge, or an edge from p to some v with alpha |v - w| <= |p - w|."""
    x = points(120, 3)
    graph = vamana.build_exhaustively(x, alpha=alpha)
    distances = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    for p in range(len(x)):
        linked = torch.from_numpy(graph.neighbours[p, : graph.degrees[p]]).long()
        reached = distances[linked].amin(0)
        others = torch.ones(len(x), dtype=torch.bool)
        others[torch.cat([linked, torch.tensor([p])])] = False
        # Squared distances are compared in float32.
        assert bool((alpha * reached <= distances[p] * (1 + 1e-5))[others].all())


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0])
def test_greedy_search_keeps_the_guarantee(vamana, alpha):
    """Greedy search ends within (alpha + 1) / (alpha - 1) of the nearest distance, in few steps."""
    # Queries and keys of a kernel, as Lemma 4.1 turns them into points.
    reduced = reduce_attention(points(200, 6, 1), points(500, 6, 2), 1.0)
    graph = vamana.build_exhaustively(reduced.keys, alpha=alpha)
    found = graph.search(reduced.queries, 1, 1)
    nearest = torch.cdist(reduced.queries, reduced.keys).amin(1)
    ratio = found.distances[:, 0].double() / nearest
    assert float(ratio.min()) > 1 - 1e-4
    assert float(ratio.max()) <= (alpha + 1) / (alpha - 1) + 1e-4
    # A graph of all pairs would need one step; a larger alpha buys nearness with links.
    assert int(found.steps.max()) <= 40


def test_more_alpha_more_links_and_nearer_answers(vamana):
    x, queries = points(400, 8), points(200, 8, 5)
    nearest = torch.cdist(queries.double(), x.double()).amin(1)
    degrees, gaps = [], []
    for alpha in (1.1, 2.0):
        graph = vamana.build_exhaustively(x, alpha=alpha)
        degrees.append(graph.degrees.mean())
        gaps.append(float((graph.search(queries, 1, 1).distances[:, 0] / nearest).mean()))
    assert degrees[0] < degrees[1]
    assert gaps[0] > gaps[1]


def test_practical_graph_finds_nearest_points(vamana):
    x, queries = points(1500, 12), points(100, 12, 5)
    generator = torch.Generator().manual_seed(0)
    graph = vamana.build(x, alpha=1.2, degree=24, beam=40, generator=generator)
    assert int(graph.degrees.max()) <= 24
    found = graph.search(queries, 10, 60)
    right = torch.cdist(queries, x).topk(10, largest=False)
    hits = np.mean([len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found.keys, right.indices, strict=True)])
    assert hits > 9.5
    # Nearest first, each once, with its distance, and without looking at all points.
    assert bool((found.distances.diff(dim=1) >= 0).all())
    assert all(len(set(row.tolist())) == 10 for row in found.keys)
    assert torch.allclose(found.distances, (queries.unsqueeze(1) - x[found.keys]).norm(dim=2), atol=1e-4)
    assert float(found.evaluations.float().mean()) < 0.6 * 1500


def test_graphs_of_few_and_equal_points(vamana):
    generator = torch.Generator()
    for x in (points(1, 3), points(2, 3), torch.zeros(20, 3)):
        graph = vamana.build(x, alpha=1.2, degree=4, beam=4, generator=generator)
        found = graph.search(points(5, 3), 3, 8)
        assert bool((found.keys[:, 0] >= 0).all())
        assert bool((found.keys < len(x)).all())
    with pytest.raises(InputError, match="alpha is"):
        vamana.build(points(5, 2), alpha=0.9, degree=4, beam=4, generator=generator)


def test_indexes_grow_and_return_products():
    pytest.importorskip("faiss")
    from approxkmv.search.indexes import make_index

    k, q = points(300, 9), points(40, 9, 1)
    for name in ("flat", "hnsw"):
        index = make_index(name, k, links=16, construction=40, breadth=200)
        for first in (0, 100, 200):
            index.add(first, first + 100)
            keys, products = index.search(q, 5)
            right = (q @ k[: first + 100].mT).topk(5)
            # The breadth makes the graph's answers exact at this size.
            assert float((keys == right.indices).float().mean()) > 0.99
            # What it returns are products with the keys as given, not with their reduction.
            assert torch.allclose(products, q.unsqueeze(1).mul(k[keys]).sum(2), atol=1e-4)


def test_faiss_and_torch_keep_the_same_number_of_threads():
    """Both bring an OpenMP of their own into this process: each works after the other, and neither changes torch's."""
    faiss = pytest.importorskip("faiss")
    from approxkmv.search.indexes import make_index

    k, before = points(400, 16), torch.get_num_threads()
    answers = []
    try:
        for threads in (2, 1, 2):
            torch.set_num_threads(threads)
            for name in ("flat", "hnsw"):
                index = make_index(name, k, links=16, construction=40, breadth=64)
                index.add(0, len(k))
                answers.append(index.search(k, 8)[0])
                assert faiss.omp_get_max_threads() == threads == torch.get_num_threads()
                assert bool((k @ k.mT).isfinite().all())
    finally:
        torch.set_num_threads(before)
    # The same graph and the same answers on any number of threads.
    for place, answer in enumerate(answers):
        assert torch.equal(answer, answers[place % 2])


def test_the_exact_index_of_other_devices_agrees():
    pytest.importorskip("faiss")
    from approxkmv.search.indexes import FlatIndex

    k, q = points(600, 9), points(30, 9, 1)
    index = FlatIndex(k)
    index.add(0, 500)
    keys, products = index.search(q, 7)
    # What it does where faiss' index has no place.
    index._index = None
    other_keys, other_products = index.search(q, 7)
    assert torch.equal(keys, other_keys)
    assert torch.allclose(products, other_products, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("d", [1, 2, 4])
def test_doubling_dimension_grows_with_that_of_the_space(d):
    side = {1: 256, 2: 16, 4: 4}[d]
    grid = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float64)] * d).reshape(-1, d)
    found = doubling_dimension(grid, centres=None)
    # A ball of radius r holds points at most 2 r apart: on a line three of them are further than r/2 from each other
    # at most five times; a greedy cover needs at most 5 to the power d.
    assert 0 < found.lower <= found.upper <= d * math.log2(5) + 1e-9
    # The longest distance is the diagonal, the shortest one.
    assert found.aspect_ratio == pytest.approx((side - 1) * d**0.5)
    # The same points in a space of more coordinates are no more complicated.
    assert doubling_dimension(torch.nn.functional.pad(grid, (0, 7)), centres=None) == found


def test_points_at_equal_distances_need_a_ball_each():
    found = doubling_dimension(torch.eye(32), centres=None)
    assert found.upper == pytest.approx(5.0)
    assert found.aspect_ratio == pytest.approx(1.0)
    with pytest.raises(InputError, match="two different points"):
        doubling_dimension(torch.ones(4, 2))
