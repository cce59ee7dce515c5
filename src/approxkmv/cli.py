"""The command line: every step of the pipeline as a command, without Snakemake."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from approxkmv.config import Study

app = typer.Typer(
    name="approxkmv",
    help=(
        "Is a model's attention sparse, head by head and length by length?\n\n"
        "A study goes through fetch, texts, extract, statistics, summary, growth, compare, figure; long texts through "
        "lengths and length-scaling; attention methods through model-heads and sweep, and perplexity. Snakemake runs "
        "them all; each can be run alone. Every command reads config.yaml (--config) and works on the study that it "
        "names (or --study). A user's mistake is one line and exit code 2."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

config_app = typer.Typer(help="The configuration itself: check it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")

Config = Annotated[Path, typer.Option("--config", help="The configuration file.")]
StudyName = Annotated[str | None, typer.Option("--study", help="A study of the configuration; its `study` by default.")]
Log = Annotated[Path | None, typer.Option("--log", help="Write the finished steps with their times here as well.")]
Model = Annotated[str, typer.Option("--model", help="A model of the study, by its name in the catalogue.")]
CONFIG = Path("config.yaml")


def _study(config: Path, study: str | None) -> Study:
    from approxkmv.config import load_config, study_of

    return study_of(load_config(config), study)


@app.command()
def fetch(
    model: Annotated[str, typer.Option("--model", help="A model of the catalogue.")],
    out: Annotated[Path, typer.Option("--out", help="JSON file to write: where the model lies.")],
    config: Config = CONFIG,
    log: Log = None,
) -> None:
    """Download a model (or find it on disk), check its hashes, unpack it into the cache."""
    from approxkmv.config import load_config, model_of
    from approxkmv.progress import log_to, step
    from approxkmv.steps.fetch import fetch_model

    log_to(log)
    checked = load_config(config)
    with step(f"fetch      {model}"):
        fetch_model(model_of(checked, model), Path(checked["cache"]), out)


@app.command()
def texts(
    out: Annotated[Path, typer.Option("--out", help="Parquet file to write: index, name, text.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Read the corpus, cut it into the study's unit of text, and draw the study's texts."""
    from approxkmv.config import corpus_of
    from approxkmv.progress import log_to, step
    from approxkmv.steps.texts import write_texts

    log_to(log)
    chosen = _study(config, study)
    with step(f"texts      {corpus_of(chosen).name}") as notes:
        count = write_texts(chosen, out)
        all_of_them = chosen.contexts is not None and count < chosen.contexts
        notes.append(f"{count} texts" + (f", all there are: {chosen.contexts} were asked for" if all_of_them else ""))


@app.command()
def extract(
    model: Model,
    location: Annotated[Path, typer.Option("--location", help="JSON file of `approxkmv fetch`.")],
    texts: Annotated[Path, typer.Option("--texts", help="Parquet file of `approxkmv texts`.")],
    shard: Annotated[int, typer.Option("--shard", min=0, help="Which part of the texts, counting from 0.")],
    out: Annotated[Path, typer.Option("--out", help="safetensors file to write: queries and keys.")],
    contexts_out: Annotated[Path, typer.Option("--contexts-out", help="CSV file to write: what became of each text.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Run a shard of the texts through a model and keep the queries and keys of every layer and head."""
    from approxkmv.config import entry_of
    from approxkmv.progress import Times, log_to, step

    log_to(log)
    chosen = _study(config, study)
    entry_of(chosen, model)
    with step(f"extract    {model}, shard {shard}") as notes:
        from approxkmv.steps.extract import extract as run

        times = Times()
        used, skipped, cut = run(chosen, model, location, texts, shard, out, contexts_out, times)
        short = f", {skipped} too short" if skipped else ""
        notes.append(f"{used} texts{short}" + (f", {cut} cut at the limit of tokens" if cut else ""))
        notes.append(f"({times})")


@app.command()
def statistics(
    model: Model,
    activations: Annotated[Path, typer.Option("--activations", help="safetensors file of `approxkmv extract`.")],
    heads_out: Annotated[Path, typer.Option("--heads-out", help="Parquet file to write: per text, layer and head.")],
    prefixes_out: Annotated[Path, typer.Option("--prefixes-out", help="Parquet file to write: c at given prefixes.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Experiments (i) and (ii) on the queries and keys of a shard."""
    from approxkmv.progress import Times, log_to, step

    log_to(log)
    chosen = _study(config, study)
    with step(f"statistics {model}, {activations.stem}") as notes:
        from approxkmv.steps.statistics import measure

        times = Times()
        heads = measure(model, activations, chosen.min_prefix, chosen.prefixes, heads_out, prefixes_out, times)
        notes.append(f"{heads} kernels")
        notes.append(f"({times})")


@app.command()
def summary(
    model: Model,
    statistics: Annotated[Path, typer.Option("--statistics", help="Folder of the shards' Parquet and CSV files.")],
    texts: Annotated[Path, typer.Option("--texts", help="Parquet file of `approxkmv texts`; says how many shards.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the model's tables.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Bring a model's shards together: per-head table, scaling with length, overview."""
    from approxkmv.config import entry_of
    from approxkmv.progress import log_to, step

    log_to(log)
    chosen = _study(config, study)
    entry = entry_of(chosen, model)
    with step(f"summary    {model}") as notes:
        from approxkmv.provenance import describe
        from approxkmv.steps.summary import summarise

        facts = summarise(chosen, entry, texts, statistics, out, describe())
        notes.append(f"largest c {facts['largest_ratio']:.2f}")


@app.command()
def growth(
    model: Model,
    statistics: Annotated[Path, typer.Option("--statistics", help="Folder of the shards' Parquet and CSV files.")],
    texts: Annotated[Path, typer.Option("--texts", help="Parquet file of `approxkmv texts`; says how many shards.")],
    tables: Annotated[Path, typer.Option("--tables", help="Folder of the model's tables; two more are written here.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """How fast c grows with the length, head by head: exponent, interval, verdict."""
    from approxkmv.config import entry_of
    from approxkmv.progress import log_to, step

    log_to(log)
    chosen = _study(config, study)
    entry_of(chosen, model)
    with step(f"growth     {model}") as notes:
        from approxkmv.steps.growth import measure_growth

        counts = measure_growth(chosen, model, texts, statistics, tables)["verdict"].value_counts()
        notes.append(", ".join(f"{count} {word}" for word, count in counts.items()))


@app.command()
def lengths(
    model: Model,
    activations: Annotated[Path, typer.Option("--activations", help="safetensors file of `approxkmv extract`.")],
    contexts: Annotated[Path, typer.Option("--contexts", help="CSV file of `approxkmv extract`.")],
    out: Annotated[Path, typer.Option("--out", help="Parquet file to write: per text, layer, head and length.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Long texts: c, order ratios and keys per row at the study's lengths, on the queries and keys of a shard."""
    from approxkmv.progress import LOG, Times, log_to, step

    log_to(log)
    chosen = _study(config, study)
    with step(f"lengths    {model}, {activations.stem}") as notes:
        from approxkmv.steps.lengths import measure_lengths

        times = Times()
        missing = measure_lengths(chosen, model, activations, contexts, out, times)
        notes.append(f"({chosen.device}: {times})")
        if missing:
            notes.append("lengths left out")
    for line in missing:
        LOG.info("  %s", line)


@app.command("length-scaling")
def length_scaling(
    model: Model,
    statistics: Annotated[Path, typer.Option("--statistics", help="Folder of the shards' Parquet and CSV files.")],
    texts: Annotated[Path, typer.Option("--texts", help="Parquet file of `approxkmv texts`; says how many shards.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the model's tables.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Bring a model's long texts together: per layer, head and length."""
    from approxkmv.config import entry_of
    from approxkmv.progress import log_to, step

    log_to(log)
    chosen = _study(config, study)
    entry = entry_of(chosen, model)
    with step(f"lengths    {model}, summary") as notes:
        from approxkmv.provenance import describe
        from approxkmv.steps.lengths import summarise_lengths

        facts = summarise_lengths(chosen, entry, texts, statistics, out, describe())
        notes.append(f"n = {facts['lengths'][0]:,} to {facts['lengths'][-1]:,}")


@app.command()
def compare(
    tables: Annotated[Path, typer.Option("--tables", help="Folder of the models' tables.")],
    out: Annotated[Path, typer.Option("--out", help="CSV file to write.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """The paper's claims beside what was measured: claim, criterion, paper, model, ours, holds."""
    from approxkmv.progress import log_to, step

    log_to(log)
    chosen = _study(config, study)
    with step("compare    the paper's claims"):
        from approxkmv.steps.compare import compare as run

        run(tables, list(chosen.models), out)


@app.command()
def figure(
    name: Annotated[str, typer.Argument(help="A figure of the catalogue, as max_ratios or context_scaling.")],
    tables: Annotated[Path, typer.Option("--tables", help="Folder of the models' tables.")],
    stem: Annotated[Path, typer.Option("--out", help="Where to write, without a suffix: makes OUT.pdf and OUT.png.")],
    models: Annotated[
        list[str] | None, typer.Option("--model", help="A model; give several for context_scaling.")
    ] = None,
    log: Log = None,
) -> None:
    """Draw one figure from tables alone."""
    from approxkmv.figures.catalogue import draw
    from approxkmv.progress import log_to, step

    log_to(log)
    with step(f"figure     {stem.name}"):
        draw(name, tables, models or [], stem)


@app.command()
def complexity(
    counts_out: Annotated[Path, typer.Option("--counts-out", help="CSV file to write: evaluations at each n.")],
    fits_out: Annotated[Path, typer.Option("--fits-out", help="CSV file to write: exponents and crossings.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Count what ApproxKMV with its printed constants costs against n, and fit exponents."""
    from approxkmv.progress import log_to, step

    log_to(log)
    chosen = _study(config, study)
    with step("complexity of ApproxKMV as printed"):
        from approxkmv.provenance import describe
        from approxkmv.steps.complexity import count

        count(chosen, counts_out, fits_out, describe())


@app.command("model-heads")
def model_heads(
    location: Annotated[Path, typer.Option("--location", help="JSON file of `approxkmv fetch`.")],
    out: Annotated[Path, typer.Option("--out", help="safetensors file to write: q, k, v of the chosen heads.")],
    tuning_out: Annotated[Path, typer.Option("--tuning-out", help="The same on a second text, for tuning.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Capture the heads that the study's sweep takes as its workload model-qk."""
    from approxkmv.config import corpus_entry, load_config
    from approxkmv.errors import ConfigError
    from approxkmv.progress import log_to, step

    log_to(log)
    chosen = _study(config, study)
    if chosen.sweep is None or chosen.sweep["capture"] is None:
        raise ConfigError(f"study {chosen.name} has no sweep that captures heads")
    captured = chosen.sweep["capture"]
    with step(f"heads      {captured['model']}, {captured['tokens']} tokens"):
        from approxkmv.steps.fetch import read_location
        from approxkmv.steps.model_heads import capture_heads

        heads = [(layer, head) for layer, head in captured["heads"]]
        corpus = corpus_entry(load_config(config), captured["corpus"])
        capture_heads(read_location(location), corpus, captured["tokens"], heads, out, tuning_out)


@app.command()
def sweep(
    out: Annotated[Path, typer.Option("--out", help="CSV file to write; its record is written beside it as JSON.")],
    capture: Annotated[Path | None, typer.Option("--capture", help="Heads of a model, for model-qk.")] = None,
    tuning_capture: Annotated[Path | None, typer.Option("--tuning-capture", help="The same, for tuning.")] = None,
    settings: Annotated[
        Path | None,
        typer.Option("--settings", help="A JSON file with one sweep, in place of --config."),
    ] = None,
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Time attention methods against exact attention at equal error."""
    from approxkmv.progress import LOG, log_to, step

    log_to(log)
    if settings is not None:
        from approxkmv.sweep.settings_file import read_settings

        chosen = read_settings(settings, out)
    else:
        from approxkmv.config import load_config, sweep_settings
        from approxkmv.errors import ConfigError

        asked = _study(config, study)
        if asked.sweep is None:
            raise ConfigError(f"study {asked.name} has no sweep: name one of the configuration's sweeps in it")
        captures = [str(path) if path else None for path in (capture, tuning_capture)]
        chosen = replace(sweep_settings(asked.sweep, *captures), cache=load_config(config)["cache"])
    with step(f"sweep      {out.stem}"):
        from approxkmv.provenance import describe
        from approxkmv.sweep import run_sweep

        run_sweep(chosen, out, describe(), say=lambda line: LOG.info("  %s", line))


@app.command()
def perplexity(
    out: Annotated[
        Path, typer.Option("--out", "--output", help="CSV file to write; its record is written beside it as JSON.")
    ],
    method: Annotated[
        str | None,
        typer.Option("--method", help="The attention method, one with a causal form; without it, those of the study."),
    ] = None,
    model: Annotated[str, typer.Option("--model", help="With --method: a model of the catalogue.")] = "smollm2-135m",
    corpus: Annotated[str, typer.Option("--corpus", help="With --method: a corpus.")] = "moby-dick",
    tokens: Annotated[
        str, typer.Option("--tokens", help="With --method: lengths of the text, separated by commas.")
    ] = "1024,2048,4096",
    layers: Annotated[
        str, typer.Option("--layers", help="With --method: layers to replace, all or as 0,5-9, counted from 0.")
    ] = "all",
    parameters: Annotated[
        str, typer.Option("--parameters", help="With --method: its parameters, a JSON object; the rest are defaults.")
    ] = "{}",
    seed: Annotated[int, typer.Option("--seed", min=0, help="With --method: its seed.")] = 0,
    location: Annotated[
        Path | None, typer.Option("--location", help="JSON file of `approxkmv fetch`; without it the model is fetched.")
    ] = None,
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Perplexity of a causal language model with a method in place of its attention, beside the exact one."""
    from approxkmv.config import corpus_entry, load_config, model_of
    from approxkmv.errors import ConfigError
    from approxkmv.files import check_writable
    from approxkmv.progress import LOG, log_to, step

    log_to(log)
    checked = load_config(config)
    if method is not None:
        from approxkmv.perplexity.settings import from_options

        settings = from_options(
            model=model,
            corpus=corpus,
            tokens=tokens,
            layers=layers,
            method=method,
            parameters=parameters,
            seed=seed,
        )
    else:
        asked = _study(config, study)
        if asked.perplexity is None:
            raise ConfigError(f"study {asked.name} has no perplexity: give --method, or name methods in the study")
        settings = dict(asked.perplexity)
    entry, chosen = model_of(checked, settings["model"]), corpus_entry(checked, settings["corpus"])
    check_writable(out, out.with_suffix(".json"))
    with step(f"perplexity {entry.name}"):
        from approxkmv.models import fetch as find
        from approxkmv.models import parse_source
        from approxkmv.perplexity.model import CausalModel
        from approxkmv.perplexity.settings import chosen_methods
        from approxkmv.provenance import describe
        from approxkmv.steps.fetch import read_location
        from approxkmv.steps.perplexity import measure_perplexity

        methods = chosen_methods(settings["methods"])
        if location is not None:
            found = read_location(location)
        else:
            cache = Path(checked["cache"]) / "models" / entry.name
            found = find(parse_source(entry.source), cache, sha256=entry.sha256, files=dict(entry.files))
        measure_perplexity(
            CausalModel.load(found, dtype=settings["dtype"], device=settings["device"]),
            entry.name,
            chosen,
            tokens=settings["tokens"],
            methods=methods,
            layers=settings["layers"],
            seed=settings["seed"],
            out=out,
            record=describe(settings),
            say=lambda line: LOG.info("  %s", line),
            require_all=method is not None,
        )


@app.command()
def show(
    results: Annotated[Path, typer.Argument(help="Folder of a study, as results/embedded.")],
) -> None:
    """Say where a study's figures are, and the few numbers that matter."""
    from approxkmv.steps.show import lines

    for line in lines(results):
        typer.echo(line)


@app.command()
def clean(
    results: Annotated[Path, typer.Argument(help="Folder of a study, as results/embedded.")],
) -> None:
    """Remove what a study's folder still holds of models, shards and parts that the study no longer has."""
    from approxkmv.steps.cleaning import remove_leftovers

    for path in remove_leftovers(results):
        typer.echo(f"removed {path}")


@config_app.command("check")
def check(config: Config = CONFIG, study: StudyName = None) -> None:
    """Check all that can be known of a study before its first job, and say what it would do. Nothing is fetched."""
    from approxkmv.config import load_config, study_of
    from approxkmv.steps.checking import check_study

    loaded = load_config(config)
    for line in check_study(loaded, study_of(loaded, study)):
        typer.echo(line)


# The list of commands shows first lines whole; left alone it cuts them after 45 characters.
for _command in (*app.registered_commands, *config_app.registered_commands):
    _command.short_help = (getattr(_command.callback, "__doc__", None) or "").strip().split("\n")[0]


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr (and in the log) and exit code 2."""
    try:
        app()
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except Exception as error:
        from approxkmv.progress import reason_of

        reason = reason_of(error)
        if reason is None:
            raise
        _fail(reason, 2)


def _fail(message: str, code: int) -> None:
    from approxkmv.progress import LOG

    line = f"approxkmv: {' '.join(message.split())}"
    if LOG.handlers:
        LOG.error("%s", line)
    else:
        print(line, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
