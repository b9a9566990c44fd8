"""Prints the tracked runs of sweep.sh, best first. `mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db` shows them in a browser."""

import mlflow

mlflow.set_tracking_uri("sqlite:///outputs/mlflow.db")
runs = mlflow.search_runs(experiment_names=["nnprune"], filter_string="status = 'FINISHED'")
columns = {"tags.mlflow.runName": "run", "params.propagate": "propagate", "metrics.demo_perplexity": "perplexity"}
print(runs[list(columns)].rename(columns=columns).sort_values("perplexity").to_string(index=False))
