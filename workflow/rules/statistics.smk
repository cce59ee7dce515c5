# What is made of statistics waits for their summary: if no text is long enough, one step says so and not five.
SUMMARY = [] if STUDY.lengths else f"{RESULTS}/tables/heads_{{model}}.csv"


rule statistics:
    input:
        tensors=rules.extract.output.tensors,
        source=package("statistics"),
    output:
        heads=f"{RESULTS}/statistics/{{model}}/{{shard}}.heads.parquet",
        prefixes=f"{RESULTS}/statistics/{{model}}/{{shard}}.prefixes.parquet",
    log:
        f"{RESULTS}/logs/statistics_{{model}}_{{shard}}.log",
    # Made first whenever it can be, so that few shards' activations lie on the disk.
    priority: 1
    threads: HALF
    params:
        config=lambda wildcards: SETTINGS,
        settings=(EXTRACTED, STUDY.min_prefix, STUDY.prefixes),
    shell:
        "approxkmv statistics --model {wildcards.model} --activations {input.tensors} --config {params.config} "
        "--heads-out {output.heads} --prefixes-out {output.prefixes} --log {log}"


rule attention:
    input:
        tensors=rules.extract.output.tensors,
        source=package("attention"),
    output:
        f"{RESULTS}/statistics/{{model}}/{{shard}}.attention.parquet",
    log:
        f"{RESULTS}/logs/attention_{{model}}_{{shard}}.log",
    # As for statistics: few shards' activations on the disk.
    priority: 1
    threads: HALF
    params:
        config=lambda wildcards: SETTINGS,
        settings=EXTRACTED,
    shell:
        "approxkmv attention --model {wildcards.model} --activations {input.tensors} --config {params.config} "
        "--out {output} --log {log}"


rule attention_table:
    input:
        summary=SUMMARY,
        rows=shard_files("attention.parquet"),
        contexts=shard_files("contexts.csv"),
        texts=f"{RESULTS}/texts.parquet",
        source=package("attention_table"),
    output:
        report(
            f"{RESULTS}/tables/attention_{{model}}.csv",
            caption=caption("attention"),
            category="5. Tables",
            labels={"table": "rows of the softmax per head: {model}"},
        ),
    log:
        f"{RESULTS}/logs/attention_table_{{model}}.log",
    params:
        config=lambda wildcards: SETTINGS,
        results=lambda wildcards: RESULTS,
    shell:
        "approxkmv attention-table --model {wildcards.model} --statistics {params.results}/statistics/{wildcards.model} "
        "--texts {input.texts} --config {params.config} --out {params.results}/tables --log {log}"


rule summary:
    input:
        heads=shard_files("heads.parquet"),
        prefixes=shard_files("prefixes.parquet"),
        contexts=shard_files("contexts.csv"),
        texts=f"{RESULTS}/texts.parquet",
        source=package("summary"),
    output:
        heads=f"{RESULTS}/tables/heads_{{model}}.csv",
        scaling=f"{RESULTS}/tables/context_scaling_{{model}}.csv",
        overview=f"{RESULTS}/tables/overview_{{model}}.json",
    log:
        f"{RESULTS}/logs/summary_{{model}}.log",
    params:
        config=lambda wildcards: SETTINGS,
        results=lambda wildcards: RESULTS,
        # The report puts parameters into its HTML as they are.
        label=lambda wildcards: (
            escape(STUDY.models[wildcards.model].label),
            STUDY.models[wildcards.model].paper_bound,
            escape(STUDY.corpus.label),
        ),
        # For the record, also where the shards are what they were before.
        conditions=escape(str(STUDY.conditions)),
    shell:
        "approxkmv summary --model {wildcards.model} --statistics {params.results}/statistics/{wildcards.model} --texts {input.texts} --config {params.config} "
        "--out {params.results}/tables --log {log}"


rule growth:
    input:
        summary=SUMMARY,
        shards=shard_files("lengths.parquet" if STUDY.lengths else "prefixes.parquet"),
        contexts=shard_files("contexts.csv"),
        texts=f"{RESULTS}/texts.parquet",
        source=package("growth"),
    output:
        report(
            f"{RESULTS}/tables/growth_{{model}}.csv",
            caption=caption("growth"),
            category="5. Tables",
            labels={"table": "growth of c per head: {model}"},
        ),
        f"{RESULTS}/tables/growth_curves_{{model}}.csv",
    log:
        f"{RESULTS}/logs/growth_{{model}}.log",
    params:
        config=lambda wildcards: SETTINGS,
        results=lambda wildcards: RESULTS,
        bound=lambda wildcards: STUDY.models[wildcards.model].paper_bound,
    shell:
        "approxkmv growth --model {wildcards.model} --statistics {params.results}/statistics/{wildcards.model} "
        "--texts {input.texts} --tables {params.results}/tables --config {params.config} --log {log}"


rule readings:
    input:
        tensors=rules.extract.output.tensors,
        texts=f"{RESULTS}/texts.parquet",
        source=package("readings"),
    output:
        f"{RESULTS}/statistics/{{model}}/{{shard}}.readings.parquet",
    log:
        f"{RESULTS}/logs/readings_{{model}}_{{shard}}.log",
    # As for statistics: few shards' activations on the disk.
    priority: 1
    threads: HALF
    params:
        config=lambda wildcards: SETTINGS,
        settings=(EXTRACTED, STUDY.min_prefix, STUDY.readings_texts),
    shell:
        "approxkmv readings --model {wildcards.model} --activations {input.tensors} --texts {input.texts} "
        "--config {params.config} --out {output} --log {log}"


rule readings_table:
    input:
        summary=SUMMARY,
        shards=shard_files("readings.parquet"),
        contexts=shard_files("contexts.csv"),
        texts=f"{RESULTS}/texts.parquet",
        source=package("readings_table"),
    output:
        report(
            f"{RESULTS}/tables/readings_{{model}}.csv",
            caption=caption("readings"),
            category="5. Tables",
            labels={"table": "readings of the definition: {model}"},
        ),
        f"{RESULTS}/tables/readings_path_{{model}}.csv",
        f"{RESULTS}/tables/readings_heads_{{model}}.csv",
    log:
        f"{RESULTS}/logs/readings_table_{{model}}.log",
    params:
        config=lambda wildcards: SETTINGS,
        results=lambda wildcards: RESULTS,
        bound=lambda wildcards: STUDY.models[wildcards.model].paper_bound,
    shell:
        "approxkmv readings-table --model {wildcards.model} --statistics {params.results}/statistics/{wildcards.model} "
        "--texts {input.texts} --config {params.config} --out {params.results}/tables --log {log}"


rule gauge:
    input:
        summary=SUMMARY,
        location=f"{RESULTS}/models/{{model}}.json",
        texts=f"{RESULTS}/texts.parquet",
        source=package("gauge"),
    output:
        report(
            f"{RESULTS}/tables/gauge_{{model}}.csv",
            caption=caption("gauge"),
            category="5. Tables",
            labels={"table": "the gauge: {model}"},
        ),
    log:
        f"{RESULTS}/logs/gauge_{{model}}.log",
    threads: HALF
    resources:
        gpu=int(STUDY.device == "cuda"),
    params:
        config=lambda wildcards: SETTINGS,
        results=lambda wildcards: RESULTS,
        settings=(
            STUDY.min_tokens,
            STUDY.max_tokens,
            STUDY.dtype,
            STUDY.device,
            STUDY.rotary_scaling,
        ),
    shell:
        "approxkmv gauge --model {wildcards.model} --location {input.location} --texts {input.texts} "
        "--config {params.config} --tables {params.results}/tables --log {log}"


rule compare:
    input:
        collect(f"{RESULTS}/tables/heads_{{model}}.csv", model=MODELS),
        collect(f"{RESULTS}/tables/readings_{{model}}.csv", model=MODELS),
        collect(f"{RESULTS}/tables/context_scaling_{{model}}.csv", model=MODELS),
        collect(f"{RESULTS}/tables/overview_{{model}}.json", model=MODELS),
        source=package("compare"),
    output:
        report(
            f"{RESULTS}/tables/paper_comparison.csv",
            caption=caption("paper_comparison"),
            category="5. Tables",
            labels={"table": "the paper's claims"},
        ),
    log:
        f"{RESULTS}/logs/compare.log",
    params:
        config=lambda wildcards: SETTINGS,
        results=lambda wildcards: RESULTS,
    shell:
        "approxkmv compare --tables {params.results}/tables --config {params.config} --out {output} --log {log}"


rule lengths:
    input:
        tensors=rules.extract.output.tensors,
        contexts=rules.extract.output.contexts,
        source=package("lengths"),
    output:
        f"{RESULTS}/statistics/{{model}}/{{shard}}.lengths.parquet",
    log:
        f"{RESULTS}/logs/lengths_{{model}}_{{shard}}.log",
    # As for statistics: few shards' activations on the disk.
    priority: 1
    threads: HALF
    resources:
        gpu=int(STUDY.device == "cuda"),
    params:
        config=lambda wildcards: SETTINGS,
        settings=(EXTRACTED, STUDY.lengths),
    shell:
        "approxkmv lengths --model {wildcards.model} --activations {input.tensors} --contexts {input.contexts} "
        "--config {params.config} --out {output} --log {log}"


rule length_scaling:
    input:
        lengths=shard_files("lengths.parquet"),
        contexts=shard_files("contexts.csv"),
        texts=f"{RESULTS}/texts.parquet",
        source=package("length_scaling"),
    output:
        report(
            f"{RESULTS}/tables/length_scaling_{{model}}.csv",
            caption=caption("length_scaling"),
            category="5. Tables",
            labels={"table": "long texts: {model}"},
        ),
        f"{RESULTS}/tables/lengths_{{model}}.json",
    log:
        f"{RESULTS}/logs/length_scaling_{{model}}.log",
    params:
        config=lambda wildcards: SETTINGS,
        results=lambda wildcards: RESULTS,
        label=lambda wildcards: (
            escape(STUDY.models[wildcards.model].label),
            STUDY.models[wildcards.model].paper_bound,
            escape(STUDY.corpus.label),
        ),
        # For the record, also where the shards are what they were before.
        conditions=escape(str(STUDY.conditions)),
    shell:
        "approxkmv length-scaling --model {wildcards.model} --statistics {params.results}/statistics/{wildcards.model} "
        "--texts {input.texts} --config {params.config} --out {params.results}/tables --log {log}"
