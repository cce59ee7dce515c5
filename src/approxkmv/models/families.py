"""The architectures that need something of their own; every other goes through the attention interface.

To add one, copy the file of the family that is most like it: openai_gpt.py wraps the method that gets queries and
keys, mpnet.py reads the outputs of the layers that make them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeAlias

import torch

from approxkmv.models import mpnet, openai_gpt
from approxkmv.models.recording import Recording

Adapter: TypeAlias = Callable[[torch.nn.Module, Recording], AbstractContextManager[None]]
"""Given a backbone and a recording: within the block, each layer of a forward pass calls recording.record once."""

ADAPTERS: dict[str, Adapter] = {
    "OpenAIGPTModel": openai_gpt.recording_calls,
    "MPNetModel": mpnet.recording_calls,
}
"""By the name of the backbone's class."""

SCALED_QUERIES = frozenset({"OPTAttention"})
"""Attention classes that multiply the queries by their `scaling` before the interface, which then says 1.0.

The product of query and key is the same, but the Gaussian kernel of Lemma 4.1 is not: it also depends on the norm of
the query. So the factor is moved back to where the other architectures have it.
"""
