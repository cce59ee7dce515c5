"""Folders of models that are not whole, not models, or would be read wrongly."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_inputs import Case, python_call

# What the tests of models share lies with them.
sys.path.append(str(Path(__file__).parents[1] / "unit"))


def use(folder: Path) -> None:
    """All that a study asks of a model in a folder: found, loaded, a text through its tokenizer and its layers."""
    from approxkmv.models import CapturableModel, fetch, parse_source

    model = CapturableModel.load(fetch(parse_source(f"path:{folder}"), folder.parent / "made"))
    model.capture([model.tokenize("w7 w8 w9 w60", None)])


def small_bert(folder: Path) -> Path:
    """A folder that is used without complaint."""
    from models_support import VOCABULARY, save_small

    save_small(folder, "bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"w{index}" for index in range(len(special), VOCABULARY)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    write(folder, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    return folder


def write(folder: Path, file: str, value: object) -> None:
    (folder / file).write_text(json.dumps(value))


def change(file: str, **changes: object) -> Callable[[Path], None]:
    """Change keys of a JSON file."""

    def make(folder: Path) -> None:
        value = json.loads((folder / file).read_text()) | changes
        write(folder, file, value)

    return make


def content(file: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(data) and None


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def save(folder: Path, tensors: dict[str, Any], file: str = "model.safetensors") -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})


def extra_weight(name: str, *shape: int, prefix: str = "") -> Callable[[Path], None]:
    """A weight that the class does not know; `prefix` is put before the names of all others."""

    def make(folder: Path) -> None:
        import torch

        save(folder, {f"{prefix}{key}": tensor for key, tensor in weights(folder).items()} | {name: torch.ones(shape)})

    return make


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: save(folder, {key: tensor for key, tensor in weights(folder).items() if part not in key})


def sharded(named: dict[str, str] | object) -> Callable[[Path], None]:
    """The weights in one shard, with an index whose weight_map is this."""

    def make(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        write(folder, "model.safetensors.index.json", {"weight_map": named})

    return make


def cut(file: str, keep: float) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(keep * len(data))])

    return make


def replaced(other: Callable[[Path], None]) -> Callable[[Path], None]:
    """Another model in place of the folder."""

    def make(folder: Path) -> None:
        shutil.rmtree(folder)
        other(folder)

    return make


def whole_clip(folder: Path) -> None:
    import transformers
    from models_support import VOCABULARY

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2},
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(folder)


def images(folder: Path) -> None:
    """A model of images whose class does not say that it takes no tokens."""
    import transformers

    sizes = {"hidden_size": 32, "depth": 1, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32}
    config = transformers.Glm4vVisionConfig(**sizes, image_size=28, patch_size=14)
    transformers.AutoModel.from_config(config).save_pretrained(folder)


def lora(folder: Path) -> None:
    import torch

    folder.mkdir()
    write(folder, "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "somebody/base"})
    save(folder, {"base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 4)}, "adapter_model.safetensors")


def in_whole_numbers(folder: Path) -> None:
    tensors = weights(folder)
    tensors[f"{LAYER}.query.weight"] = (100 * tensors[f"{LAYER}.query.weight"]).char()
    save(folder, tensors)


def in_two_shards(folder: Path) -> None:
    """The weights in two files, those of the last layer in the second."""
    tensors = weights(folder)
    last = {key: tensor for key, tensor in tensors.items() if "layer.2." in key}
    save(folder, {key: tensor for key, tensor in tensors.items() if key not in last}, "model-1.safetensors")
    save(folder, last, "model-2.safetensors")
    (folder / WEIGHTS).unlink()
    named = {key: f"model-{1 + (key in last)}.safetensors" for key in tensors}
    write(folder, "model.safetensors.index.json", {"metadata": {}, "weight_map": named})


def in_two_shards_with(more: dict[str, object]) -> Callable[[Path], None]:
    """The same, and what the index has besides the weight_map."""

    def make(folder: Path) -> None:
        in_two_shards(folder)
        index = "model.safetensors.index.json"
        write(folder, index, {"weight_map": json.loads((folder / index).read_text())["weight_map"]} | more)

    return make


def codes_in_the_second_shard(folder: Path) -> None:
    """Unsigned codes of weights, as GPTQ and bitsandbytes save them, in the file that is read last."""
    import torch

    tensors = weights(folder)
    key = "encoder.layer.2.attention.self.key.weight"
    save(folder, tensors | {key: (10 * tensors[key].abs()).to(torch.uint8)})
    in_two_shards(folder)


def shard_that_is_a_folder(folder: Path) -> None:
    in_two_shards(folder)
    (folder / "model-2.safetensors").unlink()
    (folder / "model-2.safetensors").mkdir()


def own_rotary(times: float) -> Callable[[Path], None]:
    """Frequencies of a context that was made longer, of which the configuration says nothing."""

    def make(folder: Path) -> None:
        import torch
        from models_support import save_small

        save_small(folder, "llama")
        frequencies = 10000.0 ** -(torch.arange(4) / 4) / times
        save(folder, weights(folder) | {"layers.0.self_attn.rotary_emb.inv_freq": frequencies})

    return make


def larger_vocabulary(folder: Path) -> None:
    with (folder / "vocab.txt").open("a") as file:
        file.write("more\nwords\n")


def pieces_alone(folder: Path) -> None:
    (folder / "vocab.txt").unlink()
    (folder / "sentencepiece.bpe.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    write(folder, "tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer"})


def stored_elsewhere(file: str) -> Callable[[Path], None]:
    """The file is a link to what was removed since."""

    def make(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(folder.parent / "removed" / file)

    return make


def llama(**changes: object) -> Callable[[Path], None]:
    """A model with rotary embeddings, and keys of its configuration."""

    def make(folder: Path) -> None:
        from models_support import save_small

        save_small(folder, "llama")
        change(CONFIG, **changes)(folder)

    return make


def bart(**changes: object) -> Callable[[Path], None]:
    """A model with a decoder, and keys of its configuration."""

    def make(folder: Path) -> None:
        from models_support import save_random

        sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 40}
        sizes |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
        save_random(folder, "BartConfig", sizes | {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")})
        change(CONFIG, **changes)(folder)

    return make


def llava(**changes: object) -> Callable[[Path], None]:
    """A model of images and text, and keys of the part of its configuration that is of the text."""

    def make(folder: Path) -> None:
        import transformers
        from models_support import SMALL, VOCABULARY

        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**SMALL["llama"][1], vocab_size=VOCABULARY),
            vision_config=transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        )
        transformers.AutoModel.from_config(config).save_pretrained(folder)
        change(CONFIG, text_config=json.loads((folder / CONFIG).read_text())["text_config"] | changes)(folder)

    return make


def rotary_type(**parameters: object) -> Callable[[Path], None]:
    return llama(rope_parameters=parameters)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer_config.json"
LAYER = "encoder.layer.0.attention.self"
SHARD = "model-00001-of-00001.safetensors"
LINEAR = {"rope_type": "linear", "factor": 4.0}

FOLDERS: list[tuple[str, Callable[[Path], None], str]] = [
    ("Git LFS pointer as weights", content(WEIGHTS, POINTER), "git lfs pull"),
    ("Git LFS pointer as a vocabulary", content("vocab.txt", POINTER), "git lfs pull"),
    ("Git LFS pointer as a tokenizer", content("tokenizer.json", POINTER), "git lfs pull"),
    ("adapter alone", replaced(lora), "merge"),
    ("adapter beside a model", content("adapter_config.json", b"{}"), "adapter_config.json"),
    ("code of its own", change(CONFIG, auto_map={"AutoModel": "modeling_x.X"}), "auto_map"),
    ("tokenizer's code", change(TOKENIZER, auto_map={"AutoTokenizer": ["x.X", None]}), "auto_map"),
    (
        "a weight under two names",
        extra_weight("encoder.layer.0.attention.self.query.weight", 32, 32, prefix="bert."),
        "before its name and without",
    ),
    ("norm with a pooler's name", extra_weight("encoder.layer.0.pooler_norm.weight", 32), "pooler_norm"),
    ("extra norm in a layer", extra_weight("encoder.layer.0.extra_norm.weight", 32), "extra_norm"),
    ("extra bias in a layer", extra_weight(f"bert.{LAYER}.query.more_bias", 32, prefix="bert."), "more_bias"),
    ("FP8 scale", extra_weight(f"{LAYER}.query.weight_scale_inv", 1, 1), "weight_scale_inv"),
    ("more layers than its configuration", change(CONFIG, num_hidden_layers=2), "encoder.layer.2"),
    ("extra norm of the embeddings", extra_weight("embed_norm.weight", 32), "embed_norm"),
    ("bias of each head", extra_weight(f"{LAYER}.bias", 1, 4, 40, 40), f"{LAYER}.bias"),
    ("weights in whole numbers", in_whole_numbers, f"{LAYER}.query.weight"),
    ("codes in the second shard", codes_in_the_second_shard, "layer.2.attention.self.key.weight is saved as integers"),
    ("rotary embedding of its own", replaced(own_rotary(4.0)), "rotary_emb.inv_freq"),
    ("rotary embedding of nearly the same", replaced(own_rotary(1.05)), "rotary_emb.inv_freq"),
    ("weight beside the model and its heads", extra_weight("q_norm.weight", 32, prefix="bert."), "first q_norm.weight"),
    ("weights that are a link to nowhere", stored_elsewhere(WEIGHTS), f"{WEIGHTS} is a link to"),
    ("configuration that is a link to nowhere", stored_elsewhere(CONFIG), f"{CONFIG} is a link to"),
    ("vocabulary that is a link to nowhere", stored_elsewhere("vocab.txt"), "vocab.txt is a link to"),
    ("link to a folder that is nowhere", replaced(lambda f: f.symlink_to("removed")), "model is a link to removed"),
    (
        "weights that are a folder",
        lambda f: (f / WEIGHTS).unlink() or (f / WEIGHTS).mkdir(),
        f"{WEIGHTS} is not a file",
    ),
    (
        "unknown rotary embedding",
        replaced(rotary_type(rope_type="spiral", factor=2.0)),
        "'spiral', but transformers has",
    ),
    ("old name of an unknown rotary embedding", replaced(rotary_type(type="spiral")), "'spiral', but transformers has"),
    ("two bases of a rotary embedding", replaced(llama(rope_theta=500000.0)), "different ways (rope_theta 500000.0)"),
    (
        "base beside an older scaling",
        replaced(llama(rope_scaling=LINEAR, rope_parameters={"rope_type": "linear", "rope_theta": 5e5})),
        "different ways (rope_theta 500000.0)",
    ),
    (
        "two factors of a rotary embedding",
        replaced(llama(rope_scaling=LINEAR, rope_parameters=LINEAR | {"factor": 8.0})),
        "different ways (factor 8.0 and 4.0)",
    ),
    ("rotary embedding of a number", replaced(rotary_type(rope_type=3, rope_theta=1e4)), "type 3, but transformers"),
    ("rotary embedding without its factor", replaced(rotary_type(rope_type="linear")), "factor"),
    ("mask buffer that is a bias", extra_weight(f"{LAYER}.bias", 32), f"{LAYER}.bias"),
    ("fewer layers than its configuration", change(CONFIG, num_hidden_layers=4), "would be random"),
    ("no query in a layer", without("layer.1.attention.self.query"), "would be random"),
    ("weights cut short", cut(WEIGHTS, 0.6), "not a complete safetensors"),
    ("header cut short", cut(WEIGHTS, 0.001), "not a complete safetensors"),
    ("empty weights", content(WEIGHTS, b""), "not a complete safetensors"),
    ("header of 2^60 bytes", content(WEIGHTS, (2**60).to_bytes(8, "little") + b"{}"), "not a complete safetensors"),
    ("HTML in place of weights", content(WEIGHTS, b"<!DOCTYPE html><html>"), "not a complete safetensors"),
    ("index of a file outside", sharded({"x": "../other.safetensors"}), "'../other.safetensors'"),
    ("index of an absolute path", sharded({"x": "/etc/other.safetensors"}), "'/etc/other.safetensors'"),
    ("index of a pickle", sharded({"x": "pytorch_model.bin"}), "'pytorch_model.bin'"),
    ("index of a missing shard", sharded({"x": SHARD, "y": "model-2.safetensors"}), "model-2.safetensors"),
    ("index of a folder", shard_that_is_a_folder, "model-2.safetensors, which is missing"),
    ("index without a map", sharded(None), "weight_map"),
    ("index of numbers", sharded({"x": 3}), "weight_map"),
    ("index of nothing", sharded({}), "weight_map"),
    ("index without metadata", in_two_shards_with({}), "has no metadata"),
    ("index with metadata of null", in_two_shards_with({"metadata": None}), "has no metadata"),
    ("weights of another name", lambda f: (f / WEIGHTS).rename(f / "x.safetensors") and None, "x.safetensors"),
    ("no configuration", lambda f: (f / CONFIG).unlink(), "no config.json"),
    ("configuration that is a list", content(CONFIG, b"[]"), "not hold a JSON object"),
    ("configuration that is a number", content(CONFIG, b"3"), "not hold a JSON object"),
    ("configuration without a type", content(CONFIG, b"{}"), "model_type"),
    ("configuration in UTF-16", content(CONFIG, '{"model_type": "bert"}'.encode("utf-16")), "UTF-8"),
    ("configuration with a byte order mark", content(CONFIG, b"\xef\xbb\xbf{}"), "BOM"),
    ("deep configuration", content(CONFIG, b'{"a":' * 100_000), "config.json"),
    ("cut configuration", content(CONFIG, b'{"model_type": "be'), "config.json"),
    ("empty configuration", content(CONFIG, b""), "config.json"),
    ("number of 6,000 digits", content(CONFIG, b'{"num_hidden_layers": ' + b"9" * 6000 + b"}"), "config.json"),
    ("unknown type", change(CONFIG, model_type="perceptron"), "perceptron"),
    ("type that is a list", change(CONFIG, model_type=["bert"]), "configuration cannot be read"),
    ("no layers", change(CONFIG, num_hidden_layers=0), "num_hidden_layers is 0"),
    ("-1 layers", change(CONFIG, num_hidden_layers=-1), "num_hidden_layers is -1"),
    ("a million layers", change(CONFIG, num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
    ("a million layers of a decoder", replaced(bart(decoder_layers=10**6)), "decoder_layers is 1000000"),
    ("a thousand million labels", change(CONFIG, num_labels=10**9), "num_labels is 1000000000"),
    ("as many labels of a part", change(CONFIG, text_config={"num_labels": 10**9}), "num_labels is 1000000000"),
    (
        "positions of 2^64",
        change(CONFIG, max_position_embeddings=2**64),
        "max_position_embeddings is 18446744073709551616",
    ),
    ("layers in words", change(CONFIG, num_hidden_layers="three"), "num_hidden_layers"),
    ("no heads", change(CONFIG, num_attention_heads=0), "num_attention_heads is 0"),
    ("5 heads of 32 numbers", change(CONFIG, num_attention_heads=5), "32"),
    ("width of 0", change(CONFIG, hidden_size=0), "hidden_size is 0"),
    ("width of 2^40", change(CONFIG, hidden_size=2**40), "hidden_size is 1099511627776"),
    ("width of another model", change(CONFIG, hidden_size=64), "first embeddings.LayerNorm.bias: (32,) in the file"),
    ("vocabulary of -5", change(CONFIG, vocab_size=-5), "vocab_size is -5"),
    ("vocabulary of 10^9", change(CONFIG, vocab_size=10**9), "correct the sizes in config.json"),
    ("width of 2^31 between layers", change(CONFIG, intermediate_size=2**31 - 1), "BertModel has 418,759,"),
    ("width of 10^7 between layers", change(CONFIG, intermediate_size=10**7), "correct the sizes in config.json"),
    ("head of 10^9 numbers", replaced(llama(head_dim=10**9)), "correct the sizes in config.json"),
    ("as wide a part", replaced(llava(intermediate_size=10**9)), "correct the sizes in config.json"),
    ("unknown activation", change(CONFIG, hidden_act="snake"), "snake"),
    ("image model", change(CONFIG, model_type="vit"), "not token ids"),
    ("images as if they were text", replaced(images), "model of text"),
    ("whole CLIP", replaced(whole_clip), "save its text model alone"),
    ("tokenizer larger than the vocabulary", larger_vocabulary, "another model"),
    ("tokenizer of SentencePiece alone", pieces_alone, "okenizer"),
    ("vocabulary without an unknown token", content("vocab.txt", b"[PAD]\n[CLS]\n[SEP]\nw7\n"), "UNK"),
    ("no tokenizer", lambda f: (f / "vocab.txt").unlink(), "no tokenizer"),
    ("deep tokenizer", content("tokenizer.json", b'{"a":' * 100_000), "tokenizer"),
    ("tokenizer that is a list", content("tokenizer.json", b"[]"), "tokenizer"),
    ("tokenizer configuration that is a list", content(TOKENIZER, b"[]"), "not hold a JSON object"),
    ("GGUF under another name", replaced(lambda f: f.mkdir() or content("model.bin", b"GGUF123")(f)), ".gguf"),
    ("empty folder", replaced(Path.mkdir), "no weights"),
    ("file in place of a folder", replaced(lambda f: f.write_bytes(b"x") and None), "folder"),
]


def bad_folder(folder: Path, make: Callable[[Path], None]) -> tuple[int, str]:
    make(small_bert(folder / "model"))
    return python_call(lambda: use(folder / "model"))


CASES = [Case("models", name, lambda folder, make=make: bad_folder(folder, make)) for name, make, _ in FOLDERS]
