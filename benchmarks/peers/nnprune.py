"""nnprune itself, through `nnprune.run.run`, as its command line would run it."""

import shutil
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from benchmarks.peers.common import Result, Run, Spec, write_result
from benchmarks.products import ProductProfile
from nnprune.run import CONF, run

PRUNING = ("calibration", "prune", "write")


def config(spec: Spec) -> DictConfig:
    """The config of the run that a spec asks for; what a path may hold is no matter, as none goes through a command line."""
    calibration = "random" if spec.calibration["path"] is None else "text"
    groups = ["model=local", f"calibration={calibration}", "evaluation=none", "propagate=pruned", f"pruner={spec.method}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*groups, f"sparsity={spec.pattern}", *spec.options.get("overrides", [])])
    cfg.model.path = spec.model
    cfg.model.dtype = spec.dtype
    for key, value in spec.calibration.items():
        if value is not None:
            cfg.calibration[key] = value
    cfg.runtime.device = spec.device
    if spec.threads:
        cfg.runtime.threads = spec.threads
    cfg.seed = spec.seed
    cfg.outputs = spec.scratch
    cfg.overwrite = True
    cfg.save = spec.save is not None
    return cfg


def profile_pruning() -> list[ProductProfile]:
    """Let nnprune's pruning stage be profiled; the profile is in the list once it has run."""
    from nnprune.engine.pruning_pass import PruningPass

    profiles: list[ProductProfile] = []
    prune = PruningPass.run

    def profiled(*arguments: object) -> object:
        with ProductProfile() as profile:
            counts = prune(*arguments)
        profiles.append(profile)
        return counts

    PruningPass.run = profiled
    return profiles


def main() -> None:
    """Run what the spec says. Raises RuntimeError when nnprune pruned with other token ids than the spec's."""
    bench = Run()
    spec = bench.spec
    profiles = profile_pruning() if spec.profile else []
    cfg = config(spec)
    record = run(cfg)
    if record.calibration_hash != spec.ids_hash:
        raise RuntimeError(f"nnprune calibrated on ids {record.calibration_hash}, all others on {spec.ids_hash}")
    if spec.save:
        [model] = Path(spec.scratch).glob("*/*/*/model")  # model / pattern / pruner-fingerprint
        shutil.move(model, spec.save)
    stages = {stage: value for stage, value in record.seconds.items() if stage not in ("total", "save")}
    # What the other programs do as one stage, writing the finished layers included.
    seconds = {"prune": sum(stages.get(stage, 0) for stage in PRUNING)} | {f"({stage})": stages[stage] for stage in PRUNING}
    seconds |= {stage: value for stage, value in stages.items() if stage not in PRUNING}
    result = Result(
        seconds,
        record.peak_host_bytes,
        record.peak_device_bytes,
        record.versions | {"commit": f"{record.commit}{' (edited)' if record.dirty else ''}"},
        profile=profiles[0].shares() if spec.profile else None,
        pruned_model=spec.save,
    )
    write_result(bench.path, result)


if __name__ == "__main__":
    main()
