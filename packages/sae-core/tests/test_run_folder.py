"""One folder, one run: real processes that are stopped, killed and started again."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_core import SAE
from sae_core.cli import main
from sae_core.errors import ConfigError, FormatError
from sae_core.run import execute, read_run
from sae_core.run_folder import RunFolder, locked
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

ROWS = torch.randn(1500, 8, generator=torch.Generator().manual_seed(0)).relu()


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    save_file({"activations": ROWS}, tmp_path / "rows.safetensors")
    run = {
        "output": str(tmp_path / "out"),
        "sae": {"architecture": "batchtopk", "d_sae": 24, "k": 3},
        "source": {"name": "tensor_files", "paths": [str(tmp_path / "rows.safetensors")], "epochs": 100_000},
        "train": {
            "total_samples": 4000, "batch_size": 40, "lr": 0.003, "log_every_steps": 7, "dead_after_samples": 200,
            "init_samples": 200, "progress_bar": False,
        },
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def content(folder: Path) -> dict[str, bytes]:
    """What a finished run leaves besides its checkpoints."""
    names_the_folder = ("run.yaml", "report.html")
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name not in names_the_folder
    }


@pytest.fixture(scope="module")
def processes() -> Any:
    """Where processes with everything imported are forked from, so that each costs milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sae_core.run", "sae_core.cli", "torch._dynamo", "tqdm.auto"])
    return context


def start(processes: Any, *argv: str | Path, errors: Path) -> BaseProcess:
    given = {"ARGV": [str(part) for part in argv], "ERRORS": str(errors)}
    process = processes.Process(
        target=runpy.run_path, args=(str(Path(__file__).with_name("command_process.py")), given)
    )
    process.start()
    return process


def wait_for(condition: Callable[[], Any], process: BaseProcess) -> None:
    deadline = time.monotonic() + 60
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.0002)


def ended(process: BaseProcess) -> int | None:
    process.join(60)
    return process.exitcode


def writing_a_checkpoint(out: Path) -> bool:
    folder = out / "checkpoints"
    return folder.is_dir() and any(path.name.startswith(".") for path in folder.iterdir())


def saving_at_the_end(out: Path) -> bool:
    return any(path.name.startswith(".sae_weights") or path.name == "sae_weights.safetensors" for path in out.iterdir())


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(
    run_file: Path, tmp_path: Path, processes: Any
) -> None:
    out, whole, errors = tmp_path / "out", tmp_path / "whole", tmp_path / "errors"
    sets = ["--set", "train.checkpoint_every_samples=400", "--set", "train.total_samples=8000"]
    process = start(processes, "train", run_file, *sets, "--set", f"output={whole}", errors=errors)
    assert ended(process) == 0, errors.read_text()
    chance = random.Random(0)
    killed = dict.fromkeys(("anywhere", "checkpoint", "end"), 0)
    plan = ["anywhere", "checkpoint", "checkpoint", "anywhere", "checkpoint", "anywhere", "end", "end"]
    for moment in plan:
        process = start(processes, "train", run_file, *sets, "--resume", errors=errors)
        if moment == "anywhere":
            wait_for(lambda: (out / "log.jsonl").exists(), process)
            time.sleep(chance.uniform(0, 0.05))
        elif moment == "checkpoint":
            wait_for(lambda: writing_a_checkpoint(out), process)
        else:
            wait_for(lambda: saving_at_the_end(out), process)
        process.kill()
        killed[moment] += ended(process) == -signal.SIGKILL
    process = start(processes, "train", run_file, *sets, "--resume", errors=errors)
    assert ended(process) == 0, errors.read_text()
    assert killed["checkpoint"] >= 2
    assert killed["anywhere"] >= 2
    assert killed["end"] >= 1
    assert content(out) == content(whole)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.parametrize(("which", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_finishes_the_step_saves_and_tells_by_the_exit_code(
    run_file: Path, tmp_path: Path, processes: Any, which: str, code: int
) -> None:
    out, errors = tmp_path / "out", tmp_path / "errors"
    sets = ["--set", "train.total_samples=1000000000"]
    process = start(processes, "train", run_file, *sets, errors=errors)
    wait_for(lambda: (out / "log.jsonl").exists(), process)
    assert process.pid is not None
    os.kill(process.pid, getattr(signal, which))
    assert ended(process) == code, errors.read_text()
    message = errors.read_text()
    assert f"{which}: stopping after this step" in message
    found = re.search(r"--resume goes on from \S+/checkpoints/(\d+)", message)
    assert found, message
    assert SAE.load(out / "interrupted").W_dec.isfinite().all()
    assert not (out / ".lock").exists()
    samples = int(found[1])
    whole, again = tmp_path / "whole", tmp_path / "again"
    shutil.copytree(out, again)
    execute(read_run(run_file, [f"output={whole}", f"train.total_samples={samples + 400}"]))
    execute(read_run(run_file, [f"output={again}", f"train.total_samples={samples + 400}"]), resume=True)
    assert content(again) == content(whole)
    assert not (again / "interrupted").exists()


def test_a_second_signal_stops_at_once(run_file: Path, tmp_path: Path, processes: Any) -> None:
    out, errors = tmp_path / "out", tmp_path / "errors"
    process = start(processes, "train", run_file, "--set", "train.total_samples=1000000000", errors=errors)
    wait_for(lambda: (out / "log.jsonl").exists(), process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)  # both arrive before the step is over
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    wait_for(lambda: errors.exists() and "stopping after" in errors.read_text(), process)
    os.kill(process.pid, signal.SIGINT)
    assert ended(process) in (-signal.SIGINT, 143)  # 143: it had saved already


def test_two_runs_do_not_share_a_folder(run_file: Path, tmp_path: Path, processes: Any) -> None:
    out, errors = tmp_path / "out", tmp_path / "errors"
    process = start(processes, "train", run_file, "--set", "train.total_samples=1000000000", errors=errors)
    wait_for(lambda: (out / "log.jsonl").exists(), process)
    with pytest.raises(
        FormatError, match=rf"^{out}: a run of process {process.pid} on host {socket.gethostname()} is writing"
    ):
        execute(read_run(run_file))
    process.kill()
    assert ended(process) == -signal.SIGKILL
    assert json.loads((out / ".lock").read_text())["pid"] == process.pid
    assert execute(read_run(run_file)).samples == 4000  # a lock without its process is no lock


def test_what_was_there_stays_until_the_new_run_has_ended_well(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    execute(read_run(run_file))
    (out / "notes.txt").write_text("mine")
    before = content(out)
    bad = ROWS.clone()
    bad[700, 3] = torch.nan
    save_file({"activations": bad}, tmp_path / "rows.safetensors")
    sets = ["source.shuffle=false", "sae.k=2", "source.seed=4"]
    with pytest.raises(ValueError, match="sample 700"):
        execute(read_run(run_file, sets), overwrite=True)
    assert content(out) == before
    assert yaml.safe_load((out / "run.yaml").read_text())["sae"]["k"] == 3
    save_file({"activations": ROWS}, tmp_path / "rows.safetensors")
    execute(read_run(run_file, ["sae.k=2"]), overwrite=True)
    assert yaml.safe_load((out / "run.yaml").read_text())["sae"]["k"] == 2
    assert SAE.load(out).metadata["sae_core"]["training_config"]["k"] == 2
    assert sorted(path.name for path in out.iterdir()) == [
        "cfg.json", "checkpoints", "log.jsonl", "notes.txt", "report.html", "run.yaml", "sae_weights.safetensors",
        "training_form.safetensors",
    ]  # fmt: skip
    execute(read_run(run_file, [f"output={tmp_path / 'direct'}", "sae.k=2"]))
    direct = content(tmp_path / "direct")
    assert {name: data for name, data in content(out).items() if name != "notes.txt"} == direct


def test_an_interrupted_replacement_goes_on_beside_the_old_run(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    execute(read_run(run_file))
    old = content(out)
    run = read_run(run_file, ["sae.k=2", "train.checkpoint_every_samples=1000"])
    with pytest.raises(KeyboardInterrupt), failing_after(2500):
        execute(run, overwrite=True)
    assert content(out) == old
    assert main(["train", "--resume", str(out)]) == 0
    assert SAE.load(out).metadata["sae_core"]["training_config"]["k"] == 2
    assert not (out / ".new").exists()


@contextmanager
def failing_after(samples: int) -> Iterator[None]:
    """Training breaks off at this point without a chance to save."""
    from sae_core.training.learner import Learner

    step = Learner.step

    def failing(self: Learner, batch: Any) -> Any:
        if self.samples >= samples:
            raise KeyboardInterrupt
        return step(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", failing)
        yield


@pytest.mark.parametrize("moves", range(12))
def test_an_exchange_of_runs_that_was_interrupted_is_finished_by_the_next(moves: int, tmp_path: Path) -> None:
    for folder, text in ((tmp_path, "old"), (tmp_path / ".new", "new")):
        folder.mkdir(exist_ok=True)
        for name in ("cfg.json", "sae_weights.safetensors", "run.yaml", "log.jsonl"):
            (folder / name).write_text(text)
    (tmp_path / "interrupted").mkdir()
    folder = RunFolder(tmp_path)
    folder.go_on()
    left = iter([None] * moves)

    def rename(path: Path, target: Path) -> Path:
        if next(left, "over") == "over":
            raise KeyboardInterrupt
        os.rename(path, target)
        return target

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with suppress(KeyboardInterrupt):
            folder.end()
    RunFolder(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("cfg.json", "sae_weights.safetensors", "run.yaml", "log.jsonl"), "new"
    )


def test_an_unfinished_run_is_not_thrown_away_by_accident(run_file: Path, tmp_path: Path) -> None:
    run = read_run(run_file, ["train.checkpoint_every_samples=1000"])
    with pytest.raises(KeyboardInterrupt), failing_after(2500):
        execute(run)
    with pytest.raises(FormatError, match="has not ended; go on with --resume, start anew with --overwrite"):
        execute(run)
    assert execute(run, resume=True).samples == 4000


def test_the_log_of_a_run_that_failed_early_is_not_appended_to(run_file: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), failing_after(2500):
        execute(read_run(run_file))
    assert (tmp_path / "out" / "interrupted").exists()
    result = execute(read_run(run_file))
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    assert not (tmp_path / "out" / "interrupted").exists()


def test_a_finished_run_can_be_trained_further(run_file: Path, tmp_path: Path, capsys: Any) -> None:
    execute(read_run(run_file))
    assert main(["train", "--resume", str(tmp_path / "out")]) == 0
    assert "has ended already" in capsys.readouterr().err
    longer = ["train", "--resume", str(tmp_path / "out"), "--set", "train.total_samples=6000"]
    assert main(longer) == 0
    execute(read_run(run_file, [f"output={tmp_path / 'whole'}", "train.total_samples=6000"]))
    assert SAE.load(tmp_path / "out").metadata["sae_core"]["training"]["samples"] == 6000
    # The shorter run ended with a record of its own; apart from that both are one.
    assert (tmp_path / "out" / "sae_weights.safetensors").read_bytes() == (
        tmp_path / "whole" / "sae_weights.safetensors"
    ).read_bytes()


def test_a_run_can_go_on_from_any_directory(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sets = ["output=out", "source.paths=[rows.safetensors]", "train.checkpoint_every_samples=1000"]
    with pytest.raises(KeyboardInterrupt), failing_after(2500):
        execute(read_run(run_file, sets))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--resume", "../out"]) == 0
    assert SAE.load(tmp_path / "out").metadata["dataset_path"] == str(tmp_path / "rows.safetensors")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_run_with_other_settings_is_refused_by_name(run_file: Path) -> None:
    run = read_run(run_file, ["train.checkpoint_every_samples=1000"])
    with pytest.raises(KeyboardInterrupt), failing_after(2500):
        execute(run)
    for setting, message in (
        ("source.seed=9", r"source\.config\.seed was 0, is now 9"),
        ("sae.k=2", r"sae\.k was 3\.0, is now 2\.0"),
        ("sae.architecture=topk", r"sae\.architecture was 'batchtopk', is now 'topk'"),
        ("train.batch_size=41", r"batch_size was 40, is now 41"),
        ("dtype=float64", "precision"),
    ):
        changed = read_run(run_file, ["train.checkpoint_every_samples=1000", setting])
        with pytest.raises(ConfigError, match=message):
            execute(changed, resume=True)
    assert execute(changed, resume=True, force=True).samples == 4000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "nowhere"], "nowhere: no run to go on with"),
        ([], "give a run file, or --resume"),
        (["RUN", "--force"], "--force belongs to --resume"),
        (["RUN", "--resume", "--overwrite"], "give one of them"),
        (["RUN", "--resume", "elsewhere"], "the run file's output is"),
    ],
)
def test_contradictions_on_the_command_line_are_one_error(
    run_file: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    assert main(["train", *(str(run_file) if part == "RUN" else part for part in arguments)]) == 1
    assert message in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_one_error_before_anything_is_loaded(
    run_file: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").write_text("")
    sets = ["--set", f"output={tmp_path / 'file' / 'out'}", "--set", "source.paths=[missing]"]
    assert main(["train", str(run_file), *sets]) == 1
    assert (
        "cannot be the output of a run: cannot be written: a part of the path is a file, not a folder"
        in capsys.readouterr().err
    )


def test_a_refused_run_leaves_no_folder_behind(run_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        execute(read_run(run_file, ["source.paths=[missing]"]))
    assert not (tmp_path / "out").exists()


@contextmanager
def small_files_only(size: int) -> Iterator[None]:
    """The system refuses to write more than this into a file, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("size", "what"), [(4000, "checkpoint"), (400, "cannot be written")])
def test_a_full_disk_is_one_clear_error_and_the_last_checkpoint_stays(
    run_file: Path, tmp_path: Path, size: int, what: str, capsys: Any
) -> None:
    run = read_run(run_file, ["train.checkpoint_every_samples=1000"])
    with pytest.raises(KeyboardInterrupt), failing_after(2500):
        execute(run)
    capsys.readouterr()
    with small_files_only(size):
        code = main(["train", str(run_file), "--set", "train.checkpoint_every_samples=1000", "--resume"])
    error = capsys.readouterr().err
    assert code == 1
    assert what in error
    assert "too large" in error or "larger than this file system allows" in error
    assert execute(run, resume=True).samples == 4000
    assert content(tmp_path / "out")["log.jsonl"]


def test_a_lock_without_help_of_the_file_system_goes_by_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    (tmp_path / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid()}))
    with pytest.raises(FormatError, match=f"process {os.getppid()} on host"), locked(tmp_path):
        pass
    (tmp_path / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1}))
    with locked(tmp_path):
        pass
    (tmp_path / ".lock").write_text("no JSON")
    with locked(tmp_path):
        pass
