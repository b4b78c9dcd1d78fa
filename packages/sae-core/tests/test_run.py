from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
import yaml
from sae_core import SAE
from sae_core.cli import main
from sae_core.config import structure
from sae_core.data.tensor_files import TensorFiles, TensorFilesConfig
from sae_core.errors import ConfigError, DataError, FormatError
from sae_core.plugins import ActivationSourceSpec, get_registry, reset_registry
from sae_core.run import execute, read_run
from safetensors.torch import load_file, save_file

ROWS = torch.randn(3000, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A small run on activations in two files."""
    (tmp_path / "data").mkdir()
    save_file({"activations": ROWS[:2000].clone()}, tmp_path / "data" / "a.safetensors")
    np.save(tmp_path / "data" / "b.npy", ROWS[2000:].numpy())
    run = {
        "output": str(tmp_path / "out"),
        "sae": {"architecture": "topk", "d_sae": 32, "k": 4},
        "source": {"name": "tensor_files", "paths": [str(tmp_path / "data")], "epochs": 4},
        "train": {"total_samples": 6000, "batch_size": 100, "lr": 0.003, "log_every_steps": 10, "progress_bar": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command line, in this process."""

    def run(*arguments: str | Path) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Done(code, *capsys.readouterr())

    return run


Command = Callable[..., Done]


def test_the_train_command_leaves_an_sae_a_log_and_the_run_with_every_default(run_file: Path, command: Command) -> None:
    done = command("train", run_file, "--set", "sae.k=3", "--set", "train.total_samples=3000")
    assert done.returncode == 0, done.stderr
    out = run_file.parent / "out"
    assert "explained variance" in done.stdout
    assert str(out) in done.stdout
    assert SAE.load(out).config.k == 3
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["samples"] == 3000
    resolved = yaml.safe_load((out / "run.yaml").read_text())
    assert resolved["train"]["adam_beta2"] == 0.999
    assert resolved["sae"] == {**resolved["sae"], "d_in": 12, "k": 3}
    assert resolved["source"]["seed"] == 0


def test_the_run_that_was_written_can_be_run_again_and_gives_the_same_sae(run_file: Path) -> None:
    run = read_run(run_file)
    execute(run)
    again = read_run(run.output / "run.yaml", [f"output={run_file.parent / 'again'}"])
    execute(again)
    assert all(
        torch.equal(a, b)
        for a, b in zip(SAE.load(run.output).parameters(), SAE.load(again.output).parameters(), strict=True)
    )


def test_an_output_that_holds_an_sae_is_not_overwritten_unless_asked(run_file: Path) -> None:
    run = read_run(run_file, ["train.total_samples=500"])
    execute(run)
    before = (run.output / "sae_weights.safetensors").read_bytes()
    with pytest.raises(FormatError, match="already holds an SAE; choose another output or pass --overwrite"):
        execute(run)
    assert (run.output / "sae_weights.safetensors").read_bytes() == before
    execute(run, overwrite=True)


def test_bad_activations_stop_the_run_and_what_was_learnt_is_kept(run_file: Path, command: Command) -> None:
    bad = ROWS.clone()
    bad[2500, 3] = torch.nan
    save_file({"activations": bad}, run_file.parent / "data" / "a.safetensors")
    done = command("train", run_file, "--set", "source.shuffle=false", "--set", "train.init_samples=100")
    assert done.returncode == 1
    assert "sample 2500, dimension 3" in done.stderr
    assert "saved in" in done.stderr
    assert "Traceback" not in done.stderr
    assert SAE.load(run_file.parent / "out" / "interrupted").W_dec.isfinite().all()


def test_a_source_that_ends_early_is_said_in_the_summary(run_file: Path, command: Command) -> None:
    done = command("train", run_file, "--set", "train.total_samples=100000000", "--set", "source.epochs=1")
    assert done.returncode == 0, done.stderr
    assert "of 100,000,000: the source ended" in done.stdout


@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_a_device_that_is_not_there_is_one_error(run_file: Path, command: Command, device: str) -> None:
    done = command("train", run_file, "--set", f"device={device}")
    assert done.returncode == 1
    assert f"device '{device}' cannot be used here" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_diverges_says_so_though_its_weights_cannot_be_kept(run_file: Path, command: Command) -> None:
    done = command("train", run_file, "--set", "train.lr=1e30", "--set", "train.grad_clip_norm=null")
    assert done.returncode == 1
    assert "training diverged" in done.stderr
    assert "Lower lr" in done.stderr
    assert "cannot be kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run_file.parent / "out" / "cfg.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.pop("sae"), "missing key 'sae'"),
        (lambda run: run["sae"].pop("architecture"), "sae: missing key 'architecture'"),
        (lambda run: run["source"].pop("name"), "source: missing key 'name'"),
        (lambda run: run["train"].update(batchsize=3), r"unknown key 'train\.batchsize'; did you mean 'batch_size'"),
        (lambda run: run.update(sead=3), "unknown key 'sead'; did you mean 'seed'"),
        (lambda run: run["train"].update(lr="fast"), r"expected float \| Schedule, found str 'fast' at train\.lr"),
    ],
)
def test_a_wrong_run_file_is_refused_before_anything_happens(run_file: Path, change: Any, message: str) -> None:
    run = yaml.safe_load(run_file.read_text())
    change(run)
    run_file.write_text(yaml.safe_dump(run))
    with pytest.raises(ConfigError, match=message):
        read_run(run_file)


def test_a_width_that_contradicts_the_source_is_refused(run_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"width 13 is wanted, but the source gives one site \(12\)"):
        execute(read_run(run_file, ["sae.d_in=13"]))


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=3", "output.x=3", "seed=["])
def test_a_malformed_override_is_refused(run_file: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        read_run(run_file, [override])


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("- 1", "a run file is a mapping")])
def test_a_file_that_is_no_run_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(FormatError, match=message):
        read_run(tmp_path / "run.yaml")
    with pytest.raises(FormatError, match="cannot read the run file"):
        read_run(tmp_path / "missing.yaml")


def test_the_seed_of_the_run_reaches_a_source_without_one_of_its_own(run_file: Path) -> None:
    for overrides, expected in ((["seed=7"], 7), (["seed=7", "source.seed=3"], 3)):
        run = read_run(run_file, [*overrides, "train.total_samples=200", f"output={run_file.parent / str(expected)}"])
        execute(run)
        assert yaml.safe_load((run.output / "run.yaml").read_text())["source"]["seed"] == expected


def tensor_files(**fields: Any) -> TensorFiles:
    return TensorFiles(structure(fields, TensorFilesConfig))


def test_every_row_of_every_file_comes_once_an_epoch_in_changing_order(run_file: Path) -> None:
    source = tensor_files(paths=[str(run_file.parent / "data")], epochs=2)
    assert (source.rows, source.sites) == (3000, {"": 12})
    rows = torch.cat(list(source.batches(700)))
    first, second = rows[:3000], rows[3000:]
    for epoch in (first, second):
        assert torch.equal(epoch[epoch[:, 0].argsort()], ROWS[ROWS[:, 0].argsort()])
    assert not torch.equal(first, second)
    assert torch.equal(rows, torch.cat(list(source.batches(700))))


def test_unshuffled_rows_come_in_the_files_order(run_file: Path) -> None:
    source = tensor_files(paths=[str(run_file.parent / "data")], shuffle=False)
    assert torch.equal(torch.cat(list(source.batches(999))), ROWS)


def test_files_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"other": ROWS}, tmp_path / "a.safetensors")
    save_file({"activations": ROWS[:, :5].clone()}, tmp_path / "narrow.safetensors")
    np.save(tmp_path / "ints.npy", np.arange(10).reshape(2, 5))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("a.safetensors", "no tensor 'activations'; it holds other"),
        ("ints.npy", "must be .rows, d_in. of floating point"),
        ("objects.npy", "not a readable .npy file"),
        ("missing", "no such file or folder"),
        ("empty", "no .safetensors or .npy files"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            tensor_files(paths=[str(tmp_path / name)])
        assert name in str(caught.value)
    np.save(tmp_path / "wide.npy", ROWS.numpy())
    with pytest.raises(DataError, match="different widths"):
        tensor_files(paths=[str(tmp_path / "narrow.safetensors"), str(tmp_path / "wide.npy")])


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, Any]:
    """Files of 100 inputs (8 wide) and targets (6 wide) that are a linear map of them, in other shards."""
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    y = x[:, :6] * 2
    for name, part in {"x0": x[:70], "x1": x[70:], "y0": y[:50], "y1": y[50:]}.items():
        save_file({"acts": part.contiguous()}, tmp_path / f"{name}.safetensors")
    paths, targets = ([str(tmp_path / f"{name}{i}.safetensors") for i in (0, 1)] for name in "xy")
    return {"paths": paths, "target_paths": targets, "key": "acts"}


def test_files_of_targets_give_pairs_that_stay_together_over_shards_and_shuffling(pairs: dict[str, Any]) -> None:
    source = tensor_files(**pairs, reads={"a": 5, "b": 3}, writes={"p": 2, "q": 4}, held_out=0.1, epochs=2)
    assert (source.sites, source.target_sites, source.rows) == ({"a": 5, "b": 3}, {"p": 2, "q": 4}, 90)
    batches = list(source.batches(32))
    assert [len(batch.inputs) for batch in batches] == [32, 32, 26] * 2
    assert all(torch.equal(batch.targets, batch.inputs[:, :6] * 2) for batch in batches)


def test_a_run_trains_a_transcoder_of_files_and_measures_it_on_rows_that_it_did_not_see(
    pairs: dict[str, Any], tmp_path: Path
) -> None:
    run: dict[str, Any] = {
        "sae": {"architecture": "topk", "d_sae": 16, "k": 4, "skip": True},
        "source": {"name": "tensor_files", **pairs, "writes": {"p": 2, "q": 4}, "held_out": 0.2, "epochs": 30},
        "train": {"total_samples": 2400, "batch_size": 80, "lr": 0.03, "log_every_steps": 10, "progress_bar": False},
        "eval": {"every_samples": 800, "rows": 15},
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(run))
    assert main(["train", str(tmp_path / "pairs.yaml")]) == 0
    sae = SAE.load(tmp_path / "out")
    assert (sae.d_in, dict(sae.writes)) == (8, {"p": 2, "q": 4})
    records = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    x = torch.cat([load_file(path)["acts"] for path in pairs["paths"]])[80:95]
    y = x[:, :6] * 2
    expected = 1 - float((sae(x).detach() - y).square().sum() / (y - y.mean(0)).square().sum())
    assert records[-1]["held_out.explained_variance"] == pytest.approx(expected, abs=1e-4)
    assert records[-1]["held_out.l0"] == pytest.approx(float((sae.encode(x) != 0).sum(-1).float().mean()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_paths": None}, "writes is of targets; give target_paths, too"),
        ({"writes": {"p": 5}}, r"writes: widths \{'p': 5\} add up to 5, not to 6"),
        ({"reads": {"a": 9}, "writes": {}}, r"reads: widths \{'a': 9\} add up to 9, not to 8"),
        ({"held_out": 1.0}, r"held_out is a fraction in \[0, 1\), not 1.0"),
        ({"held_out": 0.01}, "held_out: 0.01 of 100 rows leaves 1 to measure on and 99 to train on"),
        ({"target_key": "y"}, "no tensor 'y'; it holds acts"),
    ],
)
def test_targets_that_do_not_fit_are_one_error(pairs: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    fields = {**pairs, "writes": {"p": 2, "q": 4}, **changes}
    with pytest.raises((ConfigError, DataError), match=message):
        tensor_files(**{name: value for name, value in fields.items() if value is not None})


def test_every_row_has_a_target_and_measuring_needs_rows_held_out(pairs: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=r"100 rows in .*x0\.safetensors, .*, but 50 rows of targets in .*every row has a target"
    ):
        tensor_files(**{**pairs, "target_paths": pairs["target_paths"][:1]})
    source = tensor_files(**pairs)
    with pytest.raises(ConfigError, match=r"no rows are held out from training \(source\.held_out is 0\)"):
        source.held_out(source.held_out_class())


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    seed: int = 0


class Noise:
    """A source that holds nothing out."""

    config_class: ClassVar[type] = NoiseConfig
    sites: ClassVar[Mapping[str, int]] = {"": 12}

    def __init__(self, config: NoiseConfig) -> None:
        self.config = config

    def batches(self, batch_size: int) -> list[torch.Tensor]:
        return [ROWS[:batch_size]]


def test_a_source_that_holds_nothing_out_says_so(
    run_file: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "noises", cast("ModuleType", SimpleNamespace(Noise=Noise)))
    get_registry().register(ActivationSourceSpec(name="noise", target="noises:Noise", summary="of a test"))
    try:
        run = yaml.safe_load(run_file.read_text()) | {"source": {"name": "noise"}, "eval": {"every_samples": 100}}
        run_file.write_text(yaml.safe_dump(run))
        done = command("train", run_file)
    finally:
        reset_registry()
    assert done.returncode == 1
    assert "the source 'noise' has nothing to measure on during training; leave out eval" in done.stderr


def test_files_of_several_precisions_are_read_in_the_widest(tmp_path: Path) -> None:
    wide = torch.tensor([[1.0000001, 2.0]])
    save_file({"activations": wide.half()}, tmp_path / "a.safetensors")
    save_file({"activations": wide}, tmp_path / "b.safetensors")
    (batch,) = tensor_files(paths=[str(tmp_path)], shuffle=False).batches(2)
    assert torch.equal(batch[1], wide[0])
