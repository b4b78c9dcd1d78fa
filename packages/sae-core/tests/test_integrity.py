"""What a file may hold and what it may not: precisions, maps of memory, numbers that are none, folders for files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sae_core.format.read as reading
import torch
from sae_core import SAE, create
from sae_core.errors import ConfigError, FormatError
from sae_core.format.tensors import plain_tensor
from safetensors.torch import load_file, save_file

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
WEIGHTS = "sae_weights.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return create("jumprelu", d_in=6, d_sae=12, seed=3, jumprelu_init_threshold=0.05).save(tmp_path / "sae")


def edit_tensors(folder: Path, **changes: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file({name: changes.get(name, torch.clone)(tensor) for name, tensor in tensors.items()}, folder / WEIGHTS)


def edit_config(folder: Path, text: Callable[[str], str]) -> None:
    path = folder / "cfg.json"
    path.write_text(text(path.read_text()))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ({"W_enc": torch.bfloat16}, torch.float32),
        ({"W_enc": torch.float16, "W_dec": torch.bfloat16, "b_enc": torch.float16, "b_dec": torch.float16}, torch.float32),
        ({"b_dec": torch.float64}, torch.float64),
        ({"W_dec": torch.float8_e4m3fn}, torch.float32),
        (dict.fromkeys(("W_enc", "W_dec", "b_enc", "b_dec"), torch.float8_e5m2), torch.float32),
        (dict.fromkeys(("W_enc", "W_dec", "b_enc", "b_dec"), torch.float16), torch.float16),
    ],
)  # fmt: skip
@torch.no_grad()
def test_tensors_of_several_precisions_become_one_that_holds_them_all(
    saved: Path, dtypes: dict[str, torch.dtype], expected: torch.dtype
) -> None:
    edit_tensors(saved, **{name: lambda tensor, to=dtype: tensor.to(to) for name, dtype in dtypes.items()})
    sae = SAE.load(saved)
    assert sae.dtype == expected
    t = {name: tensor.double() for name, tensor in load_file(saved / WEIGHTS).items()}
    pre = (X.double() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    acts = torch.where(pre > t["threshold"], pre, 0.0).clamp(min=0)
    tolerance = 2e-2 if expected == torch.float16 else 1e-5
    torch.testing.assert_close(sae.encode(X).double(), acts, rtol=tolerance, atol=tolerance)
    assert SAE.load(saved, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "is quantised"),
        (lambda: torch.eye(3).to_sparse(), "is stored as sparse_coo"),
        (lambda: torch.ones(1).expand(3), "is a view that repeats its values"),
        (lambda: torch.ones(3, device="meta"), "has a shape and no values"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_layouts_that_no_product_takes_are_refused_by_name(make: Callable[[], torch.Tensor], said: str) -> None:
    with pytest.raises(FormatError, match=f"ae.pt: tensor 'W_enc' {said}"):
        plain_tensor(make(), "W_enc", "ae.pt")


def test_views_that_negate_or_conjugate_are_made_plain() -> None:
    negated = torch._neg_view(torch.ones(3))
    assert plain_tensor(negated, "W_enc", "ae.pt").numpy().tolist() == [-1.0, -1.0, -1.0]


def maps(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
@torch.no_grad()
def test_small_files_are_copied_and_large_ones_mapped_unless_the_caller_says_otherwise(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = SAE.load(saved)
    assert not maps(saved / WEIGHTS)
    expected = copied(X)
    mapped = SAE.load(saved, mmap=True)
    assert maps(saved / WEIGHTS)
    torch.testing.assert_close(mapped(X), expected, rtol=0, atol=0)
    del mapped
    monkeypatch.setattr(reading, "MAPPED_FROM", 16)
    large = SAE.load(saved)
    assert maps(saved / WEIGHTS)
    del large
    whole = SAE.load(saved, mmap=False)
    assert not maps(saved / WEIGHTS)
    os.truncate(saved / WEIGHTS, 0)  # a process that had mapped it would be killed at its next look
    torch.testing.assert_close(copied(X), expected, rtol=0, atol=0)
    torch.testing.assert_close(whole(X), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "rows", [range(2, 5), (2, 3, 4), np.array([2, 3, 4]), torch.tensor([2, 3, 4]), [np.int64(2), 3, torch.tensor(4)]]
)
@torch.no_grad()
def test_rows_are_any_sequence_of_distinct_numbers(saved: Path, rows: Any) -> None:
    torch.testing.assert_close(SAE.load(saved, rows=rows).encode(X), SAE.load(saved).encode(X)[:, 2:5])


@pytest.mark.parametrize(
    "rows", [[1, 1], [-1], [True, False], [1.5], "12", {1: 2}, 3, [], [None], np.ones((2, 2), dtype=int), torch.ones(3)]
)
def test_rows_that_are_not_are_refused_with_one_error(saved: Path, rows: Any) -> None:
    with pytest.raises(ConfigError, match="rows= must be a sequence of distinct latent numbers"):
        SAE.load(saved, rows=rows)
    with pytest.raises(ConfigError, match=r"rows must lie in \[0, d_sae = 12\), not 12"):
        SAE.load(saved, rows=[3, 12])


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 0.0, -1.0])
def test_a_factor_that_no_input_could_be_multiplied_by_is_refused(saved: Path, factor: float) -> None:
    edit_config(saved, lambda text: text.replace('"none"', '"expected_average_only_in"', 1))
    with pytest.raises(ConfigError, match="norm_scaling_factor must be a positive number"):
        SAE.load(saved, overrides={"norm_scaling_factor": factor})


def test_a_number_beyond_all_numbers_is_refused_in_the_config_and_unknown_in_the_metadata(saved: Path) -> None:
    edit_config(saved, lambda text: text.replace('"metadata": {', '"metadata": {"l0": NaN, "loss": -Infinity,', 1))
    metadata = SAE.load(saved).metadata
    assert (metadata["l0"], metadata["loss"]) == (None, None)
    edit_config(saved, lambda text: text.replace("{", '{"activation_normalization_factor": 1e999,', 1))
    with pytest.raises(FormatError, match=r"cfg\.json: 'activation_normalization_factor' is inf"):
        SAE.load(saved)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (lambda text: text.replace("{", '{"d_in": 6,', 1), r"cfg\.json: .*the key 'd_in' is given twice"),
        (lambda text: "[" * 100_000, r"cfg\.json: (nested too deeply|not valid JSON)"),
        (lambda text: "\0", r"cfg\.json: not valid JSON"),
        (lambda text: text.replace("12", "1" * 5000), r"cfg\.json: cannot be read: Exceeds the limit"),
        (
            lambda text: text.replace("12", "123456789012345678901234567890"),
            "its config asks for tensors that cannot be",
        ),
    ],
)
def test_json_that_nobody_means_is_one_error_that_names_the_file(
    saved: Path, text: Callable[[str], str], said: str
) -> None:
    edit_config(saved, text)
    with pytest.raises((FormatError, ConfigError), match=said):
        SAE.load(saved)


def test_a_folder_or_a_circle_of_links_where_a_file_should_be_is_one_error(saved: Path) -> None:
    weights = saved / WEIGHTS
    weights.unlink()
    weights.mkdir()
    with pytest.raises(FormatError, match="this is a folder, and a file is needed"):
        SAE.load(saved, format="sae_lens")
    weights.rmdir()
    weights.symlink_to(WEIGHTS)
    with pytest.raises(FormatError):
        SAE.load(saved, format="sae_lens")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        (
            "list architectures >/dev/full",
            1,
            "sae-core: error: the output cannot be written: No space left on device\n",
        ),
        ("list architectures >&-", 0, ""),
    ],
)
def test_an_output_that_nobody_takes_is_one_line(shell: str, code: int, said: str) -> None:
    command = f"{sys.executable} -c 'import sys; from sae_core.cli import main; sys.exit(main())' {shell}"
    done = subprocess.run(command, shell=True, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)
