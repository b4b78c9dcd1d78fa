"""What the parts of sae-core ask of each other, and of plugins.

Each protocol is as small as its callers allow. An ability that only some objects have is a protocol of its own
(`Resumable`, `HasMetadata`), and callers test for it with ``isinstance``; nobody asks ``hasattr``.

Components that a run file can name (architectures, sources, loggers) are built one way: the class has a `config_class`,
a frozen dataclass, and takes one instance of it as its first argument. Such a class may say in `example` what a small instance
is made with, for the checks of `sae_core.testing`; ``{folder}`` in it stands for a folder of their own, and a function is
called with that folder for the value. A loader says in `example` how files that it reads are made: ``{"path": write_some}``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

    from sae_core.sae import SAE, Export

__all__ = [
    "ActivationBatch",
    "ActivationSource",
    "Catalogue",
    "CatalogueEntry",
    "Command",
    "EstimatesCosts",
    "FileSource",
    "GivesParts",
    "GivesSequences",
    "HasFingerprint",
    "HasMetadata",
    "HasOwnPlace",
    "HasTargets",
    "KnowsBaseModels",
    "LoadedSAE",
    "Loader",
    "Logger",
    "MeasuresHeldOut",
    "Memory",
    "Metric",
    "Resumable",
    "RunFacts",
    "Writer",
]


@dataclass(frozen=True, slots=True, eq=False)
class ActivationBatch:
    """One batch of activations in the model's own units: the plain way to hand pairs to a trainer.

    `inputs` is (..., d_in); `targets` is (..., d_out) for transcoders and None when the dictionary reconstructs its input.
    Where there are several sites, they lie side by side in the last dimension.
    """

    inputs: Tensor
    targets: Tensor | None = None


@runtime_checkable
class ActivationSource(Protocol):
    """Something that yields batches of activations.

    `sites` are the named columns of its tensors with their widths, in order: ``{"blocks.9.hook_resid_post": 576}``, or
    ``{"": 64}`` where there is nothing to name. `batches(batch_size)` yields tensors of shape (batch_size, width of all
    sites) until the data are exhausted; each call starts from the beginning. If the iterator is `Resumable`, its state can
    be restored before its first batch, and training on it goes on exactly where it stopped. A source owns its random
    generators, seeded from its config, and never touches the global ones.
    """

    @property
    def sites(self) -> Mapping[str, int]: ...

    def batches(self, batch_size: int) -> Iterator[Tensor | ActivationBatch]: ...


@runtime_checkable
class HasTargets(Protocol):
    """A source whose batches are `ActivationBatch` with targets; `target_sites` are the columns of those."""

    @property
    def target_sites(self) -> Mapping[str, int]: ...


@runtime_checkable
class GivesSequences(Protocol):
    """A source that can hand out whole sequences, for dictionaries that read them.

    With a `sequence_length`, its tensors are (sequences, sequence_length, width), as many sequences as make up the batch
    size asked for in positions; with None they are shuffled rows.
    """

    @property
    def sequence_length(self) -> int | None: ...


@runtime_checkable
class GivesParts(Protocol):
    """A source that can give one of several processes its rows of every batch without reading or computing the others'.

    `parts(batch_size, rank, ranks)` yields of each batch its rows ``rank::ranks`` (of sequences, its sequences), and how many
    rows the whole batch has. Either these are the `batches(batch_size)`, and the iterator's state is that of `batches`, the
    same on every rank. Or the iterator `HasOwnPlace`: it reads data that no other rank reads, and what all ranks give is the
    batch. A source without this is read whole by every process.
    """

    def parts(self, batch_size: int, rank: int, ranks: int) -> Iterator[tuple[Tensor | ActivationBatch, int]]: ...


@runtime_checkable
class HasOwnPlace(Protocol):
    """An iterator of parts, and one of `batches` of the same source, whose place is its own: other ranks stand elsewhere.

    `load_places` goes on from what `state_dict` gave on each of the ranks that there were, in their order: exactly where these
    are as many as now, else so that nothing is read twice and nothing left out. The data end where the first rank has no more.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_places(self, places: Sequence[Mapping[str, Any]]) -> None: ...


@runtime_checkable
class HasFingerprint(Protocol):
    """A source that can say in a few letters which data it reads, for processes that are to read the same."""

    def fingerprint(self) -> str: ...


@runtime_checkable
class HasMetadata(Protocol):
    """A source that knows facts to be kept with the SAE: base model, hook point, token policy."""

    def metadata(self) -> Mapping[str, Any]:
        """JSON-serialisable facts, stored under ``metadata`` in cfg.json."""
        ...


class Memory(NamedTuple):
    """Bytes of memory that something takes on a device: ``cpu``, ``cuda`` or ``mps``."""

    what: str
    bytes: int
    device: str


@runtime_checkable
class EstimatesCosts(Protocol):
    """A source that takes much memory or time, and can say how much before a run.

    `to_load` is what it loads when it is first used, and is asked before that. `to_run` is what it takes besides while a run
    goes on; `seconds_per_sample` measures on a few samples. For both it is loaded.
    """

    def to_load(self) -> list[Memory]: ...

    def to_run(self, batch_size: int) -> list[Memory]: ...

    def seconds_per_sample(self) -> float: ...


@runtime_checkable
class MeasuresHeldOut(Protocol):
    """A source that can say what a dictionary in training is worth on data that it keeps back from training.

    `held_out_class` is a frozen dataclass: what a run file may say of it under ``eval``. `held_out` gives a function from an
    SAE to numbers by name. It may be called between any two steps; the SAE and what the source hands out stay as they are.
    """

    held_out_class: ClassVar[type[Any]]

    def held_out(self, config: Any) -> Callable[[Any], Mapping[str, float]]: ...


@runtime_checkable
class Resumable(Protocol):
    """An object whose position can be saved and restored exactly; the state is tensors and JSON values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class FileSource(Protocol):
    """A folder of files, on disk or on the Hub, as a loader sees it.

    Names are relative, with forward slashes, and never leave the folder.
    """

    @property
    def location(self) -> str:
        """Where this is, for messages: a path, or ``repo@revision``."""
        ...

    def files(self) -> Sequence[str]:
        """Names of all files, sorted."""
        ...

    def exists(self, name: str) -> bool: ...

    def path(self, name: str) -> Path:
        """A local path of the file, fetched first if need be. Raises FormatError when there is no such file."""
        ...

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the file, without fetching the rest where that can be avoided."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LoadedSAE:
    """What a loader makes of foreign files: an architecture's name, its config, tensors in native names and layout.

    `config` holds only fields of that architecture's config class. `metadata` holds facts about origin. `tensors` is
    empty when only the config was asked for. `activation_scale` is the factor of ``expected_average_only_in`` where the files
    or the catalogue know it.
    """

    architecture: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Any])
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    activation_scale: float | None = None


@runtime_checkable
class Loader(Protocol):
    """Reads one checkpoint format. It downloads nothing and guesses nothing."""

    def matches(self, source: FileSource, folder: str = "") -> bool:
        """Whether `folder` of the source holds this format, judged by its file names and small config files."""
        ...

    def load(
        self,
        source: FileSource,
        folder: str = "",
        *,
        weights: bool = True,
        overrides: Mapping[str, Any] | None = None,
        rows: Sequence[int] | None = None,
    ) -> LoadedSAE:
        """Read config and, unless `weights` is False, tensors.

        `folder` is a folder or, for formats of one file, a file. `overrides` are facts that the files lack and a
        catalogue supplies. `rows` are the latents to load, in this order, None for all; the config's d_sae is then their
        number. Raises FormatError naming file and key for anything missing, unknown or of the wrong shape.
        """
        ...


@runtime_checkable
class Writer(Protocol):
    """Writes dictionaries in one format, that of another library for example. It approximates nothing."""

    def write(self, sae: SAE, exported: Export, folder: Path) -> Sequence[str]:
        """Fill the empty `folder`; returns notes on what the format leaves out, one sentence each.

        `exported` is the checked inference form of `sae`, and its `architecture` is qualified, ``"sae-core:topk"``, so that
        another plugin's dictionary of that name is not taken for it. Raises FormatError for what the format cannot express.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogueEntry:
    """One published SAE: where its files are and which loader reads them.

    `path` is a folder or a file of the repository, `model` the base model's Hub id, `format` a loader's name (None: the
    loader that recognises the files). `l0` and `variance_explained` are as published. `overrides` are facts that the
    files lack.
    """

    release: str
    sae_id: str
    repo_id: str
    path: str
    model: str | None = None
    format: str | None = None
    revision: str | None = None
    model_revision: str | None = None
    layer: int | None = None
    l0: float | None = None
    variance_explained: float | None = None
    neuronpedia_id: str | None = None
    links: Mapping[str, str] = field(default_factory=dict[str, str])
    overrides: Mapping[str, Any] = field(default_factory=dict[str, Any])


@runtime_checkable
class Catalogue(Protocol):
    """A list of published SAEs and the way to their files."""

    def releases(self) -> Sequence[str]: ...

    def sae_ids(self, release: str) -> Sequence[str]: ...

    def lookup(self, release: str, sae_id: str) -> CatalogueEntry:
        """Raises UnknownNameError with near matches."""
        ...

    def files(self, entry: CatalogueEntry) -> FileSource: ...


@runtime_checkable
class KnowsBaseModels(Protocol):
    """A catalogue that can say more about a loaded SAE's base model than the files do."""

    def base_model_facts(self, entry: CatalogueEntry, metadata: Mapping[str, Any]) -> Mapping[str, Any]:
        """Facts for `metadata`, such as the hook point in other terms; they replace what is there.

        ``base_model`` among them is the model's exact Hub id.
        """
        ...


@runtime_checkable
class Metric(Protocol):
    """A streaming metric: `update` with batches of rows, then `compute`, which leaves it as it was.

    `inputs` and `outputs` are (..., d) and `codes` latents of the same rows, `SparseCodes` or dense (..., d_sae). The numbers
    are those of one big batch, whatever the batches were, and their names start with the metric's registered name. What no row
    was seen for is NaN. A metric says ``order_independent = True`` if the order of rows makes no difference.
    """

    def update(self, inputs: Tensor, outputs: Tensor, codes: Any) -> None: ...

    def compute(self) -> Mapping[str, float]: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunFacts:
    """What a logger is told before its first record.

    `name` says which dictionary its records are of, "" where the run has only one. `sae` is that dictionary, in training.
    `config` is everything that was set, as plain data: the whole run file with its defaults, or in Python ``sae`` and
    ``train``. `folder` is where the run keeps this dictionary, None where it keeps nothing. `steps` were done before, when a
    run goes on.
    """

    sae: SAE
    name: str = ""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    folder: Path | None = None
    steps: int = 0


@runtime_checkable
class Logger(Protocol):
    """Receives the training records of one dictionary: flat mappings of plain numbers, None where one is not known.

    A run makes one logger for each dictionary. `start` comes once, before the first record; `log` at each flush, with the same
    names from the first record on; `close` at the end, perhaps twice, perhaps before any record. A logger that is `Resumable`
    has its state restored before `start` when a run goes on. What `start`, `log` and `close` raise is reported once and never
    stops the run.
    """

    def start(self, run: RunFacts) -> None: ...

    def log(self, record: Mapping[str, float | int | str | None]) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class Command(Protocol):
    """A subcommand of ``sae-core``. Heavy imports belong inside `run`."""

    help: ClassVar[str]

    def configure(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int:
        """Return the process's exit code. A SaeCoreError raised here is printed as one message, exit code 1."""
        ...
