"""From a model's queries and keys through a shard to its table of softmax statistics."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from models_support import ARCHITECTURES, SMALL, captured_of, own_attentions, save_activations, save_random

from approxkmv.errors import InputError
from approxkmv.models import CapturableModel
from approxkmv.results.activations import read_activations
from approxkmv.results.tables import ATTENTION
from approxkmv.steps.attention import measure_attention

TEXTS = [[3 + 7 * place % 50 for place in range(n)] for n in (40, 25)]
T5 = ("T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4})
MODELS = {name: ARCHITECTURES[name] for name in ("GPT-OSS", "Mistral", "BERT", "Llama")}
MODELS |= {"Gemma2": SMALL["gemma2"], "MPNet": SMALL["mpnet"], "T5": T5}


def by_definition(p: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns of a table from weights (layers, heads, n, n), whose rows may lack what a sink takes."""
    sink = (1 - p.sum(-1)).clamp_min(0)
    entropy = torch.special.entr(p).sum(-1) + torch.special.entr(sink)
    mass = p.sort(-1, descending=True).values.cumsum(-1)
    keys = [(mass < share * mass[..., -1:]).sum(-1).double() + 1 for share in (0.9, 0.99)]
    rows = (entropy, entropy.exp(), *keys, p[..., 0], sink, p.amax(-1))
    norm = p.shape[-2] * p.square().sum(-2).amax(-1)
    rank = p.square().sum((-2, -1)) / torch.linalg.matrix_norm(p, 2).square()
    return dict(zip(ATTENTION, (*(row.mean(-1) for row in rows), norm, rank), strict=True))


def is_as_defined(table: pd.DataFrame, before: str, p: torch.Tensor) -> None:
    for name, right in by_definition(p).items():
        # Weights of the model are float32; a share may be held by a key more or less; stable ranks are to 1 %.
        tolerance = {"stable_rank": 0.01, "keys_90": 0.02, "keys_99": 0.02}.get(name, 2e-4)
        np.testing.assert_allclose(table[f"{before}{name}"], right.flatten(), rtol=tolerance, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_of_the_models_own_attention(tmp_path, name):
    location = save_random(tmp_path, *MODELS[name])
    model = CapturableModel.load(location)
    captured = dict(enumerate(model.capture(TEXTS)))
    save_activations(tmp_path / "qk.safetensors", captured, causal=model.is_causal, own_masks=model.has_own_masks)
    for item in read_activations(tmp_path / "qk.safetensors", name).contexts:
        for layer, beside in enumerate(item.beside):
            own = captured[item.context].softmax_of(layer)
            for what in ("softcap", "sinks", "bias"):
                assert (beside[what] is None) == (own[what] is None)
                assert own[what] is None or bool((torch.as_tensor(beside[what]) == torch.as_tensor(own[what])).all())
    assert measure_attention(name, tmp_path / "qk.safetensors", tmp_path / "attention.parquet") == 24
    table = pd.read_parquet(tmp_path / "attention.parquet")
    for context, text in enumerate(TEXTS):
        part = table[table["context"] == context]
        assert (part["tokens"] == len(text)).all()
        one = captured[context]
        logits = one.scales[:, None, None, None] * (one.queries.double() @ one.keys.double().mT)
        is_as_defined(part, "", logits.softmax(-1))
        if name == "BERT":
            assert not any(column.startswith("masked_") for column in part)
        else:
            is_as_defined(part, "masked_", own_attentions(location, text).double())


def test_a_shard_without_texts_has_a_table_without_rows(tmp_path):
    save_activations(tmp_path / "qk.safetensors", {}, causal=True)
    assert measure_attention("m", tmp_path / "qk.safetensors", tmp_path / "attention.parquet") == 0
    table = pd.read_parquet(tmp_path / "attention.parquet")
    assert table.empty
    assert "masked_support" in table


def test_what_is_not_finite_is_refused_by_model_and_text(tmp_path):
    q = torch.ones(1, 1, 9, 4)
    q[0, 0, 3] = torch.nan
    save_activations(tmp_path / "qk.safetensors", {7: captured_of(q, q.clone(), 1.0)}, causal=True)
    with pytest.raises(InputError, match="model m, context 7: q holds a NaN"):
        measure_attention("m", tmp_path / "qk.safetensors", tmp_path / "attention.parquet")
