"""The kits for all kinds but architectures: each check rejects a mutant that differs in one thing.

Our own contributions pass through their installed entry points; those of other packages are checked in the tests of these.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sae_core.codes import SparseCodes
from sae_core.config import option
from sae_core.errors import ConfigError, FormatError, UnknownNameError
from sae_core.format.files import LocalFiles, read_json, read_safetensors
from sae_core.plugins import (
    ActivationSourceSpec,
    CatalogueSpec,
    CommandSpec,
    LoaderSpec,
    LoggerSpec,
    MetricSpec,
    Spec,
    WriterSpec,
    get_registry,
    reset_registry,
)
from sae_core.protocols import ActivationBatch, CatalogueEntry, FileSource, LoadedSAE, RunFacts
from sae_core.sae import SAE, Export
from sae_core.testing import NotApplicable, PluginFolder, Subject, checks_of, parametrize_with_checks, run_checks
from sae_core.testing.kit import Check, in_a_folder
from safetensors.torch import save_file
from torch import Tensor

SPECS: dict[str, type[Spec]] = {
    "loader": LoaderSpec,
    "writer": WriterSpec,
    "source": ActivationSourceSpec,
    "catalogue": CatalogueSpec,
    "metric": MetricSpec,
    "logger": LoggerSpec,
    "command": CommandSpec,
}


def ours(kind: str) -> list[str]:
    found = get_registry().contributions(kind)
    return [contribution.qualified for contribution in found if contribution.distribution == "sae-core"]


def own_format(folder: Path) -> Path:
    from sae_core import create

    return create("standard", d_in=8, d_sae=24, seed=3).save(folder / "sae")


@parametrize_with_checks({name: {"path": own_format} for name in ours("loader")}, kind="loader")
def test_our_loaders_conform(check: Any) -> None:
    check()


@parametrize_with_checks(ours("source"), kind="source")
def test_our_sources_conform(check: Any) -> None:
    check()


@parametrize_with_checks(ours("metric"), kind="metric")
def test_our_metrics_conform(check: Any) -> None:
    check()


@parametrize_with_checks(ours("logger"), kind="logger")
def test_our_loggers_conform(check: Any) -> None:
    check()


@parametrize_with_checks(ours("command"), kind="command")
def test_our_commands_conform(check: Any) -> None:
    check()


# -- sources -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlainConfig:
    """Config of `PlainSource`."""

    seed: int = option(default=0, help="seed of the rows")


class PlainRows(Iterator[Tensor]):
    """Random rows, a row of batches of its own."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.count, self.drawn = size, 0, torch.Generator().manual_seed(seed)

    def __next__(self) -> Tensor:
        self.count += 1
        return torch.randn(self.size, 8, generator=self.drawn) + 1

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.drawn.set_state(state["drawn"])


class PlainSource:
    """Gives random rows."""

    config_class: ClassVar[type] = PlainConfig
    sites: ClassVar[Mapping[str, int]] = {"": 8}

    def __init__(self, config: PlainConfig) -> None:
        self.config = config

    def batches(self, batch_size: int) -> Iterator[Any]:
        return PlainRows(batch_size, self.config.seed)

    def metadata(self) -> Mapping[str, Any]:
        return {"dataset_path": "nowhere"}


class SequencesSource(PlainSource):
    """Gives whole sequences with targets."""

    sites: ClassVar[Mapping[str, int]] = {"a": 5, "b": 3}
    target_sites: ClassVar[Mapping[str, int]] = {"c": 4}
    sequence_length: ClassVar[int] = 6

    def batches(self, batch_size: int) -> Iterator[Any]:
        for x in PlainRows(batch_size // 6 * 6, self.config.seed):
            rows = x.view(-1, 6, 8)
            yield ActivationBatch(rows, rows[..., :4] * 2)


class PartRows(Iterator[Any]):
    """Of each batch the rows of one rank."""

    def __init__(self, whole: Iterator[Tensor], own: slice) -> None:
        self.whole, self.own = whole, own

    def __next__(self) -> tuple[Tensor, int]:
        rows = next(self.whole)
        return rows[self.own], len(rows)


class PartsSource(PlainSource):
    """Gives a rank its rows of every batch."""

    def parts(self, batch_size: int, rank: int, ranks: int) -> Iterator[tuple[Tensor, int]]:
        return PartRows(self.batches(batch_size), slice(rank, None, ranks))


class OwnRows(Iterator[Any]):
    """Batches of which each is made from its number; a rank makes every `ranks`-th."""

    def __init__(self, size: int, seed: int, rank: int, ranks: int, *, whole: bool) -> None:
        self.size, self.seed, self.rank, self.ranks, self.whole, self.at = size, seed, rank, ranks, whole, 0

    def __next__(self) -> Any:
        drawn = torch.Generator().manual_seed(1000 * self.seed + self.at * self.ranks + self.rank)
        self.at += 1
        rows = torch.randn(len(range(self.rank, self.size, self.ranks)), 8, generator=drawn) + 1
        return rows if self.whole else (rows, self.size)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "ranks": self.ranks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.at = state["at"]

    def load_places(self, places: Sequence[Mapping[str, Any]]) -> None:
        self.at = max(place["at"] for place in places) * len(places) // self.ranks


class OwnPlaceSource(PlainSource):
    """Gives every rank rows that no other has."""

    def batches(self, batch_size: int) -> Iterator[Any]:
        return OwnRows(batch_size, self.config.seed, 0, 1, whole=True)

    def parts(self, batch_size: int, rank: int, ranks: int) -> Iterator[tuple[Tensor, int]]:
        return OwnRows(batch_size, self.config.seed, rank, ranks, whole=False)


class HalvesSource(PlainSource):
    """Gives a rank one half of every batch, and not every other row."""

    def parts(self, batch_size: int, rank: int, ranks: int) -> Iterator[tuple[Tensor, int]]:
        return PartRows(self.batches(batch_size), slice(rank * batch_size // ranks, (rank + 1) * batch_size // ranks))


class SameForAllSource(OwnPlaceSource):
    """Gives all ranks the same rows."""

    def parts(self, batch_size: int, rank: int, ranks: int) -> Iterator[tuple[Tensor, int]]:
        return super().parts(batch_size, 0, ranks)


class UndocumentedSource(PlainSource):
    pass


@dataclass(frozen=True, kw_only=True)
class SilentConfig(PlainConfig):
    """Has a field that nobody explains."""

    speed: int = 3


class UnexplainedSource(PlainSource):
    """Has a config with an unexplained field."""

    config_class: ClassVar[type] = SilentConfig


class ZeroWidth(PlainSource):
    """Says that a site has no width."""

    sites: ClassVar[Mapping[str, int]] = {"": 8, "nothing": 0}


class NumberedSite(PlainSource):
    """Names a site by a number."""

    sites: ClassVar[Mapping[Any, int]] = {3: 8}


class OtherWidth(PlainSource):
    """Gives other widths than it says."""

    sites: ClassVar[Mapping[str, int]] = {"": 9}


class NaNs(PlainSource):
    """Gives NaN now and then."""

    def batches(self, batch_size: int) -> Iterator[Any]:
        for number, rows in enumerate(PlainRows(batch_size, self.config.seed)):
            rows[0, 0] = math.nan if number == 3 else 0
            yield rows


class WholeNumbers(PlainSource):
    """Gives integers."""

    def batches(self, batch_size: int) -> Iterator[Any]:
        return (rows.long() for rows in PlainRows(batch_size, self.config.seed))


class OneBatchOnly(PlainSource):
    """Gives the same batch for ever."""

    def batches(self, batch_size: int) -> Iterator[Any]:
        return (torch.ones(batch_size, 8) for _ in range(9))


class SharedPosition(PlainSource):
    """Goes on where the last row of batches stopped."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.drawn = torch.Generator().manual_seed(config.seed)

    def batches(self, batch_size: int) -> Iterator[Any]:
        return (torch.randn(batch_size, 8, generator=self.drawn) for _ in range(99))


class GlobalDraws(PlainSource):
    """Draws from the global generator; the same rows at each call, since it keeps them."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.kept = torch.randn(400, 8)

    def batches(self, batch_size: int) -> Iterator[Any]:
        return iter(self.kept.split(batch_size))


class SeedIgnored(PlainSource):
    """Has a seed that makes no difference."""

    def batches(self, batch_size: int) -> Iterator[Any]:
        return PlainRows(batch_size, 7)


class OneMemory(PlainSource):
    """Gives out the same memory each time."""

    def batches(self, batch_size: int) -> Iterator[Any]:
        memory = torch.empty(batch_size, 8)
        for rows in PlainRows(batch_size, self.config.seed):
            yield memory.copy_(rows)


class ForgetfulRows(PlainRows):
    """Restores nothing."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Forgetful(PlainSource):
    """Says that it can go on, and starts anew."""

    def batches(self, batch_size: int) -> Iterator[Any]:
        return ForgetfulRows(batch_size, self.config.seed)


class AliasedRows(PlainRows):
    """Its state changes while it goes on."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size, seed)
        self.state: dict[str, Any] = {}

    def __next__(self) -> Tensor:
        rows = super().__next__()
        self.state["drawn"] = self.drawn.get_state()
        return rows

    def state_dict(self) -> dict[str, Any]:
        self.state["drawn"] = self.drawn.get_state()
        return self.state


class Aliased(PlainSource):
    """Hands out its state instead of a copy."""

    def batches(self, batch_size: int) -> Iterator[Any]:
        return AliasedRows(batch_size, self.config.seed)


class NoSequences(SequencesSource):
    """Says that it gives sequences, and gives longer ones."""

    sequence_length: ClassVar[int] = 6

    def batches(self, batch_size: int) -> Iterator[Any]:
        for x in PlainRows(batch_size // 12 * 12, self.config.seed):
            rows = x.view(-1, 12, 8)
            yield ActivationBatch(rows, rows[..., :4] * 2)


class TensorFacts(PlainSource):
    """Keeps a tensor among its facts."""

    def metadata(self) -> Mapping[str, Any]:
        return {"mean": torch.zeros(3)}


class GivesLists(PlainSource):
    """Has site names that the frame cannot take: two sites, and batches of another width on the third."""

    def batches(self, batch_size: int) -> Iterator[Any]:
        return (
            rows if number < 6 else rows[:, :7]
            for number, rows in enumerate(PlainRows(batch_size // 2, self.config.seed))
        )


class OddConfig(PlainSource):
    """Keeps a config that no checkpoint can hold."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(replace(config, seed=object()))  # type: ignore[arg-type]
        self.seed = config.seed

    def batches(self, batch_size: int) -> Iterator[Any]:
        return PlainRows(batch_size, self.seed)


SOURCES: list[tuple[str, type, str]] = [
    ("check_class", UndocumentedSource, "has no docstring"),
    ("check_options", UnexplainedSource, "fields without help: speed"),
    ("check_batches", ZeroWidth, "sites: 'nothing' has the width 0"),
    ("check_batches", NumberedSite, "sites: the name 3 is no text"),
    ("check_batches", OtherWidth, r"inputs of shape \(32, 8\), but sites add up to 9"),
    ("check_batches", NaNs, "batch 3: inputs holds NaN"),
    ("check_batches", WholeNumbers, "floating point is needed"),
    ("check_batches", OneBatchOnly, "the first two batches are the same"),
    ("check_batches", GivesLists, "no batch has half of the 32 rows"),
    ("check_restarts", SharedPosition, "a second row of batches differs from the first one at batch 0"),
    ("check_seed", GlobalDraws, "uses torch's global random generator"),
    ("check_seed", SeedIgnored, "another seed gives the same batches"),
    ("check_batches", OneMemory, "the first two batches are the same"),
    ("check_resumes", Forgetful, "a state taken after a batch gives another batch 0"),
    ("check_resumes", Aliased, "a state taken after a batch gives another batch 0"),
    ("check_parts", HalvesSource, "rank 0 has not the rows 0::2"),
    ("check_parts", SameForAllSource, "rows are given more often than they are there"),
    ("check_sequences", NoSequences, r"shape \(\d+, 12, 8\), not \(sequences, 6, 8\)"),
    ("check_metadata", TensorFacts, "cannot be written as JSON"),
    ("check_trains", OddConfig, "object"),
]


# -- metrics -------------------------------------------------------------------------------------------------------------


class PlainMetric:
    """The mean of all that is active."""

    order_independent: ClassVar[bool] = True
    name: ClassVar[str] = "plain_metric"

    def __init__(self) -> None:
        self.sum, self.rows = 0.0, 0

    def update(self, inputs: Tensor, outputs: Tensor, codes: Any) -> None:
        dense = (codes.to_dense() if isinstance(codes, SparseCodes) else codes).detach().double().flatten(0, -2)
        self.sum += dense.sum().item()
        self.rows += len(dense)

    def compute(self) -> Mapping[str, Any]:
        return {self.name: self.sum / self.rows if self.rows else math.nan}


class UndocumentedMetric(PlainMetric):
    name: ClassVar[str] = "undocumented_metric"


class TensorNumber(PlainMetric):
    """Gives a tensor."""

    name: ClassVar[str] = "tensor_number"

    def compute(self) -> Mapping[str, Any]:
        return {name: torch.tensor(value) for name, value in super().compute().items()}


class OtherName(PlainMetric):
    """Uses a name that others use, too."""

    name: ClassVar[str] = "mse"


class DividesByRows(PlainMetric):
    """Cannot answer before the first row."""

    name: ClassVar[str] = "divides_by_rows"

    def compute(self) -> Mapping[str, Any]:
        return {self.name: self.sum / self.rows}


class MeanOfBatches(PlainMetric):
    """Averages averages."""

    name: ClassVar[str] = "mean_of_batches"

    def update(self, inputs: Tensor, outputs: Tensor, codes: Any) -> None:
        dense = (codes.to_dense() if isinstance(codes, SparseCodes) else codes).detach().double().flatten(0, -2)
        if len(dense):
            self.sum += dense.mean().item()
            self.rows += 1


class FirstRowCounts(PlainMetric):
    """Says that the order makes no difference, and weighs the first row twice."""

    name: ClassVar[str] = "first_row_counts"

    def update(self, inputs: Tensor, outputs: Tensor, codes: Any) -> None:
        if not self.rows and inputs.numel():
            self.sum += inputs.detach().double().flatten(0, -2)[0].sum().item()
        super().update(inputs, outputs, codes)


class DenseOnly(PlainMetric):
    """Knows dense latents alone."""

    name: ClassVar[str] = "dense_only"

    def update(self, inputs: Tensor, outputs: Tensor, codes: Any) -> None:
        super().update(inputs, outputs, codes.values if isinstance(codes, SparseCodes) else codes)


class InPlaceMetric(PlainMetric):
    """Changes what it looks at."""

    name: ClassVar[str] = "in_place_metric"

    def update(self, inputs: Tensor, outputs: Tensor, codes: Any) -> None:
        super().update(inputs, outputs, codes)
        inputs.data.sub_(1)


class NumpyMetric(PlainMetric):
    """Cannot take what has a gradient."""

    name: ClassVar[str] = "numpy_metric"

    def update(self, inputs: Tensor, outputs: Tensor, codes: Any) -> None:
        super().update(inputs, outputs, codes)
        self.sum += float(np.sum(outputs.double().numpy()) * 0)


class KeepsOnClass(PlainMetric):
    """Counts for all instances together."""

    name: ClassVar[str] = "keeps_on_class"
    seen: ClassVar[list[float]] = []

    def update(self, inputs: Tensor, outputs: Tensor, codes: Any) -> None:
        super().update(inputs, outputs, codes)
        KeepsOnClass.seen.append(0.0)

    def compute(self) -> Mapping[str, Any]:
        return {name: value + len(self.seen) for name, value in super().compute().items()}


class ComputesOnce(PlainMetric):
    """Starts anew when it is asked."""

    name: ClassVar[str] = "computes_once"

    def compute(self) -> Mapping[str, Any]:
        found = super().compute()
        self.sum, self.rows = 0.0, 0
        return found


METRICS: list[tuple[str, type, str]] = [
    ("check_class", UndocumentedMetric, "has no docstring"),
    ("check_numbers", TensorNumber, "tensor_number is Tensor, not a plain number"),
    ("check_numbers", OtherName, "the name 'mse' does not start with 'other_name'"),
    ("check_few_rows", DividesByRows, "division by zero"),
    ("check_batches_make_no_difference", MeanOfBatches, "in several batches and at once"),
    ("check_order_makes_no_difference", FirstRowCounts, "in another order"),
    ("check_codes", DenseOnly, "with sparse codes and with dense ones|flatten|Dimension"),
    ("check_inputs_are_left_alone", InPlaceMetric, r"update\(\) changes what it is given"),
    ("check_inputs_are_left_alone", NumpyMetric, "requires grad"),
    ("check_instances_are_apart", KeepsOnClass, "of a second instance"),
    ("check_instances_are_apart", ComputesOnce, "computed a second time"),
]


# -- loggers -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Config of `PlainLogger`."""

    path: Path = option(help="file")


class PlainLogger:
    """Appends JSON, NaN as it is."""

    config_class: ClassVar[type] = LogConfig
    example: ClassVar[Mapping[str, Any]] = {"path": "{folder}/log"}

    def __init__(self, config: LogConfig) -> None:
        self.path, self.closed = config.path, 0

    def start(self, run: RunFacts) -> None:
        pass

    def log(self, record: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(dict(record)) + "\n")

    def close(self) -> None:
        self.closed += 1


class UndocumentedLogger(PlainLogger):
    pass


@dataclass(frozen=True, kw_only=True)
class SilentLogConfig(LogConfig):
    """Has a field that nobody explains."""

    colour: str = "red"


class UnexplainedLogger(PlainLogger):
    """Has an unexplained field."""

    config_class: ClassVar[type] = SilentLogConfig


class AddsTime(PlainLogger):
    """Writes into the record."""

    def log(self, record: Any) -> None:
        record["time"] = 0.0


class StrictJson(PlainLogger):
    """Refuses what JSON has not."""

    def log(self, record: Any) -> None:
        json.dumps(dict(record), allow_nan=False)


class ClosesOnce(PlainLogger):
    """Cannot be closed twice."""

    def close(self) -> None:
        super().close()
        if self.closed > 1:
            raise ValueError("already closed")


class NumbersOnly(PlainLogger):
    """Fails on what is not known, but only of a name that real records have."""

    def log(self, record: Any) -> None:
        if record.get("dead_fraction", 0) is None and "metrics/threshold" not in record:
            raise TypeError("None is no number")


class FixedColumns(PlainLogger):
    """Has the columns of the first record for ever, for all that share its file."""

    def log(self, record: Any) -> None:
        if not self.path.exists():
            self.path.write_text(",".join(record) + "\n")
        elif self.path.read_text().splitlines()[0] != ",".join(record):
            raise ValueError("other columns")


class LosesItsState(PlainLogger):
    """Keeps an open file in its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"file": self}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


LOGGERS: list[tuple[str, type, str]] = [
    ("check_class", UndocumentedLogger, "has no docstring"),
    ("check_options", UnexplainedLogger, "fields without help: colour"),
    ("check_records", AddsTime, r"log\(\) changes the record"),
    ("check_values_that_are_no_numbers", StrictJson, "JSON compliant"),
    ("check_close", ClosesOnce, "already closed"),
    ("check_run", NumbersOnly, "NumbersOnly failed and is left out from here on: TypeError: None is no number"),
    ("check_several_dictionaries", FixedColumns, "other columns"),
    ("check_resumes", LosesItsState, "neither a tensor|cannot be saved|LosesItsState"),
]


# -- commands ------------------------------------------------------------------------------------------------------------


class PlainCommand:
    """Prints a number."""

    help: ClassVar[str] = "Print a number."

    def configure(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("number", type=int, help="the number")

    def run(self, args: argparse.Namespace) -> int:
        return 0


class UndocumentedCommand(PlainCommand):
    pass


class UnhelpfulOption(PlainCommand):
    """Does not say what an option is for."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        super().configure(parser)
        parser.add_argument("--fast", action="store_true")


class Percent(PlainCommand):
    """Writes a per cent sign that argparse takes for a field."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--share", help="at most 5 % of them")


class Growing(PlainCommand):
    """Has another option each time."""

    times: ClassVar[list[int]] = []

    def configure(self, parser: argparse.ArgumentParser) -> None:
        Growing.times.append(1)
        parser.add_argument(f"--option-{len(self.times)}", help="one more")


class ExitsWithOne(PlainCommand):
    """Has a parser that ends in its own way."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        def error(message: str) -> Any:
            print("error", file=sys.stderr)
            sys.exit(1)

        parser.error = error  # type: ignore[method-assign]


COMMANDS: list[tuple[str, type, str]] = [
    ("check_class", UndocumentedCommand, "has no docstring"),
    ("check_help", UnhelpfulOption, "--fast has no help"),
    ("check_help", Percent, "integer is required|unsupported format character|badly formed help"),
    ("check_configure", Growing, r"a second configure\(\) gives other options"),
    ("check_wrong_usage", ExitsWithOne, "an unknown option ends with 1, not with exit code 2"),
]


# -- catalogues ----------------------------------------------------------------------------------------------------------


class PlainCatalogue:
    """Lists one release."""

    ids: ClassVar[list[str]] = ["layer_1", "layer_2"]

    def releases(self) -> Sequence[str]:
        return ["plain"]

    def sae_ids(self, release: str) -> Sequence[str]:
        if release != "plain":
            raise UnknownNameError(f"unknown release {release!r}")
        return self.ids

    def lookup(self, release: str, sae_id: str) -> CatalogueEntry:
        if sae_id not in self.sae_ids(release):
            raise UnknownNameError(f"no SAE {sae_id!r}")
        return CatalogueEntry(release=release, sae_id=sae_id, repo_id="lab/plain", path=sae_id, format="sae_lens")

    def files(self, entry: CatalogueEntry) -> FileSource:
        return LocalFiles(Path(__file__).parent)


class UndocumentedCatalogue(PlainCatalogue):
    pass


class ListsTwice(PlainCatalogue):
    """Lists an id twice."""

    ids: ClassVar[list[str]] = ["layer_1", "layer_1"]


class AsksTheNetwork(PlainCatalogue):
    """Asks a server what there is."""

    def releases(self) -> Sequence[str]:
        import socket

        socket.create_connection(("127.0.0.1", 9), timeout=1)
        return ["plain"]


class WrongEntry(PlainCatalogue):
    """Gives an entry of another id."""

    def lookup(self, release: str, sae_id: str) -> CatalogueEntry:
        return replace(super().lookup(release, sae_id), sae_id="layer_9")


class ClimbingPath(PlainCatalogue):
    """Leaves the repository."""

    def lookup(self, release: str, sae_id: str) -> CatalogueEntry:
        return replace(super().lookup(release, sae_id), path="../elsewhere")


class UnknownFormat(PlainCatalogue):
    """Names a loader that nobody has."""

    def lookup(self, release: str, sae_id: str) -> CatalogueEntry:
        return replace(super().lookup(release, sae_id), format="no_such_format")


class Guesses(PlainCatalogue):
    """Makes an entry of whatever it is asked for."""

    def lookup(self, release: str, sae_id: str) -> CatalogueEntry:
        return CatalogueEntry(release=release, sae_id=sae_id, repo_id="lab/plain", path=sae_id)


class NoFiles(PlainCatalogue):
    """Gives a path instead of a source of files."""

    def files(self, entry: CatalogueEntry) -> Any:
        return Path()


CATALOGUES: list[tuple[str, type, str]] = [
    ("check_class", UndocumentedCatalogue, "has no docstring"),
    ("check_lists", ListsTwice, "ids of 'plain': 'layer_1' comes twice"),
    ("check_lists", AsksTheNetwork, "the network is used"),
    ("check_entries", WrongEntry, "the entry says plain, layer_9"),
    ("check_entries", ClimbingPath, "path: file name '../elsewhere' is not a relative path"),
    ("check_entries", UnknownFormat, "no loader 'no_such_format' is installed"),
    ("check_unknown_names", Guesses, r"lookup\('no-such-release-of-anybody', 'no-such-id'\) gave"),
    ("check_files", NoFiles, r"files\(\) gave PosixPath, without location"),
]


# -- loaders -------------------------------------------------------------------------------------------------------------


def plain_files(folder: Path, form: str = "PlainLoader") -> Path:
    drawn = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (8, 24), "b_enc": (24,), "W_dec": (24, 8), "b_dec": (8,)}
    save_file({name: torch.randn(*shape, generator=drawn) for name, shape in shapes.items()}, folder / "w.safetensors")
    (folder / "plain.json").write_text(json.dumps({"format": form, "d_in": 8, "d_sae": 24}))
    return folder


class PlainLoader:
    """Reads one small format, which is called like its class."""

    example: ClassVar[Mapping[str, Any]] = {"path": plain_files}

    def __init_subclass__(cls) -> None:
        cls.example = {"path": partial(plain_files, form=cls.__name__)}

    def matches(self, source: FileSource, folder: str = "") -> bool:
        return source.exists("plain.json") and read_json(source, "plain.json").get("format") == type(self).__name__

    def load(
        self,
        source: FileSource,
        folder: str = "",
        *,
        weights: bool = True,
        overrides: Mapping[str, Any] | None = None,
        rows: Sequence[int] | None = None,
    ) -> LoadedSAE:
        if overrides:
            raise ConfigError("no facts are taken")
        said = read_json(source, "plain.json")
        config = {"d_in": said["d_in"], "d_sae": said["d_sae"] if rows is None else len(rows)}
        if not weights:
            return LoadedSAE("standard", config)
        tensors = self.tensors(read_safetensors(source.path("w.safetensors")))
        if rows is not None:
            axes = {"W_enc": 1, "b_enc": 0, "W_dec": 0}
            numbers = torch.tensor(list(rows))
            tensors = {n: t.index_select(axes[n], numbers) if n in axes else t for n, t in tensors.items()}
        return LoadedSAE("standard", config, tensors)

    def tensors(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return found


class UndocumentedLoader(PlainLoader):
    pass


class ClaimsAll(PlainLoader):
    """Takes every folder with safetensors for its own."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        return super().matches(source, folder) or any(name.endswith(".safetensors") for name in source.files())


class TripsOverJunk(PlainLoader):
    """Believes that a config is what it should be."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        if source.exists("cfg.json"):
            return json.loads(source.path("cfg.json").read_text()).get("format") == "TripsOverJunk"
        return super().matches(source, folder)


class KnowsNothing(PlainLoader):
    """Does not know its own files."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        return False


class LoadsByChance(PlainLoader):
    """Makes up what the files do not hold."""

    def tensors(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor + torch.rand(()) for name, tensor in found.items()}


class TensorsAmongFacts(PlainLoader):
    """Keeps a tensor among the facts."""

    def load(self, source: FileSource, folder: str = "", **more: Any) -> LoadedSAE:
        return replace(super().load(source, folder, **more), metadata={"mean": torch.zeros(3)})


class OtherConfig(PlainLoader):
    """Says another width when it is asked for the config alone."""

    def load(self, source: FileSource, folder: str = "", *, weights: bool = True, **more: Any) -> LoadedSAE:
        loaded = super().load(source, folder, weights=weights, **more)
        return loaded if weights else replace(loaded, config={**loaded.config, "d_sae": 25})


class WrongRows(PlainLoader):
    """Gives latents in the files' order."""

    def load(self, source: FileSource, folder: str = "", *, rows: Any = None, **more: Any) -> LoadedSAE:
        return super().load(source, folder, rows=None if rows is None else sorted(rows), **more)


class IgnoresFacts(PlainLoader):
    """Takes facts and forgets them."""

    def load(self, source: FileSource, folder: str = "", *, overrides: Any = None, **more: Any) -> LoadedSAE:
        return super().load(source, folder, **more)


class DropsTheRest(PlainLoader):
    """Takes the tensors that it knows and lets others be."""

    def tensors(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in found.items() if name in ("W_enc", "b_enc", "W_dec", "b_dec")}


class RawErrors(PlainLoader):
    """Lets the library's errors through."""

    def load(self, source: FileSource, folder: str = "", **more: Any) -> LoadedSAE:
        try:
            return super().load(source, folder, **more)
        except FormatError as error:
            raise ValueError(str(error)) if "w.safetensors" in str(error) else error from None


LOADERS: list[tuple[str, type, str]] = [
    ("check_class", UndocumentedLoader, "has no docstring"),
    ("check_strangers_are_left_alone", ClaimsAll, r"matches\(\) is True for a language model"),
    ("check_junk_is_an_answer", TripsOverJunk, r"matches\(\) of a folder with junk \(empty\) raises .*JSONDecodeError"),
    ("check_own_files_are_recognised", KnowsNothing, r"matches\(\) is False for files of its own"),
    ("check_loads", LoadsByChance, "the output of the SAE loaded twice"),
    ("check_loads", TensorsAmongFacts, "metadata are no plain data"),
    ("check_config_alone", OtherConfig, "another config: d_sae"),
    ("check_rows", WrongRows, r"latents \[23, 0\] loaded alone"),
    ("check_overrides", IgnoresFacts, "was accepted"),
    ("check_every_tensor_counts", DropsTheRest, "'no_such_tensor_of_any_format' too many was accepted"),
    ("check_damage", RawErrors, "w.safetensors cut off raises ValueError"),
]

# -- writers -------------------------------------------------------------------------------------------------------------


class PlainWriter:
    """Writes what PlainLoader reads."""

    def write(self, sae: SAE, exported: Export, folder: Path) -> Sequence[str]:
        if exported.architecture != "sae-core:standard":
            self.refuse(exported.architecture)
        config = exported.config
        if sae.d_out != sae.d_in or not config.apply_b_dec_to_input or config.normalize_activations != "none":
            raise FormatError("plain holds no transcoders and no normalisation")
        save_file(
            {name: self.kept(name, tensor) for name, tensor in exported.tensors.items()}, folder / "w.safetensors"
        )
        said = {"format": "PlainLoader", "d_in": config.d_in, "d_sae": config.d_sae}
        (folder / "plain.json").write_text(json.dumps(said))
        return ["metadata are left out"]

    def refuse(self, architecture: str) -> None:
        raise FormatError(f"plain holds no {architecture}")

    def kept(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.contiguous()


class UndocumentedWriter(PlainWriter):
    pass


class RefusesAll(PlainWriter):
    """Finds a reason against everything."""

    def write(self, sae: SAE, exported: Export, folder: Path) -> Sequence[str]:
        raise FormatError("not today")


class ChangesWhatItWrites(PlainWriter):
    """Scales the SAE that it writes."""

    def write(self, sae: SAE, exported: Export, folder: Path) -> Sequence[str]:
        notes = super().write(sae, exported, folder)
        next(sae.parameters()).data.mul_(2)
        return notes


class RawRefusal(PlainWriter):
    """Trips over what it does not know."""

    def refuse(self, architecture: str) -> None:
        raise KeyError(architecture)


class DropsBias(PlainWriter):
    """Forgets the biases."""

    def kept(self, name: str, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor) if name == "b_enc" else super().kept(name, tensor)


WRITERS: list[tuple[str, type, str]] = [
    ("check_class", UndocumentedWriter, "has no docstring"),
    ("check_writes", RefusesAll, "it writes none of the architectures that are installed"),
    ("check_writes", ChangesWhatItWrites, ": writing changed '"),
    ("check_refuses", RawRefusal, "the writer cases:raw_refusal failed: .*, not a FormatError"),
    ("check_loads_again", DropsBias, ": the output after it was written and loaded"),
]

WRONG = {
    "writer": WRITERS,
    "loader": LOADERS,
    "source": SOURCES,
    "catalogue": CATALOGUES,
    "metric": METRICS,
    "logger": LOGGERS,
    "command": COMMANDS,
}
RIGHT: dict[str, list[type]] = {
    "writer": [PlainWriter],
    "loader": [PlainLoader],
    "source": [PlainSource, SequencesSource, PartsSource, OwnPlaceSource],
    "catalogue": [PlainCatalogue],
    "metric": [PlainMetric],
    "logger": [PlainLogger],
    "command": [PlainCommand],
}
ALL = [(kind, *case) for kind, cases in WRONG.items() for case in cases]


def snake(cls: type) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    """Every class of this file under its name in snake case; those of one kind are told apart from others by it."""
    module = ModuleType("kit_cases")
    sys.modules["kit_cases"] = module
    for kind, spec in SPECS.items():
        for cls in (*RIGHT[kind], *(cls for _, cls, _ in WRONG[kind])):
            setattr(module, cls.__name__, cls)
            target = f"kit_cases:{cls.__name__}"
            get_registry().register(spec(name=snake(cls), target=target, summary="A test case"), "cases")
    yield
    reset_registry()
    del sys.modules["kit_cases"]


# What a fresh process has to import is not in this one; the check of that has a test of its own.
NOT_HERE = {"command": ["check_light"]}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("kind", "cls"), [(kind, cls) for kind, some in RIGHT.items() for cls in some], ids=lambda each: str(each)
)
def test_a_correct_implementation_passes_every_check(kind: str, cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClaimsAll, "matches", PlainLoader.matches)
    wrong = [result for result in run_checks(kind, snake(cls)) if not result.ok]
    assert [result for result in wrong if result.check not in NOT_HERE.get(kind, [])] == []


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("kind", "check", "cls", "message"), ALL, ids=[f"{case[0]}-{case[2].__name__}" for case in ALL]
)
def test_a_mutant_is_rejected_by_its_check(
    kind: str, check: str, cls: type, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cls is not ClaimsAll:
        monkeypatch.setattr(ClaimsAll, "matches", PlainLoader.matches)
    wanted = next(each for each in checks_of(kind) if each.__name__ == check)
    with pytest.raises(Exception, match=message):
        in_a_folder(wanted, Subject(kind, snake(cls)))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", WRONG)
def test_every_check_rejects_a_mutant_that_all_others_let_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    claims_all = ClaimsAll.matches
    alone: set[str] = set()
    checks = [check for check in checks_of(kind) if check.__name__ not in NOT_HERE.get(kind, [])]
    for check, cls, _ in WRONG[kind]:
        with monkeypatch.context() as patch:
            patch.setattr(ClaimsAll, "matches", claims_all if cls is ClaimsAll else PlainLoader.matches)
            if rejecting(checks, Subject(kind, snake(cls))) == [check]:
                alone.add(check)
    assert alone == {check.__name__ for check in checks}


def rejecting(checks: Sequence[Check], subject: Subject) -> list[str]:
    names: list[str] = []
    for check in checks:
        try:
            in_a_folder(check, subject)
        except NotApplicable:
            continue
        except Exception:  # noqa: BLE001 - whatever a mutant raises
            names.append(check.__name__)
    return names


def test_a_command_that_imports_what_is_heavy_to_be_asked_for_help_is_rejected(site: PluginFolder) -> None:
    source = """
        from sae_core.plugins import CommandSpec, hookimpl

        @hookimpl
        def sae_register_commands():
            for name in ("light", "heavy"):
                yield CommandSpec(name=name, target=f"sae_weigh.{name}:Weigh", summary="Of a test")
        """
    body = (
        'class Weigh:\n    """Weighs."""\n    help = "Weigh."\n    def configure(self, parser): pass\n'
        "    def run(self, args): return 0\n"
    )
    site.add("sae-weigh", source, files={"light.py": body, "heavy.py": "import numpy\n" + body})
    failed: list[dict[str, str]] = []
    for name in ("light", "heavy"):
        done = site.cli("check", name, "--json")
        (report,) = json.loads(done.stdout)
        failed.append({each["check"]: each["reason"] for each in report["checks"] if each["status"] == "failed"})
        assert done.returncode == bool(failed[-1])
    light, heavy = failed
    assert light == {}
    assert heavy.keys() == {"check_light"}
    assert heavy["check_light"] == "importing and configuring it imports numpy"
