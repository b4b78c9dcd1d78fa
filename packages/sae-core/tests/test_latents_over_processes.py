"""Real processes that share out the latents of a dictionary train what one trains, save the same, and go on from it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE
from sae_core.testing.rank_processes import run_program

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("latents_process.py")
_PROGRAM = runpy.run_path(str(PROGRAM))
CASES: dict[str, Any] = _PROGRAM["CASES"]
D_SAE: int = _PROGRAM["D_SAE"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes left what they found."""
    place = tmp_path_factory.mktemp("latents")
    (place / "said").write_text(run_program(PROGRAM, place))
    return place


def loaded(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("case", CASES)
def test_processes_that_share_out_latents_train_and_save_what_one_does(folder: Path, case: str) -> None:
    alone = loaded(folder / "alone.pt")[case]
    everyone = [loaded(folder / f"found-{rank}.pt")[case] for rank in range(4)]
    for rank in everyone:
        assert len(rank["history"]) == len(alone["history"]) == 3
        for record, wanted in zip(rank["history"], alone["history"], strict=True):
            assert record == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        part = slice(rank["latents"].start, rank["latents"].stop)
        assert len(rank["latents"]) == D_SAE // 2
        assert torch.equal(rank["silent"], alone["silent"][part])
        for kind, tolerance in (("weights", 1e-5), ("moments", 1e-7)):
            for name, tensor in rank[kind].items():
                whole = alone[kind][name]
                wanted = whole[part] if tensor.shape != whole.shape else whole
                assert torch.allclose(tensor, wanted, rtol=1e-4, atol=tolerance), name
        assert rank["health"] == alone["health"]
        assert torch.equal(rank["density"], alone["density"])
        assert torch.allclose(rank["norms"], alone["norms"], rtol=1e-5)
    alike(SAE.load(everyone[0]["saved"]), SAE.load(alone["saved"]))


def test_latents_that_are_dead_are_revived_and_restarted_on_all_processes(folder: Path) -> None:
    records = loaded(folder / "alone.pt")["topk"]["history"]
    assert records[0]["loss/auxiliary_reconstruction"] > 0
    assert any(record["resampled"] >= len(_PROGRAM["SILENT"]) for record in records)


def test_a_run_file_shares_out_the_latents_and_the_first_process_speaks(folder: Path) -> None:
    alike(SAE.load(folder / "both"), SAE.load(folder / "one"))
    logs_agree(folder / "both", folder / "one")
    said = (folder / "said").read_text()
    assert said.count("both") == said.count("one") > 0


def test_the_report_is_about_all_latents(folder: Path) -> None:
    said = [sentences(folder / name / "report.html") for name in ("one", "both")]
    assert said[0] == said[1]
    assert f"{D_SAE} latents, trained on" in said[0][0]
    assert f" of {D_SAE} latents never fired" in said[0][1]


def sentences(report: Path) -> list[str]:
    """What it says of the latents, of which one is that there are so many."""
    text = report.read_text()
    places = [text.index(said) for said in (" latents, trained on", " latents never fired")]
    return [text[place - 20 : place + 20] for place in places]


def test_a_run_that_is_stopped_keeps_what_it_learnt_and_goes_on_with_the_same_bits(folder: Path) -> None:
    everyone = [loaded(folder / f"found-{rank}.pt") for rank in range(4)]
    said = everyone[0]["stopped"]
    assert said.startswith("stopped by SIGTERM; --resume goes on from ")
    assert said.endswith(f"what was learnt in 380 samples is saved in {folder / 'stopped' / 'interrupted'}")
    assert all(rank["resumed"] == "ended" for rank in everyone)
    assert SAE.load(folder / "kept").d_sae == D_SAE
    for name in ("sae_weights.safetensors", "training_form.safetensors", "cfg.json", "log.jsonl"):
        assert (folder / "stopped" / name).read_bytes() == (folder / "both" / name).read_bytes(), name
    checkpoint = sorted((folder / "both" / "checkpoints").iterdir())[-1]
    for path in checkpoint.iterdir():
        assert (folder / "stopped" / "checkpoints" / checkpoint.name / path.name).read_bytes() == path.read_bytes(), (
            path
        )


@pytest.mark.parametrize("name", ["grown", "shrunk"])
def test_a_run_goes_on_with_other_processes(folder: Path, name: str) -> None:
    """From one process to four, and from two times two to one."""
    alike(SAE.load(folder / name), SAE.load(folder / "one"))
    logs_agree(folder / name, folder / "one")


def logs_agree(found: Path, wanted: Path) -> None:
    logs = [[json.loads(line) for line in (each / "log.jsonl").read_text().splitlines()] for each in (found, wanted)]
    for record, expected in zip(*logs, strict=True):
        assert record.keys() == expected.keys()
        numbers = {name: value for name, value in expected.items() if value is not None}
        assert {name: record[name] for name in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-5)
        assert {name for name, value in record.items() if value is None} == set(expected) - set(numbers)


def alike(found: SAE, wanted: SAE) -> None:
    for name, tensor in wanted.state_dict().items():
        assert torch.allclose(found.state_dict()[name], tensor, rtol=1e-5, atol=1e-5), name
