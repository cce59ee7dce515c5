"""Small random models of many architectures, saved as folders, and the attention weights that they report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from approxkmv.models import Captured, ModelLocation
from approxkmv.models.loading import quiet
from approxkmv.models.recording import Layer
from approxkmv.results.activations import write_activations

VOCABULARY = 61


def save_activations(path: Path, texts: dict[int, Captured], *, causal: bool, own_masks: bool = False) -> None:
    """What extract writes of these texts, without special tokens."""
    special = {index: torch.zeros(one.queries.shape[2], dtype=torch.bool) for index, one in texts.items()}
    write_activations(path, texts, special, "weights a, texts b", causal=causal, own_masks=own_masks)


def captured_of(queries: torch.Tensor, keys: torch.Tensor, *scales: float) -> Captured:
    """Queries and keys (layers, heads, n, d) of plain layers, with a scale for each."""
    spans = torch.tensor([0, queries.shape[2]]).expand(len(scales), queries.shape[2], 2)
    return Captured(queries, keys, torch.tensor(scales, dtype=torch.float64), None, spans, (Layer(),) * len(scales))


TEXTS = [[5, 17, 40, 8, 23, 11, 52, 30, 9, 14, 33], [7, 29, 12], [44, 6, 18, 50, 21, 13, 19]]
"""Three texts of different lengths, without the ids 0 to 2 that serve as padding somewhere."""

_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_LLAMA = _BERT | {"num_key_value_heads": 2}

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _BERT),
    "roberta": ("RobertaConfig", _BERT | {"max_position_embeddings": 42}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}),
    "gpt2-unscaled": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40, "scale_attn_weights": False},
    ),
    "gpt2-by-layer": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40, "scale_attn_by_inverse_layer_idx": True},
    ),
    "openai-gpt": ("OpenAIGPTConfig", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}),
    "llama": ("LlamaConfig", _LLAMA),
    "mpnet": ("MPNetConfig", _BERT | {"max_position_embeddings": 42}),
    "qwen3": ("Qwen3Config", _LLAMA | {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        _LLAMA | {"head_dim": 16, "query_pre_attn_scalar": 100, "attn_logit_softcapping": 5.0, "sliding_window": 4},
    ),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 40,
            "word_embed_proj_dim": 32,
        },
    ),
}
"""Configuration class and settings by the name that the tests use."""

_ROBERTA = _BERT | {"max_position_embeddings": 42}
_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}
_WIDE = _LLAMA | {"head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

_HYBRID = _WIDE | {"num_hidden_layers": 4}
_DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_MAMBA = {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": SMALL["bert"],
    "RoBERTa": SMALL["roberta"],
    "XLM-R": ("XLMRobertaConfig", _ROBERTA),
    "CamemBERT": ("CamembertConfig", _ROBERTA),
    "Data2Vec-text": ("Data2VecTextConfig", _ROBERTA),
    "DistilBERT": (
        "DistilBertConfig",
        {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
    ),
    "ELECTRA": ("ElectraConfig", _BERT | {"embedding_size": 16}),
    "ALBERT": ("AlbertConfig", _BERT | {"embedding_size": 16}),
    "ModernBERT": ("ModernBertConfig", _BERT | {"local_attention": 4, "global_attn_every_n_layers": 2}),
    "NomicBERT": ("NomicBertConfig", _BERT),
    "EuroBERT": ("EuroBertConfig", _LLAMA),
    "MobileBERT": ("MobileBertConfig", _BERT | {"embedding_size": 32}),
    "GPT-2": SMALL["gpt2"],
    "GPT-NeoX": ("GPTNeoXConfig", _BERT),
    "GPT-BigCode": ("GPTBigCodeConfig", _GPT),
    "BioGPT": ("BioGptConfig", _BERT),
    "Llama": SMALL["llama"],
    "Mistral": ("MistralConfig", _LLAMA | {"sliding_window": 4}),
    "Mixtral": ("MixtralConfig", _LLAMA | {"num_local_experts": 4}),
    "Qwen2": ("Qwen2Config", _LLAMA),
    "Qwen3": SMALL["qwen3"],
    "Qwen3-MoE": ("Qwen3MoeConfig", _WIDE | _EXPERTS),
    "Gemma": ("GemmaConfig", _WIDE),
    "Gemma3 (text)": (
        "Gemma3TextConfig",
        _WIDE
        | {"sliding_window": 4, "query_pre_attn_scalar": 100}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "Phi": ("PhiConfig", _LLAMA),
    "Phi-3": ("Phi3Config", _LLAMA),
    "OLMo": ("OlmoConfig", _LLAMA),
    "OLMo2": ("Olmo2Config", _LLAMA),
    "Cohere": ("CohereConfig", _LLAMA),
    "StableLM": ("StableLmConfig", _LLAMA),
    "StarCoder2": ("Starcoder2Config", _LLAMA),
    "Granite": ("GraniteConfig", _LLAMA | {"attention_multiplier": 0.25}),
    "SmolLM3": ("SmolLM3Config", _LLAMA),
    "GLM-4": ("Glm4Config", _WIDE),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        _BERT
        | {"num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 12}
        | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        | {"moe_intermediate_size": 16, "n_shared_experts": 1},
    ),
    "CLIP (text)": ("CLIPTextConfig", _BERT),
    "ESM": ("EsmConfig", _ROBERTA | {"position_embedding_type": "rotary", "token_dropout": False}),
    "Splinter": ("SplinterConfig", _BERT),
    "Llama 4 (text)": (
        "Llama4TextConfig",
        _WIDE
        | {"attention_chunk_size": 4, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"layer_types": ["chunked_attention", "full_attention", "chunked_attention"]},
    ),
    "OPT": SMALL["opt"],
    "GPT-OSS": ("GptOssConfig", _WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "GPT-1": SMALL["openai-gpt"],
    "Gemma4 (text)": (
        "Gemma4TextConfig",
        _WIDE
        | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4}
        | {"head_dim": 4, "global_head_dim": 8, "num_kv_shared_layers": 1}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
    ),
    "Qwen3-Next": ("Qwen3NextConfig", _HYBRID | _EXPERTS | _DELTA | {"shared_expert_intermediate_size": 16}),
    "Qwen3.5 (text)": ("Qwen3_5TextConfig", _HYBRID | _DELTA),
    "OLMo-Hybrid": ("OlmoHybridConfig", _HYBRID | {"num_key_value_heads": 4}),
    "LFM2": ("Lfm2Config", _HYBRID | {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    "Jamba": ("JambaConfig", _HYBRID | _MAMBA | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}),
    "Nemotron-H": (
        "NemotronHConfig",
        _HYBRID
        | {"layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention"], "n_routed_experts": 4}
        | {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_groups": 1, "ssm_state_size": 4, "chunk_size": 8}
        | {"mamba_num_heads": 4, "mamba_head_dim": 16},
    ),
    "Granite-4 hybrid": (
        "GraniteMoeHybridConfig",
        _HYBRID
        | {"layer_types": ["linear_attention", "full_attention"] * 2, "attention_multiplier": 0.5}
        | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_chunk_size": 8}
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16},
    ),
    "RecurrentGemma": ("RecurrentGemmaConfig", _HYBRID | {"lru_width": 32, "attention_window_size": 4}),
}
"""By the names of docs/add-a-model.md: those whose attentions follow from q and k alone (and a mask, or a sink)."""

_FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.0, 3.0, 4.0]}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16} | _FACTORS

LENGTH_DEPENDENT: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi-3 longrope": ("Phi3Config", _LLAMA | {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 16}),
    "PhiMoE longrope": (
        "PhimoeConfig",
        _LLAMA
        | {"num_local_experts": 2, "sliding_window": None}
        | {"rope_parameters": _LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.4}},
    ),
    "Llama dynamic": (
        "LlamaConfig",
        _LLAMA | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
}
"""Rotary embeddings that depend on the length of the text beyond 16 tokens, or beyond the model's positions, 40."""

_IMAGES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_IMAGES |= {"image_size": 16, "patch_size": 8}
OF_NO_TEXT = {"ViT", "CLIP (vision)", "DINOv2", "Wav2Vec2", "Whisper"}
"""Those of the refused that take images or sound."""

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-J": ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "GPT-Neo": (
        "GPTNeoConfig",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
    ),
    "CodeGen": ("CodeGenConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "DeBERTa": ("DebertaConfig", _BERT),
    "DeBERTa-v2": ("DebertaV2Config", _BERT),
    "BLOOM": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Falcon": ("FalconConfig", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "MPT": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4}),
    "XLNet": ("XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    "XLM": ("XLMConfig", {"emb_dim": 32, "n_layers": 2, "n_heads": 4}),
    "XGLM": ("XGLMConfig", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}),
    "Longformer": ("LongformerConfig", _ROBERTA | {"attention_window": 4}),
    "ConvBERT": ("ConvBertConfig", _BERT | {"embedding_size": 32}),
    "RoFormer": ("RoFormerConfig", _BERT | {"embedding_size": 32}),
    "Mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "DeepSeek-V3.2": (
        "DeepseekV32Config",
        ARCHITECTURES["DeepSeek-V3"][1] | {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 8},
    ),
    "ViT": ("ViTConfig", _IMAGES),
    "CLIP (vision)": ("CLIPVisionConfig", _IMAGES),
    "DINOv2": ("Dinov2Config", _IMAGES),
    "Wav2Vec2": (
        "Wav2Vec2Config",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    ),
    "Whisper": (
        "WhisperConfig",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40, "decoder_start_token_id": 3},
    ),
}
"""By the names of docs/add-a-model.md: those whose queries and keys cannot be had."""

LATER = {"GPT-J": "5.24", "CodeGen": "5.24"}
"""Those of the refused that a later transformers gives the attention interface, with its version."""


def save_small(folder: Path, name: str, seed: int = 0) -> ModelLocation:
    """Save a random model whose attention is far from uniform, so that a wrong factor shows."""
    class_name, settings = SMALL[name]
    return save_random(folder, class_name, settings, seed)


def save_random(
    folder: Path, class_name: str, settings: dict[str, Any], seed: int = 0, gain: float = 1.5
) -> ModelLocation:
    """Save a random model of a configuration class, its matrices large enough for logits of about 1 to 5.

    `gain` multiplies them: 1.5 suits layers behind a normalisation.
    """
    torch.manual_seed(seed)
    config = getattr(transformers, class_name)(**{"vocab_size": VOCABULARY, "pad_token_id": 1} | settings)
    with quiet():
        model = transformers.AutoModel.from_config(config).eval()
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.ndim == 2:
                    tensor.normal_(0.0, gain * tensor.shape[-1] ** -0.5)
        model.save_pretrained(folder)
    return ModelLocation(folder)


def own_attentions(location: ModelLocation, text: list[int]) -> torch.Tensor:
    """(layers, heads, n, n): what the untouched model returns for one text, in eager mode."""
    with quiet(), torch.inference_mode():
        model = transformers.AutoModel.from_pretrained(location.folder, attn_implementation="eager").eval()
        backbone = model.get_encoder() if model.config.is_encoder_decoder else model
        out = backbone(torch.tensor([text]), output_attentions=True)
    # Of a hybrid some return nothing for layers without softmax attention.
    return torch.cat([weights for weights in out.attentions if weights is not None])


def recomputed(captured: Captured, causal: bool, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(layers, heads, n, n): softmax(scale q k^T + bias), under a causal mask or none."""
    logits = captured.scales[:, None, None, None] * (captured.queries.double() @ captured.keys.double().mT)
    if bias is not None:
        logits = logits + bias
    if causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    return logits.softmax(-1)


def write_gguf(
    path: Path,
    seed: int = 0,
    *,
    metadata: dict[str, float | str] | None = None,
    tensors: dict[str, tuple[int, ...]] | None = None,
    pre: str | None = "default",
) -> Path:
    """Write a Llama of two layers, 4 heads on 2 key heads of width 16, its matrices quantised to 4 bits (Q4_1).

    `metadata` is added, numbers as float32; of `tensors`, by their shapes, matrices too are quantised, rows are ones.
    """
    import gguf
    import numpy as np

    layers, heads, key_heads, width, hidden, inner, vocabulary = 2, 4, 2, 16, 64, 96, VOCABULARY
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    letters = [chr(ord("A") + place) for place in range(vocabulary - 6)]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<s>", "</s>", "<unk>", *letters, "Ġ", "ab", "ba"])
    writer.add_token_types([3, 3, 3] + [1] * (vocabulary - 3))
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)

    for key, value in (metadata or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_float32(key, value)

    def add(name: str, rows: int, columns: int) -> None:
        weights = (1.5 * columns**-0.5 * rng.standard_normal((rows, columns))).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(name, gguf.quantize(weights, kind), raw_dtype=kind)

    add("token_embd.weight", vocabulary, hidden)
    for layer in range(layers):
        block = f"blk.{layer}"
        add(f"{block}.attn_q.weight", heads * width, hidden)
        add(f"{block}.attn_k.weight", key_heads * width, hidden)
        add(f"{block}.attn_v.weight", key_heads * width, hidden)
        add(f"{block}.attn_output.weight", hidden, heads * width)
        add(f"{block}.ffn_gate.weight", inner, hidden)
        add(f"{block}.ffn_up.weight", inner, hidden)
        add(f"{block}.ffn_down.weight", hidden, inner)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{name}.weight", np.ones(hidden, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    for name, shape in (tensors or {}).items():
        add(name, *shape) if len(shape) == 2 else writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
