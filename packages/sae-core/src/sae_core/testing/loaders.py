"""What every loader promises: it knows its own files and no others, reads all of them or says why not, and changes nothing.

Most of it can only be seen on files of the format. They are named by `path`, a folder or a file; `inside` is the folder or file
in it that holds the SAE, where that is not all of it; `overrides` are facts that the files lack.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor

from sae_core.errors import ConfigError, FormatError, SaeCoreError
from sae_core.format.files import LocalFiles
from sae_core.format.read import Hints, find_loader, read_sae
from sae_core.plugins import get_registry
from sae_core.plugins.errors import one_line
from sae_core.plugins.records import CORE
from sae_core.protocols import FileSource, LoadedSAE, Loader
from sae_core.sae import SAE, create
from sae_core.testing.kit import Check, NotApplicable, Subject, check_class
from sae_core.testing.small import batch_for, is_finite, same

__all__ = [
    "CHECKS",
    "check_config_alone",
    "check_damage",
    "check_every_tensor_counts",
    "check_junk_is_an_answer",
    "check_loads",
    "check_overrides",
    "check_own_files_are_recognised",
    "check_rows",
    "check_strangers_are_left_alone",
]

_STRANGE = "no_such_tensor_of_any_format"
_WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")


def check_strangers_are_left_alone(subject: Subject) -> None:
    """`matches` is False for files of others: nothing, a text, a language model, an adapter, an SAE of sae-core's own format.

    It judges by names and by what small config files say; names that everybody uses (config.json) need a second look inside.
    """
    loader = _loader(subject)
    for what, write in _STRANGERS.items():
        folder = subject.folder / what.replace(" ", "_")
        folder.mkdir()
        write(folder)
        before = _digests(folder)
        found = loader.matches(LocalFiles(folder))
        own = what == "an SAE of sae-core" and subject.contribution.distribution == CORE
        assert found is own, f"matches() is {found!r} for {what}"
        assert _digests(folder) == before, f"matches() changes files of {what}"


def check_junk_is_an_answer(subject: Subject) -> None:
    """Files of any name with anything in them give an answer or one error of sae-core's, never a raw exception."""
    loader = _loader(subject)
    junk = {
        "empty": b"",
        "bytes": bytes(range(256)) * 4,
        "no_json": b"{",
        "a_list": b"[1, 2]",
        "a_null": b"null",
        "odd_json": b'{"trainer": 3, "architecture": [], "model_type": {}, "k": "x", "hook_name": null}',
    }
    names = (
        "cfg.json",
        "config.json",
        "hyperparams.json",
        "sae.safetensors",
        "sae_weights.safetensors",
        "ae.pt",
        "params.npz",
    )
    for what, content in junk.items():
        folder = subject.folder / what
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(content)
        source = LocalFiles(folder)
        for place in ("", *names):
            for ask in (loader.matches, loader.load):
                try:
                    ask(source, place)
                except SaeCoreError:
                    continue
                except Exception as error:
                    raise AssertionError(
                        f"{ask.__name__}() of {place or 'a folder'} with junk ({what}) raises {one_line(error)}"
                    ) from error


def check_own_files_are_recognised(subject: Subject) -> None:
    """`matches` is True for its own files and no other loader claims them; where files say nothing, `hint` does."""
    own = _example(subject)
    loader = _loader(subject)
    found = loader.matches(own.source, own.inside)
    if found is not True:
        hint = loader.hint(own.source, own.inside) if isinstance(loader, Hints) else None
        assert hint, f"matches() is {found!r} for files of its own, and there is no hint()"
        return
    name = find_loader(own.source, own.inside)
    assert name == subject.contribution.qualified, f"the files are taken for those of {name}"


def check_loads(subject: Subject) -> None:
    """`load` gives an architecture that is installed, fields of its config and exactly its tensors; files stay as they are."""
    own = _example(subject)
    before = _digests(own.root)
    loaded = own.load(_loader(subject))
    assert isinstance(loaded, LoadedSAE), f"load() gave {type(loaded).__name__}, not a LoadedSAE"
    get_registry().find("architecture", loaded.architecture)
    try:
        json.dumps(dict(loaded.metadata), allow_nan=False, default=_refused)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"metadata are no plain data: {error}") from None
    one, two = own.sae(subject), own.sae(subject)
    assert not one.training, "the SAE is in train mode"
    x = batch_for(one, 16)
    is_finite(one(x), "the output of the loaded SAE")
    same(two(x), one(x), "the output of the SAE loaded twice", 0.0)
    assert _digests(own.root) == before, "load() changes the files"


def check_config_alone(subject: Subject) -> None:
    """With ``weights=False`` architecture and config are the same, and no tensor is read."""
    own = _example(subject)
    whole, config = own.load(_loader(subject)), own.load(_loader(subject), weights=False)
    assert not config.tensors, f"weights=False gives tensors: {', '.join(config.tensors)}"
    assert config.architecture == whole.architecture, (
        f"weights=False says {config.architecture}, not {whole.architecture}"
    )
    differing = [key for key in {*whole.config, *config.config} if whole.config.get(key) != config.config.get(key)]
    assert not differing, f"weights=False gives another config: {', '.join(sorted(differing))}"


def check_rows(subject: Subject) -> None:
    """`rows` gives those latents in that order, with ``d_sae`` their number; where latents compete, sae-core refuses."""
    own = _example(subject)
    whole = own.sae(subject)
    rows = [whole.d_sae - 1, 0]
    some = own.load(_loader(subject), rows=rows)
    assert some.config.get("d_sae") == len(rows), f"rows={rows} gives d_sae {some.config.get('d_sae')!r}"
    if not whole.independent_latents:
        return
    found, x = own.sae(subject, rows=rows), batch_for(whole, 16)
    same(found.encode(x), whole.encode(x)[:, rows], f"latents {rows} loaded alone and among all")


def check_overrides(subject: Subject) -> None:
    """A fact that the format does not know is refused, not ignored: it may be a misspelt one."""
    own = _example(subject)
    try:
        own.load(_loader(subject), overrides={**own.overrides, "no_such_fact_of_any_format": 1})
    except SaeCoreError:
        return
    raise AssertionError("overrides={'no_such_fact_of_any_format': 1} was accepted")


def check_every_tensor_counts(subject: Subject) -> None:
    """A tensor too many is refused and so is the lack of the largest one, each with an error that names file or tensor."""
    own = _example(subject).copy(subject.folder / "copy")
    loader = _loader(subject)
    tried = 0
    for name in own.weights(loader):
        path = own.root / name
        content = path.read_bytes()
        read = _tensors(path)
        if read is None:
            continue
        tried += 1
        tensors, write = read
        largest = max(tensors, key=lambda key: tensors[key].numel())
        for what, changed in (
            (f"a tensor {_STRANGE!r} too many", {**tensors, _STRANGE: torch.zeros(3)}),
            (f"{largest!r} missing", {key: value for key, value in tensors.items() if key != largest}),
        ):
            write(changed)
            _refused_by(own, subject, f"{name} with {what}")
        path.write_bytes(content)
    if not tried:
        raise NotApplicable("no safetensors, npz or pt file is read")


def check_damage(subject: Subject) -> None:
    """A file that is cut off, empty or gone is one FormatError, never a raw exception of torch, numpy or json."""
    own = _example(subject).copy(subject.folder / "copy")
    for name in own.weights(_loader(subject)):
        path = own.root / name
        content = path.read_bytes()
        for what, damaged in (("cut off", content[: len(content) // 2]), ("empty", b"")):
            path.write_bytes(damaged)
            _refused_by(own, subject, f"{name} {what}")
        path.unlink()
        _refused_by(own, subject, f"{name} gone")
        path.write_bytes(content)


# -- files of the format ------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class _Example:
    """Files of the format: where they are, where in them the SAE is, and what must be said about them."""

    root: Path
    inside: str
    overrides: Mapping[str, Any]

    @property
    def source(self) -> LocalFiles:
        return LocalFiles(self.root)

    def load(self, loader: Loader, **changes: Any) -> LoadedSAE:
        arguments: dict[str, Any] = {"overrides": self.overrides or None, **changes}
        return loader.load(self.source, self.inside, **arguments)

    def sae(self, subject: Subject, rows: Sequence[int] | None = None) -> SAE:
        qualified = subject.contribution.qualified
        sae = read_sae(self.source, self.inside, format=qualified, overrides=self.overrides or None, rows=rows)
        return cast("SAE", sae)

    def copy(self, to: Path) -> _Example:
        to = to / self.root.name  # some formats say things in the name of their folder
        shutil.copytree(self.root, to)
        return _Example(to, self.inside, self.overrides)

    def weights(self, loader: Loader) -> list[str]:
        """The weights files that loading opens."""
        source = _Watched(self.source)
        loader.load(source, self.inside, overrides=self.overrides or None)
        return sorted(name for name in source.opened if name.endswith(_WEIGHTS))


@final
@dataclass
class _Watched:
    """A file source that notes what is opened."""

    behind: FileSource
    opened: set[str] = field(default_factory=set[str])

    @property
    def location(self) -> str:
        return self.behind.location

    def files(self) -> Sequence[str]:
        return self.behind.files()

    def exists(self, name: str) -> bool:
        return self.behind.exists(name)

    def path(self, name: str) -> Path:
        self.opened.add(name)
        return self.behind.path(name)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        self.opened.add(name)
        return self.behind.read_range(name, start, stop)


def _loader(subject: Subject) -> Loader:
    return cast("Loader", subject.new())


def _example(subject: Subject) -> _Example:
    settings = subject.settings
    if unknown := sorted(set(settings) - {"path", "inside", "overrides"}):
        raise ConfigError(f"a loader is checked with path, inside and overrides; {unknown[0]!r} is none of them")
    if "path" not in settings:
        raise NotApplicable("needs files of the format: path=FOLDER OR FILE")
    path = Path(settings["path"])
    if path.is_file():
        return _Example(path.parent, path.name, settings.get("overrides", {}))
    LocalFiles(path)  # raises where there is nothing
    return _Example(path, str(settings.get("inside", "")), settings.get("overrides", {}))


def _refused_by(own: _Example, subject: Subject, what: str) -> None:
    try:
        own.sae(subject)
    except FormatError:
        return
    except Exception as error:
        raise AssertionError(f"{what} raises {one_line(error)}, not a FormatError") from error
    raise AssertionError(f"{what} was accepted")


def _tensors(path: Path) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], None]] | None:
    """The tensors of a weights file, and how to write it with others; None where it holds no plain mapping of them."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        with cast("Any", safe_open(path, framework="pt")) as file:
            metadata = file.metadata()
        return load_file(path), lambda tensors: save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata
        )
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            read = {name: torch.from_numpy(arrays[name]) for name in arrays.files}

        def write_arrays(tensors: dict[str, Tensor]) -> None:
            with zipfile.ZipFile(path, "w") as archive:
                for name, tensor in tensors.items():
                    buffer = io.BytesIO()
                    np.save(buffer, tensor.numpy(), allow_pickle=False)
                    archive.writestr(f"{name}.npy", buffer.getvalue())

        return read, write_arrays
    try:
        whole: Any = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # noqa: BLE001 - something before or around the tensors, which only the loader knows
        return None
    places = [whole, *(whole.values() if isinstance(whole, dict) else ())]
    for place in places:
        if isinstance(place, dict):
            tensors = {key: value for key, value in cast("dict[str, Any]", place).items() if isinstance(value, Tensor)}
            if tensors:
                return tensors, _writer_of_pt(path, whole, cast("dict[str, Any]", place))
    return None


def _writer_of_pt(path: Path, whole: Any, place: dict[str, Any]) -> Callable[[dict[str, Tensor]], None]:
    others = {key: value for key, value in place.items() if not isinstance(value, Tensor)}

    def write(tensors: dict[str, Tensor]) -> None:
        place.clear()
        place.update({**others, **tensors})
        torch.save(whole, path)

    return write


def _digests(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _refused(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


# -- files of others ----------------------------------------------------------------------------------------------------


def _safetensors(path: Path, **shapes: tuple[int, ...]) -> None:
    from safetensors.torch import save_file

    save_file({name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}, path)


def _text(folder: Path) -> None:
    (folder / "README.md").write_text("# Weights\n\nSee the paper.\n")
    (folder / "results.json").write_text('{"loss": 0.5}')


def _language_model(folder: Path) -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 8, "vocab_size": 20}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
    _safetensors(folder / "model.safetensors", transformer__wte__weight=(20, 8), transformer__ln_f__weight=(8,))


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}))
    _safetensors(folder / "adapter_model.safetensors", q_proj__lora_A__weight=(4, 8), q_proj__lora_B__weight=(8, 4))


def _image_model(folder: Path) -> None:
    torch.save({"conv.weight": torch.zeros(4, 3, 3, 3), "fc.bias": torch.zeros(10)}, folder / "model.pt")
    (folder / "args.yaml").write_text("lr: 0.1\nepochs: 90\n")


def _own(folder: Path) -> None:
    create("standard", d_in=8, d_sae=16).save(folder / "sae")
    for path in (folder / "sae").iterdir():
        path.rename(folder / path.name)
    (folder / "sae").rmdir()


_STRANGERS: dict[str, Callable[[Path], None]] = {
    "an empty folder": lambda _: None,
    "a text": _text,
    "a language model": _language_model,
    "an adapter": _adapter,
    "an image model": _image_model,
    "an SAE of sae-core": _own,
}

CHECKS: tuple[Check, ...] = (
    check_class,
    check_strangers_are_left_alone,
    check_junk_is_an_answer,
    check_own_files_are_recognised,
    check_loads,
    check_config_alone,
    check_rows,
    check_overrides,
    check_every_tensor_counts,
    check_damage,
)
