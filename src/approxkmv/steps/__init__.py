"""The steps of the pipeline, one file each: a step reads files that the step before wrote, and writes files."""
