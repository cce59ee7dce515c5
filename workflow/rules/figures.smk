TABLES = f"{RESULTS}/tables"
# The tables of a figure of one model, by the name of its rule; in place of {} the model's name.
OF_MODEL = {
    "max_ratios": ["heads_{}.csv", "overview_{}.json"],
    "order_ratios": ["heads_{}.csv", "overview_{}.json"],
    "readings_figure": ["readings_{}.csv", "readings_path_{}.csv", "overview_{}.json"],
    "gauge_figure": ["gauge_{}.csv", "overview_{}.json"],
    "attention_support": ["attention_{}.csv", "overview_{}.json"],
    "length_scaling_figure": ["length_scaling_{}.csv", "lengths_{}.json"],
    # Beside the tables of growth, what is known of a model's texts and heads.
    **dict.fromkeys(
        ["growth_figure", "growth_curves"],
        [
            "growth_{}.csv",
            "growth_curves_{}.csv",
            "lengths_{}.json" if STUDY.lengths else "overview_{}.json",
        ],
    ),
}

for NAME, FILES in OF_MODEL.items():
    FIGURE = NAME.removesuffix("_figure")

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
