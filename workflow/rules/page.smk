rule page:
    input:
        study_figures("png"),
        page_tables(),
        rules.perplexity.output if STUDY.perplexity else [],
        source=package("page") + [os.path.relpath(path) for path in PAGE_FILES],
    output:
        f"{RESULTS}/index.html",
    log:
        f"{RESULTS}/logs/page.log",
    params:
        results=lambda wildcards: RESULTS,
        models=" ".join(f"--model {name}" for name in MODELS),
    shell:
        "approxkmv page {params.results}/tables --figures {params.results}/figures --out {params.results} "
        "{params.models} --log {log}"
