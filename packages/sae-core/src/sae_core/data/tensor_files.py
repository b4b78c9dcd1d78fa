"""Activations that are already on disk: safetensors or .npy files of shape (rows, d_in), shuffled by index.

The files are memory-mapped; what is shuffled each epoch is row numbers, so the rows themselves are read once an epoch and
never held together. Files of targets, row by row what belongs to the inputs, make it a source for transcoders. The last part
of the rows can be held out: neighbours in a file are often neighbours in a text, so it is one piece and not rows in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, final

import torch
from torch import Tensor

from sae_core.config import check_fields, option, require
from sae_core.errors import DataError
from sae_core.format.files import read_safetensors
from sae_core.protocols import ActivationBatch
from sae_core.sites import Sites

if TYPE_CHECKING:
    from sae_core.sae import SAE

__all__ = ["PartBatches", "RowBatches", "TensorFiles", "TensorFilesConfig", "TensorFilesHeldOut"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TensorFilesConfig:
    """Config of `TensorFiles`."""

    paths: list[Path] = option(help="files, or folders whose .safetensors and .npy files are all read")
    key: str = option(default="activations", help="name of the tensor in each safetensors file")
    target_paths: list[Path] = option(
        default_factory=list, help="files of what a transcoder is to predict, row by row what belongs to those of paths"
    )
    target_key: str | None = option(default=None, help="name of the tensor in those; null: key")
    reads: dict[str, int] = option(
        default_factory=dict,
        help="widths of the sites that stand side by side in a row, by name; they add up to its width",
    )
    writes: dict[str, int] = option(default_factory=dict, help="widths of the sites in a row of targets, by name")
    held_out: float = option(default=0.0, help="fraction of the rows, the last ones, that training does not see")
    epochs: int = option(default=1, help="passes over all rows, each in an order of its own")
    shuffle: bool = option(default=True, help="false reads rows in the files' order")
    seed: int = option(default=0, help="seed of the order")

    def __post_init__(self) -> None:
        check_fields(self)
        require(len(self.paths) > 0, "paths must name at least one file or folder")
        require(self.epochs > 0, f"epochs must be positive, not {self.epochs}")
        require(0 <= self.held_out < 1, f"held_out is a fraction in [0, 1), not {self.held_out}")
        for name in ("target_key", "writes"):
            require(bool(self.target_paths) or not getattr(self, name), f"{name} is of targets; give target_paths, too")


@dataclass(frozen=True, kw_only=True)
class TensorFilesHeldOut:
    """What a run file may say of measuring on the rows held out."""

    rows: int = option(default=65_536, help="rows measured on, the first of those held out")

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.rows > 1, f"rows must be at least 2, not {self.rows}")


def _some_rows(folder: Path) -> list[str]:
    """A small file, for the checks of sources."""
    import numpy as np

    path = folder / "rows.npy"
    np.save(path, torch.randn(200, 8, generator=torch.Generator().manual_seed(0)).numpy())
    return [str(path)]


_MEASURED_AT_ONCE = 1024


@final
class TensorFiles:
    """Rows of activations from files, as pairs where there are targets. Raises DataError for files that cannot be read,
    disagree about the width, or hold other numbers of inputs and targets.
    """

    config_class: ClassVar[type] = TensorFilesConfig
    held_out_class: ClassVar[type[TensorFilesHeldOut]] = TensorFilesHeldOut
    example: ClassVar[Mapping[str, Any]] = {"paths": _some_rows}

    def __init__(self, config: TensorFilesConfig) -> None:
        self.config = config
        self._inputs = _Rows(config.paths, config.key)
        self._targets = _Rows(config.target_paths, config.target_key or config.key) if config.target_paths else None
        self._sites = Sites.of(config.reads, self._inputs.width, "reads").widths
        self._target_sites: Mapping[str, int] = {}
        if self._targets is not None:
            self._target_sites = Sites.of(config.writes, self._targets.width, "writes").widths
            if self._targets.rows != self._inputs.rows:
                raise DataError(
                    f"{self._inputs.rows} rows in {_listed(config.paths)}, but {self._targets.rows} rows of targets in "
                    f"{_listed(config.target_paths)}; every row has a target"
                )
        kept = round(self._inputs.rows * config.held_out)
        if config.held_out and not 1 < kept < self._inputs.rows:
            raise DataError(
                f"held_out: {config.held_out:g} of {self._inputs.rows} rows leaves {kept} to measure on and "
                f"{self._inputs.rows - kept} to train on"
            )
        self._training_rows = self._inputs.rows - kept

    @property
    def sites(self) -> Mapping[str, int]:
        """Those that the config names; else one, without a name."""
        return self._sites

    @property
    def target_sites(self) -> Mapping[str, int]:
        """Those of the targets; empty where there are none."""
        return self._target_sites

    @property
    def width(self) -> int:
        """Width of the activations."""
        return self._inputs.width

    @property
    def rows(self) -> int:
        """Number of rows to train on in all files together."""
        return self._training_rows

    def batches(self, batch_size: int) -> RowBatches[Any]:
        """Batches (batch_size, d_in), or pairs, from the first one; the last one of an epoch may be smaller."""
        return self._batches_of(self._read, batch_size)

    def parts(self, batch_size: int, rank: int, ranks: int) -> PartBatches[Any]:
        """For each of the `batches` the rows of one of several processes, the only ones that it reads."""
        return PartBatches(self._read, self._batches_of(lambda numbers: numbers, batch_size), rank, ranks)

    def fingerprint(self) -> str:
        """Of the numbers of rows and of some of the rows."""
        import hashlib

        some = self._read(torch.linspace(0, self.rows - 1, min(self.rows, 16)).long())
        pair = some if isinstance(some, ActivationBatch) else ActivationBatch(some)
        parts = [part for part in (pair.inputs, pair.targets) if part is not None]
        found = hashlib.sha256(str(self.rows).encode())
        for part in parts:
            found.update(part.contiguous().view(torch.uint8).numpy().tobytes())
        return f"{self.rows} rows, {found.hexdigest()[:12]}"

    def held_out(self, config: TensorFilesHeldOut) -> Callable[[SAE], Mapping[str, float]]:
        """A function that measures explained variance and L0 on rows held out. Raises ConfigError where there are none."""
        require(
            self.config.held_out > 0,
            "eval: no rows are held out from training (source.held_out is 0), so there is nothing to measure on",
        )
        numbers = torch.arange(self.rows, min(self._inputs.rows, self.rows + config.rows))

        def measure(sae: SAE) -> Mapping[str, float]:
            from sae_core.data.wiring import Wiring
            from sae_core.metrics import L0, ExplainedVariance

            wiring = Wiring.between(sae, self)
            variance, l0 = ExplainedVariance(), L0()
            was_training = sae.training
            sae.eval()
            try:
                with torch.no_grad():
                    for some in numbers.split(_MEASURED_AT_ONCE):
                        batch = self._read(some)
                        pair = wiring(batch if isinstance(batch, ActivationBatch) else ActivationBatch(batch))
                        x = pair.inputs.to(sae.device)
                        wanted = x if pair.targets is None else pair.targets.to(sae.device)
                        codes = sae.encode_sparse(x)
                        variance.update(wanted, sae.decode(codes, x=x), codes)
                        l0.update(x, x, codes)
            finally:
                sae.train(was_training)
            return {**variance.compute(), **l0.compute()}

        return measure

    def metadata(self) -> Mapping[str, Any]:
        """Where the activations came from."""
        return {"dataset_path": ", ".join(str(path.absolute()) for path in self.config.paths)}

    def _batches_of(self, read: Callable[[Tensor], T], batch_size: int) -> RowBatches[T]:
        config = self.config
        seed = config.seed if config.shuffle else None
        return RowBatches(read, self.rows, batch_size, epochs=config.epochs, seed=seed)

    def _read(self, chosen: Tensor) -> Tensor | ActivationBatch:
        inputs = self._inputs.read(chosen)
        return inputs if self._targets is None else ActivationBatch(inputs, self._targets.read(chosen))


@final
class _Rows:
    """The rows of some files together, in the widest precision among them."""

    def __init__(self, paths: Sequence[Path], key: str) -> None:
        self._parts = [_open(path, key) for path in _expand(paths)]
        widths = {part.shape[1] for part in self._parts}
        if len(widths) != 1:
            raise DataError(f"files of different widths: {sorted(widths)} in {_listed(paths)}")
        self.width = widths.pop()
        self._dtype = reduce(torch.promote_types, (part.dtype for part in self._parts))
        self._starts = torch.tensor([0, *(part.shape[0] for part in self._parts)]).cumsum(0)
        self.rows = int(self._starts[-1])

    def read(self, chosen: Tensor) -> Tensor:
        """(n, width) the rows of these numbers."""
        part_of = torch.bucketize(chosen, self._starts, right=True) - 1
        batch = torch.empty(chosen.numel(), self.width, dtype=self._dtype)
        for number in part_of.unique().tolist():
            here = part_of == number
            batch[here] = self._parts[number][chosen[here] - self._starts[number]].to(batch.dtype)
        return batch


def _open(path: Path, key: str) -> Tensor:
    if path.suffix == ".npy":
        import numpy as np

        try:
            tensor = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        except (ValueError, TypeError, OSError) as error:
            raise DataError(f"{path}: not a readable .npy file of numbers: {error}") from None
    else:
        tensors = read_safetensors(path)
        if key not in tensors:
            raise DataError(f"{path}: no tensor {key!r}; it holds {', '.join(tensors)}. Set key=")
        tensor = tensors[key]
    if tensor.dim() < 2 or not tensor.is_floating_point() or tensor.numel() == 0:
        raise DataError(
            f"{path}: activations must be (rows, d_in) of floating point, found {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor.reshape(-1, tensor.shape[-1])


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


@final
class RowBatches(Generic[T]):
    """Batches of rows by number, `epochs` times over all `rows`, each time in another order; None for `seed` keeps order.

    `read` gives the rows of the numbers (n,) that it is called with. The place can be saved and restored.

    >>> batches = RowBatches(lambda numbers: numbers, rows=5, batch_size=2, epochs=1, seed=None)
    >>> [batch.tolist() for batch in batches]
    [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self, read: Callable[[Tensor], T], rows: int, batch_size: int, *, epochs: int, seed: int | None
    ) -> None:
        require(batch_size > 0, f"batch_size must be positive, not {batch_size}")
        self._read, self._rows, self._batch_size, self._epochs = read, rows, batch_size, epochs
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._epoch, self._position = 0, 0
        self._open_epoch()

    def __iter__(self) -> RowBatches[T]:
        return self

    def __next__(self) -> T:
        if self._position >= self._rows:
            self._epoch, self._position = self._epoch + 1, 0
            if self._epoch < self._epochs:
                self._open_epoch()
        if self._epoch >= self._epochs:
            self._epoch, self._position = self._epochs - 1, self._rows
            raise StopIteration
        chosen = self._order[self._position : self._position + self._batch_size]
        self._position += len(chosen)
        return self._read(chosen)

    def state_dict(self) -> dict[str, Any]:
        """The place: epoch, row in its order, and the generator as it was when the order was drawn."""
        return {"epoch": self._epoch, "position": self._position, "rows": self._rows, "generator": self._drawn_from}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a saved place. Raises DataError for another number of rows, ConfigError for another way to shuffle."""
        if state["rows"] != self._rows:
            raise DataError(f"the files hold {self._rows} rows; {state['rows']} when the place was saved")
        require(
            (state["generator"] is None) == (self._generator is None),
            "shuffle is not what it was when the place was saved",
        )
        if self._generator is not None:
            self._generator.set_state(state["generator"])
        self._epoch, self._position = state["epoch"], state["position"]
        self._open_epoch()

    def _open_epoch(self) -> None:
        if self._generator is None:
            self._drawn_from, self._order = None, torch.arange(self._rows)
        else:
            self._drawn_from = self._generator.get_state()
            self._order = torch.randperm(self._rows, generator=self._generator)


@final
class PartBatches(Generic[T]):
    """The rows of process `rank` of `ranks` in each batch of row `numbers`, and how many rows the whole batch has.

    >>> whole = RowBatches(lambda numbers: numbers, rows=5, batch_size=4, epochs=1, seed=None)
    >>> [(part.tolist(), rows) for part, rows in PartBatches(lambda numbers: numbers, whole, rank=1, ranks=2)]
    [([1, 3], 4), ([], 1)]
    """

    def __init__(self, read: Callable[[Tensor], T], numbers: RowBatches[Tensor], rank: int, ranks: int) -> None:
        self._read, self._numbers, self._rank, self._ranks = read, numbers, rank, ranks

    def __iter__(self) -> PartBatches[T]:
        return self

    def __next__(self) -> tuple[T, int]:
        numbers = next(self._numbers)
        return self._read(numbers[self._rank :: self._ranks].contiguous()), len(numbers)

    def state_dict(self) -> dict[str, Any]:
        """The place, which is the same for all of them."""
        return self._numbers.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a saved place; see `RowBatches`."""
        self._numbers.load_state_dict(state)


def _expand(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".npy"))
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    if not found:
        raise DataError(f"no .safetensors or .npy files in {_listed(paths)}")
    return found
