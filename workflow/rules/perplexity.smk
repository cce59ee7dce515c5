PERPLEXITY = STUDY.perplexity or {}


rule perplexity:
    input:
        location=f"{RESULTS}/models/{PERPLEXITY['model']}.json" if PERPLEXITY else [],
        corpus=(
            local_files(corpus_entry(checked(config), PERPLEXITY["corpus"]).source)
            if PERPLEXITY
            else []
        ),
        # A comment in a method must not cost hours of timing: delete the table to measure anew.
        source=ancient(package("attention", "search", "perplexity", "models")),
    output:
        table=report(
            f"{RESULTS}/tables/perplexity.csv",
            caption="../report/perplexity.rst",
            category="Tables",
            labels={"table": "perplexity with attention methods"},
        ),
        record=f"{RESULTS}/tables/perplexity.json",
    log:
        f"{RESULTS}/logs/perplexity.log",
    conda:
        "../../environment.yml"
    # Nothing else runs while times are taken.
    threads: workflow.cores
    resources:
        gpu=int(PERPLEXITY.get("device") == "cuda"),
    params:
        config=lambda wildcards: SETTINGS,
        settings=STUDY.perplexity,
    shell:
        "approxkmv perplexity --location {input.location} --config {params.config} --out {output.table} --log {log}"
