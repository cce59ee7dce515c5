"""Plans: the fastest method within an error for each head, in a file, and in a model of transformers."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pytest
import torch
import transformers
from models_support import REFUSED

from approxkmv.attention import Method, get
from approxkmv.compute.counting import count
from approxkmv.errors import CaptureError, InputError, TableError, UnavailableError
from approxkmv.integrations import transformers as fast
from approxkmv.models import ModelLocation
from approxkmv.models.folders import complete
from approxkmv.models.loading import quiet
from approxkmv.perplexity import planning
from approxkmv.perplexity.layers import parse_layers
from approxkmv.perplexity.model import CausalModel
from approxkmv.perplexity.plan import HeadPlan, Plan, read_plan, write_plan
from approxkmv.perplexity.planning import best, make_plan
from approxkmv.perplexity.replacement import Replacement

IDS = torch.randint(3, 90, (400,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def location(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    with quiet():
        config = transformers.LlamaConfig(
            vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=600,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.ndim == 2:
                    tensor.normal_(0.0, 1.5 * tensor.shape[-1] ** -0.5)
        model.save_pretrained(folder)
    return ModelLocation(folder)


@pytest.fixture(scope="module")
def model(location):
    return CausalModel.load(location)


def head(method, **parameters):
    return HeadPlan(method, get(method).parameters(parameters), 0.0, 1.0, "exact-sdpa", 1.0)


def plan_of(layers, model="any"):
    return Plan(model, 0.05, 100, layers, {})


MIXED = plan_of(
    (
        (head("exact-sdpa"), head("mean"), head("exact-sdpa"), head("mean")),
        (head("exact-sdpa-bf16"), head("exact-sdpa"), head("exact-sdpa"), head("local-expansion")),
    )
)
EXACT = plan_of(((head("exact-sdpa"),) * 4,) * 2)


def test_each_head_is_computed_by_its_method():
    q, k, v = torch.randn(3, 4, 50, 8, generator=torch.Generator().manual_seed(1))
    out = MIXED.of_layer(0)(q, k, v, scale=0.3, seed=5)
    for number, name in enumerate(("exact-sdpa", "mean", "exact-sdpa", "mean")):
        one = slice(number, number + 1)
        assert torch.allclose(out[one], get(name).attend_causally(q[one], k[one], v[one], scale=0.3), atol=1e-6)
    assert MIXED.heads_by_method() == {"exact-sdpa": 4, "mean": 2, "exact-sdpa-bf16": 1, "local-expansion": 1}


def test_heads_apart_draw_numbers_of_their_own():
    uniform = head("uniform", samples=4)
    # The last layer has one method, as one run of its heads.
    plan = plan_of((*((uniform, head("exact-sdpa"), uniform),) * 2, (uniform,) * 3))
    q, k, v = torch.randn(3, 1, 600, 8, generator=torch.Generator().manual_seed(1)).expand(-1, 3, -1, -1)
    out = plan.of_layer(0)(q, k, v, scale=0.3, seed=5)
    assert not torch.equal(out[0], out[2])
    following = plan.of_layer(1)(q, k, v, scale=0.3, seed=6)
    assert not any(torch.equal(out[i], following[j]) for i in (0, 2) for j in (0, 2))
    # Seeds of layers and numbers of heads are not added up, or these two would be equal.
    third = plan.of_layer(0)(q, k, v, scale=0.3, seed=0)[2]
    assert not torch.equal(third, plan.of_layer(2)(q, k, v, scale=0.3, seed=2)[0])


def test_a_plan_survives_its_file_and_damage_is_one_line(tmp_path):
    path = tmp_path / "plan.json"
    write_plan(path, MIXED, {"made": "here"})
    assert read_plan(path) == MIXED
    whole = json.loads(path.read_text())
    whole["layers"][0][0]["method"] = "exact-sdap"
    wrong = [("layers", [[{"method": "mean"}]]), ("layers", [3]), ("layers", []), ("layers", whole["layers"])]
    for key, value in wrong:
        path.write_text(json.dumps({**whole, key: value}))
        with pytest.raises(InputError) as caught:
            read_plan(path)
        assert "\n" not in str(caught.value)
    path.write_text("{}")
    with pytest.raises(TableError):
        read_plan(path)


def test_the_fastest_method_within_the_error_is_chosen(monkeypatch):
    """Given seconds and errors by name: too slow, too far off, and within both; exact in half precision if allowed."""
    given = {"exact-sdpa-bf16": (0.01, 4.0), "exact-tiles-bf16": (0.01, 4.5), "exact-sdpa": (0.0, 8.0)}
    given["local-expansion"] = (0.03, 3.0)
    # A second that is faster than exact attention, but not than the first
    given["approxkmv"] = (0.0, 3.3)
    monkeypatch.setattr(planning, "METHODS", ("local-expansion", "approxkmv"))
    recomputed = {}
    monkeypatch.setattr(
        planning, "_measured", lambda method, *rest: (*given[method.name], recomputed.get(method.name, 0.0))
    )
    assert best((None,) * 4, None, 0.05).method == "local-expansion"
    monkeypatch.setattr(planning, "METHODS", ("local-expansion",))
    recomputed["local-expansion"] = 0.02
    assert best((None,) * 4, None, 0.05).method == "exact-sdpa-bf16"
    recomputed.clear()
    given["local-expansion"] = (0.045, 3.0)
    assert best((None,) * 4, None, 0.05).method == "exact-sdpa-bf16"
    given["local-expansion"] = (0.03, 3.9)
    assert best((None,) * 4, None, 0.05).method == "exact-sdpa-bf16"
    found = best((None,) * 4, None, 0.015)
    assert (found.method, found.exact_seconds) == ("exact-sdpa", 8.0)
    given["exact-tiles-bf16"] = (0.01, 2.0)
    assert best((None,) * 4, None, 0.05).method == "exact-tiles-bf16"


def test_of_several_seeds_the_largest_error_of_the_answer_and_the_fewest_seconds_count(monkeypatch):
    seconds = iter([5.0, 3.0, 4.0] * 2)

    def timed(run):
        run()
        return next(seconds)

    def attend(q, k, v, *, scale, seed):
        count(recomputed_rows=seed)
        return exact * (torch.nan if seed == 4 else 1 + 0.1 * seed)

    monkeypatch.setattr(planning, "timer", lambda device, clock: timed)
    method, exact = Method(name="made-up", compute=attend, causal=attend, summary=""), 2 * torch.ones(1, 10, 1)
    inputs = torch.ones(1, 10, 4), torch.ones(1, 10, 4), 10 * torch.ones(1, 10, 1), 0.3
    assert planning._measured(method, {}, inputs, exact, (1, 2, 0)) == (pytest.approx(0.2), 3.0, 0.2)
    assert planning._measured(method, {}, inputs, exact, (1, 4, 0))[0] == float("inf")


def test_an_exact_method_that_the_device_lacks_is_left_out(monkeypatch):
    def measured(method, *rest):
        if method.name == "exact-tiles-bf16":
            raise UnavailableError("a CPU only")
        return (0.0, 1.0, 0.0)

    monkeypatch.setattr(planning, "METHODS", ())
    monkeypatch.setattr(planning, "_measured", measured)
    assert best((None,) * 4, None, 0.05).method == "exact-sdpa-bf16"


def test_a_made_plan_keeps_the_answers_of_another_text(model, monkeypatch):
    """With exact attention declared slow, every head gets a method, and perplexity on other text stays within 5 %."""
    measured = planning._measured

    def slow(method, *rest):
        error, seconds, recomputed = measured(method, *rest)
        return error, seconds + (60.0 if method.exact else 0.0), recomputed

    monkeypatch.setattr(planning, "_measured", slow)
    said = []
    plan = make_plan(model, IDS[:300], 0.05, said.append)
    assert len(said) == 2
    assert plan.model == model.identity()
    assert not any(name.startswith("exact") for name in plan.heads_by_method())
    assert all(head.error <= 0.04 for heads in plan.layers for head in heads)
    other = [(7 * i) % 87 + 3 for i in IDS]
    own = model.perplexity(other, Replacement(None, {}, range(2), 0)).perplexity
    assert model.perplexity(other, Replacement(plan, {}, range(2), 0)).perplexity == pytest.approx(own, rel=0.05)
    with pytest.raises(InputError, match="target is 2"):
        make_plan(model, IDS, 2, said.append)


@pytest.fixture
def ordinary(location):
    with quiet():
        return transformers.AutoModelForCausalLM.from_pretrained(location.folder).eval()


def logits(model, ids, **more):
    with torch.inference_mode():
        return model(torch.tensor(ids), **more).logits


def test_a_plan_in_a_model_of_transformers_and_back(ordinary):
    before, implementation = logits(ordinary, [IDS]), ordinary.config._attn_implementation
    fast.use_plan(ordinary, EXACT)
    assert torch.allclose(logits(ordinary, [IDS]), before, atol=1e-4)
    fast.use_plan(ordinary, MIXED)
    assert not torch.allclose(logits(ordinary, [IDS]), before, atol=1e-2)
    fast.restore(ordinary)
    assert ordinary.config._attn_implementation == implementation
    assert torch.equal(logits(ordinary, [IDS]), before)
    assert not any(module in fast._plans for module in ordinary.modules())
    with pytest.raises(InputError, match="has no plan"):
        fast.restore(ordinary)


def test_a_plan_has_the_factor_of_the_layer_and_a_seed_for_each(ordinary, monkeypatch):
    for layer, factor in zip(ordinary.model.layers, (0.9, 0.2), strict=True):
        layer.self_attn.scaling = factor
    before = logits(ordinary, [IDS])
    fast.use_plan(ordinary, EXACT)
    assert torch.allclose(logits(ordinary, [IDS]), before, atol=1e-4)
    seen = []

    def of_layer(self, layer):
        return lambda q, k, v, *, scale, seed: seen.append((layer, scale, seed)) or v

    monkeypatch.setattr(Plan, "of_layer", of_layer)
    logits(ordinary, [IDS])
    assert seen == [(0, 0.9, 0), (1, 0.2, 1)]


def test_training_is_computed_as_before(ordinary):
    means = plan_of(((head("mean"),) * 4,) * 2)

    def found(dropout=0.0):
        torch.manual_seed(0)
        for layer in ordinary.model.layers:
            layer.self_attn.attention_dropout = dropout
        return ordinary.train(dropout > 0)(torch.tensor([IDS])).logits

    before = found()
    with torch.no_grad():
        dropped = found(0.5)
    fast.use_plan(ordinary, means)
    torch.testing.assert_close(found(), before)
    with torch.no_grad():
        torch.testing.assert_close(found(0.5), dropped)
        planned = found()
    assert not torch.allclose(planned, before, atol=1e-2)
    # Nothing here wants gradients, although they are enabled.
    torch.testing.assert_close(ordinary.requires_grad_(False)(torch.tensor([IDS])).logits, planned)


@pytest.mark.parametrize("trained", ["k_proj", "v_proj"])
def test_keys_or_values_alone_are_trained_as_before(ordinary, trained):
    ordinary.requires_grad_(False)
    weight = getattr(ordinary.model.layers[0].self_attn, trained).weight.requires_grad_()

    def gradient():
        return torch.autograd.grad(ordinary(torch.tensor([IDS])).logits.square().sum(), weight)[0]

    before = gradient()
    fast.use_plan(ordinary, MIXED)
    torch.testing.assert_close(gradient(), before)


def test_several_padded_or_continued_texts_and_a_look_ahead_are_computed_as_before(ordinary):
    """Where no method applies, the answers of a plan of means are the model's own."""
    means = plan_of(((head("mean"),) * 4,) * 2)
    two, mask = [IDS[:30], IDS[30:60]], torch.ones(2, 30, dtype=torch.long)
    mask[1, :7] = 0
    plain = [logits(ordinary, two), logits(ordinary, two, attention_mask=mask)]
    with torch.inference_mode():
        past = ordinary(torch.tensor([IDS[:20]]), use_cache=True).past_key_values
    plain.append(logits(ordinary, [IDS[20:21]], past_key_values=past))
    plain.append(logits(ordinary, [IDS], is_causal=False))
    assert not torch.allclose(plain[-1], logits(ordinary, [IDS]), atol=1e-2)
    fast.use_plan(ordinary, means)
    past.crop(-1)
    found = [logits(ordinary, two), logits(ordinary, two, attention_mask=mask)]
    found.append(logits(ordinary, [IDS[20:21]], past_key_values=past))
    found.append(logits(ordinary, [IDS], is_causal=False))
    for one, other in zip(plain, found, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_values_of_zero_are_no_traceback():
    q, k, v = torch.randn(1, 40, 8), torch.randn(1, 40, 8), torch.zeros(1, 40, 8)
    found = best((q, k, v, 0.3), torch.zeros(1, 40, 8), 0.05)
    assert found.error == 0


def test_a_plan_for_another_shape_is_refused(ordinary):
    with pytest.raises(InputError, match="the plan is for 1 layers of 4 heads, but the model has 2 layers of 4"):
        fast.use_plan(ordinary, dataclasses.replace(EXACT, layers=EXACT.layers[:1]))
    with pytest.raises(InputError, match="2 layers of 2 heads, but the model has 2 layers of 4"):
        fast.use_plan(ordinary, dataclasses.replace(EXACT, layers=tuple(heads[:2] for heads in EXACT.layers)))


def test_layers_may_differ_in_their_heads():
    config = transformers.LagunaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_attention_heads_per_layer=[4, 2], layer_types=["full_attention"] * 2,
        mlp_layer_types=["dense"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    with quiet():
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    before = logits(model, [IDS])
    fast.use_plan(model, plan_of(((head("exact-sdpa"),) * 4, (head("mean"),) * 2)))
    assert not torch.allclose(logits(model, [IDS]), before, atol=1e-4)
    fast.use_plan(model, plan_of(((head("exact-sdpa"),) * 4, (head("exact-sdpa"),) * 2)))
    assert torch.allclose(logits(model, [IDS]), before, atol=1e-4)
    with pytest.raises(InputError, match=r"2 layers of 4 heads, but the model has 2 layers of \[4, 2\]"):
        fast.use_plan(model, EXACT)
    vars(model.config)["num_attention_heads_per_layer"] = [4, None]
    with pytest.raises(InputError, match=r"the model has 2 layers of \[4, 0\]"):
        fast.use_plan(model, EXACT)


def test_a_hybrid_has_heads_in_its_layers_of_softmax_attention(tmp_path, monkeypatch):
    config = transformers.Qwen3_5TextConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    with quiet():
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model.save_pretrained(tmp_path)
    causal = CausalModel.load(ModelLocation(tmp_path))
    assert (causal.n_layers, causal.attending) == (4, [3])
    assert parse_layers("all", causal.n_layers, causal.attending) == [3]
    monkeypatch.setattr(planning, "METHODS", ())
    plan = make_plan(causal, IDS[:40], 0.1, lambda line: None)
    assert [len(heads) for heads in plan.layers] == [0, 0, 0, 4]
    write_plan(tmp_path / "plan.json", plan, {})
    before = logits(model, [IDS])
    fast.use_plan(model, tmp_path / "plan.json")
    assert torch.allclose(logits(model, [IDS]), before, atol=1e-3)
    fast.use_plan(model, dataclasses.replace(plan, layers=((), (), (), (head("mean"),) * 4)))
    assert not torch.allclose(logits(model, [IDS]), before, atol=1e-3)
    with pytest.raises(InputError, match=r"1 layers of 4 heads, but the model has 4 layers of \[0, 0, 0, 4\]"):
        fast.use_plan(model, dataclasses.replace(plan, layers=plan.layers[3:]))
    with pytest.raises(InputError, match="the plan has no heads in layer 0"):
        plan.of_layer(0)
    with pytest.raises(CaptureError, match=r"1 of 2 layers handed their attention over: choose among \[3\]"):
        causal.perplexity(IDS[:40], Replacement(get("mean"), {}, [2, 3], 0))


def test_a_language_model_without_softmax_attention_has_no_perplexity_of_methods(tmp_path):
    config = transformers.Lfm2Config(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2,
        num_key_value_heads=2, layer_types=["conv"] * 2,
    )  # fmt: skip
    with quiet():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(CaptureError, match="Lfm2ForCausalLM has no layers of softmax attention"):
        CausalModel.load(ModelLocation(tmp_path))


def test_a_model_that_caps_its_logits_takes_no_plan():
    config = transformers.Gemma2Config(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    with pytest.raises(CaptureError, match="Gemma2ForCausalLM does not let its attention be replaced"):
        fast.use_plan(transformers.AutoModelForCausalLM.from_config(config), EXACT)


def test_a_model_without_heads_takes_no_plan():
    config = transformers.MambaConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(CaptureError, match="MambaForCausalLM does not let its attention be replaced"):
        fast.use_plan(transformers.AutoModelForCausalLM.from_config(config), EXACT)


def test_a_model_that_chooses_its_keys_takes_no_plan():
    name, settings = REFUSED["DeepSeek-V3.2"]
    config = getattr(transformers, name)(**settings | {"num_hidden_layers": 2, "vocab_size": 90})
    with pytest.raises(CaptureError, match="DeepseekV32ForCausalLM chooses keys for each query"):
        fast.use_plan(transformers.AutoModelForCausalLM.from_config(config), EXACT)


def test_weights_are_the_same_to_a_plan_wherever_they_were_fetched(location, tmp_path):
    def identity(name):
        def fill(folder):
            shutil.copytree(location.folder, folder, dirs_exist_ok=True, copy_function=shutil.copy)
            return {}

        return CausalModel.load(complete(tmp_path / name, "path:x", {}, fill)).identity()

    assert identity("a") == identity("b") == CausalModel.load(location).identity()
    # Trained further where it lies, it is a folder as any other.
    weights = tmp_path / "a" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert CausalModel.load(ModelLocation(weights.parent)).identity() != identity("b")


def test_a_folder_that_is_copied_has_the_same_weights_to_a_plan(location, tmp_path):
    def identity(name):
        return CausalModel.load(ModelLocation(tmp_path / name)).identity()

    for name in "ab":
        shutil.copytree(location.folder, tmp_path / name, copy_function=shutil.copy)
    (tmp_path / "a" / "notes.txt").write_text("no part of the model")
    # As the hub's cache has its files
    (tmp_path / "links").mkdir()
    for path in location.folder.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    found = CausalModel.load(location).identity()
    assert [identity(name) for name in ("a", "b", "links")] == [found] * 3
    # What is beyond the first MiB counts as well.
    weights = tmp_path / "a" / "model.safetensors"
    about, data = weights.stat(), weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert len({found, identity("a"), identity("b"), CausalModel.load(location, dtype="bfloat16").identity()}) == 4
