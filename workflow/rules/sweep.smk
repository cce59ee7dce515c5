CAPTURE = STUDY.capture
CAPTURED = (
    [corpus_entry(checked(config), name) for name in CAPTURE.corpora] if CAPTURE else []
)


rule model_heads:
    input:
        location=f"{RESULTS}/models/{CAPTURE.model}.json" if CAPTURE else [],
        corpus=sorted(
            {file for corpus in CAPTURED for file in local_files(corpus.source)}
        ),
        source=package("model_heads"),
    output:
        heads=f"{RESULTS}/sweep/heads.safetensors",
        tuning=f"{RESULTS}/sweep/heads_tuning.safetensors",
    log:
        f"{RESULTS}/logs/model_heads.log",
    threads: workflow.cores
    params:
        config=lambda wildcards: SETTINGS,
        capture=lambda wildcards: escape(str(CAPTURE)),
        rotary_scaling=escape(str(STUDY.rotary_scaling)),
        corpus=lambda wildcards: [read_from(corpus) for corpus in CAPTURED],
        identity=" ".join(identity_of(corpus.source) for corpus in CAPTURED),
    shell:
        "approxkmv model-heads --location {input.location} --config {params.config} --out {output.heads} "
        "--tuning-out {output.tuning} --log {log}"


rule sweep:
    input:
        heads=rules.model_heads.output if CAPTURE else [],
        # A comment in a method must not cost hours of timing: delete the table to time anew.
        source=ancient(package("sweep", "attention")),
    output:
        table=report(
            f"{RESULTS}/tables/sweep.csv",
            caption=caption("sweep"),
            category="5. Tables",
            labels={"table": "time at equal error"},
        ),
        record=f"{RESULTS}/tables/sweep.json",
        exponents=report(
            f"{RESULTS}/tables/sweep_exponents.csv",
            caption=caption("sweep_exponents"),
            category="5. Tables",
            labels={"table": "kernel evaluations against n"},
        ),
    log:
        f"{RESULTS}/logs/sweep.log",
    # Nothing else runs while times are taken.
    threads: workflow.cores
    resources:
        gpu=int(STUDY.sweep is not None and STUDY.sweep.device != "cpu"),
    params:
        config=lambda wildcards: SETTINGS,
        settings=lambda wildcards: escape(str(STUDY.sweep)),
        vectors=[
            identity_of(f"path:{path}")
            for workload in (STUDY.sweep.workloads if STUDY.sweep else ())
            for path in (workload.path, workload.tuning_path)
        ],
        capture=lambda wildcards, input: (
            f"--capture {input.heads[0]} --tuning-capture {input.heads[1]}"
            if CAPTURE
            else ""
        ),
    shell:
        "approxkmv sweep --config {params.config} {params.capture} --out {output.table} --log {log}"


rule sweep_figure:
    input:
        f"{RESULTS}/tables/sweep.csv",
        source=package(
            "figure",
            "figures/speedup.py",
            "figures/error_vs_time.py",
            "figures/crossover.py",
        ),
    output:
        f"{RESULTS}/figures/{{figure}}.pdf",
        png=report(
            f"{RESULTS}/figures/{{figure}}.png",
            **in_report("speedup")
            | {
                "labels": lambda wildcards: {"figure": FIGURES[wildcards.figure].title}
            },
        ),
    log:
        f"{RESULTS}/logs/figure_{{figure}}.log",
    wildcard_constraints:
        figure="speedup|error_vs_time|crossover",
    params:
        results=lambda wildcards: RESULTS,
        stem=lambda wildcards, output: output.png.removesuffix(".png"),
    shell:
        "approxkmv figure {wildcards.figure} --tables {params.results}/tables --out {params.stem} --log {log}"
