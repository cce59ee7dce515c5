"""Rotary embeddings scaled beyond a model's positions."""

from __future__ import annotations

import pytest
import torch
from models_support import save_small

from approxkmv.errors import CaptureError
from approxkmv.models import CapturableModel

POSITIONS = 40


def load(folder, method: str | None, factor: float = 2.0) -> CapturableModel:
    scaling = None if method is None else {"method": method, "factor": factor}
    return CapturableModel.load(save_small(folder, "llama"), rotary_scaling=scaling)


@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_a_model_goes_on_where_its_positions_end(tmp_path, method):
    model = load(tmp_path, method)
    assert model.max_positions == 2 * POSITIONS
    text = [3 + place % 50 for place in range(2 * POSITIONS)]
    whole = model.capture([text])[0]
    assert whole.queries.shape[2] == 2 * POSITIONS
    # A causal model whose embedding does not depend on the text's length: a prefix is a text of its own.
    part = model.capture([text[:25]])[0]
    assert torch.allclose(whole.keys[:, :, :25], part.keys, atol=1e-5)


def test_linear_scaling_divides_positions(tmp_path):
    plain, scaled = load(tmp_path / "plain", None), load(tmp_path / "scaled", "linear", 4.0)
    # The first layer's keys before rotation are those of the token alone: equal tokens show the rotation alone.
    text = [7] * POSITIONS
    plain_keys, scaled_keys = (model.capture([text])[0].keys[0] for model in (plain, scaled))
    assert torch.allclose(scaled_keys[:, ::4], plain_keys[:, : POSITIONS // 4], atol=1e-5)
    assert not torch.allclose(scaled_keys[:, 1], plain_keys[:, 1], atol=1e-3)


def test_a_model_without_rotary_embeddings_is_refused_in_one_line(tmp_path):
    with pytest.raises(CaptureError, match="no single rotary embedding") as caught:
        CapturableModel.load(save_small(tmp_path, "bert"), rotary_scaling={"method": "yarn", "factor": 2})
    assert "\n" not in str(caught.value)
