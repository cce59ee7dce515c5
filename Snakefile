# Does the sparsity assumption hold on your models? `snakemake --cores all` draws the figures of the study in config.yaml.
import sys

from snakemake.utils import min_version

min_version("9.1")


# Reads and checks config.yaml.
include: "workflow/rules/common.smk"
include: "workflow/rules/texts.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/statistics.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/complexity.smk"
include: "workflow/rules/sweep.smk"
include: "workflow/rules/perplexity.smk"
include: "workflow/rules/page.smk"


report: "workflow/report/workflow.rst"


localrules:
    all,
    figures,
    clean_leftovers,


rule all:
    default_target: True
    input:
        rules.figures.input,
        f"{RESULTS}/tables/paper_comparison.csv" if MODELS and not STUDY.lengths else [],
        rules.complexity.output if STUDY.complexity else [],
        rules.sweep.output if STUDY.sweep else [],
        rules.perplexity.output if STUDY.perplexity else [],
        rules.page.output,


rule clean_leftovers:
    log:
        f"{RESULTS}/logs/clean_leftovers.log",
    params:
        results=lambda wildcards: RESULTS,
    shell:
        "approxkmv clean {params.results} | tee {log}"


onstart:
    with one_line_errors():
        hold(LOCK, f"a run of study {STUDY.name}")
    if STUDY.takes:
        print(f"study {STUDY.name} takes {STUDY.takes}", file=sys.stderr)


onsuccess:
    remove_activations(Path(RESULTS), but=workflow.dag.targetfiles)
    # Not after a run of a few files, as `snakemake results/embedded/texts.parquet`.
    if any(Path(RESULTS, "tables").glob("*.json")):
        shell(f"approxkmv show {RESULTS}")


onerror:
    if RUN_LOG.stopped:
        print("stopped; run again to continue", file=sys.stderr)
        sys.exit(130)
    print(
        f"A step failed; its reason stands above and in {RESULTS}/logs. Run again to go on from there. "
        "(A step that was killed may have had too little memory: lower batch_tokens, or shard_contexts.)",
        file=sys.stderr,
    )
    sys.exit(2)
