#!/usr/bin/env bash
# A sweep as one Slurm job array, a run a job (pip install 'nnprune[slurm]'). Start it again to resume. Arguments are added to it.
set -euo pipefail

python -m nnprune.run -m hydra/launcher=slurm hydra.launcher.partition=gpu hydra.launcher.array_parallelism=8 \
    model=opt-125m,opt-1.3b pruner=magnitude,wanda,sparsegpt sparsity=0.5,2:4,4:8 "$@"
