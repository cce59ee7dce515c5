"""Perplexity with a method in place of a model's attention: unchanged if exact, a one-line error if impossible."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import transformers
import yaml
from models_support import REFUSED, VOCABULARY
from safetensors.torch import load_file, save_file

from approxkmv import cli
from approxkmv.attention import UnavailableError, get
from approxkmv.attention.blocks import approxkmv as approxkmv_module
from approxkmv.attention.blocks import chunks
from approxkmv.compute.counting import count
from approxkmv.compute.trial import decisions
from approxkmv.config import CorpusEntry, Perplexity, checked, study_of
from approxkmv.errors import CaptureError, ConfigError, InputError, NonFiniteError, TableError
from approxkmv.models import ModelLocation
from approxkmv.models.loading import quiet
from approxkmv.perplexity.layers import parse_layers
from approxkmv.perplexity.model import CausalModel
from approxkmv.perplexity.replacement import Replacement, refuse_what_no_method_does
from approxkmv.perplexity.settings import from_options
from approxkmv.steps.perplexity import measure_perplexity

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 1200,
    "pad_token_id": 1,
}
IDS = torch.randint(3, VOCABULARY, (700,), generator=torch.Generator().manual_seed(0)).tolist()


def save(folder, class_name="LlamaConfig", **more):
    """A random language model whose attention is far from uniform, so that a wrong one shows."""
    torch.manual_seed(0)
    with quiet():
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, class_name)(**SETTINGS | more)
        ).eval()
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.ndim == 2:
                    tensor.normal_(0.0, 1.5 * tensor.shape[-1] ** -0.5)
        model.save_pretrained(folder)
    return ModelLocation(folder)


@pytest.fixture(scope="module")
def location(tmp_path_factory):
    return save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(location):
    return CausalModel.load(location)


def own_perplexity(location, ids):
    """What the untouched model says, in eager mode."""
    with quiet(), torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(location.folder, attn_implementation="eager").eval()
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return math.exp(float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))))


def replacement(name, layers=(0, 1, 2), **given):
    return Replacement(get(name), get(name).parameters(given), layers, 0)


def test_exact_methods_give_the_models_own_perplexity(location, model):
    right = own_perplexity(location, IDS)
    own = model.perplexity(IDS, Replacement(None, {}, range(3), 0))
    found = model.perplexity(IDS, replacement("exact-sdpa"))
    assert own.perplexity == pytest.approx(right, rel=1e-5)
    assert found.perplexity == pytest.approx(right, rel=1e-5)
    assert 0 < found.attention_seconds < found.seconds
    # Other attention is seen: this model is not indifferent to it.
    rough = model.perplexity(IDS, replacement("window", window=16))
    assert abs(rough.perplexity / right - 1) > 1e-3


@pytest.mark.parametrize("name", ["knn", "approxkmv"])
def test_budgets_for_all_keys_give_the_models_own_perplexity(name, location, model):
    if name == "knn":
        pytest.importorskip("faiss")
    given = {"top": 700} if name == "knn" else {"near": 700}
    found = model.perplexity(IDS, replacement(name, **given))
    assert found.perplexity == pytest.approx(own_perplexity(location, IDS), rel=1e-5)


def test_only_the_chosen_layers_are_replaced(location, model):
    right = own_perplexity(location, IDS)
    gaps = [
        abs(model.perplexity(IDS, replacement("window", layers, window=16)).perplexity - right)
        for layers in ((), (1,), (0, 1, 2))
    ]
    assert gaps[0] < 1e-5 * right
    assert gaps[1] > 1e-4 * right
    assert gaps[1] != gaps[2]


def test_rough_attention_is_far_and_more_budget_is_near(location, model):
    pytest.importorskip("faiss")
    right = own_perplexity(location, IDS)
    gaps = [
        abs(math.log(model.perplexity(IDS, replacement("knn", top=top, samples=samples)).perplexity / right))
        for top, samples in ((1, 1), (128, 64))
    ]
    assert gaps[1] < 0.3 * gaps[0]


def test_seconds_are_those_of_all_layers_but_the_warm_up_and_every_layer_has_a_seed_of_its_own(model, monkeypatch):
    seeds = []

    def a_second(q, k, v, *, seed, **given):
        seeds.append(seed)
        return v.clone()

    for module in ("model", "replacement"):
        clock = SimpleNamespace(perf_counter=lambda: float(len(seeds)))
        monkeypatch.setattr(f"approxkmv.perplexity.{module}.time", clock)
    for seed in (0, 1):
        method = replace(get("exact-sdpa"), causal=a_second)
        found = model.perplexity(IDS[:30], Replacement(method, {}, (0, 1, 2), seed))
        assert (found.attention_seconds, found.seconds) == (3.0, 3.0)
    # The first of the three layers is called once more.
    assert len(seeds) == 8
    assert seeds[::4] == seeds[1::4]
    assert len({*seeds}) == 6


@pytest.mark.parametrize(
    ("class_name", "more", "message"),
    [
        ("BertConfig", {}, "BertConfig is not that of a causal language model"),
        ("Gemma2Config", {"head_dim": 8}, "does not let its attention be replaced"),
        ("OpenAIGPTConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "does not let its attention be replaced"),
        (*REFUSED["DeepSeek-V3.2"], "DeepseekV32ForCausalLM chooses keys for each query"),
    ],
)
def test_other_models_are_refused_with_the_reason(class_name, more, message, tmp_path):
    if class_name == "BertConfig":
        with quiet():
            transformers.AutoModel.from_config(transformers.BertConfig(**SETTINGS)).save_pretrained(tmp_path)
        found = ModelLocation(tmp_path)
    else:
        found = save(tmp_path, class_name, **more)
    with pytest.raises(CaptureError, match=message) as caught:
        CausalModel.load(found)
    assert "\n" not in str(caught.value)


def test_a_sliding_window_is_refused_where_it_cuts(tmp_path):
    found = CausalModel.load(save(tmp_path, "MistralConfig", sliding_window=64))
    assert found.perplexity(IDS[:60], replacement("exact-sdpa")).perplexity > 1
    with pytest.raises(CaptureError, match=r"layer 0 \(MistralAttention\) has its own mask"):
        found.perplexity(IDS[:200], replacement("exact-sdpa"))


@pytest.mark.parametrize("option", ["softcap", "s_aux", "sinks", "position_bias"])
def test_what_attention_has_besides_its_softmax_is_refused(option):
    q = torch.randn(1, 2, 5, 8)
    module = torch.nn.Module()
    refuse_what_no_method_does(module, q, q, None, {option: None})
    with pytest.raises(CaptureError, match="not plain causal softmax attention"):
        refuse_what_no_method_does(module, q, q, None, {option: torch.ones(2)})


@pytest.mark.parametrize(("layer", "call"), [(False, None), (True, False), (False, False), (True, True), (False, True)])
def test_a_call_that_looks_ahead_is_refused_whether_it_or_its_layer_says_so(layer, call):
    q = torch.randn(1, 2, 5, 8)
    module = torch.nn.Module()
    module.is_causal = layer
    if layer if call is None else call:
        refuse_what_no_method_does(module, q, q, None, {"is_causal": call})
    else:
        with pytest.raises(CaptureError, match="looks ahead"):
            refuse_what_no_method_does(module, q, q, None, {"is_causal": call})


def test_texts_too_short_or_too_long(model):
    for ids in (IDS[:1], IDS + IDS):
        with pytest.raises(InputError, match="give 2 to 1200"):
            model.perplexity(ids, replacement("exact-sdpa"))


def test_a_model_whose_positions_were_scaled_is_read_to_their_end(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 100}
    found = CausalModel.load(save(tmp_path, max_position_embeddings=100, rope_parameters=yarn))
    assert found.perplexity(IDS[:400], replacement("exact-sdpa")).perplexity > 1
    with pytest.raises(InputError, match="give 2 to 400"):
        found.perplexity(IDS[:401], replacement("exact-sdpa"))


def test_damaged_weights_are_not_taken_for_those_of_an_encoder(tmp_path):
    found = save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="the logits of LlamaForCausalLM are not finite"):
        CausalModel.load(found).perplexity(IDS[:30], Replacement(None, {}, range(3), 0))


def test_layers_as_a_person_writes_them():
    assert parse_layers("all", 3) == [0, 1, 2]
    assert parse_layers("5, 0,2-3", 6) == [0, 2, 3, 5]
    for wrong in ("", "a", "0,6", "-1"):
        with pytest.raises(InputError, match="layers "):
            parse_layers(wrong, 6)
    with pytest.raises(InputError, match="layers names 3-1, which ends before it begins"):
        parse_layers("0,3-1", 6)


def settings(keys):
    return Perplexity(model="llama", corpus="words", **keys)


def test_the_table_has_a_row_for_each_setting_and_names_what_cannot_run(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "tokens", lambda documents, count: IDS[:count])
    monkeypatch.setitem(sys.modules, "faiss", None)
    # 300 tokens are then three chunks, or one if 256 keys are near.
    monkeypatch.setattr(chunks, "EXACT_BELOW", 64)
    text = tmp_path / "text.txt"
    text.write_text("some words")
    out = tmp_path / "perplexity.csv"
    methods = {"approxkmv": [{}, {"near": 16}], "knn": [{}]}
    measure_perplexity(
        model,
        "llama",
        CorpusEntry(name="words", source=f"path:{text}", label="words"),
        settings({"tokens": [300, 30], "methods": methods, "layers": "0,2", "repeats": 2}),
        out=out,
        record={"made": "here"},
        say=lambda line: None,
        require_all=False,
    )
    table = pd.read_csv(out)
    assert table["tokens"].tolist() == [30] * 3 + [300] * 3
    assert table["layers"].tolist() == [2] * 6
    assert table["ratio"].notna().tolist() == [True, True, False] * 2
    assert "needs faiss" in table["unavailable"][2]
    assert json.loads(table["parameters"][1])["near"] == 16
    record = json.loads(out.with_suffix(".json").read_text())
    assert record == {"made": "here", "tokens_of_earlier_runs": [], "trials": decisions()}
    # A row out of its block's reach is no fault: few are, with 16 near keys of 300 as well.
    assert table["recomputed_share"].dropna().between(0, 0.1).tolist() == [True] * 4
    ran = table[table["ratio"].notna()]
    for name in ("seconds", "exact_seconds", "attention_seconds", "exact_attention_seconds"):
        # Two passes differ, so each quartile is half way between one of them and the median.
        assert (ran[f"{name}_q1"] < ran[name]).all()
        assert (ran[f"{name}_q3"] - ran[name]).to_numpy() == pytest.approx((ran[name] - ran[f"{name}_q1"]).to_numpy())
    assert ran["repeats"].tolist() == [2] * 4
    # What fits in one chunk is exact.
    assert table["ratio"][[0, 1, 3]].tolist() == pytest.approx([1] * 3, abs=1e-5)
    assert abs(table["ratio"][4] - 1) > 1e-3


KILLED = """
import json, os, signal, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from approxkmv.config import CorpusEntry, Perplexity
from approxkmv.models import ModelLocation
from approxkmv.perplexity.model import CausalModel
from approxkmv.steps.perplexity import measure_perplexity

def say(line):
    print(line, flush=True)
    if line.startswith("n = 200: exact"):
        os.kill(os.getpid(), signal.SIGKILL)

CausalModel.tokens = lambda self, documents, count: json.loads(sys.argv[3])[:count]
given = json.loads(sys.argv[4])
settings = Perplexity(model="llama", corpus="words", **given.pop("settings"))
model, corpus = CausalModel.load(ModelLocation(Path(sys.argv[1]))), CorpusEntry(**given.pop("corpus"))
measure_perplexity(model, "llama", corpus, settings, out=Path(sys.argv[2]), record={}, say=say, **given)
"""


@pytest.fixture
def asked(tmp_path):
    """What measure_perplexity is asked, but for the model, its name and the method objects."""
    text = tmp_path / "text.txt"
    text.write_text("some words")
    corpus = {"name": "words", "source": f"path:{text}", "label": "words"}
    given = {"tokens": [30, 200], "methods": {"approxkmv": [{}]}, "layers": "0,2"}
    return {"corpus": corpus, "settings": given, "require_all": False}


def asked_for(asked, **keys):
    return asked | {"settings": asked["settings"] | keys}


def measure(model, asked, out, **more):
    given = {**asked, "record": {}, "say": lambda line: None, **more}
    corpus = CorpusEntry(**given.pop("corpus"))
    measure_perplexity(model, "llama", corpus, settings(given.pop("settings")), out=out, **given)
    return pd.read_csv(out)


@pytest.mark.slow
def test_a_killed_run_goes_on_after_its_last_whole_length(location, model, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "tokens", lambda documents, count: IDS[:count])
    out, part = tmp_path / "perplexity.csv", tmp_path / "perplexity.csv.part"
    words = [sys.executable, "-c", KILLED, str(location.folder), str(out), json.dumps(IDS), json.dumps(asked)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    (first,) = json.loads(part.read_text().splitlines()[1])["rows"]
    said = []
    table = measure(model, asked, out, say=said.append)
    assert said[0] == f"the run resumes after the 1 finished by an earlier one, kept in {part}"
    assert not any(line.startswith("n = 30") for line in said)
    assert table["tokens"].tolist() == [30, 200]
    assert table["seconds"][0] == first["seconds"]
    assert table["perplexity"][0] == first["perplexity"]
    assert json.loads(out.with_suffix(".json").read_text())["tokens_of_earlier_runs"] == [30]
    assert not part.exists()


def test_memory_that_is_too_little_is_a_row_or_one_line(model, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "tokens", lambda documents, count: IDS[:count])
    right = model.perplexity

    def too_long(ids, replacement):
        if len(ids) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")
        return right(ids, replacement)

    monkeypatch.setattr(model, "perplexity", too_long)
    table = measure(model, asked, tmp_path / "p.csv")
    assert table["perplexity"].notna().tolist() == [True, False]
    assert "the model itself, at 200 tokens, runs out of memory" in table["unavailable"][1]
    with pytest.raises(UnavailableError, match="at 200 tokens, runs out of memory") as caught:
        measure(model, asked, tmp_path / "q.csv", require_all=True)
    assert "\n" not in str(caught.value)


def test_what_is_no_number_is_not_reported(model, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "tokens", lambda documents, count: IDS[:count])
    broken = replace(get("approxkmv"), causal=lambda q, k, v, **_: v * torch.nan)
    monkeypatch.setattr(approxkmv_module, "method", broken)
    table = measure(model, asked_for(asked, tokens=[30]), tmp_path / "p.csv")
    assert table["perplexity"].isna().all()
    assert "logits of LlamaForCausalLM are not finite" in table["unavailable"][0]


def test_rows_made_again_are_reported(model, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "tokens", lambda documents, count: IDS[:count])
    right = get("approxkmv")

    def repaired(q, k, v, **given):
        count(recomputed_rows=q.shape[0] * 15)
        return right.causal(q, k, v, **given)

    monkeypatch.setattr(approxkmv_module, "method", replace(right, causal=repaired))
    table = measure(model, asked_for(asked, tokens=[30]), tmp_path / "p.csv")
    assert table["recomputed_share"].tolist() == [0.5]


def test_outputs_and_lengths_are_checked_first(model, asked, tmp_path, monkeypatch):
    def nothing(*_):
        raise AssertionError("something ran")

    monkeypatch.setattr(model, "perplexity", nothing)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "p.csv", tmp_path / "p.json"):
        with pytest.raises(TableError, match="cannot write"):
            measure(model, asked, out)
    with pytest.raises(InputError, match="the text has 5000 tokens: give 2 to 1200"):
        measure(model, asked_for(asked, tokens=[30, 5000]), tmp_path / "p.csv")


def test_options_become_settings_or_one_line():
    assert from_options("64,128", "knn", '{"top": 5}') == {"tokens": [64, 128], "methods": {"knn": [{"top": 5}]}}
    wrong = [{"tokens": "a"}, {"tokens": "9" * 6000}, {"parameters": "{"}, {"parameters": "[1]"}]
    for words in [*wrong, {"parameters": '{"top": ' + "9" * 6000 + "}"}, {"parameters": "[" * 10**5}]:
        with pytest.raises(InputError, match=r"^(tokens|parameters) is ") as caught:
            from_options(**{"tokens": "64", "method": "knn", "parameters": "{}"} | words)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def config_with(perplexity):
    value = yaml.safe_load((ROOT / "config.yaml").read_text())
    value["studies"] = {"p": {"perplexity": perplexity}}
    value["study"] = "p"
    return value


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"methods": {"own-key": [{}]}}, "method own-key has no causal form"),
        ({"methods": {"kn": [{}]}}, "did you mean 'knn'"),
        ({"methods": {"knn": [{"tpo": 3}]}}, "no parameter 'tpo'"),
        ({"model": "smollm"}, "did you mean 'smollm2-135m'"),
    ],
)
def test_a_study_that_cannot_be_is_refused_before_anything_runs(more, message):
    good = {"model": "smollm2-135m", "corpus": "moby-dick", "methods": {"knn": [{"top": 4}]}}
    assert study_of(checked(config_with(good))).perplexity.tokens == (1024, 2048, 4096)
    with pytest.raises(ConfigError, match=message):
        study_of(checked(config_with(good | more)))


def test_the_command_refuses_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    words = ["approxkmv", "perplexity", "--method", "own-key", "--out", str(tmp_path / "p.csv")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("approxkmv: method own-key has no causal form")
