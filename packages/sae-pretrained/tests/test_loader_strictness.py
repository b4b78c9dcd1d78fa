"""No loader guesses: whatever is wrong with a file is refused with a message that names it, in every format alike.

One specimen of each format, most of them the golden files, is damaged in each way.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from sae_core import SAE
from sae_core.errors import ConfigError, FormatError, UnknownNameError
from sae_core.format.files import LocalFiles
from sae_core.format.read import find_loader, read_sae
from sae_core.plugins import get_registry
from sae_core.protocols import Loader
from sae_core.testing import run_checks
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
D, F = 8, 24
JSON_LINE = "a line of JSON, then torch.save"


@dataclass
class Specimen:
    """Good files of one format.

    `config` is its strict config file, if it has one, and `section` the key of the strict part; `free` are tensors
    without which the files mean the same, `shapeless` those of which any shape is fine.
    """

    format: str
    root: Path
    path: str
    weights: str
    config: str | None = None
    section: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    free: tuple[str, ...] = ()
    shapeless: tuple[str, ...] = ()

    def load(self, **facts: Any) -> SAE:
        return read_sae(LocalFiles(self.root), self.path, format=self.format, overrides=self.facts | facts or None)

    def loader(self) -> Loader:
        return cast("Loader", get_registry().resolve("loader", self.format)())

    @property
    def weights_path(self) -> Path:
        return self.root / self.weights

    def tensors(self) -> dict[str, Any]:
        if self.weights.endswith(".safetensors"):
            return {name: tensor.clone() for name, tensor in load_file(self.weights_path).items()}
        return torch.load(io.BytesIO(self._pickled()[1]), weights_only=True)

    def write(self, tensors: dict[str, Any]) -> None:
        if self.weights.endswith(".safetensors"):
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.weights_path)
            return
        line, _ = self._pickled()
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        self.weights_path.write_bytes(line + buffer.getvalue())

    def _pickled(self) -> tuple[bytes, bytes]:
        data = self.weights_path.read_bytes()
        if not data.startswith(b"{"):
            return b"", data
        end = data.index(b"\n") + 1
        return data[:end], data[end:]

    def edit_config(self, change: Callable[[dict[str, Any]], None]) -> None:
        assert self.config is not None
        path = self.root / self.config
        if path == self.weights_path:  # the line of JSON
            line, rest = self._pickled()
            header = json.loads(line)
            change(header[self.section] if self.section else header)
            path.write_bytes(json.dumps(header).encode() + b"\n" + rest)
            return
        is_json = path.suffix == ".json"
        whole = json.loads(path.read_text()) if is_json else yaml.safe_load(path.read_text())
        change(whole[self.section] if self.section else whole)
        path.write_text(json.dumps(whole) if is_json else yaml.safe_dump(whole))


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("io.safetensors", "case.json"))
    return to


def trained(case: str) -> Callable[[Path], Specimen]:
    """Files of dictionary_learning."""

    def make(root: Path) -> Specimen:
        free = ("group_sizes",) if case == "matryoshka" else ("threshold",) if "topk" in case and "auto" in case else ()
        return Specimen(
            "dictionary_learning_1",
            copy(GOLDEN / "dictionary_learning" / case, root),
            "",
            "ae.pt",
            "config.json",
            "trainer",
            free=(*free, "k"),
            shapeless=free,
        )

    return make


def coder(case: str) -> Callable[[Path], Specimen]:
    """Files of sparsify."""

    def make(root: Path) -> Specimen:
        return Specimen("sparsify", copy(GOLDEN / "sparsify" / case, root), "", "sae.safetensors", "cfg.json")

    return make


def published(
    case: str, weights: str, config: str | None = None, section: str | None = None
) -> Callable[[Path], Specimen]:
    """Files of publications; `weights` is relative to the root."""

    def make(root: Path) -> Specimen:
        known = json.loads((GOLDEN / "foreign" / case / "case.json").read_text())
        copy(GOLDEN / "foreign" / case / "files", root)
        return Specimen(known["loader"], root, known["path"], weights, config, section, known.get("facts", {}))

    return make


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def openai(root: Path) -> Specimen:
    tensors: dict[str, Any] = {
        "pre_bias": drawn(D),
        "latent_bias": drawn(F),
        "encoder.weight": drawn(F, D),
        "decoder.weight": drawn(D, F),
        "stats_last_nonzero": torch.zeros(F),
        "activation": "TopK",
        "activation_state_dict": {"k": 4, "postact_fn": "ReLU"},
    }
    torch.save(tensors, root / "7.pt")
    return Specimen("openai", root, "7.pt", "7.pt", free=("stats_last_nonzero",), shapeless=("stats_last_nonzero",))


def openmoss(root: Path) -> Specimen:
    hook = "blocks.4.hook_resid_post"
    norm = f"dataset_average_activation_norm.{hook}"
    tensors = {"W_E": drawn(D, F), "b_E": drawn(F), "W_D": drawn(F, D), "b_D": drawn(D), norm: torch.tensor(5.0)}
    tensors["activation_function.log_jumprelu_threshold"] = drawn(F)
    config = {"sae_type": "sae", "d_model": D, "expansion_factor": F / D, "act_fn": "jumprelu"}
    config |= {"hook_point_in": hook, "hook_point_out": hook}
    save_file(tensors, root / "sae_weights.safetensors")
    (root / "config.json").write_text(json.dumps(config))
    return Specimen("openmoss", root, "", "sae_weights.safetensors", "config.json")


def saev(root: Path) -> Specimen:
    cfg = {"d_model": D, "d_sae": F, "seed": 0, "activation": {"cls": "Relu", "params": {}}}
    tensors = {"W_enc": drawn(D, F), "b_enc": drawn(F), "W_dec": drawn(F, D), "b_dec": drawn(D)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    (root / "sae.pt").write_bytes(json.dumps({"schema": 5, "cfg": cfg}).encode() + b"\n" + buffer.getvalue())
    return Specimen("saev", root, "sae.pt", "sae.pt", "sae.pt", "cfg")


def crosscoder(root: Path) -> Specimen:
    tensors = {"encoder.weight": drawn(2, D, F), "encoder.bias": drawn(F), "decoder.weight": drawn(2, F, D)}
    save_file(tensors | {"decoder.bias": drawn(2, D), "threshold": torch.tensor(0.3)}, root / "model.safetensors")
    config = {"activation_dim": D, "dict_size": F, "num_layers": 2, "code_normalization": "SAE"}
    (root / "config.json").write_text(json.dumps(config))
    return Specimen("crosscoder", root, "", "model.safetensors", "config.json", free=("threshold",))


def model_diffing(root: Path) -> Specimen:
    torch.save(
        {"W_enc": drawn(2, D, F), "b_enc": drawn(F), "W_dec": drawn(F, 2, D), "b_dec": drawn(2, D)}, root / "3.pt"
    )
    config = {"d_in": D, "dict_size": F, "hook_point": "blocks.14.hook_resid_pre", "dec_init_norm": 0.08, "seed": 1}
    (root / "3_cfg.json").write_text(json.dumps(config))
    return Specimen("crosscoder", root, "3.pt", "3.pt", "3_cfg.json", facts={"input_scaling": [1, 1]})


KISSANE = "gpt2-small_L0_Hcat_z_lr1.20e-03_l11.80e+00_ds24_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9"
SPECIMENS: dict[str, Callable[[Path], Specimen]] = {
    "autoencoder": trained("autoencoder"),
    "autoencoder_topk": trained("autoencoder_topk"),
    "batch_topk": trained("batch_topk"),
    "matryoshka": trained("matryoshka"),
    "gated": trained("gated"),
    "jumprelu": trained("jumprelu"),
    "sparsify": coder("sae"),
    "sparsify_skip": coder("skip_transcoder"),
    "openai": openai,
    "llama_scope": published(
        "llama_scope",
        "Llama3_1-8B-Base-L3R-8x/checkpoints/final.safetensors",
        "Llama3_1-8B-Base-L3R-8x/hyperparams.json",
    ),
    "llama_scope_r1_distill": published(
        "llama_scope_r1_distill",
        "800M-Slimpajama-0-OpenR1-Math-220k/L3R/sae_weights.safetensors",
        "800M-Slimpajama-0-OpenR1-Math-220k/L3R/config.json",
    ),
    "openmoss": openmoss,
    "deepseek_r1": published("deepseek_r1", "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"),
    "goodfire": published("goodfire", "Llama-3.1-8B-Instruct-SAE-l19.pth"),
    "connor_rob_hook_z": published("connor_rob_hook_z", f"{KISSANE}.pt", f"{KISSANE}_cfg.json"),
    "mwhanna_transcoder": published("mwhanna_transcoder", "layer_2.safetensors", "config.yaml"),
    "mntss_clt": published("mntss_clt", "W_dec_1.safetensors", "config.yaml"),
    "qwen_scope": published("qwen_scope", "layer11.sae.pt"),
    "temporal": published(
        "temporal", "layer_12/temporal/latest_ckpt.safetensors", "layer_12/temporal/conf.yaml", "sae"
    ),
    "saev": saev,
    "crosscoder": crosscoder,
    "model_diffing": model_diffing,
}
X_SEED = 5


@pytest.fixture(params=SPECIMENS)
def specimen(request: pytest.FixtureRequest, tmp_path: Path) -> Specimen:
    return SPECIMENS[request.param](tmp_path)


@pytest.fixture(params=["batch_topk", "sparsify", "saev", "llama_scope"])
def one_of_each_kind(request: pytest.FixtureRequest, tmp_path: Path) -> Specimen:
    """Specimens of every kind of weights file, for what does not depend on the format."""
    return SPECIMENS[request.param](tmp_path)


@pytest.fixture(params=[name for name in SPECIMENS if name not in ("openai", "deepseek_r1", "goodfire", "qwen_scope")])
def with_config(request: pytest.FixtureRequest, tmp_path: Path) -> Specimen:
    """Specimens of the formats that have a config, in a file of its own or at the start of the weights."""
    return SPECIMENS[request.param](tmp_path)


def test_every_loader_passes_the_conformance_kit(conforming: Specimen) -> None:
    config = {"path": conforming.root, "inside": conforming.path, "overrides": conforming.facts}
    results = run_checks("loader", f"sae-pretrained:{conforming.format}", config=config)
    assert [result for result in results if not result.ok] == []
    assert {result.check for result in results if result.status == "skipped"} <= {"check_every_tensor_counts"}


@pytest.fixture(
    params=[name for name in SPECIMENS if name not in ("autoencoder_topk", "matryoshka", "gated", "jumprelu")]
)
def conforming(request: pytest.FixtureRequest, tmp_path: Path) -> Specimen:
    """A specimen of every format, in a folder of its own."""
    (tmp_path / "files").mkdir()
    return SPECIMENS[request.param](tmp_path / "files")


def outputs(sae: SAE) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        x = 4 * drawn(3, sae.d_in, seed=X_SEED)
        return sae.encode(x), sae(x)


pytestmark = pytest.mark.filterwarnings("ignore:.*decoders added up:UserWarning")


def test_exactly_one_loader_recognises_every_specimen(specimen: Specimen):
    assert find_loader(LocalFiles(specimen.root), specimen.path) == f"sae-pretrained:{specimen.format}"


def test_a_tensor_that_nobody_understands_is_refused_by_name(specimen: Specimen):
    specimen.write(specimen.tensors() | {"surprise": torch.ones(3)})
    with pytest.raises(FormatError, match=r"surprise"):
        specimen.load()


def test_every_missing_tensor_is_refused_by_name(specimen: Specimen):
    whole = specimen.tensors()
    expected = outputs(specimen.load())
    for name, value in whole.items():
        if not isinstance(value, Tensor):
            continue
        specimen.write({other: tensor for other, tensor in whole.items() if other != name})
        if name in specimen.free:
            sae = specimen.load()
            if name != "threshold" or specimen.format != "crosscoder":
                assert all(map(torch.equal, outputs(sae), expected))
            continue
        with pytest.raises(FormatError) as refusal:
            specimen.load()
        assert name.partition(".")[0] in str(refusal.value)


def test_every_tensor_of_another_shape_is_refused_by_name(specimen: Specimen):
    whole = specimen.tensors()
    for name, value in whole.items():
        if not isinstance(value, Tensor) or name in specimen.shapeless:
            continue
        longer = torch.cat([value, value[:1]]) if value.dim() else value.repeat(2)
        specimen.write(whole | {name: longer})
        with pytest.raises(FormatError, match=r"shape|latents|fit"):
            specimen.load()


def test_a_value_that_is_not_finite_is_refused(one_of_each_kind: Specimen):
    specimen = one_of_each_kind
    tensors = specimen.tensors()
    name = next(key for key, value in tensors.items() if isinstance(value, Tensor) and value.dim() >= 2)
    tensors[name][(0,) * tensors[name].dim()] = float("nan")
    specimen.write(tensors)
    with pytest.raises(FormatError, match="NaN"):
        specimen.load()


def test_weights_that_are_not_floating_point_are_refused(one_of_each_kind: Specimen):
    specimen = one_of_each_kind
    tensors = specimen.tensors()
    name = next(key for key, value in tensors.items() if isinstance(value, Tensor) and value.dim() >= 2)
    specimen.write(tensors | {name: tensors[name].to(torch.int8)})
    with pytest.raises(FormatError, match="int8"):
        specimen.load()


def test_a_truncated_file_is_refused(specimen: Specimen):
    data = specimen.weights_path.read_bytes()
    for length in (len(data) // 2, len(data) - 1, 0):
        specimen.weights_path.write_bytes(data[:length])
        with pytest.raises(FormatError):
            specimen.load()


def test_an_unknown_config_key_is_refused_with_the_known_ones_unless_the_caller_vouches(with_config: Specimen):
    specimen, expected = with_config, outputs(with_config.load())
    specimen.edit_config(lambda config: config.update(frobnicate=True))
    with pytest.raises(FormatError) as refusal:
        specimen.load()
    message = str(refusal.value)
    assert "unknown key 'frobnicate' (known: " in message
    assert str(specimen.config) in message
    assert "ignore_keys=['frobnicate']" in message
    assert all(map(torch.equal, outputs(specimen.load(ignore_keys=["frobnicate"])), expected))


def test_a_damaged_config_file_is_refused_by_name(with_config: Specimen):
    config = with_config.root / str(with_config.config)
    weights = with_config.tensors()
    for text in ("[1, 2", "[1, 2]", "\x00"):
        config.write_bytes(text.encode() + b"\n")
        if config == with_config.weights_path:
            with config.open("ab") as file:
                torch.save(weights, file)
        with pytest.raises(FormatError) as refusal:
            with_config.load()
        assert config.name in str(refusal.value)


def test_an_unknown_fact_is_refused_with_the_known_ones(one_of_each_kind: Specimen):
    specimen = one_of_each_kind
    with pytest.raises(ConfigError, match=r"unknown fact 'hook_nam'; did you mean 'hook_name'\?.*ignore_keys"):
        specimen.load(hook_nam="blocks.1.hook_resid_pre")


def test_facts_about_the_model_become_metadata(one_of_each_kind: Specimen):
    specimen = one_of_each_kind
    sae = specimen.load(hook_name="blocks.1.hook_resid_pre", dataset_path="mine")
    assert (sae.metadata["hook_name"], sae.metadata["dataset_path"]) == ("blocks.1.hook_resid_pre", "mine")


class Counting:
    """A source that counts the bytes that were asked for; asking for a whole weights file counts all of it."""

    def __init__(self, specimen: Specimen) -> None:
        self._files = LocalFiles(specimen.root)
        self._weights = specimen.weights
        self.weight_bytes = 0

    @property
    def location(self) -> str:
        return self._files.location

    def files(self) -> Sequence[str]:
        return self._files.files()

    def exists(self, name: str) -> bool:
        return self._files.exists(name)

    def path(self, name: str) -> Path:
        path = self._files.path(name)
        self.weight_bytes += path.stat().st_size if name == self._weights else 0
        return path

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        data = self._files.read_range(name, start, stop)
        self.weight_bytes += len(data) if name == self._weights else 0
        return data


def test_the_config_alone_is_what_comes_with_the_weights(specimen: Specimen):
    facts = specimen.facts or None
    source = Counting(specimen)
    whole = specimen.loader().load(source, specimen.path, overrides=facts)
    source.weight_bytes = 0
    alone = specimen.loader().load(source, specimen.path, overrides=facts, weights=False)
    assert (alone.architecture, alone.config, alone.metadata) == (whole.architecture, whole.config, whole.metadata)
    assert alone.tensors == {}
    if specimen.config is not None:
        header = 20_000  # in files as small as these, more than all of the weights: only a whole-file request would count more
        assert source.weight_bytes <= header
        assert specimen.weights.endswith(".safetensors") or specimen.format == "saev" or source.weight_bytes == 0


def test_rows_loads_some_latents_with_the_values_they_have_among_all(specimen: Specimen):
    rows = [5, 0, 11]
    whole = specimen.load()
    load = {"overrides": specimen.facts or None, "rows": rows}
    if not type(whole).independent_latents:
        with pytest.raises(ConfigError, match="its latents compete"):
            read_sae(LocalFiles(specimen.root), specimen.path, **cast("Any", load))
        return
    some = read_sae(LocalFiles(specimen.root), specimen.path, **cast("Any", load))
    assert some.d_sae == 3
    assert some.metadata["rows"] == rows
    torch.testing.assert_close(outputs(some)[0], outputs(whole)[0][:, rows], rtol=0, atol=1e-6)
    torch.testing.assert_close(some.W_dec, whole.W_dec[rows], rtol=0, atol=0)
    with pytest.raises(ConfigError, match="rows must lie in"):
        read_sae(LocalFiles(specimen.root), specimen.path, overrides=specimen.facts or None, rows=[whole.d_sae])


def test_casting_on_the_way_is_casting_afterwards(one_of_each_kind: Specimen):
    specimen = one_of_each_kind
    direct = read_sae(LocalFiles(specimen.root), specimen.path, overrides=specimen.facts or None, dtype="bfloat16")
    later = specimen.load().to(torch.bfloat16)
    assert direct.dtype == torch.bfloat16
    assert all(map(torch.equal, outputs(direct), outputs(later)))


def test_what_is_loaded_can_be_saved_and_is_then_the_same_function(specimen: Specimen, tmp_path: Path):
    sae = specimen.load()
    again = SAE.load(sae.save(tmp_path / "native"))
    for found, expected in zip(outputs(again), outputs(sae), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Runs:
    """An object whose unpickling leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize(
    "name", [name for name in SPECIMENS if name in ("batch_topk", "connor_rob_hook_z", "saev", "openai")]
)
@pytest.mark.parametrize("as_zip", [True, False])
def test_a_file_that_would_run_code_is_refused_and_runs_none(name: str, as_zip: bool, tmp_path: Path):
    specimen = SPECIMENS[name](tmp_path)
    trace = tmp_path / "ran"
    line, _ = specimen._pickled()
    buffer = io.BytesIO()
    if as_zip:
        torch.save({"W_enc": Runs(trace)}, buffer)
    else:
        pickle.dump({"W_enc": Runs(trace)}, buffer)
    specimen.weights_path.write_bytes(line + buffer.getvalue())
    with pytest.raises(FormatError, match="run code"):
        specimen.load()
    assert not trace.exists()


def test_a_config_that_names_another_class_is_refused_with_the_known_ones(tmp_path: Path):
    specimen = SPECIMENS["batch_topk"](tmp_path)
    specimen.edit_config(lambda trainer: trainer.update(dict_class="BatchTopKSEA"))
    with pytest.raises(FormatError, match=r"did you mean 'BatchTopKSAE'\?; known: AutoEncoder"):
        specimen.load()


def test_a_k_that_contradicts_itself_is_refused(tmp_path: Path):
    specimen = SPECIMENS["autoencoder_topk"](tmp_path)
    specimen.edit_config(lambda trainer: trainer.update(k=7))
    with pytest.raises(FormatError, match=r"k is 3 here, but 7 in config\.json"):
        specimen.load()


def test_a_missing_class_is_never_a_default(tmp_path: Path):
    specimen = SPECIMENS["autoencoder"](tmp_path)
    specimen.edit_config(lambda trainer: trainer.pop("dict_class"))
    with pytest.raises(FormatError, match="'dict_class' is missing"):
        specimen.load()


def test_a_path_out_of_the_folder_is_refused(tmp_path: Path):
    specimen = SPECIMENS["goodfire"](tmp_path)
    (tmp_path / "inside").mkdir()
    with pytest.raises(FormatError, match="not a relative path inside"):
        read_sae(LocalFiles(tmp_path / "inside"), f"../{specimen.path}", format="goodfire")


def test_an_unknown_folder_lists_what_was_looked_for_and_what_is_there(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FormatError, match=r"no known format \(looked for: .*sparsify.*\); it holds: notes.txt"):
        SAE.load(tmp_path)


def test_a_format_that_nobody_provides_is_refused_with_near_names(tmp_path: Path):
    specimen = SPECIMENS["sparsify"](tmp_path)
    with pytest.raises(UnknownNameError, match="sparsify"):
        SAE.load(specimen.root, format="sparsfy")


def test_a_file_of_two_formats_is_refused_until_the_caller_names_one(tmp_path: Path):
    specimen = SPECIMENS["sparsify"](tmp_path)
    trained("batch_topk")(tmp_path)
    with pytest.raises(FormatError, match=r"several formats fit: .*dictionary_learning_1.*sparsify.*format="):
        SAE.load(tmp_path)
    assert SAE.load(tmp_path, format="sparsify").architecture == "topk"
    assert dataclasses.asdict(SAE.load(specimen.root, format="sparsify").config)["k"] == 4
