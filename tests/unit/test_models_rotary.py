"""Rotary embeddings scaled beyond a model's positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_support import save_small
from transformers import Gemma3TextConfig, LlamaConfig

from approxkmv.errors import CaptureError, SourceError
from approxkmv.models import CapturableModel
from approxkmv.models.rotary import (
    length_that_changes,
    refuse_two_answers,
    refuse_unknown_types,
    scale_rotary,
    scaled_positions,
)

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


def config(*parameters: dict[str, Any], positions: int = POSITIONS) -> Any:
    """A configuration with these parameters of its rotary embeddings, if several one for each kind of layer."""
    made: Any = (Gemma3TextConfig if len(parameters) > 1 else LlamaConfig)(max_position_embeddings=positions)
    kinds = ("full_attention", "sliding_attention")
    made.rope_parameters = parameters[0] if len(parameters) == 1 else dict(zip(kinds, parameters, strict=True))
    return made


PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("parameters", "length"),
    [
        ([PLAIN], None),
        ([DYNAMIC], POSITIONS),
        ([DYNAMIC | {"rope_type": "dynamic_ntk"}], POSITIONS),
        ([LONG], 16),
        ([LONG | {"original_max_position_embeddings": 64}, DYNAMIC], POSITIONS),
        ([DYNAMIC, LONG], 16),
        ([PLAIN, DYNAMIC], POSITIONS),
        ([PLAIN, PLAIN], None),
    ],
)
def test_the_length_that_changes_an_embedding_is_the_least_of_all_kinds_of_layers(parameters, length):
    assert length_that_changes(config(*parameters)) == length


def test_layers_without_a_rotary_embedding_change_nothing():
    some = config(PLAIN, DYNAMIC)
    some.rope_parameters["full_attention"] = None
    assert length_that_changes(some) == POSITIONS
    refuse_unknown_types(some, "m")


def test_what_is_scaled_already_or_of_several_kinds_is_not_scaled_again():
    scaled = config(PLAIN)
    assert scaled_positions(scaled) is None
    scale_rotary(scaled, "yarn", 2.5)
    assert scaled_positions(scaled) == 100
    with pytest.raises(CaptureError, match="is scaled already"):
        scale_rotary(scaled, "linear", 2.0)
    with pytest.raises(CaptureError, match="no single rotary embedding"):
        scale_rotary(config(PLAIN, DYNAMIC), "linear", 2.0)
    # A checkpoint that was scaled and trained says itself how many positions it has.
    assert scaled_positions(config({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})) is None
    # Of another type a factor is not one of the positions.
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
    assert scaled_positions(config(llama3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0})) is None
    # transformers takes max_position_embeddings over the original ones for the factor.
    assert scaled_positions(config(LONG | {"rope_type": "yarn", "factor": None})) is None


def test_scaling_keeps_the_base_and_the_share_of_a_head_that_is_rotated():
    own = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    scaled = config(own)
    scale_rotary(scaled, "linear", 2.0)
    given = {"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": POSITIONS}
    assert scaled.rope_parameters == own | given
    assert scaled_positions(scaled) == 2 * POSITIONS
    # A position that is reached in part is none.
    part = config(PLAIN)
    scale_rotary(part, "linear", 2.49)
    assert scaled_positions(part) == 99


def test_an_unknown_type_in_any_kind_of_layer_is_refused():
    refuse_unknown_types(config(PLAIN, DYNAMIC), "m")
    with pytest.raises(SourceError, match=r"m: .*'spiral', but transformers has"):
        refuse_unknown_types(config(PLAIN, PLAIN | {"rope_type": "spiral"}), "m")


def test_what_a_model_of_several_parts_states_twice_stands_in_the_part_for_text():
    text = {"rope_theta": 1e4, "rope_parameters": PLAIN, "rope_scaling": {"rope_theta": 10000}}
    refuse_two_answers(config(PLAIN), {"rope_theta": 7.0, "text_config": text}, "m")
    for wrong in ({"rope_theta": 500000}, {"rope_scaling": {"rope_theta": 500000}}):
        with pytest.raises(SourceError, match=r"^m: .*\(rope_theta 500000\): keep"):
            refuse_two_answers(config(PLAIN), {"rope_theta": 7.0, "text_config": text | wrong}, "m")
