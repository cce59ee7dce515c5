"""The architectures that need special treatment; all others use the attention interface.

To add one, copy the file of the most similar family: openai_gpt.py wraps the method that receives queries and keys,
mpnet.py reads the outputs of the layers that compute them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeAlias

import torch

from approxkmv.models import mpnet, openai_gpt
from approxkmv.models.recording import Recording

Adapter: TypeAlias = Callable[[torch.nn.Module, Recording], AbstractContextManager[None]]
"""Takes a backbone and a recording: within the block, each layer of a forward pass calls recording.record once."""

ADAPTERS: dict[str, Adapter] = {
    "OpenAIGPTModel": openai_gpt.recording_calls,
    "MPNetModel": mpnet.recording_calls,
}
"""Keyed by the name of the backbone's class."""

SCALED_QUERIES = frozenset({"OPTAttention", "EsmSelfAttention"})
"""Attention classes that multiply the queries by 1/sqrt(d) before the interface, and then report a factor of 1.0.

The product of query and key is the same, but the Gaussian kernel of Lemma 4.1 is not, since it also depends on the norm
of the query. So the factor is moved back to where the other architectures have it.
"""

UNSCALED = frozenset(
    {
        # Multiplied unscaled, as these were trained.
        *("T5Attention", "MT5Attention", "UMT5Attention", "SwitchTransformersAttention", "UdopAttention"),
        *("Pop2PianoAttention", "Pix2StructTextAttention", "DiaSelfAttention"),
        # Queries and keys are normalised instead of scaled.
        *("Gemma3nTextAttention", "Gemma4TextAttention", "Gemma4UnifiedTextAttention", "EmbeddingGemma2Attention"),
        # The factor is a setting, and may be 1.
        *("GPT2Attention", "DecisionTransformerGPT2Attention", "GPTBigCodeAttention"),
        *("GraniteAttention", "GraniteSWAAttention", "GraniteMoeAttention", "GraniteMoeSWAAttention"),
        *("GraniteMoeSharedAttention", "GraniteMoeHybridAttention", "HyperCLOVAXAttention"),
        *("Gemma2Attention", "Gemma3Attention", "VaultGemmaAttention", "T5GemmaSelfAttention"),
        *("T5Gemma2SelfAttention", "Step3p7Attention"),
        # Half of the factor is in the queries and half in the keys: the kernel is the same.
        "OpenAIPrivacyFilterAttention",
    }
)
"""Attention classes whose factor of the logits may really be 1.0; in any other, 1.0 means that q was scaled before."""
