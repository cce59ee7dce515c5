import os
import sys
from html import escape

# What all rules share: the configuration, the study, its folder, and the package files that decide a result.
from pathlib import Path

from snakemake.logging import logger

from approxkmv.config import (
    checked,
    corpus_entry,
    load_config,
    model_of,
    relocate,
    settings_file,
    study_of,
)
from approxkmv.errors import ConfigError
from approxkmv.imports import command_files
from approxkmv.lock import hold, try_lock
from approxkmv.models.sources import identity
from approxkmv.page.contents import CAPTIONS, FIGURES, PAGE_FILES
from approxkmv.progress import RunLog, one_line_errors
from approxkmv.steps.cleaning import (
    remove_activations,
    remove_damaged,
    remove_half_written,
)
from approxkmv.steps.devices import check_device
from approxkmv.steps.fetch import check_model
from approxkmv.results.shards import shard_count

# Cores of a step on texts, rounded up. Two run side by side: much of a step on short texts, as its start, takes one core.
HALF = ((workflow.cores or 1) + 1) // 2


def show_again():
    """The last words of a run of which nothing was left to do."""
    print(f"study {STUDY.name} is up to date", file=sys.stderr)
    if any(Path(RESULTS, "tables").glob("*.json")):
        shell(f"approxkmv show {RESULTS}")


# A person sees one line per finished step, from the step itself, and how many there are; Snakemake's own errors stay.
RUN_LOG = RunLog(show_again)
if not workflow.output_settings.dryrun:
    logger.addFilter(RUN_LOG)

# Snakemake itself keeps the last of two equal keys, and has another message and exit code for what is no YAML.
with one_line_errors():
    given = workflow.config_settings
    CONFIG = Path("config.yaml")
    required = {"models", "corpora", "studies"}
    if not CONFIG.exists() and not required <= given.overwrite_config.keys():
        # With --directory or in another folder: that of the checkout, of which --configfile may change a part.
        CONFIG = Path(
            workflow.current_basedir.join("../../config.yaml").get_path_or_uri(
                secret_free=True
            )
        )
    for file in [*given.configfiles, CONFIG]:
        if given.configfiles and not file.exists():
            continue
        try:
            load_config(file)
        except ConfigError as error:
            # What --config or --configfile add to may be a part of a configuration: the sum is checked below.
            if str(file) in str(error) or not given.overwrite_config:
                raise


configfile: str(CONFIG)


with one_line_errors():
    relocate(config, [CONFIG, *given.configfiles])
    STUDY = study_of(checked(config))
    RESULTS = f"results/{STUDY.name}"
    MODELS = list(STUDY.models)
    # The commands read the configuration as Snakemake sees it, with what --config and --configfile changed.
    SETTINGS = Path(RESULTS) / "config.yaml"
    LOCK = Path(".snakemake") / f"{STUDY.name}.lock"
    if not workflow.is_main_process:
        settings_file(checked(config), SETTINGS)
    # A dry run, a report or anything else that starts while the study runs changes nothing in its folder.
    elif not workflow.output_settings.dryrun and (lock := try_lock(LOCK)):
        settings_file(checked(config), SETTINGS)
        remove_half_written(Path(RESULTS))
        for line in remove_damaged(Path(RESULTS)):
            print(f"approxkmv: {line}", file=sys.stderr)
        # Taken again, and held, when jobs start.
        lock.close()


wildcard_constraints:
    model="[A-Za-z0-9][A-Za-z0-9.-]*",
    shard="[0-9]+",


def local_files(source):
    """The files of a source on this disk, so that an edit of one reruns what reads it."""
    kind, _, rest = source.partition(":")
    path = Path(os.path.expanduser(rest))
    if kind != "path" or not os.path.exists(path):
        return []
    files = (
        [path]
        if path.is_file()
        else [file for file in path.glob("*.*") if file.is_file()]
    )
    # Snakemake would take braces for wildcards; an edit of such a file changes the rule's params, by identity_of.
    return sorted(str(file) for file in files if not {*"{}"} & {*str(file)})


def identity_of(source):
    """What tells a model or a file on this disk from another that lay under the same name, be that newer or older."""
    kind, _, rest = source.partition(":")
    # Path's own would raise for an unknown user or too long a name.
    path = Path(os.path.expanduser(rest))
    with one_line_errors():
        return identity(path) if kind == "path" and os.path.exists(path) else ""


def read_from(entry):
    """What decides what is read of a model or a corpus: a change of its label alone must not measure it again."""
    read = entry.model_dump(include={"source", "sha256", "files"}) if entry else ""
    return escape(str(read))


def package(command, *more):
    """The package's files that a command runs, so that an edit of one reruns its rule; `more` as in command_files."""
    # The workflow runs with the package that lies beside it, which an editable installation makes the one imported.
    return [os.path.relpath(path) for path in command_files(command, *more)]


def shard_files(kind):
    """The files of one kind of all shards of a model."""

    def files(wildcards):
        return [
            f"{RESULTS}/statistics/{wildcards.model}/{shard}.{kind}"
            for shard in shards(wildcards)
        ]

    return files


def caption(name):
    """The caption that a figure or table has on the page, for Snakemake's report."""
    return str(CAPTIONS / f"{name}.rst")


def in_report(name, **labels):
    """Where a figure stands in Snakemake's report, and under what name; all labels of a chapter have the same keys."""
    figure = FIGURES[name]
    return {
        "caption": caption(figure.caption),
        "category": figure.chapter,
        "labels": {"figure": figure.title} | labels,
    }


def study_figures(kind):
    """The figures of the study: those of the paper and of growth, or those of long texts; and those of costs."""
    own = ["max_ratios", "order_ratios", "readings", "gauge", "attention_support"]
    own = ["length_scaling"] if STUDY.lengths else own
    per_model = [*own, "growth", "growth_curves"]
    names = [f"{figure}_{model}" for figure in per_model for model in MODELS]
    names += ["context_scaling"] if MODELS and not STUDY.lengths else []
    names += ["complexity"] if STUDY.complexity else []
    names += ["operator"] if STUDY.operator else []
    names += ["speedup", "error_vs_time", "crossover"] if STUDY.sweep else []
    return [f"{RESULTS}/figures/{name}.{kind}" for name in names]


def page_tables():
    """What the page reads beside the figures and the tables that they are drawn from."""
    if not MODELS:
        return []
    kinds = ["growth", "growth_curves"]
    kinds += (
        ["length_scaling"]
        if STUDY.lengths
        else ["heads", "attention", "readings_heads"]
    )
    more = [] if STUDY.lengths else [f"{RESULTS}/tables/paper_comparison.csv"]
    return more + [
        f"{RESULTS}/tables/{kind}_{model}.csv" for kind in kinds for model in MODELS
    ]
