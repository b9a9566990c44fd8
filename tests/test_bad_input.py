"""Bad input: one line that names the key, the value and the remedy, before any weights are read, and a record of it."""

import errno

import pytest
from conftest import compose_config
from support.runs import failure, refuse

import nnprune.model.checkpoint
from nnprune.experiment.build import build
from nnprune.model.loading import ModelSource
from nnprune.records import RESULT_FILE, read
from nnprune.run import run


@pytest.fixture
def no_weights(monkeypatch):
    """Reading weights is long work: nothing that uses this fixture gets that far."""
    monkeypatch.setattr(ModelSource, "load", refuse)
    monkeypatch.setattr(ModelSource, "checkpoint", refuse)


SETTINGS = [
    ("sparsity=50", "sparsity=50: ", "for 50 % write 0.5"),
    ("sparsity=-0.1", "sparsity=-0.1: ", "0 <= sparsity < 1"),
    ("sparsity=1.0", "sparsity=1.0: ", "0 <= sparsity < 1"),
    ("sparsity=124", "sparsity=124: ", 'quote it: "2:4"'),
    ("sparsity=4:2", "sparsity=4:2: ", "0 < N < M"),
    ("sparsity=2:0", "sparsity=2:0: ", "0 < N < M"),
    ("sparsity=nan", "sparsity=nan: ", "0 <= sparsity < 1"),
    ("sparsity=1:5", "sparsity=1:5: model.decoder.layers.0.self_attn.k_proj has 32 inputs", "choose another N:M"),
    ("pruner=custom", "pruner._target_=???: ", "add pruner._target_="),
    ("pruner=custom pruner._target_=nowhere.Mine", "pruner._target_=nowhere.Mine: ", "No module named 'nowhere'"),
    (
        "pruner=custom pruner._target_=collections.Counter",
        "pruner._target_=collections.Counter: ",
        "derive it from nnprune's Pruner",
    ),
    ("+pruner.dampening=0.1", "pruner.dampening=0.1: no such setting", "did you mean damping?"),
    ("pruner.damping=0", "pruner.damping=0: ", "greater than 0"),
    ("propagate=later", "propagate=later: ", "pruned, dense or sequential"),
    ("calibration.num_samples=0", "calibration.num_samples=0: ", "at least 1"),
    ("calibration.num_samples=1.5", "calibration.num_samples=1.5: ", "whole number"),
    ("calibration.seq_len=1e3", "calibration.seq_len=1000.0: ", "whole number"),
    ("calibration.seq_len=1", "calibration.seq_len=1: ", "at least 2"),
    ("calibration.seq_len=65", "calibration.seq_len=65: tiny-opt has 64 positions", "lower calibration.seq_len"),
    ("calibration.mode=all", "calibration.mode=all: ", "packed or documents"),
    ("calibration.path=no.txt", "calibration.path=no.txt: ", "no such file"),
    ("calibration.path=[no.txt]", "calibration.path=no.txt: ", "no such file"),
    ("evaluation.seq_len=65", "evaluation.seq_len=65: tiny-opt has 64 positions", "lower evaluation.seq_len"),
    ("evaluation.seq_len=x", "evaluation.seq_len=x: ", "whole number"),
    ("evaluation.max_windows=0", "evaluation.max_windows=0: ", "at least 1"),
    ("evaluation.path=no.txt", "evaluation.path=no.txt: ", "no such file"),
    ("model.dtype=int8", "model.dtype=int8: ", "auto, bfloat16, float16, float32"),
    ("model.path=no/such/dir", "model.path=no/such/dir: ", "give a directory or a hub id"),
    ("model.path=facebook/opt-125m", "model.path=facebook/opt-125m: ", "use model=local model.path=DIR"),
    ("model.layers_path=model.layers", "model.layers_path=model.layers: ", "no list of layers"),
    ("+model.color=red", "model.color=red: no such setting", "dtype"),
    ("+runtime.bath_tokens=2", "runtime.bath_tokens=2: no such setting", "batch_tokens"),
    ("runtime.device_memory=much", "runtime.device_memory=much: must be a size such as 12GiB", "null"),
    ("runtime.device_memory=12GiB", "runtime.device_memory=12GiB: is for a CUDA device", "runtime.device_memory=null"),
    ("runtime.batch_tokens=0", "runtime.batch_tokens=0: ", "at least 1"),
    ("runtime.batch_tokens=1.5", "runtime.batch_tokens=1.5: ", "whole number"),
    ("runtime.threads=x", "runtime.threads=x: ", "whole number"),
    ("runtime.threads=100000", "runtime.threads=100000: ", "4 for each of this machine's CPUs"),
    ("runtime.batch_tokens=1000000000000", "runtime.batch_tokens=1000000000000: ", "at most 16777216"),
    ("runtime.device=cuda:99999999999999999999", "runtime.device=cuda:9999", "cuda:N"),
    ("calibration.num_samples=1000000000", "calibration.num_samples=1000000000: ", "lower calibration.num_samples"),
    ("calibration.seq_len=1000000000000", "calibration.seq_len=1000000000000: ", "lower calibration.seq_len"),
    ("pruner.block_size=100000000000", "pruner.block_size=100000000000: ", "at most 1048576"),
    ("pruner.mask_columns=1.5", "pruner.mask_columns=1.5: ", "whole number"),
    ("pruner.damping=x", "pruner.damping=x: ", "greater than 0"),
    ("pruner=alps pruner.num_iterations=1000000000", "pruner.num_iterations=1000000000: ", "at most 100000"),
    ("sparsity=1:100000000000", "sparsity=1:100000000000: ", "M must be at most 1048576"),
    ("runtime.device=gpu", "runtime.device=gpu: ", "auto, cpu, cuda"),
    ("runtime.device=mps", "runtime.device=mps: ", "auto, cpu, cuda"),
    ("pruner.block_size=12.5", "pruner.block_size=12.5: ", "whole number"),
    ("pruner.damp_inverse=no", "pruner.damp_inverse=no: ", "true or false"),
    ("seed=null", "seed=None: ", "whole number"),
    ("save=no", "save=no: ", "true or false"),
    ("seed=-1", "seed=-1: ", "at least 0"),
    ("seed=99999999999999999999", "seed=99999999999999999999: ", "at most 9223372036854775807"),
    ("label=[a,b]", "label=['a', 'b']: ", "must be one name"),
    ("model.name=[a]", "model.name=['a']: ", "must be one name"),
    ("model.revision=[a]", "model.revision=['a']: ", "must be one name"),
    ("calibration.path=[]", "calibration.path=[]: ", "names no file"),
    ("calibration.column=[a]", "calibration.column=['a']: ", "must be text"),
    ("+calibration.separator=5", "calibration.separator=5: ", "must be text"),
    ("calibration.num_samples=[1,2]", "calibration.num_samples=[1, 2]: ", "whole number"),
    ("calibration.num_samples=true", "calibration.num_samples=True: ", "whole number"),
    ("calibration.seed=x", "calibration.seed=x: ", "whole number"),
    ("evaluation.path=[]", "evaluation.path=[]: ", "names no file"),
    ("evaluation.max_windows=[1]", "evaluation.max_windows=[1]: ", "whole number"),
    ("runtime.threads=-1", "runtime.threads=-1: ", "at least 1"),
    ("runtime.native=1", "runtime.native=1: ", "true or false"),
    ("runtime.resume=1", "runtime.resume=1: ", "auto, true or false"),
    ("runtime.resume=always", "runtime.resume=always: ", "auto, true or false"),
    ("runtime.layers=gpu", "runtime.layers=gpu: ", "host, device or disk"),
    ("sparsity=1000000000:2000000000", "sparsity=1000000000:2000000000: ", "M must be at most 1048576"),
    ("pruner.damping=nan", "pruner.damping=nan: ", "greater than 0"),
    ("pruner.damping=1e308", "pruner.damping=1e+308: ", "less than 1e+30"),
    ("pruner.damping=[1]", "pruner.damping=[1]: ", "greater than 0"),
    ("pruner.block_size=0", "pruner.block_size=0: ", "at least 1"),
    ("pruner.block_size=-1", "pruner.block_size=-1: ", "at least 1"),
    ("pruner=dsnot pruner.threshold=1e308", "pruner.threshold=1e+308: ", "at most 1e+30"),
    ("recover=layer_model recover.layers.lr=0", "recover.layers.lr=0: ", "greater than 0"),
    ("recover=layer_model +recover.layers.num_layers=9", "recover.layers.num_layers=9: ", "set no more"),
    ("recover=layer recover.epochs_after=100000000000", "recover.epochs_after=100000000000: ", "at most 100000"),
    (f"pruner._target_={'x' * 5000}", f"pruner._target_={'x' * 190}", "check its spelling"),
]


@pytest.mark.parametrize(("overrides", "start", "remedy"), SETTINGS, ids=[row[0][:60] for row in SETTINGS])
@pytest.mark.usefixtures("no_weights")
def test_settings(tiny_config, overrides, start, remedy):
    message = failure(tiny_config(*overrides.split()))
    assert message.startswith(start)
    assert remedy in message


@pytest.mark.parametrize("kind", ["hub", "local"])
@pytest.mark.usefixtures("no_weights")
def test_a_model_without_a_path_is_not_the_demo(kind, tmp_path):
    message = failure(compose_config(f"model={kind}", f"outputs={tmp_path}"))
    assert message.startswith("model.path=null: ")
    assert "add model.path=" in message


BAD_FILES = [
    ("short.txt", b"not much", "calibration.seq_len=32: the text has 8 tokens", "lower calibration.seq_len or give"),
    (
        "text.pdf",
        b"%PDF",
        "calibration.path=",
        "must be a .txt, .jsonl, .json, .csv (also .gz, .xz, .bz2 or .zst) or .parquet file",
    ),
    ("latin.txt", "naïve".encode("latin-1") * 90, "calibration.path=", "is not UTF-8 text"),
    ("empty.txt", b"", "calibration.path=", "holds no text"),
    ("broken.jsonl", b'{"text": "a', "calibration.path=", "JSON parse error"),
    ("broken.json.gz", b'{"text": "a"}', "calibration.path=", "Not a gzipped file"),
    ("other.jsonl", b'{"body": "a"}\n', "calibration.column=text: ", "other.jsonl has body"),
    ("number.jsonl", b'{"text": 1}\n', "calibration.column=text: ", "number.jsonl has none"),
]


@pytest.mark.parametrize("bad", BAD_FILES, ids=[row[0] for row in BAD_FILES])
@pytest.mark.usefixtures("no_weights")
def test_calibration_files(tiny_config, tmp_path, monkeypatch, bad):
    name, content, start, remedy = bad
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name).write_bytes(content)
    message = failure(tiny_config(f"calibration.path={tmp_path / name}"))
    assert message.startswith(start)
    assert remedy in message


@pytest.mark.usefixtures("no_weights")
def test_a_dataset_that_cannot_be_reached(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    small = ("calibration.seq_len=32", "evaluation=none", f"outputs={tmp_path / 'outputs'}")
    message = failure(compose_config("model=local", f"model.path={tiny_model_dir}", "calibration=c4", *small))
    assert message.startswith("calibration.dataset=allenai/c4: could not be read")
    assert "point calibration.dataset at a local folder that holds en/c4-train.00000-of-01024.json.gz" in message
    assert "or use calibration=text calibration.path=FILE" in message
    (tmp_path / "c4").mkdir()
    overrides = ("calibration=c4", f"calibration.dataset={tmp_path / 'c4'}", *small)
    with pytest.raises(ValueError, match=r"has no file en/c4-train\.\S+; copy it there as on the hub"):
        run(compose_config("model=local", f"model.path={tiny_model_dir}", *overrides))


def test_a_result_cut_in_half(tiny_config):
    cfg = tiny_config("pruner=magnitude")
    run(cfg)
    path = build(cfg).folder / RESULT_FILE
    path.write_text(path.read_text()[:300])
    with pytest.raises(ValueError, match=f"{path}: is no complete JSON file; delete it, or run again with overwrite=true"):
        run(cfg)
    assert len(path.read_text()) == 300  # it may be of use to its owner
    cfg.overwrite = True
    assert run(cfg).status == "completed"
    assert read(path.parent).status == "completed"


@pytest.mark.usefixtures("no_weights")
def test_outputs_that_cannot_be_written(tiny_config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=f"outputs={tmp_path / 'file'}.*: cannot be written .*; set outputs=DIR"):
        run(tiny_config(f"outputs={tmp_path / 'file'}"))


def test_disk_full_while_a_layer_is_saved(tiny_config, monkeypatch):
    cfg = tiny_config("runtime.resume=true")
    original, saved = nnprune.model.checkpoint.save_file, []

    def save_file(state, path, **options):
        if len(saved) == 1:
            path.write_bytes(b"half a lay")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(path)
        original(state, path, **options)

    monkeypatch.setattr(nnprune.model.checkpoint, "save_file", save_file)
    message = failure(cfg)
    folder = build(cfg).folder
    assert message.startswith("outputs: decoder layer 1 could not be saved in ")
    assert "No space left" in message
    assert "make room or set outputs to another disk" in message
    assert sorted(path.name for path in (folder / "unfinished").glob("layer-*")) == [
        "layer-0000.json",
        "layer-0000.safetensors",
    ]

    saved.clear()
    record = run(cfg)
    assert record.status == "completed"
    assert [path.name.split(".")[1] for path in saved] == ["layer-0001"]
    cfg.overwrite = True
    saved[:] = [None] * 2
    assert run(cfg).metrics == record.metrics
