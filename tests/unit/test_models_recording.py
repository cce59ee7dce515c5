"""What layers hand over is sorted by text and layer, and what is no self-attention of one shape is refused."""

from __future__ import annotations

import pytest
import torch

from approxkmv.errors import CaptureError
from approxkmv.models.recording import Layer, NonFiniteActivation, Recording

LENGTHS = [3, 5]


def tensors(batch: int = 2, heads: int = 4, n: int = 5, d: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, heads, n, d, generator=torch.Generator().manual_seed(seed))


def recorded(*layers: Layer, masks: tuple[torch.Tensor | None, ...] = (None, None), **more: object) -> Recording:
    recording = Recording("Model", len(layers), LENGTHS, **more)
    for layer, mask in zip(layers, masks, strict=False):
        recording.record(tensors(), tensors(), tensors(), 0.5, causal=False, mask=mask, layer=layer)
    return recording


@pytest.mark.parametrize(
    ("queries", "keys", "says"),
    [
        (tensors(batch=1), tensors(batch=1), "only self-attention"),
        (tensors(n=4), tensors(n=4), "only self-attention"),
        (tensors(n=6), tensors(n=6), "only self-attention"),
        (tensors(), tensors(n=4), "only self-attention"),
        (tensors(), tensors(d=3), "only self-attention"),
        (tensors(), tensors(heads=3), "4 query heads on 3 key heads"),
        (tensors(heads=8), tensors(), "layers with different numbers of heads"),
    ],
)
def test_a_layer_of_another_shape_is_refused(queries, keys, says):
    recording = Recording("Model", 2, LENGTHS)
    recording.record(tensors(), tensors(), tensors(), 0.5, causal=False)
    with pytest.raises(CaptureError, match=says):
        recording.record(queries, keys, keys, 0.5, causal=False)


@pytest.mark.parametrize("widths", [((4, 4), (3, 6), (8, 2)), ((8, 2), (4, 5), (4, 5))])
def test_narrow_layers_have_zeros_behind_their_own_columns(widths):
    recording = Recording("Model", 3, LENGTHS, values=True)
    given = [(tensors(d=d, seed=1), tensors(d=d, seed=2), tensors(d=d_v, seed=3)) for d, d_v in widths]
    for q, k, v in given:
        recording.record(q, k, v, 0.5, causal=False)
    for text, (found, n) in enumerate(zip(recording.texts(), LENGTHS, strict=True)):
        assert found.queries.shape == found.keys.shape == (3, 4, n, 8)
        assert found.values is not None
        assert [layer.widths for layer in found.layers] == list(widths)
        for layer, (q, k, v) in enumerate(given):
            for ours, theirs in ((found.queries, q), (found.keys, k), (found.values, v)):
                width = theirs.shape[-1]
                assert ours[layer, ..., :width].equal(theirs[text, :, :n])
                assert not ours[layer, ..., width:].any()


def test_biases_and_sinks_are_those_of_each_text_beside_what_its_mask_adds():
    bias, sinks = tensors(d=5, seed=1), tensors(d=1, seed=2)
    added = tensors(heads=1, d=5, seed=3)
    mask = added.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), torch.finfo(torch.float32).min)
    one, other = recorded(Layer(bias=bias, sinks=sinks), Layer(), masks=(mask, mask)).texts()
    for text, (found, n) in enumerate(((one, 3), (other, 5))):
        below = added[text, :, :n, :n].tril()
        torch.testing.assert_close(found.layers[0].bias, bias[text, :, :n, :n] + below)
        torch.testing.assert_close(found.layers[1].bias, below)
        torch.testing.assert_close(found.layers[0].sinks, sinks[text, :, :n, 0])
    # One of size one serves every text.
    one, other = recorded(Layer(bias=bias[:1], sinks=sinks[:1])).texts()
    torch.testing.assert_close(one.layers[0].bias, bias[0, :, :3, :3])
    torch.testing.assert_close(other.layers[0].bias, bias[0])
    torch.testing.assert_close(other.layers[0].sinks, sinks[0, :, :, 0])


def test_layers_keep_masks_of_their_own():
    """Also those of one shape, and those that come again after two others."""
    every = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    masks = (every.tril(), every, every.triu(-1).tril(), every.tril())
    (_, one) = recorded(*[Layer()] * 4, masks=masks).texts()
    for layer, mask in enumerate(masks):
        seen = torch.zeros(5, 5, dtype=torch.bool)
        for row, (first, stop) in enumerate(one.spans[layer].tolist()):
            seen[row, first:stop] = True
        assert seen.equal(mask[0, 0])


def test_the_first_broken_layer_is_named_whether_it_is_of_queries_or_of_keys():
    recording = Recording("Model", 3, LENGTHS)
    for layer in range(3):
        q, k = tensors(), tensors()
        q[1, 1, 2, 0] = torch.nan if layer == 2 else 1.0
        k[1, 3, 4, 1] = -torch.inf if layer == 1 else 1.0
        recording.record(q, k, k, 0.5, causal=False)
    with pytest.raises(
        NonFiniteActivation, match="text 7 of the batch: layer 1, head 3 has a NaN or infinite key"
    ) as e:
        recording.texts([4, 7])
    assert (e.value.layer, e.value.head, e.value.index) == (1, 3, 7)


@pytest.mark.parametrize(("dtype", "advice"), [(torch.float32, "damaged"), (torch.float16, "try dtype float32")])
def test_finite_numbers_whose_sum_is_not_are_no_error(dtype, advice):
    large = torch.full((2, 4, 5, 6), torch.finfo(dtype).max, dtype=dtype)
    recording = Recording("Model", 1, LENGTHS)
    recording.record(large, large, large, 0.5, causal=True)
    assert len(recording.texts()) == 2
    recording = Recording("Model", 1, LENGTHS)
    recording.record(2 * large, large, large, 0.5, causal=True)
    with pytest.raises(NonFiniteActivation, match=advice):
        recording.texts()
