#!/usr/bin/env bash
# Measures the model of deploy.sh with a local task of lm-eval (tasks/), without pruning it again. Give both the same arguments.
#     pip install 'nnprune[eval]'
set -euo pipefail
cd "$(dirname "$0")"

python -m nnprune.run pruner=sparsegpt sparsity=2:4 save=true \
    evaluation=lm_eval 'evaluation.tasks=[demo_sentences]' evaluation.include_path=tasks "$@"
