# Every experiment: its points, its tables, its figure.
#   snakemake -c all          the experiments of workflows/config/default.yaml, or of --configfile FILE
#   snakemake -c all smoke    a small one of each kind, in under two minutes
from snakemake.utils import min_version

min_version("9.0")


# A configuration given on the command line replaces the default experiments; they are not mixed.
if "experiments" not in config:

    configfile: workflow.source_path("workflows/config/default.yaml")


include: "workflows/rules/common.smk"


wildcard_constraints:
    experiment="|".join(map(re.escape, EXPERIMENTS)),
    series="[a-z0-9.-]+",
    seed="[0-9]+",


localrules:
    all,
    smoke,


rule all:
    default_target: True
    input:
        [result for name in config["experiments"] for result in results_of(name)],


rule smoke:
    input:
        [result for name in EXPERIMENTS if name.startswith(SMOKE) for result in results_of(name)],


include: "workflows/rules/sweep.smk"
include: "workflows/rules/report.smk"
