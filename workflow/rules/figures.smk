TABLES = f"{RESULTS}/tables"
# What is known of a model's texts and heads, beside the tables of growth.
FACTS = f"{TABLES}/{'lengths' if STUDY.lengths else 'overview'}_{{model}}.json"


rule max_ratios:
    input:
        f"{TABLES}/heads_{{model}}.csv",
        f"{TABLES}/overview_{{model}}.json",
        source=package("figure", "figures/max_ratios.py"),
    output:
        f"{RESULTS}/figures/max_ratios_{{model}}.pdf",
        png=report(
            f"{RESULTS}/figures/max_ratios_{{model}}.png",
            **in_report("max_ratios", model="{model}"),
        ),
    log:
        f"{RESULTS}/logs/max_ratios_{{model}}.log",
    params:
        tables=lambda wildcards: TABLES,
        stem=lambda wildcards, output: output.png.removesuffix(".png"),
    shell:
        "approxkmv figure max_ratios --model {wildcards.model} --tables {params.tables} --out {params.stem} --log {log}"


rule order_ratios:
    input:
        f"{TABLES}/heads_{{model}}.csv",
        f"{TABLES}/overview_{{model}}.json",
        source=package("figure", "figures/order_ratios.py"),
    output:
        f"{RESULTS}/figures/order_ratios_{{model}}.pdf",
        png=report(
            f"{RESULTS}/figures/order_ratios_{{model}}.png",
            **in_report("order_ratios", model="{model}"),
        ),
    log:
        f"{RESULTS}/logs/order_ratios_{{model}}.log",
    params:
        tables=lambda wildcards: TABLES,
        stem=lambda wildcards, output: output.png.removesuffix(".png"),
    shell:
        "approxkmv figure order_ratios --model {wildcards.model} --tables {params.tables} --out {params.stem} --log {log}"


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


rule readings_figure:
    input:
        f"{TABLES}/readings_{{model}}.csv",
        f"{TABLES}/readings_path_{{model}}.csv",
        f"{TABLES}/overview_{{model}}.json",
        source=package("figure", "figures/readings.py"),
    output:
        f"{RESULTS}/figures/readings_{{model}}.pdf",
        png=report(
            f"{RESULTS}/figures/readings_{{model}}.png",
            **in_report("readings", model="{model}"),
        ),
    log:
        f"{RESULTS}/logs/readings_figure_{{model}}.log",
    params:
        tables=lambda wildcards: TABLES,
        stem=lambda wildcards, output: output.png.removesuffix(".png"),
    shell:
        "approxkmv figure readings --model {wildcards.model} --tables {params.tables} --out {params.stem} --log {log}"


rule gauge_figure:
    input:
        f"{TABLES}/gauge_{{model}}.csv",
        f"{TABLES}/overview_{{model}}.json",
        source=package("figure", "figures/gauge.py"),
    output:
        f"{RESULTS}/figures/gauge_{{model}}.pdf",
        png=report(
            f"{RESULTS}/figures/gauge_{{model}}.png",
            **in_report("gauge", model="{model}"),
        ),
    log:
        f"{RESULTS}/logs/gauge_figure_{{model}}.log",
    params:
        tables=lambda wildcards: TABLES,
        stem=lambda wildcards, output: output.png.removesuffix(".png"),
    shell:
        "approxkmv figure gauge --model {wildcards.model} --tables {params.tables} --out {params.stem} --log {log}"


rule growth_figure:
    input:
        f"{TABLES}/growth_{{model}}.csv",
        f"{TABLES}/growth_curves_{{model}}.csv",
        FACTS,
        source=package("figure", "figures/growth.py"),
    output:
        f"{RESULTS}/figures/growth_{{model}}.pdf",
        png=report(
            f"{RESULTS}/figures/growth_{{model}}.png",
            **in_report("growth", model="{model}"),
        ),
    log:
        f"{RESULTS}/logs/growth_figure_{{model}}.log",
    params:
        tables=lambda wildcards: TABLES,
        stem=lambda wildcards, output: output.png.removesuffix(".png"),
    shell:
        "approxkmv figure growth --model {wildcards.model} --tables {params.tables} --out {params.stem} --log {log}"


rule growth_curves:
    input:
        f"{TABLES}/growth_{{model}}.csv",
        f"{TABLES}/growth_curves_{{model}}.csv",
        FACTS,
        source=package("figure", "figures/growth_curves.py"),
    output:
        f"{RESULTS}/figures/growth_curves_{{model}}.pdf",
        png=report(
            f"{RESULTS}/figures/growth_curves_{{model}}.png",
            **in_report("growth_curves", model="{model}"),
        ),
    log:
        f"{RESULTS}/logs/growth_curves_{{model}}.log",
    params:
        tables=lambda wildcards: TABLES,
        stem=lambda wildcards, output: output.png.removesuffix(".png"),
    shell:
        "approxkmv figure growth_curves --model {wildcards.model} --tables {params.tables} --out {params.stem} --log {log}"


rule attention_support:
    input:
        f"{TABLES}/attention_{{model}}.csv",
        f"{TABLES}/overview_{{model}}.json",
        source=package("figure", "figures/attention_support.py"),
    output:
        f"{RESULTS}/figures/attention_support_{{model}}.pdf",
        png=report(
            f"{RESULTS}/figures/attention_support_{{model}}.png",
            **in_report("attention_support", model="{model}"),
        ),
    log:
        f"{RESULTS}/logs/attention_support_{{model}}.log",
    params:
        tables=lambda wildcards: TABLES,
        stem=lambda wildcards, output: output.png.removesuffix(".png"),
    shell:
        "approxkmv figure attention_support --model {wildcards.model} --tables {params.tables} --out {params.stem} --log {log}"


rule length_scaling_figure:
    input:
        f"{TABLES}/length_scaling_{{model}}.csv",
        f"{TABLES}/lengths_{{model}}.json",
        source=package("figure", "figures/length_scaling.py"),
    output:
        f"{RESULTS}/figures/length_scaling_{{model}}.pdf",
        png=report(
            f"{RESULTS}/figures/length_scaling_{{model}}.png",
            **in_report("length_scaling", model="{model}"),
        ),
    log:
        f"{RESULTS}/logs/length_scaling_figure_{{model}}.log",
    params:
        tables=lambda wildcards: TABLES,
        stem=lambda wildcards, output: output.png.removesuffix(".png"),
    shell:
        "approxkmv figure length_scaling --model {wildcards.model} --tables {params.tables} --out {params.stem} --log {log}"


rule figures:
    input:
        study_figures("pdf"),
        study_figures("png"),
