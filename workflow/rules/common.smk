import os
import re
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
    settings_file,
    study_of,
)
from approxkmv.errors import ConfigError
from approxkmv.progress import one_line_errors
from approxkmv.steps.shards import remove_damaged, remove_leftovers
from approxkmv.steps.texts import shard_count

# A person sees one line per finished step, from the step itself; Snakemake's own errors stay.
if not any(re.fullmatch(r"--dry-?run|-[a-z]*n[a-z]*", word) for word in sys.argv):
    logger.setLevel("WARNING")

# Snakemake itself keeps the last of two equal keys, and has another message and exit code for what is no YAML.
with one_line_errors():
    given = workflow.config_settings
    for file in [*given.configfiles, Path("config.yaml")]:
        if given.configfiles and not file.exists():
            continue
        try:
            load_config(file)
        except ConfigError as error:
            # What --config or --configfile add to may be a part of a configuration: the sum is checked below.
            if str(file) in str(error) or not given.overwrite_config:
                raise


configfile: "config.yaml"


with one_line_errors():
    STUDY = study_of(checked(config))
    RESULTS = f"results/{STUDY.name}"
    MODELS = list(STUDY.models)
    # The commands read the configuration as Snakemake sees it, with what --config and --configfile changed.
    SETTINGS = settings_file(checked(config), Path(RESULTS) / "config.yaml")
    # Only before anything runs: the jobs of an executor read this file too.
    if workflow.is_main_process and not workflow.output_settings.dryrun:
        remove_leftovers(Path(RESULTS))
        for line in remove_damaged(Path(RESULTS)):
            print(f"approxkmv: {line}", file=sys.stderr)


wildcard_constraints:
    model="[A-Za-z0-9][A-Za-z0-9.-]*",
    shard="[0-9]+",


def local_files(source):
    """The files of a source that lies on this disk, so that an edit of one reruns what reads it."""
    kind, _, rest = source.partition(":")
    path = Path(rest).expanduser()
    if kind != "path" or not path.exists():
        return []
    return (
        [str(path)]
        if path.is_file()
        else sorted(str(file) for file in path.glob("*.*") if file.is_file())
    )


def package(*names):
    """Source files of the package that a rule depends on, so that an edit of one reruns it."""
    root = Path(workflow.basedir) / "src" / "approxkmv"
    found = []
    for name in names:
        found += (
            sorted((root / name).rglob("*.py"))
            if (root / name).is_dir()
            else [root / name]
        )
    return [os.path.relpath(path) for path in found]


def shard_files(kind):
    """The files of one kind of all shards of a model."""

    def files(wildcards):
        return [
            f"{RESULTS}/statistics/{wildcards.model}/{shard}.{kind}"
            for shard in shards(wildcards)
        ]

    return files


def study_figures(kind):
    """The figures of the study: those of the paper and of growth, or those of long texts; and those of costs."""
    if STUDY.lengths:
        names = [f"length_scaling_{model}" for model in MODELS]
    else:
        per_model = ["max_ratios", "order_ratios", "growth", "growth_curves"]
        names = [f"{figure}_{model}" for figure in per_model for model in MODELS]
        names += ["context_scaling"] if MODELS else []
    names += ["complexity"] if STUDY.complexity else []
    names += ["speedup", "error_vs_time", "crossover"] if STUDY.sweep else []
    return [f"{RESULTS}/figures/{name}.{kind}" for name in names]
