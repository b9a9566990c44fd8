#!/usr/bin/env bash
# A sweep of parallel runs tracked in MLflow, read back through its API. Arguments are added to the sweep.
#     pip install 'nnprune[parallel,track]'
set -euo pipefail
cd "$(dirname "$0")"

python -m nnprune.run -m hydra/launcher=joblib hydra.launcher.n_jobs=2 runtime.threads=1 tracking=mlflow \
    pruner=magnitude,wanda sparsity=0.5,2:4 "$@"
python read_back.py
