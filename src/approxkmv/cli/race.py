"""The commands for attention methods: a sweep and the heads it needs, and perplexity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from approxkmv.cli.app import CONFIG, Config, Log, StudyName, app, asked, refuse_given, to_write
from approxkmv.config import Configuration, Perplexity, PlanKeys, Study, corpus_entry, load_config, model_of, read_as
from approxkmv.errors import ConfigError
from approxkmv.files import check_writable
from approxkmv.progress import LOG, log_to, step
from approxkmv.words import counted

if TYPE_CHECKING:
    from approxkmv.perplexity.model import CausalModel

DEFAULTS = {name: key.default for name, key in Perplexity.model_fields.items()}
PLAN = {name: key.default for name, key in PlanKeys.model_fields.items()}
Location = Annotated[
    Path | None,
    typer.Option("--location", help="JSON file from `approxkmv fetch`; without it the model is fetched."),
]


@app.command("model-heads")
def model_heads(
    location: Annotated[Path, typer.Option("--location", help="JSON file from `approxkmv fetch`.")],
    out: Annotated[Path, to_write("--out", help="safetensors file to write: q, k, v of the chosen heads.")],
    tuning_out: Annotated[
        Path, to_write("--tuning-out", help="File to write: the same from another text, for tuning.")
    ],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Capture the model heads that the study's sweep uses as its workload model-qk.

    Example: approxkmv model-heads --study rows --location smollm2.json --out heads.safetensors --tuning-out
    heads_tuning.safetensors
    """
    chosen = asked(config, study, log)
    captured = chosen.capture
    if captured is None:
        raise ConfigError(f"study {chosen.name} has no sweep that captures heads")
    with step(f"heads      {captured.model}, {captured.tokens} tokens"):
        from approxkmv.results.locations import read_location
        from approxkmv.steps.model_heads import capture_heads

        catalogue = load_config(config)
        corpora = [corpus_entry(catalogue, name) for name in captured.corpora]
        scaling = dict(chosen.rotary_scaling) if chosen.rotary_scaling else None
        texts = list(zip(corpora, (out, tuning_out), strict=True))
        place = read_location(location, captured.model)
        capture_heads(captured.model, place, texts, captured.tokens, captured.heads, scaling)


@app.command()
def sweep(
    context: typer.Context,
    out: Annotated[Path, to_write("--out", help="CSV file to write; a JSON record is written next to it.")],
    capture: Annotated[Path | None, typer.Option("--capture", help="Captured heads of a model, for model-qk.")] = None,
    tuning_capture: Annotated[Path | None, typer.Option("--tuning-capture", help="The same, for tuning.")] = None,
    settings: Annotated[
        Path | None,
        typer.Option("--settings", help="A JSON file with one sweep, instead of --config."),
    ] = None,
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Time attention methods against exact attention at equal error.

    Example: approxkmv sweep --study embedded --out sweep.csv
    """
    log_to(log)
    beside: dict[str, Any] = {}
    if settings is not None:
        from approxkmv.sweep.settings_file import read_settings

        given = ("capture", "tuning_capture", "study", "config")
        refuse_given(context, given, "goes with a configuration, not with --settings")
        chosen = read_settings(settings, out)
    else:
        named = asked(config, study, log)
        if named.sweep is None:
            raise ConfigError(f"study {named.name} has no sweep: add one of the configuration's sweeps to it")
        captures = [str(path) if path else None for path in (capture, tuning_capture)]
        if named.capture is not None:
            from approxkmv.sweep.workloads import check_capture

            for path in filter(None, captures):
                check_capture(path, named.capture)
            # What a sweep's own settings do not say of its heads
            beside = named.model_dump(mode="json", include={"rotary_scaling"})
        else:
            refuse_given(context, ("capture", "tuning_capture"), "goes with a sweep that captures heads")
        chosen = named.sweep.with_capture(*captures)
        chosen = replace(chosen, cache=chosen.cache or load_config(config).cache)
    with step(f"sweep      {out.stem}"):
        from approxkmv.provenance import describe
        from approxkmv.sweep import run_sweep

        run_sweep(chosen, out, describe(beside), say=lambda line: LOG.info("  %s", line))


@app.command()
def plan(
    context: typer.Context,
    out: Annotated[Path, to_write("--out", help="JSON file to write.")],
    model: Annotated[str | None, typer.Option("--model", help="A model; without it, the study's perplexity.")] = None,
    target: Annotated[
        float, typer.Option("--target", help="With --model: the largest error of a head, relative to its answer.")
    ] = PLAN["target"],
    tokens: Annotated[int, typer.Option("--tokens", help="With --model: length of the calibration text.")] = PLAN[
        "tokens"
    ],
    corpus: Annotated[str, typer.Option("--corpus", help="With --model: the corpus of that text.")] = "moby-dick",
    location: Location = None,
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Measure, head by head, which attention method is fastest within an error: exact attention where none is.

    Example: approxkmv plan --model smollm2-135m --target 0.05 --out plan.json
    """
    log_to(log)
    checked = load_config(config)
    if model is not None:
        refuse_given(context, ["study"], "goes without --model")
        given = {"plan": {"target": target, "tokens": tokens}, "methods": {"exact-sdpa": [{}]}}
        settings = read_as(Perplexity, given | {"model": model, "corpus": corpus}, "options")
    else:
        settings = _perplexity_of(asked(config, study, log), "--model")
        refuse_given(context, ("target", "tokens", "corpus"), "goes with --model: the study has its own")
    if settings.plan is None:
        raise ConfigError("the study's perplexity has no plan: give --model, or add plan: {} to it")
    chosen = corpus_entry(checked, settings.corpus)
    with step(f"plan       {settings.model}"):
        from approxkmv.corpora import read_corpus
        from approxkmv.perplexity.plan import write_plan
        from approxkmv.perplexity.planning import make_plan
        from approxkmv.provenance import describe

        documents = [document.context for document in reversed(read_corpus(chosen.source, chosen.sha256))]
        causal = _causal_model(checked, settings, location)
        ids = causal.tokens(documents, settings.plan.tokens)
        made = make_plan(causal, ids, settings.plan.target, lambda line: LOG.info("  %s", line))
        write_plan(out, made, describe(settings.model_dump()))
        for name, heads in made.heads_by_method().items():
            LOG.info("  %s: %s", name, counted(heads, "head"))


def _perplexity_of(study: Study, option: str) -> Perplexity:
    if study.perplexity is None:
        raise ConfigError(f"study {study.name} has no perplexity: give {option}, or name methods in the study")
    return study.perplexity


def _causal_model(config: Configuration, settings: Perplexity, location: Path | None) -> CausalModel:
    """The model, fetched unless its location is given."""
    from approxkmv.models import fetch as find
    from approxkmv.models import parse_source
    from approxkmv.perplexity.model import CausalModel
    from approxkmv.results.locations import read_location

    entry = model_of(config, settings.model)
    if location is not None:
        found = read_location(location, entry.name)
    else:
        cache = Path(config.cache) / "models" / entry.name
        found = find(parse_source(entry.source), cache, sha256=entry.sha256, files=dict(entry.files))
    return CausalModel.load(found, dtype=settings.dtype, device=settings.device)


@app.command()
def perplexity(  # noqa: PLR0913 - one argument for each option of the command line
    context: typer.Context,
    out: Annotated[Path, to_write("--out", "--output", help="CSV file to write; a JSON record is written next to it.")],
    method: Annotated[
        str | None,
        typer.Option("--method", help="An attention method with a causal form; without it, the study's methods."),
    ] = None,
    model: Annotated[str, typer.Option("--model", help="With --method: the model.")] = "smollm2-135m",
    corpus: Annotated[str, typer.Option("--corpus", help="With --method: the corpus.")] = "moby-dick",
    tokens: Annotated[
        str, typer.Option("--tokens", help="With --method: text lengths in tokens, separated by commas.")
    ] = ",".join(map(str, DEFAULTS["tokens"])),
    layers: Annotated[
        str,
        typer.Option("--layers", help="With --method: layers to replace, counted from 0: all, or e.g. 0,5-9."),
    ] = DEFAULTS["layers"],
    parameters: Annotated[
        str, typer.Option("--parameters", help="With --method: its parameters as a JSON object; defaults for the rest.")
    ] = "{}",
    seed: Annotated[int, typer.Option("--seed", help="With --method: its seed.")] = DEFAULTS["seed"],
    plan: Annotated[
        Path | None, typer.Option("--plan", help="A file from `approxkmv plan`, run beside the methods.")
    ] = None,
    location: Location = None,
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Measure the perplexity of a causal language model with a method in place of its exact attention, and without.

    Example: approxkmv perplexity --method approxkmv --out perplexity.csv
    """
    log_to(log)
    checked = load_config(config)
    study_keys = None if method is not None else asked(config, study, log).perplexity
    if method is not None or (plan is not None and study_keys is None):
        from approxkmv.perplexity.settings import from_options

        given = from_options(tokens, method or "exact-sdpa", parameters)
        refuse_given(context, ["study"], "goes with a study that has perplexity, and without --method")
        if method is None:
            refuse_given(context, ["parameters"], "goes with --method")
            given["methods"] = {name: [{}] for name in ("exact-sdpa", "exact-sdpa-bf16", "exact-tiles-bf16")}
        options = {"model": model, "corpus": corpus, "layers": layers, "seed": seed}
        settings = read_as(Perplexity, options | given, "options")
    else:
        settings = _perplexity_of(asked(config, study, log), "--method")
        names = ("model", "corpus", "tokens", "layers", "parameters", "seed")
        refuse_given(context, names, "goes with --method: the study has its own")
    entry, chosen = model_of(checked, settings.model), corpus_entry(checked, settings.corpus)
    check_writable(out, out.with_suffix(".json"), inputs=(plan, location))
    with step(f"perplexity {entry.name}"):
        from approxkmv.perplexity.plan import read_plan
        from approxkmv.provenance import describe
        from approxkmv.steps.perplexity import measure_perplexity

        measure_perplexity(
            _causal_model(checked, settings, location),
            entry.name,
            chosen,
            settings,
            plan=read_plan(plan) if plan else None,
            out=out,
            record=describe(settings.model_dump()),
            say=lambda line: LOG.info("  %s", line),
            require_all=method is not None,
        )


@app.command()
def operator(
    out: Annotated[Path, to_write("--out", help="CSV file to write: errors and times.")],
    config: Config = CONFIG,
    study: StudyName = None,
    log: Log = None,
) -> None:
    """Time products of KernelOperator on word vectors beside exact products.

    Example: approxkmv operator --study operator --out operator.csv
    """
    chosen = asked(config, study, log)
    with step("operator   kernel products"):
        from approxkmv.provenance import describe
        from approxkmv.steps.operator import write

        write(chosen, Path(load_config(config).cache), out, describe())
