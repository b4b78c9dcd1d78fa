"""Two dictionaries side by side, in Python and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sae_core import create
from sae_core.cli import main
from sae_core.errors import ConfigError, ShapeError
from sae_synthetic import compare_dictionaries, compare_saes, random_dictionary


def test_what_is_shared_and_what_is_not_in_a_case_worked_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.8, 0.0]])
    b = torch.tensor([[0.0, 0.0, 2.0], [3.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    found = compare_dictionaries(a, b)
    # a0 is b1, but what is best for all gives b1 to a2 (0.6), which is at -0.8 to b2; a0 and a1 take what is orthogonal.
    assert found.pairs.b_indices.tolist() == [2, 0, 1]
    assert found.consistency == pytest.approx(0.6 / 3)
    assert found.shared().tolist() == []
    assert found.shared(0.5).tolist() == [[2, 1]]
    assert found.best_in_b.tolist() == pytest.approx([1.0, 0.0, 0.6])
    assert found.best_in_a.tolist() == pytest.approx([0.0, 1.0, 0.0])
    assert found.only_in_a().tolist() == [1]
    assert found.only_in_a(0.7).tolist() == [1, 2]
    assert sorted(found.only_in_b().tolist()) == [0, 2]
    with pytest.raises(ConfigError, match="below must be a cosine"):
        found.only_in_a(2.0)


def test_a_permuted_dictionary_is_the_same_and_a_random_one_is_not() -> None:
    a = random_dictionary(64, 24, seed=1)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    found = compare_dictionaries(a, 3 * a[order])
    assert found.consistency == pytest.approx(1, abs=1e-6)
    assert found.pairs.b_indices.tolist() == torch.argsort(order).tolist()
    assert len(found.shared(0.99)) == 64
    assert len(found.only_in_a()) == len(found.only_in_b()) == 0
    other = compare_dictionaries(a, random_dictionary(64, 24, seed=2))
    assert other.consistency == pytest.approx(other.random_consistency, abs=0.05)
    assert found.random_consistency < 0.7


def test_dictionaries_of_other_activations_do_not_compare() -> None:
    plain, wide = create("topk", d_in=8, d_sae=6, k=1), create("topk", d_in=10, d_sae=6, k=1)
    with pytest.raises(ShapeError, match="one writes 8, the other 10"):
        compare_saes(plain, wide)
    split = create("topk", d_in=8, d_sae=6, k=1, reads={"x": 3, "y": 5})
    with pytest.raises(ShapeError, match="the other x: 3, y: 5"):
        compare_saes(plain, split)


def test_the_command_prints_what_both_have_and_what_one_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = create("topk", d_in=32, d_sae=20, k=2, seed=0)
    b = create("jumprelu", d_in=32, d_sae=24, seed=1)
    with torch.no_grad():
        dict(b.named_parameters())["W_dec"][4:14] = a.directions()[:10]
    a.save(tmp_path / "a")
    b.save(tmp_path / "b")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--shared", "0.9"]) == 0
    printed = capsys.readouterr().out
    assert "matched with a cosine of 0.9 or more: 10 of 20 (50%)" in printed
    assert "jumprelu" in printed
    assert "only in A: " in printed
    assert "with a random dictionary" in printed
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["latents"] == [20, 24]
    assert len(found["pairs"]) == 20
    assert found["shared"] == 10
    assert set(found["only_in_a"]) <= set(range(10, 20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "nowhere"], "nowhere: there is no such folder or file, and it is not RELEASE:ID"),
        (["{a}", "{a}", "--only", "3"], "--only must be a cosine"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create("topk", d_in=8, d_sae=6, k=1).save(tmp_path / "a")
    assert main(["compare", *(part.format(a=tmp_path / "a") for part in arguments)]) == 1
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert "Traceback" not in captured.err
