"""Prints the tracked runs of sweep.sh, best first. `mlflow ui --backend-store-uri sqlite:///mlflow.db` shows them in a browser."""

import mlflow

mlflow.set_tracking_uri("sqlite:///mlflow.db")
runs = mlflow.search_runs(search_all_experiments=True)
columns = ["params.pruner", "params.sparsity", "metrics.demo_perplexity"]
print(runs[runs["status"] == "FINISHED"][columns].sort_values(columns[-1]).to_string(index=False))
