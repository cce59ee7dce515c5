rule operator:
    input:
        # An edit of a comment does not time everything again.
        source=ancient(package("operator")),
    output:
        table=report(
            f"{RESULTS}/tables/operator.csv",
            caption=caption("operator"),
            category="5. Tables",
            labels={"table": "kernel products to within an error"},
        ),
        record=f"{RESULTS}/tables/operator.json",
    log:
        f"{RESULTS}/logs/operator.log",
    # Nothing else runs while times are taken.
    threads: workflow.cores
    params:
        config=lambda wildcards: SETTINGS,
        settings=lambda wildcards: escape(str(STUDY.operator)),
        vectors=identity_of(f"path:{STUDY.operator.path}") if STUDY.operator else "",
    shell:
        "approxkmv operator --config {params.config} --out {output.table} --log {log}"


rule operator_figure:
    input:
        rules.operator.output.table,
        source=package("figure", "figures/operator.py"),
    output:
        f"{RESULTS}/figures/operator.pdf",
        png=report(f"{RESULTS}/figures/operator.png", **in_report("operator")),
    log:
        f"{RESULTS}/logs/operator_figure.log",
    params:
        results=lambda wildcards: RESULTS,
        stem=lambda wildcards, output: output.png.removesuffix(".png"),
    shell:
        "approxkmv figure operator --tables {params.results}/tables --out {params.stem} --log {log}"
