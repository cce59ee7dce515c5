"""The commands of a study, from a model and texts to tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from approxkmv.cli.app import CONFIG, Config, Log, Model, StudyName, app, asked, of_a_file, to_write
from approxkmv.config import corpus_of, entry_of, load_config, model_of
from approxkmv.progress import LOG, Times, log_to, step
from approxkmv.words import counted

Shards = Annotated[Path, typer.Option("--statistics", help="Folder with the shards' Parquet and CSV files.")]
Texts = Annotated[Path, typer.Option("--texts", help="Parquet file from `approxkmv texts`.")]
Activations = Annotated[Path, typer.Option("--activations", help="safetensors file from `approxkmv extract`.")]
Location = Annotated[Path, typer.Option("--location", help="JSON file from `approxkmv fetch`.")]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder for the model's tables.")]
Tables = Annotated[Path, typer.Option("--tables", help="Folder of the models' tables.")]


@app.command()
def fetch(
    model: Annotated[str, typer.Option("--model", help="A model in the configuration.")],
    out: Annotated[Path, to_write("--out", help="JSON file to write: where the model is.")],
    config: Config = CONFIG,
    log: Log = None,
) -> None:
    """Download a model (or find it on disk), check its hashes and unpack it into the cache.

    Example: approxkmv fetch --model minilm-l6 --out minilm.json
    """
    from approxkmv.steps.fetch import fetch_model

    log_to(log)
    checked = load_config(config)
    with step(f"fetch      {model}"):
        fetch_model(model_of(checked, model), Path(checked.cache), out)


@app.command()
def texts(
    out: Annotated[Path, to_write("--out", help="Parquet file to write: index, name, text.")],
    location: Annotated[
        list[Path] | None,
        typer.Option("--location", help="Files from `approxkmv fetch`, of each model in order, for windows."),
    ] = None,
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Read the corpus, split it into texts and draw the study's sample.

    Example: approxkmv texts --study embedded --out texts.parquet
    """
    from approxkmv.steps.texts import write_texts

    chosen = asked(config, study, log)
    with step(f"texts      {corpus_of(chosen).name}") as notes:
        count = write_texts(chosen, out, location or [])
        all_of_them = chosen.contexts is not None and count < chosen.contexts
        notes.append(
            counted(count, "text") + (f" (all there are; {chosen.contexts} were asked for)" if all_of_them else "")
        )


@app.command()
def extract(
    model: Model,
    location: Location,
    texts: Texts,
    shard: Annotated[int, typer.Option("--shard", min=0, help="Which shard of the texts, counted from 0.")],
    out: Annotated[Path, to_write("--out", help="safetensors file to write: queries and keys.")],
    contexts_out: Annotated[Path, to_write("--contexts-out", help="CSV file to write: how each text was used.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Run a model on a shard of texts and save the queries and keys of every layer and head.

    Example: approxkmv extract --model minilm-l6 --location minilm.json --texts texts.parquet --shard 0 --out
    qk.safetensors --contexts-out statistics/0000.contexts.csv
    """
    chosen = asked(config, study, log)
    entry_of(chosen, model)
    with step(f"extract    {model}, shard {shard}") as notes:
        from approxkmv.steps.extract import extract as run

        times = Times()
        used, skipped, cut = run(chosen, model, location, texts, shard, out, contexts_out, times)
        short = f", {skipped} too short" if skipped else ""
        notes.append(counted(used, "text") + short + (f", {cut} truncated at max_tokens" if cut else ""))
        notes.append(f"({times})")


@app.command()
def statistics(
    model: Model,
    activations: Activations,
    heads_out: Annotated[Path, to_write("--heads-out", help="Parquet file to write: per text, layer and head.")],
    prefixes_out: Annotated[Path, to_write("--prefixes-out", help="Parquet file to write: c at given prefixes.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Run Experiments (i) and (ii) on the queries and keys of a shard.

    Example: approxkmv statistics --model minilm-l6 --activations qk.safetensors --heads-out
    statistics/0000.heads.parquet --prefixes-out statistics/0000.prefixes.parquet
    """
    chosen = asked(config, study, log)
    with step(f"statistics {model}, {activations.stem}") as notes:
        from approxkmv.steps.statistics import measure

        times = Times()
        heads = measure(model, activations, chosen.min_prefix, chosen.prefixes, heads_out, prefixes_out, times)
        notes.append(f"{heads} kernels")
        notes.append(f"({times})")


@app.command()
def attention(
    model: Model,
    activations: Activations,
    out: Annotated[Path, to_write("--out", help="Parquet file to write: per text, layer and head.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Measure the softmax rows of a shard: entropy, support, masses, stable rank.

    Example: approxkmv attention --model minilm-l6 --activations qk.safetensors --out
    statistics/0000.attention.parquet
    """
    asked(config, study, log)
    with step(f"attention  {model}, {activations.stem}") as notes:
        from approxkmv.steps.attention import measure_attention

        times = Times()
        notes.append(f"{measure_attention(model, activations, out, times)} heads")
        notes.append(f"({times})")


@app.command("attention-table")
def attention_table(
    model: Model,
    statistics: Shards,
    texts: Texts,
    out: OutFolder,
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Merge a model's softmax statistics: per layer and head, over texts.

    Example: approxkmv attention-table --model minilm-l6 --statistics statistics --texts texts.parquet --out tables
    """
    chosen = asked(config, study, log)
    entry_of(chosen, model)
    with step(f"attention  {model}, table") as notes:
        from approxkmv.steps.attention_table import write_attention_table

        table = write_attention_table(chosen, model, texts, statistics, out)
        notes.append(f"median support {table['support'].median():.1f} keys")


@app.command()
def summary(
    model: Model,
    statistics: Shards,
    texts: Texts,
    out: OutFolder,
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Merge a model's shards: per-head table, scaling with length, overview.

    Example: approxkmv summary --model minilm-l6 --statistics statistics --texts texts.parquet --out tables
    """
    chosen = asked(config, study, log)
    entry = entry_of(chosen, model)
    with step(f"summary    {model}") as notes:
        from approxkmv.provenance import describe
        from approxkmv.steps.summary import summarise

        facts = summarise(chosen, entry, texts, statistics, out, describe(chosen.conditions))
        notes.append(f"largest c {facts['largest_ratio']:.2f}")


@app.command()
def readings(
    model: Model,
    activations: Activations,
    texts: Annotated[Path, typer.Option("--texts", help="Parquet file from `approxkmv texts`; gives their number.")],
    out: Annotated[Path, to_write("--out", help="Parquet file to write: per text, layer, head and reading.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Compute c and the order ratios under several readings of the definition, on some texts of a shard.

    Example: approxkmv readings --model minilm-l6 --activations qk.safetensors --texts texts.parquet --out
    0000.readings.parquet
    """
    chosen = asked(config, study, log)
    with step(f"readings   {model}, {activations.stem}") as notes:
        from approxkmv.steps.readings import measure_readings

        count, undefined = measure_readings(chosen, model, activations, texts, out)
        notes.append(f"{counted(count, 'text')}; in float32 {undefined} ratios are 0/0")


@app.command("readings-table")
def readings_table(
    model: Model,
    statistics: Shards,
    texts: Texts,
    out: OutFolder,
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Merge a model's readings: a row per reading.

    Example: approxkmv readings-table --model minilm-l6 --statistics statistics --texts texts.parquet --out tables
    """
    chosen = asked(config, study, log)
    entry = entry_of(chosen, model)
    with step(f"readings   {model}"):
        from approxkmv.steps.readings_table import summarise

        summarise(chosen, entry, texts, statistics, out)


@app.command()
def gauge(
    model: Model,
    location: Location,
    texts: Texts,
    tables: Annotated[Path, typer.Option("--tables", help="Folder of the model's tables; one more is written there.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Measure on one text how K changes with queries times t and keys over t, and what error in K attention tolerates.

    Example: approxkmv gauge --model minilm-l6 --location minilm.json --texts texts.parquet --tables tables
    """
    chosen = asked(config, study, log)
    entry_of(chosen, model)
    with step(f"gauge      {model}") as notes:
        from approxkmv.steps.gauge import measure_gauge

        table = measure_gauge(chosen, model, location, texts, tables)
        notes.append(f"{table['tokens'].iloc[0]} tokens")


@app.command()
def growth(
    model: Model,
    statistics: Shards,
    texts: Texts,
    tables: Annotated[Path, typer.Option("--tables", help="Folder of the model's tables; two more are written there.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Measure how large c is at the longest length and how it grows there, per head, with intervals over texts.

    Example: approxkmv growth --model minilm-l6 --statistics statistics --texts texts.parquet --tables tables
    """
    chosen = asked(config, study, log)
    entry_of(chosen, model)
    with step(f"growth     {model}") as notes:
        from approxkmv.statistics.growth import SIZES, TRENDS, in_words
        from approxkmv.steps.growth import measure_growth

        table = measure_growth(chosen, model, texts, statistics, tables)
        notes.append(f"n = {table['length'].iloc[0]:,}: {in_words(table['size'], SIZES)};")
        notes.append(in_words(table["trend"], TRENDS))


@app.command()
def lengths(
    model: Model,
    activations: Activations,
    contexts: Annotated[Path, typer.Option("--contexts", help="CSV file from `approxkmv extract`.")],
    out: Annotated[Path, to_write("--out", help="Parquet file to write: per text, layer, head and length.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Long texts: compute c, order ratios and keys per row at the study's lengths, on a shard.

    Example: approxkmv lengths --study lengths --model smollm2-135m --activations qk.safetensors --contexts
    statistics/0000.contexts.csv --out statistics/0000.lengths.parquet
    """
    chosen = asked(config, study, log)
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
    statistics: Shards,
    texts: Texts,
    out: OutFolder,
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Merge a model's long texts: per layer, head and length.

    Example: approxkmv length-scaling --study lengths --model smollm2-135m --statistics statistics --texts
    texts.parquet --out tables
    """
    chosen = asked(config, study, log)
    entry = entry_of(chosen, model)
    with step(f"lengths    {model}, summary") as notes:
        from approxkmv.provenance import describe
        from approxkmv.steps.length_scaling import summarise

        facts = summarise(chosen, entry, texts, statistics, out, describe(chosen.conditions))
        notes.append(f"n = {facts['lengths'][0]:,} to {facts['lengths'][-1]:,}")


@app.command()
def compare(
    tables: Tables,
    out: Annotated[Path, to_write("--out", help="CSV file to write.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Compare the paper's claims with the measurements: claim, criterion, paper, model, ours, holds.

    Example: approxkmv compare --tables tables --out tables/paper_comparison.csv
    """
    chosen = asked(config, study, log)
    with step("compare    the paper's claims"):
        from approxkmv.steps.compare import compare as run

        run(tables, list(chosen.models), out)


@app.command()
def figure(
    name: Annotated[str, typer.Argument(help="Name of a figure, such as max_ratios or context_scaling.")],
    tables: Tables,
    stem: Annotated[
        Path,
        typer.Option("--out", callback=of_a_file, help="Path without a suffix: OUT.pdf and OUT.png are written."),
    ],
    models: Annotated[
        list[str] | None, typer.Option("--model", help="A model; repeat the option for context_scaling.")
    ] = None,
    log: Log = None,
) -> None:
    """Draw one figure from tables.

    Example: approxkmv figure max_ratios --model minilm-l6 --tables results/reference/embedded/tables --out max_ratios
    """
    from approxkmv.figures.catalogue import draw

    log_to(log)
    with step(f"figure     {stem.name}"):
        draw(name, tables, models or [], stem)


@app.command()
def complexity(
    counts_out: Annotated[Path, to_write("--counts-out", help="CSV file to write: evaluations at each n.")],
    fits_out: Annotated[Path, to_write("--fits-out", help="CSV file to write: exponents and crossings.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Count the cost of ApproxKMV with its printed constants as n grows, and fit exponents.

    Example: approxkmv complexity --study complexity --counts-out complexity.csv --fits-out complexity_fits.csv
    """
    chosen = asked(config, study, log)
    with step("complexity of ApproxKMV as printed"):
        from approxkmv.provenance import describe
        from approxkmv.steps.complexity import count

        count(chosen, counts_out, fits_out, describe())
