#!/usr/bin/env bash
# A pruner of your own against SparseGPT: two models, three patterns, a LaTeX table and a plot.
# my_pruner.py holds the method, conf/ its settings and the second model. Arguments are added to the sweep.
set -euo pipefail
cd "$(dirname "$0")"

[ -d tiny ] || python make_tiny_model.py tiny
python -m nnprune.run -m --config-dir conf model=demo,tiny pruner=sparsegpt,mine sparsity=0.5,2:4,4:8 "$@"

python -m nnprune.collect --metric demo_perplexity --format latex > table.tex
python -m nnprune.collect --metric demo_perplexity --plot plot.png
