rule complexity:
    input:
        source=package("complexity"),
    output:
        counts=f"{RESULTS}/tables/complexity.csv",
        record=f"{RESULTS}/tables/complexity.json",
        fits=report(
            f"{RESULTS}/tables/complexity_fits.csv",
            caption=caption("complexity_fits"),
            category="5. Tables",
            labels={"table": "cost of ApproxKMV as printed"},
        ),
    log:
        f"{RESULTS}/logs/complexity.log",
    threads: workflow.cores
    params:
        config=lambda wildcards: SETTINGS,
        settings=escape(str(STUDY.complexity)),
    shell:
        "approxkmv complexity --config {params.config} --counts-out {output.counts} --fits-out {output.fits} --log {log}"


rule complexity_figure:
    input:
        rules.complexity.output.counts,
        source=package("figure", "figures/complexity.py"),
    output:
        f"{RESULTS}/figures/complexity.pdf",
        png=report(f"{RESULTS}/figures/complexity.png", **in_report("complexity")),
    log:
        f"{RESULTS}/logs/complexity_figure.log",
    params:
        results=lambda wildcards: RESULTS,
        stem=lambda wildcards, output: output.png.removesuffix(".png"),
    shell:
        "approxkmv figure complexity --tables {params.results}/tables --out {params.stem} --log {log}"
