# What queries and keys depend on beside the model and the texts. It is among the params of all that is made from them
# too: they are temporary, and once gone they cannot be newer than what was made with other settings.
EXTRACTED = (
    STUDY.min_tokens,
    STUDY.max_tokens,
    STUDY.dtype,
    STUDY.device,
    STUDY.batch_tokens,
    STUDY.shard_contexts,
    STUDY.rotary_scaling,
)


rule fetch:
    input:
        files=lambda wildcards: local_files(
            model_of(checked(config), wildcards.model).source
        ),
        source=package("fetch"),
    output:
        f"{RESULTS}/models/{{model}}.json",
    log:
        f"{RESULTS}/logs/fetch_{{model}}.log",
    # First, so that what needs the network fails or is done before anything is computed.
    priority: 10
    params:
        config=lambda wildcards: SETTINGS,
        entry=lambda wildcards: read_from(model_of(checked(config), wildcards.model)),
        identity=lambda wildcards: identity_of(
            model_of(checked(config), wildcards.model).source
        ),
    shell:
        "approxkmv fetch --model {wildcards.model} --config {params.config} --out {output} --log {log}"


rule extract:
    input:
        location=rules.fetch.output[0],
        texts=f"{RESULTS}/texts.parquet",
        source=package("extract"),
    output:
        tensors=temp(f"{RESULTS}/activations/{{model}}/{{shard}}.safetensors"),
        contexts=f"{RESULTS}/statistics/{{model}}/{{shard}}.contexts.csv",
    log:
        f"{RESULTS}/logs/extract_{{model}}_{{shard}}.log",
    threads: HALF
    resources:
        gpu=int(STUDY.device == "cuda"),
    params:
        config=lambda wildcards: SETTINGS,
        settings=EXTRACTED,
        shard=lambda wildcards: int(wildcards.shard),
    shell:
        "approxkmv extract --model {wildcards.model} --location {input.location} --texts {input.texts} "
        "--shard {params.shard} --config {params.config} --out {output.tensors} --contexts-out {output.contexts} --log {log}"
