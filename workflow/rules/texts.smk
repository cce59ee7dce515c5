checkpoint texts:
    input:
        corpus=local_files(STUDY.corpus.source) if STUDY.corpus else [],
        # Their tokenizers say where windows end.
        locations=(
            collect(f"{RESULTS}/models/{{model}}.json", model=MODELS)
            if STUDY.long_texts == "windows"
            else []
        ),
        source=package("texts"),
    output:
        f"{RESULTS}/texts.parquet",
    log:
        f"{RESULTS}/logs/texts.log",
    params:
        config=lambda wildcards: SETTINGS,
        corpus=(read_from(STUDY.corpus), STUDY.unit, STUDY.contexts, STUDY.seed),
        windows=STUDY.max_tokens if STUDY.long_texts == "windows" else None,
        identity=identity_of(STUDY.corpus.source) if STUDY.corpus else "",
        locations=lambda wildcards, input: [
            f"--location {path}" for path in input.locations
        ],
    shell:
        "approxkmv texts {params.locations} --config {params.config} --out {output} --log {log}"


def shards(wildcards):
    """The shards that the drawn texts make."""
    table = Path(checkpoints.texts.get().output[0])
    return [f"{shard:04d}" for shard in range(shard_count(table, STUDY.shard_contexts))]
