"""What a single layer hands over through the attention interface, or to an adapter, and how it is understood."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models_support import ARCHITECTURES, REFUSED, SMALL, TEXTS, save_random, save_small

from approxkmv.errors import CaptureError
from approxkmv.models import CapturableModel, interface
from approxkmv.models.recording import Recording


class OPTAttention(torch.nn.Module):
    """A layer whose class has the name of one that scales its queries; its module has no attention function."""

    is_causal = False


class OtherAttention(OPTAttention):
    is_causal = True


def tensors(n: int = 5, d: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = torch.randn(3, 1, 2, n, d, generator=torch.Generator().manual_seed(0))
    return q, k, v


def handed_over(module: torch.nn.Module, mask: torch.Tensor | None = None, d: int = 4, **options: Any) -> Any:
    recording = Recording("Model", 1, [5])
    with interface.recording_calls(recording):
        interface._fused(module, *tensors(d=d), mask, **options)
    return recording.texts()[0]


@pytest.mark.parametrize(("factor", "scale", "times"), [(1.0, 0.5, 2.0), (0.25, 0.25, 1.0), (None, 0.5, 1.0)])
def test_queries_are_put_back_only_where_the_factor_says_that_they_were_scaled(factor, scale, times):
    found = handed_over(OPTAttention(), scaling=factor)
    assert found.scales.tolist() == [scale]
    torch.testing.assert_close(found.queries[0], times * tensors()[0][0])


def test_a_factor_of_one_is_that_of_a_width_of_one():
    assert handed_over(OtherAttention(), d=1, scaling=1.0).scales.tolist() == [1.0]
    with pytest.raises(CaptureError, match="OtherAttention hands its queries over with a factor of 1"):
        handed_over(OtherAttention(), scaling=1.0)
    assert handed_over(OtherAttention(), scaling=0.0).scales.tolist() == [0.0]


@pytest.mark.parametrize("layer", [OPTAttention, OtherAttention])
@pytest.mark.parametrize("flag", [None, False, True])
def test_a_call_says_whether_it_is_causal_before_its_layer_does(layer, flag):
    causal = layer.is_causal if flag is None else flag
    spans = handed_over(layer(), scaling=0.5, is_causal=flag).spans[0]
    assert spans[:, 1].tolist() == ([1, 2, 3, 4, 5] if causal else [5] * 5)


@pytest.mark.parametrize("name", ["s_aux", "sinks"])
def test_sinks_have_either_name(name):
    sinks = torch.tensor([0.5, -1.0])
    assert handed_over(OtherAttention(), scaling=0.5, **{name: sinks}).layers[0].sinks.equal(sinks)


@pytest.mark.parametrize(("given", "window"), [(None, None), (0, None), (-1, None), (3, 3), (False, None)])
def test_a_window_is_a_number_of_keys(given, window):
    assert handed_over(OtherAttention(), scaling=0.5, sliding_window=given).layers[0].window == window


def test_a_chunk_is_a_window_in_the_layers_that_have_it():
    config = SimpleNamespace(layer_types=["full_attention", "chunked_attention"], attention_chunk_size=3)
    for place, window in ((0, None), (1, 3), (2, None), (None, None)):
        layer = OtherAttention()
        layer.config, layer.layer_idx = config, place
        assert handed_over(layer, scaling=0.5).layers[0].window == window


def test_a_class_that_computes_attention_elsewhere_is_refused():
    recording = Recording("Model", 1, [5])
    with (
        interface.recording_calls(recording),
        pytest.raises(CaptureError, match="OtherAttention has no attention function in its own module"),
    ):
        interface._plain(OtherAttention(), *tensors(), None, scaling=0.5)


def test_learned_sparse_attention_is_refused_inside_another_model_too():
    def model(text: str) -> transformers.PreTrainedModel:
        name, settings = (ARCHITECTURES | REFUSED)[text]
        config = transformers.LlavaConfig(text_config=getattr(transformers, name)(**settings))
        with torch.device("meta"):
            return transformers.LlavaModel(config)

    with pytest.raises(CaptureError, match="DeepseekV32Model chooses keys for each query"):
        interface.refuse_learned_sparsity(map(type, model("DeepSeek-V3.2").modules()))
    interface.refuse_learned_sparsity(map(type, model("DeepSeek-V3").modules()))


def test_a_class_computes_its_attention_fused_where_it_may(tmp_path):
    def kind(name: str) -> str:
        return CapturableModel.load(save_small(tmp_path / name, name))._backbone.config._attn_implementation

    assert (kind("llama"), kind("gemma2")) == (interface.FUSED, interface.PLAIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_compared_with_what_is_known_to_within_the_rounding_of_their_type(dtype):
    q, k, _ = (x.to(dtype) for x in tensors())
    bias, mask = torch.randn(1, 2, 5, 5), torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1) > 0, -1e9)
    options = {"scaling": 0.5, "softcap": 2.0, "position_bias": bias}
    logits = 2.0 * (0.5 * q.double() @ k.double().mT / 2.0).tanh() + bias + mask
    # A sink takes a third of each row.
    weights = (logits.softmax(-1) * 2 / 3).to(dtype)
    interface._require_known("Model", q, k, mask, options, weights)
    for other in ({"softcap": None}, {"position_bias": None}, {"scaling": 0.25}):
        with pytest.raises(CaptureError, match="Model does more to its logits"):
            interface._require_known("Model", q, k, mask, options | other, weights)
    with pytest.raises(CaptureError, match="Model does more to its logits"):
        interface._require_known("Model", q, k, None, options, weights)


@pytest.mark.parametrize("by_name", [True, False])
def test_the_bias_of_mpnet_is_found_by_name_or_place(tmp_path, by_name):
    from approxkmv.models import mpnet

    backbone = CapturableModel.load(save_small(tmp_path, "mpnet"))._backbone
    hidden, bias = torch.randn(1, 5, 32), torch.randn(1, 4, 5, 5)
    recording = Recording("MPNetModel", 3, [5])
    with torch.no_grad(), mpnet.recording_calls(backbone, recording):
        for layer in backbone.encoder.layer:
            if by_name:
                layer.attention.attn(hidden, None, position_bias=bias)
            else:
                layer.attention.attn(hidden, None, bias)
    for layer in recording.texts()[0].layers:
        assert layer.bias.equal(bias[0])


def test_gpt_1_without_its_scale_has_a_factor_of_one(tmp_path):
    model = CapturableModel.load(save_random(tmp_path, *SMALL["openai-gpt"]))
    for block, scaled in zip(model._backbone.h, (True, False, True), strict=True):
        block.attn.scale = scaled
    scales = model.capture(TEXTS[:1])[0].scales.tolist()
    assert scales == pytest.approx([8**-0.5, 1.0, 8**-0.5])
