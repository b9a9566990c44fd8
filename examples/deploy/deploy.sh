#!/usr/bin/env bash
# A 2:4 model: pruned, saved, checked, and loaded in plain transformers. Arguments are added to the run.
set -euo pipefail
cd "$(dirname "$0")"

python -m nnprune.run pruner=sparsegpt sparsity=2:4 save=true "$@"
model=$(echo outputs/demo/2of4/sparsegpt-*/model)
python -m nnprune.check "$model" --masks masks.safetensors
python load.py "$model"
