PERPLEXITY = STUDY.perplexity
CORPUS = corpus_entry(checked(config), PERPLEXITY.corpus) if PERPLEXITY else None


rule plan:
    input:
        location=f"{RESULTS}/models/{PERPLEXITY.model}.json" if PERPLEXITY else [],
        corpus=local_files(CORPUS.source) if CORPUS else [],
        source=ancient(package("plan", "attention")),
    output:
        f"{RESULTS}/tables/plan.json",
    log:
        f"{RESULTS}/logs/plan.log",
    # Nothing else runs while times are taken.
    threads: workflow.cores
    resources:
        gpu=int(PERPLEXITY is not None and PERPLEXITY.device == "cuda"),
    params:
        config=lambda wildcards: SETTINGS,
        settings=lambda wildcards: escape(str(PERPLEXITY)),
        corpus=lambda wildcards: read_from(CORPUS),
        identity=identity_of(CORPUS.source) if CORPUS else "",
    shell:
        "approxkmv plan --location {input.location} --config {params.config} --out {output} --log {log}"


rule perplexity:
    input:
        plan=rules.plan.output if PERPLEXITY and PERPLEXITY.plan else [],
        location=f"{RESULTS}/models/{PERPLEXITY.model}.json" if PERPLEXITY else [],
        corpus=local_files(CORPUS.source) if CORPUS else [],
        # A comment in a method must not cost hours of timing: delete the table to measure anew.
        source=ancient(package("perplexity", "attention")),
    output:
        table=report(
            f"{RESULTS}/tables/perplexity.csv",
            caption=caption("perplexity"),
            category="5. Tables",
            labels={"table": "perplexity with attention methods"},
        ),
        record=f"{RESULTS}/tables/perplexity.json",
    log:
        f"{RESULTS}/logs/perplexity.log",
    # Nothing else runs while times are taken.
    threads: workflow.cores
    resources:
        gpu=int(PERPLEXITY is not None and PERPLEXITY.device == "cuda"),
    params:
        config=lambda wildcards: SETTINGS,
        settings=lambda wildcards: escape(str(PERPLEXITY)),
        corpus=lambda wildcards: read_from(CORPUS),
        identity=identity_of(CORPUS.source) if CORPUS else "",
        plan=lambda wildcards, input: f"--plan {input.plan}" if input.plan else "",
    shell:
        "approxkmv perplexity --location {input.location} --config {params.config} --out {output.table} {params.plan} "
        "--log {log}"
