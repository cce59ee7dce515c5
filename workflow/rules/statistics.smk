rule statistics:
    input:
        tensors=rules.activations.output.tensors,
        source=package(
            "statistics", "arrays.py", "steps/measure.py", "steps/activations.py"
        ),
    output:
        heads=f"{RESULTS}/statistics/{{model}}/{{shard}}.heads.parquet",
        prefixes=f"{RESULTS}/statistics/{{model}}/{{shard}}.prefixes.parquet",
    log:
        f"{RESULTS}/logs/statistics_{{model}}_{{shard}}.log",
    # Made first whenever it can be, so that the activations of one shard at a time lie on the disk.
    priority: 1
    conda:
        "../../environment.yml"
    threads: workflow.cores
    params:
        settings=(STUDY.min_prefix, STUDY.prefixes),
    shell:
        "approxkmv statistics --model {wildcards.model} --activations {input.tensors} --config {SETTINGS} "
        "--heads-out {output.heads} --prefixes-out {output.prefixes} --log {log}"


def shard_files(kind):
    """The files of one kind of all shards of a model."""

    def files(wildcards):
        return [
            f"{RESULTS}/statistics/{wildcards.model}/{shard}.{kind}"
            for shard in shards(wildcards)
        ]

    return files


rule summary:
    input:
        heads=shard_files("heads.parquet"),
        prefixes=shard_files("prefixes.parquet"),
        contexts=shard_files("contexts.csv"),
        texts=f"{RESULTS}/texts.parquet",
        source=package("steps/summarise.py", "steps/tables.py"),
    output:
        heads=f"{RESULTS}/tables/heads_{{model}}.csv",
        scaling=f"{RESULTS}/tables/context_scaling_{{model}}.csv",
        overview=f"{RESULTS}/tables/overview_{{model}}.json",
    log:
        f"{RESULTS}/logs/summary_{{model}}.log",
    conda:
        "../../environment.yml"
    params:
        label=lambda wildcards: (
            STUDY.models[wildcards.model].label,
            STUDY.models[wildcards.model].paper_bound,
        ),
    shell:
        "approxkmv summary --model {wildcards.model} --statistics {RESULTS}/statistics/{wildcards.model} --texts {input.texts} --config {SETTINGS} "
        "--out {RESULTS}/tables --log {log}"


rule growth_per_head:
    input:
        heads=f"{RESULTS}/tables/heads_{{model}}.csv",
        prefixes=shard_files("prefixes.parquet"),
        texts=f"{RESULTS}/texts.parquet",
        source=package("statistics/growth.py", "steps/growth.py"),
    output:
        report(
            f"{RESULTS}/tables/growth_{{model}}.csv",
            caption="../report/growth.rst",
            category="Tables",
            labels={"table": "growth of c per head: {model}"},
        ),
        f"{RESULTS}/tables/growth_curves_{{model}}.csv",
    log:
        f"{RESULTS}/logs/growth_{{model}}.log",
    conda:
        "../../environment.yml"
    params:
        seed=STUDY.seed,
    shell:
        "approxkmv growth --model {wildcards.model} --statistics {RESULTS}/statistics/{wildcards.model} "
        "--texts {input.texts} --tables {RESULTS}/tables --config {SETTINGS} --log {log}"


rule paper_comparison:
    input:
        collect(f"{RESULTS}/tables/heads_{{model}}.csv", model=MODELS),
        collect(f"{RESULTS}/tables/overview_{{model}}.json", model=MODELS),
        source=package("steps/compare.py"),
    output:
        report(
            f"{RESULTS}/tables/paper_comparison.csv",
            caption="../report/paper_comparison.rst",
            category="Tables",
            labels={"table": "the paper's claims"},
        ),
    log:
        f"{RESULTS}/logs/paper_comparison.log",
    conda:
        "../../environment.yml"
    shell:
        "approxkmv compare --tables {RESULTS}/tables --config {SETTINGS} --out {output} --log {log}"


rule lengths:
    input:
        tensors=rules.activations.output.tensors,
        contexts=rules.activations.output.contexts,
        source=package(
            "statistics", "arrays.py", "steps/lengths.py", "steps/activations.py"
        ),
    output:
        f"{RESULTS}/statistics/{{model}}/{{shard}}.lengths.parquet",
    log:
        f"{RESULTS}/logs/lengths_{{model}}_{{shard}}.log",
    # As for statistics: one shard's activations on the disk at a time.
    priority: 1
    conda:
        "../../environment.yml"
    threads: workflow.cores
    params:
        lengths=STUDY.lengths,
    shell:
        "approxkmv lengths --model {wildcards.model} --activations {input.tensors} --contexts {input.contexts} "
        "--config {SETTINGS} --out {output} --log {log}"


rule length_table:
    input:
        lengths=shard_files("lengths.parquet"),
        contexts=shard_files("contexts.csv"),
        texts=f"{RESULTS}/texts.parquet",
        source=package("steps/lengths.py", "steps/tables.py"),
    output:
        report(
            f"{RESULTS}/tables/length_scaling_{{model}}.csv",
            caption="../report/length_scaling.rst",
            category="Tables",
            labels={"table": "long texts: {model}"},
        ),
        f"{RESULTS}/tables/lengths_{{model}}.json",
    log:
        f"{RESULTS}/logs/length_table_{{model}}.log",
    conda:
        "../../environment.yml"
    params:
        label=lambda wildcards: STUDY.models[wildcards.model].label,
    shell:
        "approxkmv length-scaling --model {wildcards.model} --statistics {RESULTS}/statistics/{wildcards.model} "
        "--texts {input.texts} --config {SETTINGS} --out {RESULTS}/tables --log {log}"
