"""Activations that are already on disk: safetensors or .npy files of shape (rows, d_in), shuffled by index.

The files are memory-mapped; what is shuffled each epoch is row numbers, so the rows themselves are read once an epoch and
never held together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from sae_core.config import option, require
from sae_core.errors import DataError
from sae_core.format.files import read_safetensors

__all__ = ["RowBatches", "TensorFiles", "TensorFilesConfig"]


@dataclass(frozen=True, kw_only=True)
class TensorFilesConfig:
    """Config of `TensorFiles`."""

    paths: list[Path] = option(help="files, or folders whose .safetensors and .npy files are all read")
    key: str = option(default="activations", help="name of the tensor in each safetensors file")
    epochs: int = option(default=1, help="passes over all rows, each in an order of its own")
    shuffle: bool = option(default=True, help="false reads rows in the files' order")
    seed: int = option(default=0, help="seed of the order")

    def __post_init__(self) -> None:
        require(len(self.paths) > 0, "paths must name at least one file or folder")
        require(self.epochs > 0, f"epochs must be positive, not {self.epochs}")


def _some_rows(folder: Path) -> list[str]:
    """A small file, for the checks of sources."""
    import numpy as np

    path = folder / "rows.npy"
    np.save(path, torch.randn(200, 8, generator=torch.Generator().manual_seed(0)).numpy())
    return [str(path)]


@final
class TensorFiles:
    """Rows of activations from files. Raises DataError for files that cannot be read or disagree about the width."""

    config_class: ClassVar[type] = TensorFilesConfig
    example: ClassVar[Mapping[str, Any]] = {"paths": _some_rows}

    def __init__(self, config: TensorFilesConfig) -> None:
        self.config = config
        self._parts = [self._open(path) for path in _expand(config.paths)]
        widths = {part.shape[1] for part in self._parts}
        if len(widths) != 1:
            raise DataError(f"files of different widths: {sorted(widths)} in {', '.join(map(str, config.paths))}")
        self._starts = torch.tensor([0, *(part.shape[0] for part in self._parts)]).cumsum(0)

    @property
    def sites(self) -> Mapping[str, int]:
        """One, without a name."""
        return {"": self.width}

    @property
    def width(self) -> int:
        """Width of the activations."""
        return self._parts[0].shape[1]

    @property
    def rows(self) -> int:
        """Number of rows in all files together."""
        return int(self._starts[-1])

    def batches(self, batch_size: int) -> RowBatches:
        """Batches (batch_size, d_in), from the first one; the last one of an epoch may be smaller."""
        config = self.config
        return RowBatches(
            self._read, self.rows, batch_size, epochs=config.epochs, seed=config.seed if config.shuffle else None
        )

    def metadata(self) -> Mapping[str, Any]:
        """Where the activations came from."""
        return {"dataset_path": ", ".join(str(path.absolute()) for path in self.config.paths)}

    def _read(self, chosen: Tensor) -> Tensor:
        part_of = torch.bucketize(chosen, self._starts, right=True) - 1
        batch = torch.empty(chosen.numel(), self.width, dtype=self._parts[0].dtype)
        for number in part_of.unique().tolist():
            here = part_of == number
            batch[here] = self._parts[number][chosen[here] - self._starts[number]].to(batch.dtype)
        return batch

    def _open(self, path: Path) -> Tensor:
        if path.suffix == ".npy":
            import numpy as np

            try:
                tensor = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
            except (ValueError, TypeError, OSError) as error:
                raise DataError(f"{path}: not a readable .npy file of numbers: {error}") from None
        else:
            tensors = read_safetensors(path)
            if self.config.key not in tensors:
                raise DataError(f"{path}: no tensor {self.config.key!r}; it holds {', '.join(tensors)}. Set key=")
            tensor = tensors[self.config.key]
        if tensor.dim() < 2 or not tensor.is_floating_point() or tensor.numel() == 0:
            raise DataError(
                f"{path}: activations must be (rows, d_in) of floating point, found {tensor.dtype} {tuple(tensor.shape)}"
            )
        return tensor.reshape(-1, tensor.shape[-1])


@final
class RowBatches:
    """Batches of rows by number, `epochs` times over all `rows`, each time in another order; None for `seed` keeps order.

    `read` gives the rows of the numbers (n,) that it is called with. The place can be saved and restored.

    >>> batches = RowBatches(lambda numbers: numbers, rows=5, batch_size=2, epochs=1, seed=None)
    >>> [batch.tolist() for batch in batches]
    [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self, read: Callable[[Tensor], Tensor], rows: int, batch_size: int, *, epochs: int, seed: int | None
    ) -> None:
        require(batch_size > 0, f"batch_size must be positive, not {batch_size}")
        self._read, self._rows, self._batch_size, self._epochs = read, rows, batch_size, epochs
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._epoch, self._position = 0, 0
        self._open_epoch()

    def __iter__(self) -> RowBatches:
        return self

    def __next__(self) -> Tensor:
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


def _expand(paths: list[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".npy"))
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    if not found:
        raise DataError(f"no .safetensors or .npy files in {', '.join(map(str, paths))}")
    return found
