import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sae_core.architectures.linear import LinearConfig, LinearSAE
from sae_core.architectures.parts import squared_error
from sae_core.codes import SparseCodes
from sae_core.config import option, require
from sae_core.errors import ConfigError, FormatError, UnknownNameError, did_you_mean
from sae_core.format.files import LocalFiles, join
from sae_core.protocols import CatalogueEntry, LoadedSAE
from sae_core.sae import StepOutput, training_option


@dataclass(frozen=True, kw_only=True)
class FirstConfig(LinearConfig):
    """Config of `FirstSAE`."""

    l1_coefficient: float = training_option(default=0.1, help="weight of the sparsity penalty")

    def __post_init__(self):
        super().__post_init__()
        require(self.l1_coefficient >= 0, f"l1_coefficient must not be negative: {self.l1_coefficient}")


class FirstSAE(LinearSAE[FirstConfig]):
    """ReLU latents under an L1 penalty."""

    architecture = "first_architecture"
    config_class = FirstConfig
    folds = True
    independent_latents = True

    def encode_rows(self, prepared):
        return self.pre(prepared, floor=0.0).map(torch.relu)

    def objective(self, prepared, target, context):
        codes = self.pre(prepared, context, floor=0.0).map(torch.relu)
        y = self.to_loss_space(self.decode_rows(codes, prepared), prepared)
        losses = {
            "mse": squared_error(y, target),
            "l1": self.config.l1_coefficient * codes.row_dots(self.decoder_norms()).mean(),
        }
        return StepOutput(losses["mse"] + losses["l1"], losses, codes, y, target)


ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec")


def write_example(folder):
    drawn = np.random.default_rng(0)
    shapes = {"W_enc": (8, 24), "b_enc": (24,), "W_dec": (24, 8), "b_dec": (8,)}
    arrays = {name: drawn.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    np.savez(folder / "first.npz", **arrays)
    return folder


class FirstLoader:
    """Reads `first.npz`."""

    example = {"path": write_example}

    def matches(self, source, folder=""):
        return source.exists(join(folder, "first.npz"))

    def load(self, source, folder="", *, weights=True, overrides=None, rows=None):
        if overrides:
            raise ConfigError(f"first: no facts are needed, found {sorted(overrides)}")
        path = source.path(join(folder, "first.npz"))
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                arrays = {name: torch.from_numpy(file[name]) for name in file.files}
        except Exception as error:
            raise FormatError(f"{path}: not a readable .npz file: {error}") from None
        if set(arrays) != set(ARRAYS):
            raise FormatError(f"{path}: holds {sorted(arrays)}, expected {sorted(ARRAYS)}")
        d_in, d_sae = arrays["W_enc"].shape
        if rows is not None:
            numbers = torch.tensor(list(rows))
            d_sae = len(rows)
            axes = {"W_enc": 1, "b_enc": 0, "W_dec": 0}
            arrays = {n: a.index_select(axes[n], numbers) if n in axes else a for n, a in arrays.items()}
        return LoadedSAE("standard", {"d_in": d_in, "d_sae": d_sae}, arrays if weights else {}, {"seen": "first"})


class FirstWriter:
    """Writes `first.npz`."""

    def write(self, sae, exported, folder):
        if exported.architecture != "sae-core:standard" or set(exported.tensors) != set(ARRAYS):
            raise FormatError(f"first holds plain ReLU dictionaries, not {exported.architecture}")
        if exported.config.normalize_activations != "none" or not exported.config.apply_b_dec_to_input:
            raise FormatError("first holds no normalisation and no transcoder")
        np.savez(folder / "first.npz", **{name: exported.tensors[name].float().numpy() for name in ARRAYS})
        return ["metadata are left out"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Config of `FirstSource`."""

    d_in: int = option(default=8, help="width")
    seed: int = option(default=0, help="seed of the rows")


class FirstSource:
    """Random rows."""

    config_class = SourceConfig

    def __init__(self, config):
        self.config = config

    @property
    def sites(self):
        return {"": self.config.d_in}

    def batches(self, batch_size):
        return Rows(self.config, batch_size)

    def metadata(self):
        return {"dataset_path": "first"}


class Rows:
    def __init__(self, config, batch_size):
        self.shape, self.drawn = (batch_size, config.d_in), torch.Generator().manual_seed(config.seed)

    def __iter__(self):
        return self

    def __next__(self):
        return torch.randn(self.shape, generator=self.drawn)

    def state_dict(self):
        return {"drawn": self.drawn.get_state()}

    def load_state_dict(self, state):
        self.drawn.set_state(state["drawn"])


class FirstCatalogue:
    """One release of one SAE."""

    folder = Path()

    def releases(self):
        return ["first-release"]

    def sae_ids(self, release):
        if release != "first-release":
            raise UnknownNameError(f"unknown release {release!r}{did_you_mean(release, self.releases())}")
        return ["only"]

    def lookup(self, release, sae_id):
        if sae_id not in self.sae_ids(release):
            raise UnknownNameError(f"release {release!r} has no SAE {sae_id!r}")
        return CatalogueEntry(release=release, sae_id=sae_id, repo_id="first/release", path="", format="first_loader")

    def files(self, entry):
        return LocalFiles(self.folder)


class FirstMetric:
    """Mean size of a row's latents."""

    order_independent = True

    def __init__(self):
        self.total, self.rows = 0.0, 0

    def update(self, inputs, outputs, codes):
        dense = (codes.to_dense() if isinstance(codes, SparseCodes) else codes).detach().double().flatten(0, -2)
        self.total, self.rows = self.total + dense.abs().sum().item(), self.rows + len(dense)

    def compute(self):
        return {"first_metric": self.total / self.rows if self.rows else math.nan}


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """Config of `FirstLogger`."""

    path: Path = option(help="file to append to")


class FirstLogger:
    """Lines of JSON."""

    config_class = LoggerConfig
    example = {"path": "{folder}/first.log"}

    def __init__(self, config):
        self.path = config.path

    def start(self, run):
        self.name = run.name

    def log(self, record):
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(record)) + "\n")

    def close(self):
        pass
