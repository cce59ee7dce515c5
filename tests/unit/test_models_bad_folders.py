"""A folder that does not hold a complete model is refused in one line that says why; complete ones are accepted."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
import transformers
from bad_inputs.models import (
    FOLDERS,
    bad_folder,
    change,
    extra_weight,
    in_two_shards,
    pieces_alone,
    save,
    small_bert,
    use,
    weights,
)
from models_support import ARCHITECTURES, SMALL, TEXTS, VOCABULARY, save_random, save_small

from approxkmv.errors import CaptureError, SourceError
from approxkmv.models import CapturableModel, ModelLocation
from approxkmv.models.loading import (
    causal_class,
    load_backbone,
    load_causal_model,
    quiet,
    reading,
    source_options,
)


@pytest.mark.parametrize(("make", "says"), [case[1:] for case in FOLDERS], ids=[case[0] for case in FOLDERS])
def test_the_line_says_what_is_wrong(tmp_path, make, says):
    code, printed = bad_folder(tmp_path, make)
    assert (code, printed.count("\n")) == (2, 1), printed
    assert says in printed


@pytest.mark.parametrize("name", ["adapter beside a model", "Git LFS pointer as a vocabulary"])
def test_a_folder_that_no_fetch_has_seen_is_checked_when_it_is_loaded(tmp_path, name):
    ((make, says),) = [case[1:] for case in FOLDERS if case[0] == name]
    make(small_bert(tmp_path))
    with pytest.raises(SourceError, match=says):
        CapturableModel.load(ModelLocation(tmp_path))


def test_a_whole_folder_is_used(tmp_path):
    use(small_bert(tmp_path / "model"))


def test_a_folder_of_links_is_used_as_the_cache_of_a_hub_is_one(tmp_path):
    folder = small_bert(tmp_path / "model")
    (tmp_path / "links").mkdir()
    for path in folder.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    use(tmp_path / "links")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("load", [load_backbone, load_causal_model])
def test_codes_are_no_weights_whatever_stands_before_their_names(tmp_path, load, prefix, dtype):
    save_small(tmp_path, "llama")
    change("config.json", tie_word_embeddings=True)(tmp_path)
    tensors = {f"{prefix}{key}": tensor for key, tensor in weights(tmp_path).items()}
    save(tmp_path, tensors)
    load(ModelLocation(tmp_path), dtype=torch.float32, attention="eager")
    key = f"{prefix}layers.1.mlp.up_proj.weight"
    save(tmp_path, tensors | {key: tensors[key].to(dtype)})
    with pytest.raises(SourceError, match=f"{key} is saved as integers"):
        load(ModelLocation(tmp_path), dtype=torch.float32, attention="eager")


@pytest.mark.parametrize("beside", [False, True])
def test_weights_in_two_files_are_those_in_one_which_is_read_where_there_are_both(tmp_path, beside):
    folder = small_bert(tmp_path / "model")
    one = CapturableModel.load(ModelLocation(folder)).capture(TEXTS[:1])[0]
    whole = (folder / "model.safetensors").read_bytes()
    in_two_shards(folder)
    if beside:
        (folder / "model.safetensors").write_bytes(whole)
        # What the index of an older save names is gone.
        (folder / "model-2.safetensors").unlink()
    two = CapturableModel.load(ModelLocation(folder)).capture(TEXTS[:1])[0]
    assert two.queries.equal(one.queries)
    assert two.keys.equal(one.keys)


def test_a_tokenizer_of_sentencepiece_asks_for_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as if it were not installed
    code, printed = bad_folder(tmp_path, pieces_alone)
    assert code == 2
    assert "pip install sentencepiece" in printed


def test_what_a_file_would_have_a_terminal_do_is_shown_and_not_done(tmp_path):
    name = "encoder.layer.0.\x1b[2J\x1b]0;title\a\r\u202eevil\u2028.weight"
    code, printed = bad_folder(tmp_path, extra_weight(name, 32))
    assert code == 2
    assert r"encoder.layer.0.\x1b[2J\x1b]0;title\x07 \u202eevil .weight" in printed
    assert printed.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    ("name", "shape", "prefix"),
    [
        ("cls.predictions.transform.dense.weight", (32, 32), ""),
        ("classifier.weight", (2, 32), ""),
        ("linear.weight", (128, 32), "bert."),
        ("v_head.summary.weight", (1, 32), "bert."),
        ("cls.predictions.bias", (61,), "bert."),
        ("embed_out.weight", (61, 32), "bert."),
        ("embeddings.position_ids", (1, 40), ""),
        ("embeddings.token_type_ids", (1, 40), ""),
        ("encoder.layer.0.attention.bias", (1, 1, 40, 40), ""),
        ("encoder.layer.0.attention.masked_bias", (), ""),
    ],
)
def test_heads_and_what_is_computed_are_left_out(tmp_path, name, shape, prefix):
    small_bert(tmp_path / "plain")
    extra_weight(name, *shape, prefix=prefix)(small_bert(tmp_path / "model"))
    plain, more = (CapturableModel.load(ModelLocation(tmp_path / folder)) for folder in ("plain", "model"))
    for ours, theirs in zip(plain.capture(TEXTS), more.capture(TEXTS), strict=True):
        assert ours.queries.equal(theirs.queries)


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        *((SMALL["bert"], f"BertFor{task}") for task in ("PreTraining", "MaskedLM", "QuestionAnswering")),
        *((SMALL["gpt2"], head) for head in ("GPT2LMHeadModel", "GPT2ForTokenClassification")),
        *((SMALL["llama"], f"LlamaFor{task}") for task in ("CausalLM", "SequenceClassification")),
        (ARCHITECTURES["GPT-NeoX"], "GPTNeoXForCausalLM"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_saved_with_its_head_is_the_one_without(tmp_path, backbone, head):
    save_random(tmp_path / "alone", *backbone)
    with quiet():
        model = getattr(transformers, head).from_pretrained(tmp_path / "alone")
        model.save_pretrained(tmp_path / "whole")
    alone, whole = (CapturableModel.load(ModelLocation(tmp_path / folder)) for folder in ("alone", "whole"))
    for ours, theirs in zip(alone.capture(TEXTS), whole.capture(TEXTS), strict=True):
        assert ours.queries.equal(theirs.queries)


def test_the_sinusoids_of_marian_are_not_random(tmp_path):
    torch.manual_seed(0)
    sizes = {"encoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = transformers.MarianConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        max_position_embeddings=40,
        pad_token_id=1,
        eos_token_id=0,
        decoder_start_token_id=1,
        **sizes,
    )
    model = transformers.MarianMTModel(config).eval()
    with quiet():
        model.save_pretrained(tmp_path)
    capturing = CapturableModel.load(ModelLocation(tmp_path))
    table = model.model.encoder.embed_positions.weight
    assert capturing._backbone.embed_positions.weight.equal(table)
    assert float(table.abs().max()) > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_frequencies_of_a_rotary_embedding_are_those_that_are_computed(tmp_path, dtype):
    save_small(tmp_path, "llama")
    frequencies = (10000.0 ** -(torch.arange(4) / 4)).to(dtype)
    save(tmp_path, weights(tmp_path) | {"layers.1.self_attn.rotary_emb.inv_freq": frequencies})
    CapturableModel.load(ModelLocation(tmp_path))
    scaling = {"method": "linear", "factor": 4.0}
    assert CapturableModel.load(ModelLocation(tmp_path), rotary_scaling=scaling).max_positions == 160


def test_saved_frequencies_of_another_number_are_not_what_the_configuration_says(tmp_path):
    save_small(tmp_path, "llama")
    save(tmp_path, weights(tmp_path) | {"layers.1.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    with pytest.raises(SourceError, match="inv_freq in the file is not what the configuration says"):
        CapturableModel.load(ModelLocation(tmp_path))


LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {"rope_theta": 10000, "rope_scaling": None}),
        ("Llama", {"rope_theta": 5e5, "rope_parameters": None, "rope_scaling": LINEAR}),
        ("Llama", {"rope_theta": 5e5, "rope_parameters": LINEAR | {"rope_theta": 5e5}, "rope_scaling": LINEAR}),
        ("Gemma3 (text)", {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
        ("BERT", {"rope_theta": 5e5}),
    ],
)
def test_a_rotary_embedding_may_be_stated_in_either_way_or_in_both_alike(tmp_path, name, changes):
    save_random(tmp_path, *ARCHITECTURES[name])
    change("config.json", **changes)(tmp_path)
    CapturableModel.load(ModelLocation(tmp_path))


def test_nothing_is_fetched_and_no_code_of_a_model_is_run_whatever_its_files_say(tmp_path):
    safe = {"local_files_only": True, "trust_remote_code": False}
    assert source_options(ModelLocation(tmp_path)) == safe
    assert source_options(ModelLocation(tmp_path, "a.gguf")) == safe | {"gguf_file": "a.gguf"}


def test_an_empty_auto_map_names_no_code(tmp_path):
    save_small(tmp_path, "llama")
    change("config.json", auto_map={})(tmp_path)
    CapturableModel.load(ModelLocation(tmp_path))


@pytest.mark.parametrize(
    "asked",
    [
        {"output_attentions": True},
        *({"_attn_implementation": name} for name in ("eager", "somebody/kernels:attend", 3)),
        {"_attn_implementation": "sdpa", "output_attentions": True},
        {"_experts_implementation": "somebody/kernels"},
    ],
    ids=str,
)
def test_a_checkpoint_that_asks_for_its_attentions_or_for_a_kernel_is_read_without(tmp_path, asked):
    save_small(tmp_path, "llama")
    plain = CapturableModel.load(ModelLocation(tmp_path)).capture(TEXTS[:1])[0]
    change("config.json", **asked)(tmp_path)
    assert torch.equal(CapturableModel.load(ModelLocation(tmp_path)).capture(TEXTS[:1])[0].queries, plain.queries)
    scaling = {"method": "linear", "factor": 4.0}
    assert CapturableModel.load(ModelLocation(tmp_path), rotary_scaling=scaling).max_positions == 160


@pytest.mark.parametrize("bars", [False, True])
def test_what_transformers_says_afterwards_is_what_it_said_before(bars):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_info()
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        with contextlib.suppress(KeyError), quiet():
            assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
            raise KeyError
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, bars)
    finally:
        logging.set_verbosity(before[0])
        (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("9 GiB"), CaptureError("it looks ahead")])
def test_too_little_memory_and_what_a_model_is_are_no_fault_of_its_files(tmp_path, error):
    with pytest.raises(type(error)) as caught, reading(ModelLocation(tmp_path), "model"):
        raise error
    assert caught.value is error


def test_a_causal_model_is_one_by_its_configuration():
    assert causal_class(transformers.BertConfig(is_decoder=True)).__name__ == "BertLMHeadModel"
    assert causal_class(transformers.LlamaConfig()).__name__ == "LlamaForCausalLM"
    for other in (transformers.BertConfig(), transformers.BartConfig(), transformers.T5Config()):
        with pytest.raises(CaptureError, match="is not that of a causal language model"):
            causal_class(other)
