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
