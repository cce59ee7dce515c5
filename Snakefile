# What `snakemake` finds first. The workflow itself is where Snakemake's catalogue of workflows looks for it.
include: "workflow/Snakefile"


localrules:
    default,


# Snakemake takes no default target from a file that is included.
rule default:
    default_target: True
    input:
        rules.all.input,
