"""What the reports in the layer files tell of a run."""

from nnprune.allocations.base import Plan
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.prune_linears import fractions_of_zeros
from nnprune.experiment.build import Experiment
from nnprune.records import RunRecord


def describe_layers(record: RunRecord, experiment: Experiment, engine: LayerwiseEngine, plan: Plan) -> None:
    """Fill in what a record tells of the pruned layers; all have been written."""
    reports = [engine.store.layer_files.reports[index] for index in range(engine.num_layers)]
    record.selection = experiment.selection.counts(engine.decoder.all_shapes_by_layer())
    record.per_linear = [linear for report in reports for linear in report["linears"]]
    record.recovered = [report["recovered"] for report in reports if "recovered" in report]
    if "distilled" in reports[0]:
        record.whole_model = True
        record.recovered.append({"model": reports[0]["distilled"]})
    record.left_alone = engine.decoder.left_alone
    if quantization := experiment.method.quantization:
        record.quantization = quantization.summary(engine.decoder.shapes(), plan)
    record.linear_sparsity, record.model_sparsity = fractions_of_zeros(engine.decoder, reports)
    if (others := engine.store.layer_files.num_cells - 1) > 0:
        record.notes.append(f"pruned in one pass with {others} other cells; `seconds` leaves that pass out")
