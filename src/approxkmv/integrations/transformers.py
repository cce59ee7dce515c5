"""A plan in place of the attention of a language model of transformers.

>>> from approxkmv.integrations import transformers as fast
>>> fast.use_plan(model, "plan.json")  # doctest: +SKIP
>>> model.generate(...)  # doctest: +SKIP
>>> fast.restore(model)  # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from approxkmv.errors import CaptureError, InputError
from approxkmv.models.capture import layers_that_attend
from approxkmv.models.interface import refuse_learned_sparsity, scale_of
from approxkmv.perplexity.plan import Plan, read_plan
from approxkmv.perplexity.replacement import heads, refuse_what_no_method_does

# A name without "sdpa", "flash" or "flex", which transformers treats specially.
PLANNED = "approxkmv_plan"

_plans: WeakKeyDictionary[torch.nn.Module, Plan] = WeakKeyDictionary()
_before: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()


def use_plan(model: PreTrainedModel, plan: str | Path | Plan) -> None:
    """Let the plan compute the attention of `model`, until `restore`.

    A call is the plan's where it is causal attention of one whole text without gradients (torch.inference_mode or
    no_grad, as in generate); others, such as those for one token after a prompt, for several texts or for padded ones,
    are computed by torch's scaled_dot_product_attention as before. Only the numbers of layers and heads are compared: a
    plan's errors hold for the weights that it names.

    Args:
        model: a causal language model whose attention uses transformers' attention interface. plan: a file of
            `approxkmv plan`, or what read_plan returned.
    Raises:
        InputError: a plan for a model of another shape. TableError: a file that is not a plan. CaptureError: a model
        that does not let its attention be replaced.
    """
    found = plan if isinstance(plan, Plan) else read_plan(Path(plan))
    if not (model._can_set_attn_implementation() and model._supports_sdpa):
        raise CaptureError(f"{type(model).__name__} does not let its attention be replaced by plain softmax attention")
    refuse_learned_sparsity(map(type, model.modules()))
    config = model.config.get_text_config()
    per_layer = getattr(config, "per_layer_config", [config] * int(config.num_hidden_layers))
    heads_of = getattr(config, "num_attention_heads_per_layer", [one.num_attention_heads for one in per_layer])
    attending = layers_that_attend(config)
    found.check_shape([int(number or 0) * attends for number, attends in zip(heads_of, attending, strict=True)])
    layers = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    _before.setdefault(model, model.config._attn_implementation)
    for layer in layers:
        _plans[layer] = found
    model.set_attn_implementation(PLANNED)


def restore(model: PreTrainedModel) -> None:
    """Give `model` the attention back that it had before `use_plan`. Raises InputError if it has no plan."""
    if model not in _before:
        raise InputError("this model has no plan: use_plan gives it one")
    model.set_attn_implementation(_before.pop(model))
    for module in model.modules():
        _plans.pop(module, None)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    plan = _plans.get(module)
    try:
        refuse_what_no_method_does(module, query, key, attention_mask, options)
    except CaptureError:
        plan = None
    if plan is None or options.get("dropout") or any(t.requires_grad for t in (query, key, value)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    out = plan.of_layer(layer)(*heads(query, key, value), scale=scale_of(query, options), seed=layer)
    return out.unsqueeze(0).transpose(1, 2).contiguous(), None


AttentionInterface.register(PLANNED, _attend)
AttentionMaskInterface.register(PLANNED, sdpa_mask)
