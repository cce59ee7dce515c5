"""The steps of the pipeline, one file each: a step reads files that earlier steps wrote, and writes files."""
