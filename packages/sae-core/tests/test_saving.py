"""Saving loses nothing: kills, several savers, readers in between, strangers' files, metadata of any kind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_core import SAE, ActivationBatch, create
from sae_core.config import Schedule
from sae_core.errors import FormatError
from sae_core.format.pair import tensor_problem
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
FILES = ["cfg.json", "sae_weights.safetensors"]


def topk(seed: int, **fields: Any) -> SAE:
    return create("topk", d_in=6, d_sae=12, seed=seed, **{"k": 3, **fields})


def latents(sae: SAE) -> torch.Tensor:
    with torch.no_grad():
        return sae.encode(X)


def run(script: str, *arguments: object) -> str:
    """The output of a fresh Python, which may fork: no thread of torch's is running yet."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        check=False, capture_output=True, text=True, env=environment, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


KILL_EVERYWHERE = """
    import os, signal, sys
    from pathlib import Path
    from sae_core import SAE, create

    def topk(seed):
        return create("topk", d_in=6, d_sae=12, k=3 + seed, seed=seed)

    def killed_after(steps, folder):
        child = os.fork()
        if child:
            return os.WIFSIGNALED(os.waitpid(child, 0)[1])
        left = steps
        def counted(real):
            def call(*args, **kwargs):
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return real(*args, **kwargs)
            return call
        for name in ("replace", "rename", "unlink", "chmod", "write_text"):
            setattr(Path, name, counted(getattr(Path, name)))
        os.fsync = counted(os.fsync)
        topk(2).save(folder)
        os._exit(0)

    root = Path(sys.argv[1])
    for steps in range(100):
        folder = root / f"{steps}"
        topk(1).save(folder)
        (folder / "log.jsonl").write_text("mine")
        alive = [killed_after(steps, folder), killed_after(steps, root / f"new-{steps}")]
        if not any(alive):
            break
    print(steps)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders with an old SAE in which a save of a new one was killed, each after one step more."""
    root = tmp_path_factory.mktemp("killed")
    return [root / str(step) for step in range(int(run(KILL_EVERYWHERE, root)))]


def test_a_save_killed_anywhere_leaves_the_old_sae_or_the_new_one_and_the_next_one_sweeps(killed: list[Path]) -> None:
    old, new = (latents(topk(seed, k=3 + seed).eval()) for seed in (1, 2))
    seen: list[str] = []
    assert len(killed) > 6
    for folder in killed:
        before = sorted(path.name for path in folder.iterdir())
        found = latents(SAE.load(folder))
        seen.append("old" if torch.allclose(found, old) else "new")
        assert torch.allclose(found, old) or torch.allclose(found, new), folder
        assert torch.equal(found, latents(SAE.load(folder)))
        assert {*FILES, "log.jsonl"} <= set(before)
        topk(5).save(folder)
        assert sorted(path.name for path in folder.iterdir()) == [FILES[0], "log.jsonl", FILES[1]]
        assert (folder / "log.jsonl").read_text() == "mine"
    assert seen == sorted(seen, reverse=True), "the step from the old to the new is one"
    assert {"old", "new"} == set(seen)


def test_a_save_of_a_new_folder_that_is_killed_leaves_all_of_it_or_nothing(killed: list[Path]) -> None:
    new = latents(topk(2, k=5).eval())
    folders = [folder.with_name(f"new-{folder.name}") for folder in killed]
    made = [folder for folder in folders if folder.exists()]
    assert 0 < len(made) < len(folders)
    for folder in made:
        assert torch.allclose(latents(SAE.load(folder)), new)


def test_a_reader_finishes_a_save_that_was_killed_between_its_two_files(tmp_path: Path) -> None:
    folder = topk(1).save(tmp_path / "sae")
    new = topk(2).save(tmp_path / "new")
    (new / "cfg.json").rename(folder / ".cfg.json.aaaaaaaa.tmp")
    (new / "sae_weights.safetensors").replace(folder / "sae_weights.safetensors")
    assert torch.allclose(latents(SAE.load(folder)), latents(topk(2).eval()))
    assert sorted(path.name for path in folder.iterdir()) == FILES


def test_files_of_two_saes_are_refused_even_if_they_would_fit(tmp_path: Path) -> None:
    first, second = topk(1).save(tmp_path / "a"), topk(2, k=4).save(tmp_path / "b")
    (second / "cfg.json").replace(first / "cfg.json")
    with pytest.raises(FormatError, match="belong to different SAEs, as after copying one of them alone"):
        SAE.load(first)


def test_a_config_edited_by_hand_still_belongs_to_its_weights(tmp_path: Path) -> None:
    folder = topk(1).save(tmp_path / "sae")
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"]["neuronpedia_id"] = "gpt2-small/3"
    (folder / "cfg.json").write_text(json.dumps(cfg))
    assert SAE.load(folder).metadata["neuronpedia_id"] == "gpt2-small/3"


def test_what_another_library_saved_again_is_read_as_it_is(tmp_path: Path) -> None:
    """SAELens keeps our metadata in cfg.json and writes weights that say nothing of it."""
    folder = topk(1).save(tmp_path / "sae")
    save_file(load_file(topk(2).save(tmp_path / "other") / FILES[1]), folder / FILES[1])
    assert torch.allclose(latents(SAE.load(folder)), latents(topk(2).eval()))


SAVERS_AND_A_READER = """
    import os, sys, time
    from pathlib import Path
    import torch
    from sae_core import SAE, create

    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    x = torch.ones(1, 6)

    def topk(seed):
        return create("topk", d_in=6, d_sae=12, k=3 + seed, seed=seed).eval()

    if sys.argv[3] == "exists":
        topk(0).save(folder)
    children = []
    for seed in (0, 1):
        if child := os.fork():
            children.append(child)
            continue
        sae = topk(seed)
        for _ in range(rounds):
            sae.save(folder)
        os._exit(0)
    expected = [topk(seed).encode(x) for seed in (0, 1)]
    loads = 0
    while children:
        children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
        if folder.exists():
            sae = SAE.load(folder)
            assert torch.allclose(sae.encode(x), expected[sae.config.k - 3], atol=1e-5), "a mixture"
            loads += 1
    print(loads, sorted(path.name for path in folder.iterdir()), sorted(path.name for path in folder.parent.iterdir()))
"""


@pytest.mark.parametrize(("state", "rounds"), [("exists", 60), ("new", 1)])
def test_a_reader_beside_two_savers_always_finds_one_of_them_whole(tmp_path: Path, state: str, rounds: int) -> None:
    output = run(SAVERS_AND_A_READER, tmp_path / "sae", rounds, state)
    loads, rest = output.split(" ", 1)
    assert int(loads) >= 1
    assert rest.strip() == f"{FILES} ['sae']"


def test_a_folder_that_a_killed_save_left_beside_is_swept_and_one_at_work_is_not(tmp_path: Path) -> None:
    left = tmp_path / ".sae.abcdefgh.tmp"
    for name, age in ((left, 3600), (tmp_path / ".sae.ijklmnop.tmp", 0), (tmp_path / ".sael.abcdefgh.tmp", 3600)):
        name.mkdir()
        (name / "cfg.json").write_text("{}")
        stamp = name.stat().st_mtime - age
        os.utime(name, (stamp, stamp))
    topk(1).save(tmp_path / "sae")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".sae.ijklmnop.tmp", ".sael.abcdefgh.tmp", "sae"]


def strangers_config(folder: Path) -> None:
    (folder / "cfg.json").write_text('{"lr": 1}')


def strangers_weights(folder: Path) -> None:
    save_file({"W_E": torch.ones(2)}, folder / "sae_weights.safetensors")


@pytest.mark.parametrize(
    ("stranger", "named"),
    [
        (strangers_config, r"holds a cfg\.json that is not that of an SAE"),
        (strangers_weights, r"holds a sae_weights\.safetensors of another kind"),
    ],
)
def test_somebodys_file_is_overwritten_only_when_the_caller_says_so(
    tmp_path: Path, stranger: Callable[[Path], None], named: str
) -> None:
    stranger(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FormatError, match=f"not saved: it {named}; choose another folder, or pass overwrite=True"):
        topk(1).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    topk(1).save(tmp_path, overwrite=True)
    assert torch.allclose(latents(SAE.load(tmp_path)), latents(topk(1).eval()))


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors", "training_form.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_found_before_anything_is_written(tmp_path: Path, name: str) -> None:
    old = {}
    if name == "training_form.safetensors":
        topk(1).save(tmp_path)
        old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / name).mkdir()
    with pytest.raises(FormatError, match=f"not saved: {name} is a folder there"):
        create("batchtopk", d_in=6, d_sae=12, k=2).save(tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == old


def test_somebodys_training_form_is_not_overwritten_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "training_form.safetensors"
    file.write_bytes(b"mine")
    with pytest.raises(FormatError, match=r"holds a training_form\.safetensors of another kind"):
        trained("batchtopk", k=2).save(tmp_path)
    assert file.read_bytes() == b"mine"
    trained("batchtopk", k=2).save(tmp_path, overwrite=True)
    for damaged in (b"", file.read_bytes()[:20]):
        file.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"training_form\.safetensors: damaged, or not a training form"):
            SAE.load(tmp_path, form="training")


def test_metadata_of_any_plain_kind_are_written_and_others_named(tmp_path: Path) -> None:
    sae = topk(1)
    sae.metadata = {
        "l0": np.float32(3.5),
        "steps": np.int64(7),
        "path": Path("a/b"),
        "dtype": torch.bfloat16,
        "loss": float("nan"),
        "bounds": (1, np.inf),
        "nested": {"scale": torch.tensor(2.0)},
    }
    folder = sae.save(tmp_path / "sae")
    text = (folder / "cfg.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    found = SAE.load(folder).metadata
    assert {key: found[key] for key in sae.metadata} == {
        "l0": 3.5,
        "steps": 7,
        "path": "a/b",
        "dtype": "bfloat16",
        "loss": None,
        "bounds": [1, None],
        "nested": {"scale": 2.0},
    }
    sae.metadata = {"run": {"callback": print}}
    with pytest.raises(FormatError, match=r"cfg\.json\.metadata\.run\.callback is an object of type 'builtin_function"):
        sae.save(folder)
    assert SAE.load(folder).metadata["steps"] == 7


def test_one_flipped_bit_in_any_tensor_is_found_by_its_checksum(tmp_path: Path) -> None:
    folder = topk(1).save(tmp_path / "sae")
    weights = folder / "sae_weights.safetensors"
    assert tensor_problem(weights) is None
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    problem = tensor_problem(weights)
    assert problem is not None
    assert "has changed since it was saved" in problem


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EACCES, "permission denied; check the owner"),
        (errno.EROFS, "the file system is read-only"),
    ],
)
def test_what_the_system_refuses_is_one_error_and_the_old_sae_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    folder = topk(1).save(tmp_path / "sae")

    def refuse(_handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(FormatError, match=f"sae: cannot be written: {said}"):
        topk(2).save(folder)
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert torch.allclose(latents(SAE.load(folder)), latents(topk(1).eval()))


@pytest.mark.parametrize("name", ["x" * 300, "nul\0byte", "half\ud800"])
def test_a_name_that_the_system_does_not_take_is_one_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="cannot be written"):
        topk(1).save(tmp_path / name)
    with pytest.raises(FormatError):
        SAE.load(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def trained(architecture: str, **fields: Any) -> SAE:
    """An SAE after some steps, in train mode, with whatever moves in training having moved."""
    sae = create(architecture, d_in=6, d_sae=12, seed=1, **fields).train()
    if sae.normalization.learns:
        sae.normalization.fit([X * 3])
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.01)
    for _ in range(5):
        sae.training_step(X * 3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            sae.after_step()
    return sae


@pytest.mark.parametrize(
    ("architecture", "fields", "beside"),
    [
        ("batchtopk", {"k": 2.5}, True),
        ("matryoshka_batchtopk", {"k": 3, "matryoshka_widths": (4, 12)}, True),
        ("standard", {"normalize_activations": "expected_average_only_in", "l1_coefficient": 0.3}, True),
        ("standard", {"l1_coefficient": 0.3, "lp_norm": 0.8}, False),
        ("jumprelu", {"jumprelu_bandwidth": 0.7, "l0_coefficient": 0.2}, False),
        (
            "standard",
            {"normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": 0.5},
            True,
        ),
    ],
)
def test_training_goes_on_with_what_was_saved(
    tmp_path: Path, architecture: str, fields: dict[str, Any], beside: bool
) -> None:
    sae = trained(architecture, **fields)
    folder = sae.save(tmp_path / "sae")
    assert (folder / "training_form.safetensors").exists() == beside
    again = SAE.load(folder, form="training")
    assert (again.architecture, again.training) == (architecture, True)
    assert again.config == sae.config
    assert {name: tensor.tolist() for name, tensor in again.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in sae.state_dict().items()
    }
    expected, found = sae.training_step(X), again.training_step(X)
    assert torch.equal(found.loss, expected.loss)
    if not beside:  # the inference form is the training form, and keeps the choices of the run
        assert SAE.load(folder).config == sae.config


@pytest.mark.parametrize("architecture", ["topk", "abstopk", "groupmax"])
def test_latents_are_ranked_in_further_training_as_they_were(tmp_path: Path, architecture: str) -> None:
    sae = trained(
        architecture, k=3 if architecture == "groupmax" else Schedule(6, 3), normalize_activations="layer_norm"
    )
    folder = sae.save(tmp_path / "sae")
    again = SAE.load(folder, form="training")
    assert (again.config, sorted(path.name for path in folder.iterdir())) == (sae.config, FILES)
    assert torch.allclose(again(X), sae(X), atol=1e-5)
    assert torch.allclose(again.encode(X), sae.encode(X), atol=1e-5)
    edited = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**edited, "k": 4 if architecture == "groupmax" else 2}))
    assert SAE.load(folder, form="training").config.k != sae.config.k  # pyright: ignore[reportAttributeAccessIssue]


def test_a_cross_layer_transcoder_goes_on_selecting_over_the_batch(tmp_path: Path) -> None:
    sites: dict[str, Any] = {"reads": {"a": 2, "b": 4}, "writes": {"x": 3, "y": 3}}
    sae = create("cross_layer_transcoder", d_in=6, d_sae=12, activation="batchtopk", k=2, **sites)
    sae.training_step(ActivationBatch(X, X))
    folder = sae.save(tmp_path / "sae")
    again = SAE.load(folder, form="training")
    assert again.config == sae.config
    assert torch.equal(again.eval()(X), sae.eval()(X))
    (folder / "training_form.safetensors").unlink()
    with pytest.raises(FormatError, match="saved in another form than that of training; the training form"):
        SAE.load(folder, form="training")


def test_a_fact_under_the_key_of_this_project_is_asked_to_go_elsewhere(tmp_path: Path) -> None:
    sae = topk(1)
    sae.metadata = {"sae_core": "my note"}
    with pytest.raises(FormatError, match=r"metadata\['sae_core'\] is where .* holds 'my note'; rename that key"):
        sae.save(tmp_path / "sae")
    sae.metadata = {"sae_core": None, "training_architecture": None, "sae_lens_version": None}
    assert SAE.load(sae.save(tmp_path / "sae"), form="training").config == sae.config


def test_saving_another_sae_leaves_no_training_form_of_the_last_one(tmp_path: Path) -> None:
    folder = trained("batchtopk", k=2).save(tmp_path / "sae")
    training = (folder / "training_form.safetensors").read_bytes()
    topk(1).save(folder)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    (folder / "training_form.safetensors").write_bytes(training)
    with pytest.raises(FormatError, match="belongs to another save than sae_weights"):
        SAE.load(folder, form="training")


def test_a_training_form_that_is_not_there_is_asked_for_in_words(tmp_path: Path) -> None:
    folder = trained("batchtopk", k=2).save(tmp_path / "sae")
    (folder / "training_form.safetensors").unlink()
    with pytest.raises(FormatError, match="trained as 'batchtopk' and saved as 'jumprelu'; the training form"):
        SAE.load(folder, form="training")
    assert SAE.load(folder).architecture == "jumprelu"
