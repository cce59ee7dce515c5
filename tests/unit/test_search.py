"""DiskANN's graph keeps its guarantee, the indexes find the right neighbours, and the dimension is the space's."""

import math

import numpy as np
import pytest
import torch

from approxkmv.compute.counting import counting
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
    for alpha in (0.9, math.nan):
        with pytest.raises(InputError, match="alpha is"):
            vamana.build(points(5, 2), alpha=alpha, degree=4, beam=4, generator=generator)
    for factor, what in ((1e18, r"hold a number beyond 1e\+17"), (math.nan, "holds a NaN")):
        with pytest.raises(InputError, match=f"points {what}"):
            vamana.build_exhaustively(factor * torch.ones(5, 2), alpha=1.5)


@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_arrays_that_the_loops_would_write_beyond_are_refused(vamana, value):
    given = {"degree": 4, "beam": 4, "generator": torch.Generator()}
    graph = vamana.build(points(20, 3), alpha=1.2, **given)
    for name in ("degree", "beam"):
        with pytest.raises(InputError, match=f"{name} is {value}: it must be a whole number of at least 1"):
            vamana.build(points(20, 3), alpha=1.2, **given | {name: value})
    for name in ("count", "beam"):
        with pytest.raises(InputError, match=f"{name} is {value}: it must be"):
            graph.search(points(2, 3), **{"count": 1, "beam": 1} | {name: value})


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (3,), (1, 2, 3)])
def test_what_is_no_matrix_of_points_is_refused(vamana, shape):
    generator = torch.Generator()
    graph = vamana.build(points(20, 3), alpha=1.2, degree=4, beam=4, generator=generator)
    for call in (
        lambda: vamana.build(torch.ones(shape), alpha=1.2, degree=4, beam=4, generator=generator),
        lambda: vamana.build_exhaustively(torch.ones(shape), alpha=1.2),
        lambda: graph.search(torch.ones(shape), 1, 1),
    ):
        with pytest.raises(InputError, match=r"(points|queries) have shape"):
            call()


def test_a_graph_takes_arrays_of_numpy_and_refuses_lists(vamana):
    x, queries = points(60, 3), points(9, 3, 1)
    for make in (
        lambda given: vamana.build_exhaustively(given, alpha=1.5),
        lambda given: vamana.build(given, alpha=1.5, degree=4, beam=8, generator=torch.Generator().manual_seed(0)),
    ):
        right = make(x).search(queries, 2, 4)
        found = make(x.double().numpy()).search(queries.numpy(), 2, 4)
        assert torch.equal(found.keys, right.keys)
        assert torch.equal(found.distances, right.distances)
        for wrong in (queries.tolist(), queries.to(torch.complex64), queries.to("meta"), None):
            with pytest.raises(InputError, match=r"queries (is|has)"):
                make(x).search(wrong, 2, 4)
            with pytest.raises(InputError, match=r"points (is|has)"):
                make(wrong)


def test_points_at_one_place_link_to_each_other_and_not_to_themselves(vamana):
    x = points(12, 3).repeat(3, 1)
    graph = vamana.build_exhaustively(x, alpha=1.5)
    for i in range(36):
        linked = graph.neighbours[i, : graph.degrees[i]]
        assert i not in linked
        assert any(other % 12 == i % 12 for other in linked)
    found = graph.search(x, 1, 1)
    assert bool((found.distances == 0).all())
    assert bool((found.keys[:, 0] % 12 == torch.arange(36) % 12).all())


@pytest.mark.parametrize("width", [2, 4, 40])
def test_queries_of_another_width_are_refused(vamana, width):
    generator = torch.Generator().manual_seed(0)
    made = vamana.build(points(20, 3), alpha=1.5, degree=4, beam=8, generator=generator)
    for graph in (vamana.build_exhaustively(points(20, 3), alpha=1.5), made):
        with pytest.raises(InputError, match=f"width {width}"):
            graph.search(points(2, width), 1, 1)


def test_distances_are_counted_by_hand(vamana):
    """A shortcut so much nearer does not exist: every point stays, up to the degree, after a comparison with each."""
    x, n = points(30, 4), 30
    with counting() as counts:
        graph = vamana.build_exhaustively(x, alpha=1e6)
    assert (graph.degrees == n - 1).all()
    assert counts.other_products == n * (n - 1 + (n - 1) * (n - 2) // 2)
    with counting() as counts:
        found = graph.search(points(7, 4, 1), 3, 1)
    # The start and all its neighbours; the best of these have nothing new.
    assert (found.evaluations == n).all()
    assert counts.other_products == 7 * n
    assert torch.equal(found.steps, 3 + (found.keys != graph.start).all(1))
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    for seed in range(6):
        with counting() as counts:
            vamana.build(line, alpha=1e6, degree=2, beam=4, generator=torch.Generator().manual_seed(seed))
        # Points met in the search, then from the new point, pairs pruned; of the last point's two neighbours each
        # has one too many: distances from it, and the pair that is pruned.
        assert counts.other_products == (1 + 1) + (2 + 2 + 1) + (3 + 3 + 1) + 2 * (3 + 1)


def plain_graph(x, alpha, degree, beam, seed):
    """Neighbours of each point, by the paper's insertion: search, prune, link both ways, prune where links are many."""
    gaps = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").tolist()
    start = int((x - x.mean(0)).norm(dim=1).argmin())
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).tolist()
    links = {start: []}

    def pruned(point, candidates):
        kept = []
        for one in sorted(candidates, key=gaps[point].__getitem__):
            if len(kept) < degree and all(alpha * gaps[other][one] > gaps[point][one] for other in kept):
                kept.append(one)
        return kept

    for point in order:
        if point == start:
            continue
        held, seen, path = [start], {start}, []
        while left := [one for one in held if one not in path]:
            path.append(left[0])
            held += [one for one in links[left[0]] if one not in seen]
            seen.update(held)
            held = sorted(held, key=gaps[point].__getitem__)[:beam]
        links[point] = pruned(point, path)
        for other in links[point]:
            links[other] = [*links[other], point]
            if len(links[other]) > degree:
                links[other] = pruned(other, links[other])
    return links


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("degree", "beam", "alpha", "n", "width"),
    # The last has paths that are many times as long as the beam.
    [(3, 4, 1.05, 80, 3), (4, 12, 1.5, 80, 3), (8, 6, 1.2, 80, 3), (4, 1, 1.2, 200, 1)],
)
def test_a_graph_is_built_as_the_paper_says(vamana, degree, beam, alpha, n, width, seed):
    x = points(n, width, seed)
    generator = torch.Generator().manual_seed(seed)
    graph = vamana.build(x, alpha=alpha, degree=degree, beam=beam, generator=generator)
    made = {i: sorted(graph.neighbours[i, :size].tolist()) for i, size in enumerate(graph.degrees)}
    assert made == {i: sorted(some) for i, some in plain_graph(x, alpha, degree, beam, seed).items()}


def test_a_point_with_too_many_links_keeps_the_nearest(vamana):
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        graph = vamana.build(torch.tensor([[0.0], [1.0], [3.0]]), alpha=1.2, degree=1, beam=4, generator=generator)
        assert graph.start == 1
        assert graph.degrees.tolist() == [1, 1, 1]
        assert graph.neighbours.tolist() == [[1], [0], [1]]


def test_a_shortcut_is_as_much_nearer_as_alpha_says(vamana):
    """From 0 the point 2.5 is 1.67 times as far as from 1: a link to it stays at alpha 1.8. From 2.5, 0 is covered."""
    links = set()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        graph = vamana.build(torch.tensor([[0.0], [1.0], [2.5]]), alpha=1.8, degree=2, beam=4, generator=generator)
        links.add(tuple(graph.degrees.tolist()))
    # 2.5 gets its link to 0 only where 0 comes last, and links both ways.
    assert links == {(1, 2, 1), (2, 2, 2)}


def test_a_shortcut_exactly_as_much_nearer_is_one(vamana):
    graph = vamana.build_exhaustively(torch.tensor([[0.0], [1.0], [2.0]]), alpha=2.0)
    assert [graph.neighbours[i, :size].tolist() for i, size in enumerate(graph.degrees)] == [[1], [0, 2], [1]]


def test_a_search_goes_back_to_what_is_nearer(vamana):
    """The nearest neighbour of the start leads nowhere; behind the second lie nearer points, one behind the other."""
    x = np.zeros((5, 16), np.float32)
    x[:, 0] = [3.0, 2.0, 2.5, 1.0, 0.0]
    neighbours = np.array([[1, 2], [0, 0], [3, 0], [4, 0], [3, 0]], np.int32)
    graph = vamana.VamanaGraph(x, neighbours, np.array([2, 1, 1, 1, 1], np.int32), 0, 1)
    found = graph.search(torch.zeros(2, 1), 3, 3)
    assert found.keys.tolist() == 2 * [[4, 3, 1]]
    assert found.distances.tolist() == 2 * [[0.0, 1.0, 2.0]]
    assert found.evaluations.tolist() == found.steps.tolist() == [5, 5]


def test_searches_of_an_index_are_counted():
    pytest.importorskip("faiss")
    from approxkmv.search.indexes import make_index

    k, q = points(300, 9), points(40, 9, 1)
    numbers = {}
    for name in ("flat", "hnsw"):
        index = make_index(name, k, links=4, construction=40, breadth=20)
        index.add(0, 200)
        for _ in range(2):
            with counting() as counts:
                index.search(q, 5)
            # A second search takes as much as the first.
            assert numbers.setdefault(name, counts.other_products) == counts.other_products
    # All but those found, which are counted where they are weighed
    assert numbers["flat"] == 40 * (200 - 5)
    assert 40 * 20 < numbers["hnsw"] < 40 * 200


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

    k, q = points(600, 9), points(530, 9, 1)
    index = FlatIndex(k)
    index.add(0, 500)
    keys, products = index.search(q, 7)
    # What it does where faiss' index has no place.
    index._index = None
    other_keys, other_products = index.search(q, 7)
    assert torch.equal(keys, other_keys)
    assert torch.allclose(products, other_products, atol=1e-5)


@pytest.mark.parametrize("name", ["flat", "hnsw", "flat elsewhere"])
def test_fewer_keys_than_are_asked_for(name):
    pytest.importorskip("faiss")
    from approxkmv.search.indexes import make_index

    k, q = points(10, 3), points(4, 3, 1)
    index = make_index(name.split()[0], k, links=4, construction=20, breadth=20)
    index.add(0, 3)
    if name == "flat elsewhere":
        index._index = None
    with counting() as counts:
        keys, products = index.search(q, 5)
    right = (q @ k[:3].mT).topk(3)
    assert torch.equal(keys, torch.nn.functional.pad(right.indices, (0, 2), value=-1))
    torch.testing.assert_close(products, torch.nn.functional.pad(right.values, (0, 2), value=-torch.inf))
    assert counts.other_products >= 0


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


def test_a_star_needs_a_ball_for_each_of_its_points():
    """Six points at 1 from a seventh, further than 1 from each other: half the radius covers one. And one far."""
    rays = torch.cat([torch.eye(3), -torch.eye(3)])
    star = torch.cat([rays[:2], torch.zeros(1, 3), rays[2:], torch.tensor([[0.0, 0.0, 64.0]])])
    found = doubling_dimension(star, centres=None)
    assert found.lower == pytest.approx(math.log2(6))
    assert found.upper == pytest.approx(math.log2(7))
    assert found.aspect_ratio == pytest.approx(65.0)
    assert doubling_dimension(star, centres=8, generator=torch.Generator().manual_seed(0)) == found


@pytest.mark.parametrize("factor", [1.0, 1e-300, 1e300])
def test_points_on_a_line_need_as_many_balls_in_any_unit(factor):
    """Of five, those at the ends and the middle one; of two, each its own."""
    for number, balls in ((5, 3), (2, 2)):
        line = factor * torch.arange(float(number), dtype=torch.float64).unsqueeze(1)
        found = doubling_dimension(line, centres=None)
        assert found.upper == pytest.approx(math.log2(balls))
        assert found.aspect_ratio == pytest.approx(number - 1.0)


def test_a_point_far_away_costs_the_others_no_digits():
    line = torch.arange(40, dtype=torch.float64).unsqueeze(1)
    line[0] = -1e9
    assert doubling_dimension(line, centres=None).aspect_ratio == pytest.approx(1e9 + 39)
    # Points at one place are one.
    assert doubling_dimension(line.repeat(2, 1), centres=None) == doubling_dimension(line, centres=None)


def test_points_at_equal_distances_need_a_ball_each():
    found = doubling_dimension(torch.eye(32), centres=None)
    assert found.upper == pytest.approx(5.0)
    # None is further from another than the radius.
    assert found.lower == 0.0
    assert found.aspect_ratio == pytest.approx(1.0)
    with pytest.raises(InputError, match="two different points"):
        doubling_dimension(torch.ones(4, 2))
