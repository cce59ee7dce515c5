checkpoint texts:
    input:
        corpus=local_files(STUDY.corpus.source) if STUDY.corpus else [],
        source=package("texts"),
    output:
        f"{RESULTS}/texts.parquet",
    log:
        f"{RESULTS}/logs/texts.log",
    params:
        config=lambda wildcards: SETTINGS,
        corpus=(str(STUDY.corpus), STUDY.unit, STUDY.contexts, STUDY.seed),
        identity=identity_of(STUDY.corpus.source) if STUDY.corpus else "",
    shell:
        "approxkmv texts --config {params.config} --out {output} --log {log}"


def shards(wildcards):
    """The shards that the drawn texts make."""
    table = Path(checkpoints.texts.get().output[0])
    return [f"{shard:04d}" for shard in range(shard_count(table, STUDY.shard_contexts))]
