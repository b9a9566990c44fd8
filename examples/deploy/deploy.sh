#!/usr/bin/env bash
# A 2:4 model: pruned, saved, checked, and loaded in plain transformers. Arguments are added to the run.
set -euo pipefail
cd "$(dirname "$0")"

log=$(mktemp)
trap 'rm "$log"' EXIT
python -m nnprune.run pruner=sparsegpt sparsity=2:4 save=true "$@" | tee "$log"
model=$(sed -n 's|^record: \(.*\)/result.json$|\1/model|p' "$log")  # each choice of settings has a folder of its own
python -m nnprune.check "$model" --masks masks.safetensors
python load.py "$model"
