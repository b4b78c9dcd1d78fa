"""examples/plugins: three architectures written as strangers write them do all that the core's own do."""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sae_core import SAE, SparseCodes, TrainConfig, Trainer, create
from sae_core.errors import ConfigError, FormatError, UnknownNameError
from sae_core.plugins import get_registry, reset_registry
from sae_core.testing import PluginFolder, run_checks

FOLDER = Path(__file__).parents[1] / "examples" / "plugins"
X = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)) @ torch.randn(16, 16).fill_(0.2) + 1
X = X + torch.randn(512, 16, generator=torch.Generator().manual_seed(1))
BATCHES = list(X.split(64))
TRAIN = TrainConfig(total_samples=512, batch_size=64, lr=3e-3, init_samples=128, log_every_steps=2, progress_bar=False)


class Plugin(NamedTuple):
    """One of them: where it is, what its architecture is called, and a small config."""

    distribution: str
    name: str
    config: Mapping[str, Any]

    @property
    def project(self) -> dict[str, Any]:
        return tomllib.loads((FOLDER / self.distribution / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    @property
    def package(self) -> str:
        return self.distribution.replace("-", "_")

    def new(self, **changes: Any) -> SAE[Any]:
        return create(f"{self.distribution}:{self.name}", **{"d_in": 16, "d_sae": 64, **self.config, **changes})


PLUGINS = [
    Plugin("sae-dedicated", "dedicated", {"k": 8, "dedicated": 0.125, "reads": {"base": 6, "chat": 10}}),
    Plugin("sae-switch", "switch", {"k": 8, "experts": 4}),
    Plugin("sae-archetypal", "archetypal", {"k": 8, "points": 48}),
]
every_plugin = pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of them by the entry points that their pyproject.toml declare, as installing them does it."""
    for plugin in PLUGINS:
        monkeypatch.syspath_prepend(str(FOLDER / plugin.distribution / "src"))
        for module in plugin.project["entry-points"]["sae_core.plugins"].values():
            get_registry().register(importlib.import_module(module), plugin.project["name"])
    yield
    reset_registry()
    for module in [m for m in sys.modules if m.partition(".")[0] in {plugin.package for plugin in PLUGINS}]:
        del sys.modules[module]


def trained(plugin: Plugin, **changes: Any) -> SAE[Any]:
    return Trainer(plugin.new(**changes), BATCHES, TRAIN).fit().sae


@every_plugin
def test_it_passes_the_conformance_kit(plugin: Plugin) -> None:
    results = run_checks("architecture", f"{plugin.distribution}:{plugin.name}", config=plugin.config)
    assert len(results) > 15
    assert [result for result in results if not result.ok] == []


@every_plugin
def test_it_goes_on_from_a_checkpoint_with_the_same_bits(plugin: Plugin, tmp_path: Path) -> None:
    whole = Trainer(plugin.new(), BATCHES, TRAIN)
    whole.fit()
    part = Trainer(plugin.new(), BATCHES, TRAIN, checkpoints=tmp_path)
    part.callbacks.append(lambda progress: part.stop() if progress.learner.steps == 3 else None)
    part.fit()
    part.checkpoint()
    resumed = Trainer.resume(tmp_path, BATCHES)
    resumed.fit()
    assert resumed.history == whole.history
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(resumed.sae.state_dict()[name], tensor), name


@every_plugin
@pytest.mark.parametrize("normalisation", ["none", "expected_average_only_in"])
def test_it_saves_what_it_computes_and_folds_or_is_refused(plugin: Plugin, normalisation: str, tmp_path: Path) -> None:
    sae = trained(plugin, normalize_activations=normalisation)
    x = X[:40]
    y, latents = sae(x), sae.encode(x)
    loaded = SAE.load(sae.save(tmp_path / "sae"))
    torch.testing.assert_close(loaded(x), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded.encode(x), latents, rtol=1e-4, atol=1e-4)
    if plugin.name == "dedicated":
        sae.fold_decoder_norm()
        torch.testing.assert_close(sae.decoder_norms(), torch.ones(64))
        torch.testing.assert_close(sae.encode(x), latents, rtol=1e-4, atol=1e-4)
        sae.fold_normalization()
        assert sae.config.normalize_activations == "none"
        with pytest.raises(ConfigError, match="dedicated: latents are ranked without decoder norms"):
            sae.fold_decoder_norm()
    else:
        with pytest.raises(ConfigError, match=f"{plugin.name}: decoder norms cannot be folded"):
            sae.fold_decoder_norm()
        if normalisation != "none":
            with pytest.raises(ConfigError, match=f"{plugin.name}: .* cannot be folded"):
                sae.fold_normalization()
    torch.testing.assert_close(sae(x), y, rtol=1e-4, atol=1e-4)


def test_what_they_save_loads_where_they_are_installed_and_says_what_to_install_elsewhere(tmp_path: Path) -> None:
    """One other process has all three as installed distributions."""
    site = PluginFolder(tmp_path / "site")
    for plugin in PLUGINS:
        entries = [f"{name} = {m}" for name, m in plugin.project["entry-points"]["sae_core.plugins"].items()]
        source = FOLDER / plugin.distribution / "src" / plugin.package
        files = {path.name: path.read_text(encoding="utf-8") for path in source.glob("*.py") if path.stem != "_plugin"}
        plugin_source = (source / "_plugin.py").read_text(encoding="utf-8")
        site.add(plugin.distribution, plugin_source, version="0.1.0", entry_points=entries, files=files)
        trained(plugin).save(tmp_path / plugin.name)
    done = site.python(
        """
        import json, sys
        import torch
        from sae_core import SAE
        x = torch.arange(64.0).view(4, 16) / 10
        folders = sys.argv[1:]
        saes = [SAE.load(folder, form=form) for folder in folders for form in ("inference", "training")]
        print(json.dumps([[type(sae).__name__, sae.eval()(x).tolist()] for sae in saes]))
        """,
        *(str(tmp_path / plugin.name) for plugin in PLUGINS),
    )
    assert done.returncode == 0, done.stderr
    x = torch.arange(64.0).view(4, 16) / 10
    found = json.loads(done.stdout)
    assert [name for name, _ in found] == [
        *("DedicatedCrosscoder", "DedicatedCrosscoder"),
        *("SwitchSAE", "SwitchSAE"),
        *("TopKSAE", "ArchetypalSAE"),
    ]
    for plugin, (_, y) in zip([p for p in PLUGINS for _ in range(2)], found, strict=True):
        torch.testing.assert_close(torch.tensor(y), SAE.load(tmp_path / plugin.name)(x), rtol=1e-4, atol=1e-4)
    reset_registry()
    for name in ("dedicated", "switch"):
        with pytest.raises(UnknownNameError, match=f"provided by.*sae-{name}.*not installed"):
            SAE.load(tmp_path / name)
    assert SAE.load(tmp_path / "archetypal").architecture == "topk"
    with pytest.raises(UnknownNameError, match="sae-archetypal"):
        SAE.load(tmp_path / "archetypal", form="training")


def test_an_archetypal_dictionary_is_written_for_other_libraries_as_the_topk_that_it_is(tmp_path: Path) -> None:
    from sae_core.format.convert import convert

    sae = trained(PLUGINS[2])
    convert(sae, "sparsify", tmp_path / "theirs")
    torch.testing.assert_close(SAE.load(tmp_path / "theirs")(X[:20]), sae(X[:20]), rtol=1e-4, atol=1e-4)
    with pytest.raises(FormatError, match="sparsify cannot express architecture 'sae-switch:switch'"):
        convert(trained(PLUGINS[1]), "sparsify", tmp_path / "other")


@every_plugin
def test_training_explains_what_there_is_to_explain(plugin: Plugin) -> None:
    """Sums of two of 32 directions; on the same 200 steps sae-core's topk explains 0.88."""
    generator = torch.Generator().manual_seed(3)
    features = torch.nn.functional.normalize(torch.randn(32, 16, generator=generator), dim=-1)
    x = (torch.rand(20_000, 32, generator=generator) < 0.06).float() @ features
    config = TrainConfig(total_samples=20_000, batch_size=100, lr=1e-2, init_samples=1000, progress_bar=False)
    result = Trainer(plugin.new(k=4), x.split(100), config).fit()
    assert (result.history[-1]["explained_variance"] or 0) > 0.75


def test_dedicated_latents_read_and_write_their_own_site_alone() -> None:
    sae: Any = trained(PLUGINS[0])
    assert (sae.latents_of("base"), sae.latents_of("chat")) == (range(8), range(8, 16))
    for weights in (sae.encoder, sae.W_dec):
        assert not weights[:8, 6:].any()
        assert not weights[8:16, :6].any()
        assert weights[:8, :6].all()
        assert weights[8:16, 6:].all()
        assert weights[16:].all()


def test_a_row_is_encoded_by_the_expert_that_the_router_prefers_and_scaled_by_its_probability() -> None:
    sae: Any = trained(PLUGINS[1])
    x = X[:50]
    p, expert = torch.softmax((x - sae.router_centre) @ sae.router.T, -1).max(-1)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    expected = torch.zeros(50, 64)
    for row in range(50):
        own = pre[row, 16 * expert[row] : 16 * (expert[row] + 1)]
        best = own.topk(8).indices
        expected[row, 16 * expert[row] + best] = own[best].relu() * p[row]
    codes = sae.encode_sparse(x)
    assert isinstance(codes, SparseCodes)
    torch.testing.assert_close(codes.to_dense(), expected)
    assert len(expert.unique()) > 1


def test_the_points_of_an_archetypal_dictionary_are_samples_and_its_decoder_stays_near_their_hull() -> None:
    sae: Any = trained(PLUGINS[2], longest_deviation=0.25)
    first = torch.cat(BATCHES[:2]) - torch.cat(BATCHES[:2]).mean(0)
    distance = (sae.points[:, None] - first).norm(dim=-1).min(-1).values
    assert float(distance.max()) < 1e-4
    with torch.no_grad():
        hull = torch.softmax(sae.mixture, -1) @ sae.points
        lengths = (sae.decoder() - hull).norm(dim=-1)
    assert float(lengths.max()) <= 0.25 + 1e-5
    assert float(lengths.max()) > 0
    with pytest.raises(ConfigError, match="points: 4096 are wanted of 128; raise init_samples"):
        trained(PLUGINS[2], points=4096)


@every_plugin
def test_it_is_short_and_written_from_public_names(plugin: Plugin) -> None:
    import ast

    for path in (FOLDER / plugin.distribution / "src").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        for node in imported:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            assert not [name for name in names if name.startswith("_") and name != "__future__"], path
            if (node.module or "").startswith("sae_core"):
                module = importlib.import_module(node.module or "")
                assert {alias.name for alias in node.names} <= set(module.__all__), (path, node.module)
        private = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr.startswith("_")]
        assert [name for name in private if not name.endswith("__")] == []
        documents = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
        texts = {line for n in documents for line in range(n.lineno, (n.end_lineno or n.lineno) + 1)}
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        assert sum(1 for n, line in lines if n not in texts and line.strip()[:1] not in ("", "#")) <= 100
