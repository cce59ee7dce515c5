TABLES = f"{RESULTS}/tables"
# What is known of a model's texts and heads; in place of {} the model's name.
FACTS = "lengths_{}.json" if STUDY.lengths else "overview_{}.json"

# The rules of the figures of one model; a step has the name of some of these figures.
for NAME in [
    *("max_ratios", "order_ratios", "readings_figure", "gauge_figure"),
    *("attention_support", "length_scaling_figure", "growth_figure", "growth_curves"),
]:
    FIGURE = NAME.removesuffix("_figure")
    FILES = (*FIGURES[FIGURE].tables, FACTS)

    rule:
        name:
            NAME
        input:
            [f"{TABLES}/{file.format('{model}')}" for file in FILES],
            source=package("figure", f"figures/{FIGURE}.py"),
        output:
            f"{RESULTS}/figures/{FIGURE}_{{model}}.pdf",
            png=report(
                f"{RESULTS}/figures/{FIGURE}_{{model}}.png",
                **in_report(FIGURE, model="{model}"),
            ),
        log:
            f"{RESULTS}/logs/{NAME}_{{model}}.log",
        params:
            figure=FIGURE,
            tables=lambda wildcards: TABLES,
            stem=lambda wildcards, output: output.png.removesuffix(".png"),
        shell:
            "approxkmv figure {params.figure} --model {wildcards.model} --tables {params.tables} --out {params.stem} --log {log}"


rule context_scaling:
    input:
        collect(f"{TABLES}/context_scaling_{{model}}.csv", model=MODELS),
        collect(f"{TABLES}/overview_{{model}}.json", model=MODELS),
        source=package("figure", "figures/context_scaling.py"),
    output:
        f"{RESULTS}/figures/context_scaling.pdf",
        png=report(
            f"{RESULTS}/figures/context_scaling.png",
            **in_report("context_scaling", model="all"),
        ),
    log:
        f"{RESULTS}/logs/context_scaling.log",
    params:
        tables=lambda wildcards: TABLES,
        stem=lambda wildcards, output: output.png.removesuffix(".png"),
        models=" ".join(f"--model {name}" for name in MODELS),
    shell:
        "approxkmv figure context_scaling {params.models} --tables {params.tables} --out {params.stem} --log {log}"


rule figures:
    input:
        study_figures("pdf"),
        study_figures("png"),
