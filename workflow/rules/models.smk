rule model:
    input:
        source=package("models", "steps/fetch.py"),
    output:
        f"{RESULTS}/models/{{model}}.json",
    log:
        f"{RESULTS}/logs/extract_{{model}}_{{shard}}.log",
    conda:
        "../../environment.yml"
    threads: workflow.cores
    resources:
        gpu=int(STUDY.device == "cuda"),
    params:
        settings=(
            STUDY.min_tokens,
            STUDY.max_tokens,
            STUDY.dtype,
            STUDY.device,
            STUDY.batch_tokens,
            STUDY.shard_contexts,
        ),
        shard=lambda wildcards: int(wildcards.shard),
    shell:
        "approxkmv extract --model {wildcards.model} --location {input.location} --texts {input.texts} "
        "--shard {params.shard} --config {SETTINGS} --out {output.tensors} --contexts-out {output.contexts} --log {log}"
