"""The model's own masks (windows, chunks and prefixes), in what is captured and in the masked statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models_support import ARCHITECTURES, LENGTH_DEPENDENT, SMALL, own_attentions, save_activations, save_random

from approxkmv import attention_statistics, log_kernel
from approxkmv.config import load_config, study_of
from approxkmv.errors import CaptureError
from approxkmv.models import CapturableModel, recording
from approxkmv.models.capture import others_in_words
from approxkmv.models.masks import plain_spans, spans_of
from approxkmv.steps.extract import require_true_prefixes
from approxkmv.steps.lengths import measure_lengths
from approxkmv.steps.statistics import measure

TEXT = [3 + 7 * place % 50 for place in range(40)]
WINDOWED = {
    name: ARCHITECTURES[name] for name in ("Mistral", "Gemma3 (text)", "GPT-OSS", "Llama 4 (text)", "ModernBERT")
}
WINDOWED["Gemma2"] = SMALL["gemma2"]
WORDS = {
    "Mistral": "windows of 4 keys in 3 of 3 layers",
    "Gemma3 (text)": "windows of 4 keys in 2 of 3 layers",
    "GPT-OSS": "windows of 4 keys in 2 of 3 layers",
    "Llama 4 (text)": "windows of 4 keys in 2 of 3 layers",
    "ModernBERT": "windows of 2 keys to each side in 1 of 3 layers",
    "Gemma2": "windows of 4 keys in 2 of 3 layers",
}


def ratio(logs: torch.Tensor, seen: torch.Tensor) -> float:
    """c of the entries that are seen, by sorting."""
    values = (logs[seen] - logs[seen].max()).exp().sort(descending=True).values
    n = len(logs)
    return float(values[n:].flip(0).sum() / values[:n].flip(0).sum())


@pytest.mark.parametrize("name", WINDOWED)
def test_the_masked_statistics_are_those_of_the_models_own_mask(tmp_path, name):
    location = save_random(tmp_path, *WINDOWED[name])
    model = CapturableModel.load(location)
    assert model.mask == f"each layer's own mask: {WORDS[name]}"
    assert model.is_causal == (name != "ModernBERT")
    captured, short = model.capture([TEXT, TEXT[:25]])
    # No seen entry of these logits underflows, so a zero of the model's own attentions is its mask.
    seen = own_attentions(location, TEXT)[:, 0] > 0
    place = torch.arange(len(TEXT))
    assert ((place >= captured.spans[..., :1]) & (place < captured.spans[..., 1:])).equal(seen)
    assert int(seen[0].sum()) < int(seen[1].sum()) or name in ("Mistral", "ModernBERT")

    contexts = {0: captured, 1: short}
    save_activations(tmp_path / "qk.safetensors", contexts, causal=model.is_causal, own_masks=True)
    measure(name, tmp_path / "qk.safetensors", 20, [30], tmp_path / "heads.parquet", tmp_path / "prefixes.parquet")
    heads = pd.read_parquet(tmp_path / "heads.parquet").query("context == 0")
    prefixes = pd.read_parquet(tmp_path / "prefixes.parquet").query("context == 0")
    taken = {"context": [0, 1], "tokens": [40, 25], "cut": 0, "used": True, "causal": model.is_causal}
    taken |= {"mask": model.mask, "left_out": ""}
    pd.DataFrame(taken).to_csv(tmp_path / "contexts.csv", index=False)
    study = study_of(load_config(Path(__file__).parents[2] / "config.yaml"), "lengths")
    study = study.model_copy(update={"lengths": (30, 40), "device": "cpu"})
    measure_lengths(study, name, tmp_path / "qk.safetensors", tmp_path / "contexts.csv", tmp_path / "lengths.parquet")
    lengths = pd.read_parquet(tmp_path / "lengths.parquet").set_index(["layer", "head", "length"])
    for (_, row), (_, prefix) in zip(heads.iterrows(), prefixes.iterrows(), strict=True):
        layer, head = int(row["layer"]), int(row["head"])
        logs = log_kernel(
            captured.queries[layer, head].double(), captured.keys[layer, head].double(), float(captured.scales[layer])
        )
        expected, part = ratio(logs, seen[layer]), ratio(logs[:30, :30], seen[layer, :30, :30])
        np.testing.assert_allclose(row["masked_last_ratio"], expected, rtol=1e-9)
        np.testing.assert_allclose(prefix["masked_ratio"], part, rtol=1e-9)
        np.testing.assert_allclose(lengths.loc[(layer, head, 40), "masked_ratio"], expected, rtol=1e-9)
        np.testing.assert_allclose(lengths.loc[(layer, head, 30), "masked_ratio"], part, rtol=1e-9)
        np.testing.assert_allclose(row["last_ratio"], ratio(logs, torch.ones(40, 40, dtype=torch.bool)), rtol=1e-9)


_T5 = ("T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4})
_OWN = WINDOWED | {name: SMALL[name] for name in ("bert", "llama", "mpnet")} | {"T5": _T5}


@pytest.mark.parametrize("name", _OWN)
def test_statistics_of_a_layer_are_those_of_the_models_own_attention(tmp_path, name):
    location = save_random(tmp_path, *_OWN[name])
    texts = [TEXT, TEXT[3:28]]
    for text, captured in zip(texts, CapturableModel.load(location).capture(texts), strict=True):
        own = own_attentions(location, text).double()
        for layer, weights in enumerate(own):
            found = attention_statistics(captured.queries[layer], captured.keys[layer], **captured.softmax_of(layer))
            sink = 1 - weights.sum(-1)
            close = {"rtol": 1e-4, "atol": 1e-6}
            torch.testing.assert_close(found.largest_weight, weights.amax(-1), **close)
            torch.testing.assert_close(found.first_mass, weights[..., 0], **close)
            torch.testing.assert_close(found.sink_mass, sink, **close)
            assert bool((found.sink_mass > 1e-3).any()) == (name == "GPT-OSS")
            entropy = torch.special.entr(weights).sum(-1) + torch.special.entr(sink.clamp_min(0))
            torch.testing.assert_close(found.entropy, entropy, rtol=1e-4, atol=1e-5)
            norm = len(text) * weights.square().sum(-2).amax(-1)
            torch.testing.assert_close(found.column_norm, norm, **close)


def test_what_is_beside_the_kernel_is_known_by_layer(tmp_path):
    def model_of(name: str, class_name: str, settings: dict) -> CapturableModel:
        return CapturableModel.load(save_random(tmp_path / name, class_name, settings))

    gemma = model_of("gemma2", *SMALL["gemma2"])
    assert [layer.softcap for layer in gemma.layers] == [5.0] * 3
    assert [layer.window for layer in gemma.layers] == [4, None, 4]
    assert gemma.left_out == ("the logits' cap of 5 in 3 of 3 layers",)
    sunk = model_of("gpt-oss", *ARCHITECTURES["GPT-OSS"])
    assert [tuple(layer.sinks.shape) for layer in sunk.layers] == [(4,)] * 3
    assert sunk.left_out == ("the learned sink in 3 of 3 layers",)
    mpnet = model_of("mpnet", *SMALL["mpnet"])
    assert mpnet.left_out == ("the bias added to the logits in 3 of 3 layers",)
    t5 = model_of("t5", *_T5)
    assert t5.left_out == (
        "the bias added to the logits in 3 of 3 layers",
        "the decoder and its cross-attention (this is the encoder's self-attention)",
    )
    hybrid = model_of("hybrid", *ARCHITECTURES["Jamba"])
    assert hybrid.n_layers == 2
    assert hybrid.left_out == (
        "2 layers without softmax attention (the model's layers 1 and 3 are numbered from 0 here)",
    )
    for name, words in (("bert", "every query with every key"), ("llama", "no key after its query")):
        plain = model_of(name, *SMALL[name])
        assert (plain.mask, plain.left_out, plain.has_own_masks) == (words, (), False)


@pytest.mark.parametrize(
    ("attending", "words"),
    [
        ([True, True], ()),
        ([False, True], ("1 layer without softmax attention (the model's layer 1 is layer 0 here)",)),
        (
            [True, False, True, False, True],
            ("2 layers without softmax attention (the model's layers 0, 2 and 4 are numbered from 0 here)",),
        ),
    ],
)
def test_a_hybrid_says_which_of_its_layers_are_measured(attending, words):
    assert others_in_words(attending) == words


@pytest.mark.parametrize("kind", ["linear_attention", "moe"])
def test_a_model_none_of_whose_layers_attend_is_refused(tmp_path, kind):
    class_name, settings = ARCHITECTURES["Nemotron-H"]
    location = save_random(tmp_path, class_name, settings | {"layers_block_type": [kind] * 4})
    with pytest.raises(CaptureError, match="NemotronHModel does not say that it has layers of attention"):
        CapturableModel.load(location)


def test_layers_in_which_a_query_chooses_its_keys_are_refused(tmp_path):
    kinds = ["full_attention", "indexed_attention", "linear_attention"]
    location = save_random(tmp_path, "LlamaConfig", SMALL["llama"][1] | {"layer_types": kinds})
    with pytest.raises(CaptureError, match="LlamaModel has layers of indexed_attention, in which queries choose"):
        CapturableModel.load(location)


def test_lengths_on_both_sides_of_a_change_of_the_embedding_are_refused(tmp_path):
    model = CapturableModel.load(save_random(tmp_path, *LENGTH_DEPENDENT["Phi-3 longrope"]))
    assert model.changes_beyond == 16
    whole, part, beyond = (model.capture([TEXT[:n]])[0].keys for n in (40, 10, 30))
    assert not torch.allclose(whole[:, :, :10], part, atol=1e-2)
    torch.testing.assert_close(whole[:, :, :30], beyond, atol=1e-5, rtol=1e-5)
    study = study_of(load_config(Path(__file__).parents[2] / "config.yaml"), "lengths")
    for lengths, tokens in (((10, 16), [12, 16]), ((20, 40), [12, 40]), ((), [12, 40])):
        require_true_prefixes(study.model_copy(update={"lengths": lengths}), "phi", model, tokens)
    with pytest.raises(CaptureError, match=r"model phi: .* beyond 16 tokens, so the first 10 of a text of 40") as error:
        require_true_prefixes(study.model_copy(update={"lengths": (10, 40)}), "phi", model, [12, 40])
    assert "\n" not in str(error.value)


def test_windows_of_which_nothing_is_said_are_refused(tmp_path):
    model = CapturableModel.load(save_random(tmp_path, *ARCHITECTURES["Mistral"]))
    model.has_own_masks = False
    model.capture([TEXT[:4]])
    with pytest.raises(CaptureError, match="text 1 of the batch is attended to in windows"):
        model.capture([TEXT[:4], TEXT])


def test_a_model_that_only_says_it_is_causal_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "plain_spans", lambda n, causal: plain_spans(n, causal=True))
    with pytest.raises(CaptureError, match="BertModel hides later tokens from its attention, and yet"):
        CapturableModel.load(save_random(tmp_path, *SMALL["bert"]))


def test_what_a_layer_does_to_its_logits_in_secret_is_refused(tmp_path, monkeypatch):
    from transformers.models.gemma2 import modeling_gemma2

    own = modeling_gemma2.eager_attention_forward

    def hotter(module, query, *rest, **options):
        return own(module, 1.1 * query, *rest, **options)

    location = save_random(tmp_path, *SMALL["gemma2"])
    CapturableModel.load(location)
    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", hotter)
    with pytest.raises(CaptureError, match="Gemma2Attention does more to its logits"):
        CapturableModel.load(location)


def test_spans_of_any_form_of_mask():
    window = torch.ones(5, 5, dtype=torch.bool).tril().triu(-1)
    expected = [[0, 1], [0, 2], [1, 3], [2, 4]]
    for mask in (window, torch.zeros(5, 5).masked_fill(~window, torch.finfo(torch.float32).min)):
        spans, biased = spans_of(mask.expand(2, 1, 5, 5), [4, 5])
        assert (spans[0].tolist(), spans[1][4].tolist(), biased) == (expected, [3, 5], False)
    # One row for all queries, which hides padding; and a bias beside a mask.
    padding = torch.tensor([True, True, False]).expand(1, 1, 1, 3)
    assert spans_of(padding, [2])[0][0].tolist() == [[0, 2], [0, 2]]
    biases = torch.full((1, 1, 3, 3), -2.5).masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -torch.inf)
    spans, biased = spans_of(biases, [3])
    assert biased
    assert spans[0].equal(plain_spans(3, causal=True))
    # A bias that one text of a batch has and the next one not.
    assert spans_of(torch.stack([biases[0], biases[0].masked_fill(biases[0] == -2.5, 0)]), [3, 3])[1]
    # What older code hides a key with, and a bias that hides none.
    for number, seen in ((-10000.0, [0, 2]), (-9000.0, [0, 3])):
        of_all = torch.tensor([0.0, 0.0, number]).expand(1, 1, 3, 3)
        spans, biased = spans_of(of_all, [3])
        assert (spans[0].tolist(), biased) == ([seen] * 3, number == -9000.0)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.tensor([[1, 0, 1]] * 3).bool().expand(1, 1, 3, 3), "not contiguous"),
        (torch.zeros(1, 1, 3, 3, dtype=torch.bool), "sees no key"),
        (torch.stack([torch.eye(3), torch.ones(3, 3)]).bool()[None], "heads of a layer see different keys"),
        (torch.ones(3, 3), "only one of"),
    ],
)
def test_a_mask_that_cannot_be_told_is_one_line(mask, says):
    with pytest.raises(CaptureError, match=says):
        spans_of(mask, [3])
