"""Damaged files of every format: refused with one error of the project, or read with the numbers of the good file.

Small good files of each format are damaged at random, from fixed seeds: bytes flipped, cut and inserted; settings replaced by
what no writer writes; tensors of another precision, shape or layout; folders and links where files should be. Nothing but
`SaeCoreError` may come out. What loads must compute what the good file computes, except where a file has nothing by which a
change could be told from what somebody wrote (`inherent`): digits of a setting, and tensors of files without checksums.

    python tests/test_fuzz_formats.py 1000        # more mutations of each format, and a table of what became of them
"""

from __future__ import annotations

import importlib.util
import io
import json
import random
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sae_core import SAE, create
from sae_core.errors import SaeCoreError
from sae_core.format.files import LocalFiles
from sae_core.format.read import read_sae
from safetensors.torch import load_file, save_file

ROUNDS = 40
PACKAGES = Path(__file__).parent.parent / "packages"
ODD: tuple[Any, ...] = (
    None, "", "x", -1, 0, 1, 2**70, 1e300, 0.5, float("inf"), True, False, [], {}, [[]], {"a": {}}, "none", "\ud800",
)  # fmt: skip


@dataclass(frozen=True)
class Good:
    """Good files in `root`; `path` is what is loaded, `facts` what the caller must say."""

    root: Path
    path: str
    format: str
    facts: dict[str, Any]

    def load(self) -> SAE:
        return read_sae(LocalFiles(self.root), self.path, format=self.format, overrides=self.facts or None)

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.is_file())


def module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"fuzzed_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def native(architecture: str, **fields: Any) -> Callable[[Path], Good]:
    def make(root: Path) -> Good:
        sae = create(architecture, d_in=8, d_sae=24, seed=1, **fields)
        sae.metadata = {"hook_name": "blocks.1.hook_resid_post", "model_name": "gpt2"}
        sae.save(root, overwrite=True)
        return Good(root, "", "sae_lens", {})

    return make


def golden(folder: Path) -> Callable[[Path], Good]:
    def make(root: Path) -> Good:
        case = json.loads((folder / "case.json").read_text())
        shutil.copytree(folder / "files", root / case["repository"])
        return Good(root / case["repository"], case["path"], case["loader"], case.get("facts", {}))

    return make


def specimen(make: Callable[[Path], Any]) -> Callable[[Path], Good]:
    def made(root: Path) -> Good:
        found = make(root)
        return Good(root, found.path, found.format, found.facts)

    return made


def formats() -> Iterator[tuple[str, Callable[[Path], Good]]]:
    yield "sae_lens (ours)", native("jumprelu", jumprelu_init_threshold=0.05)
    yield (
        "sae_lens (SAELens)",
        lambda root: Good(
            Path(shutil.copytree(PACKAGES / "sae-core/tests/golden/sae_lens_files/6.28.0/topk_rescale", root / "sae")),
            "",
            "sae_lens",
            {},
        ),
    )
    for name, make in module(PACKAGES / "sae-pretrained/tests/test_loader_strictness.py").SPECIMENS.items():
        yield name, specimen(make)
    for folder in sorted((PACKAGES / "sae-loaders-gemmascope/tests/golden/foreign").iterdir()):
        yield folder.name, golden(folder)


FORMATS = dict(formats())


# ----------------------------------------------------------------------------------------------------------------------
# Mutations: each returns what it did, and whether a reader can tell the result from a file that somebody wrote so


def mutate_bytes(good: Good, chance: random.Random) -> tuple[str, bool]:
    path = chance.choice(good.files())
    data = bytearray(path.read_bytes())
    original = bytes(data)
    at = chance.randrange(len(data))
    how = chance.choice(["flip", "set", "cut", "insert", "delete", "zeros", "repeat"])
    if how == "flip":
        data[at] ^= 1 << chance.randrange(8)
    elif how == "set":
        data[at] = chance.randrange(256)
    elif how == "cut":
        del data[at:]
    elif how == "insert":
        data[at:at] = chance.randbytes(chance.randrange(1, 9))
    elif how == "delete":
        del data[at : at + chance.randrange(1, 9)]
    elif how == "zeros":
        data[at : at + 16] = bytes(len(data[at : at + 16]))
    else:
        data[at:at] = data[max(0, at - 32) : at]
    path.write_bytes(data)
    return f"{how} at {at} of {path.name}", inherent(path, original, bytes(data))


def inherent(path: Path, before: bytes, after: bytes) -> bool:
    """Whether nothing in a file of this kind tells the change from what somebody might have written."""
    if path.suffix == ".safetensors":
        data = 8 + int.from_bytes(before[:8], "little")
        return before[:data] == after[:data] and len(before) == len(after)
    if path.suffix in (".json", ".yaml"):
        try:
            settings = [parsed(path, text) for text in (before, after)]
        except (ValueError, yaml.YAMLError, RecursionError):
            return False
        return all(isinstance(one, dict) for one in settings) and values_changed_only(*settings)
    if before.startswith(b"{"):  # a line of JSON before the tensors
        lines = [data.partition(b"\n") for data in (before, after)]
        try:
            settings = [json.loads(line) for line, _, _ in lines]
        except ValueError:
            return False
        return lines[0][2] == lines[1][2] and values_changed_only(*settings)
    return False


def parsed(path: Path, text: bytes) -> Any:
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text.decode())


def values_changed_only(before: Any, after: Any) -> bool:
    """The same settings with other values of the same kind, or without some that have a default."""
    if isinstance(before, dict) and isinstance(after, dict):
        return set(after) <= set(before) and all(values_changed_only(before[key], after[key]) for key in after)
    if isinstance(before, bool) or isinstance(after, bool):
        return type(before) is type(after)
    if isinstance(before, int | float) and isinstance(after, int | float):
        return True
    return type(before) is type(after)


def mutate_settings(good: Good, chance: random.Random) -> tuple[str, bool]:
    configs = [path for path in good.files() if path.suffix in (".json", ".yaml")]
    if not configs:
        return mutate_bytes(good, chance)
    path = chance.choice(configs)
    before = parsed(path, path.read_bytes())
    whole = json.loads(json.dumps(before))
    section = whole
    while (
        inner := [value for value in section.values() if isinstance(value, dict) and value]
    ) and chance.random() < 0.5:
        section = chance.choice(inner)
    key = chance.choice([*section, "surprise"])
    if chance.random() < 0.2:
        section.pop(key, None)
        what = f"without {key}"
    else:
        section[key] = chance.choice(ODD)
        what = f"{key} = {section[key]!r}"
    if path.suffix == ".json":
        path.write_text(json.dumps(whole))
    else:
        path.write_text(yaml.safe_dump(whole))
    return f"{what} in {path.name}", values_changed_only(before, whole)


def mutate_tensors(good: Good, chance: random.Random) -> tuple[str, bool]:
    weights = [path for path in good.files() if path.suffix in (".safetensors", ".npz", ".pt", ".pth")]
    path = chance.choice(weights)
    head = b""
    if path.suffix == ".safetensors":
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    else:
        data = path.read_bytes()
        head = data[: data.index(b"\n") + 1] if data.startswith(b"{") else b""
        tensors = torch.load(io.BytesIO(data[len(head) :]), weights_only=True)
    names = [
        name for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    ]
    name = chance.choice(names)
    tensor = tensors[name]
    changes: dict[str, Callable[[], torch.Tensor | None]] = {
        "half": tensor.half,
        "bfloat16": tensor.bfloat16,
        "double": tensor.double,
        "float8": lambda: tensor.to(torch.float8_e4m3fn),
        "integers": tensor.long,
        "truth values": tensor.bool,
        "complex": lambda: tensor.to(torch.complex64),
        "not finite": lambda: tensor * float(chance.choice(["nan", "inf", "-inf"])),
        "empty": lambda: torch.empty(0),
        "one dimension more": lambda: tensor[None],
        "flat": lambda: tensor.reshape(-1),
        "transposed": lambda: tensor.t().contiguous() if tensor.dim() == 2 else tensor[None],
        "gone": lambda: None,
    }
    if path.suffix in (".pt", ".pth"):
        changes |= {
            "sparse": tensor.to_sparse,
            "negated view": lambda: torch._neg_view(-tensor) if tensor.dim() else tensor,
            "repeated": lambda: (
                tensor.reshape(-1)[:1].expand(tensor.numel()).reshape(tensor.shape)
                if tensor.dim() == 1
                else tensor.sum().expand(tensor.shape)
            ),
            "meta": lambda: tensor.to("meta"),
            "a number": lambda: 3.5,  # pyright: ignore[reportReturnType]
        }
    how = chance.choice(sorted(changes))
    changed = changes[how]()
    if changed is None:
        del tensors[name]
    else:
        tensors[name] = changed
    try:
        if path.suffix == ".safetensors":
            save_file(tensors, path)
        elif path.suffix == ".npz":
            arrays = {key: value.float() if value.dtype == torch.bfloat16 else value for key, value in tensors.items()}
            np.savez(path, **{key: value.numpy() for key, value in arrays.items()})
        else:
            buffer = io.BytesIO()
            torch.save(tensors, buffer)
            path.write_bytes(head + buffer.getvalue())
    except (TypeError, RuntimeError, KeyError, NotImplementedError):
        return mutate_bytes(good, chance)  # no such tensor can be written
    rounds = how in ("half", "bfloat16", "float8", "transposed", "gone") or (how == "integers" and tensor.dim() == 0)
    return f"{name} {how} in {path.name}", rounds


def mutate_place(good: Good, chance: random.Random) -> tuple[str, bool]:
    path = chance.choice(good.files())
    how = chance.choice(["folder", "empty", "link to itself", "link to nothing", "gone", "archive bomb"])
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "empty":
        path.touch()
    elif how == "link to itself":
        path.symlink_to(path.name)
    elif how == "link to nothing":
        path.symlink_to("nowhere")
    elif how == "archive bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("W_enc.npy", bytes(10**6))
    return f"{how} for {path.name}", how == "gone" and path.suffix in (".json", ".yaml")


MUTATIONS = (mutate_bytes, mutate_bytes, mutate_settings, mutate_tensors, mutate_place)


def outputs(sae: SAE, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return sae.encode(x), sae(x)


def fuzz(name: str, root: Path, rounds: int) -> Counter[str]:
    """How many mutations of a format were refused, read with the same numbers, or with others that are inherent.

    Raises AssertionError for any other outcome, with what was done.
    """
    (root / "good").mkdir()
    good = FORMATS[name](root / "good")
    reference = good.load()
    x = 4 * torch.randn(3, reference.d_in, generator=torch.Generator().manual_seed(5))
    expected = outputs(reference, x)
    counts: Counter[str] = Counter()
    for seed in range(rounds):
        chance = random.Random(f"{name} {seed}")
        copy = root / "copy"
        shutil.copytree(root / "good", copy)
        bad = Good(copy / good.root.relative_to(root / "good"), good.path, good.format, good.facts)
        what, cannot_be_told = MUTATIONS[seed % len(MUTATIONS)](bad, chance)
        what = f"{name}, seed {seed}: {what}"
        try:
            found = outputs(bad.load(), x)
        except SaeCoreError:
            counts["refused"] += 1
        except Exception as error:  # what must not come out
            raise AssertionError(f"{what}: raw {type(error).__name__}: {error}") from error
        else:
            same = all(
                a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5)
                for a, b in zip(found, expected, strict=True)
            )
            assert same or cannot_be_told, f"{what}: accepted with other numbers"
            counts["same" if same else "inherent"] += 1
        shutil.rmtree(copy)
    return counts


@pytest.mark.filterwarnings("ignore:.*decoders added up:UserWarning")
@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_refused_in_one_way_or_mean_the_same(name: str, tmp_path: Path) -> None:
    counts = fuzz(name, tmp_path, ROUNDS)
    assert sum(counts.values()) == ROUNDS
    assert counts["refused"] > ROUNDS / 4


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(f"{'format':28} tried  refused  same  inherent  raw or wrong")
    for each in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = fuzz(each, Path(folder), int(sys.argv[1]))
            except AssertionError as failure:
                print(f"{each:28} {failure}")
                continue
        print(f"{each:28} {sum(made.values()):5}  {made['refused']:7}  {made['same']:4}  {made['inherent']:8}  0")
