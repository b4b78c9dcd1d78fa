"""Plots show the numbers they should, in the right order, and a page of them needs no network."""

from __future__ import annotations

import builtins
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go  # noqa: TID253 - plots are what is tested
import plotly.io  # noqa: TID253 - likewise
import pytest
import torch
from sae_core import SAE, create
from sae_core.errors import ConfigError, MissingDependencyError
from sae_synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    Report,
    find_best_feature_ordering,
    find_best_feature_ordering_across_saes,
    find_best_feature_ordering_from_sae,
    init_sae_to_match_feature_dict,
    plot_firing,
    plot_pareto,
    plot_recovery,
    plot_sae_feature_similarity,
    plot_similarity,
    plot_training,
)
from safetensors.torch import load_file
from torch import Tensor


@pytest.fixture
def features() -> FeatureDictionary:
    return FeatureDictionary(6, 8, seed=0)


def _shuffled(features: FeatureDictionary, order: list[int], noise: float = 0.0) -> SAE:
    sae = create("standard", d_in=8, d_sae=len(order))
    init_sae_to_match_feature_dict(sae, features, noise, torch.tensor(order), seed=1)
    return sae


def _valid(figure: Any) -> go.Figure:
    """The figure, after plotly has read it back from JSON and checked every property."""
    plotly.io.from_json(plotly.io.to_json(figure))
    return figure


def assert_no_network(page: str) -> None:
    """Nothing is fetched when the page opens: no element refers to an address."""
    elements = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href|data|action)\s*=\s*["']?\s*(https?:)?//""", elements)
    assert "@import" not in elements
    assert "Plotly.newPlot" in page
    assert len(page) > 1_000_000  # plotly's script is inside


def test_the_best_ordering_undoes_a_shuffle(features: FeatureDictionary) -> None:
    order = [3, 0, 5, 1, 4, 2]
    sae = _shuffled(features, order, noise=0.05)
    found = find_best_feature_ordering_from_sae(sae, features)
    assert [order[i] for i in found] == [0, 1, 2, 3, 4, 5]
    assert torch.equal(found, find_best_feature_ordering(sae.W_dec, features.feature_vectors))
    with torch.no_grad():
        sae.W_dec.neg_()  # the sign does not count
    assert torch.equal(find_best_feature_ordering_from_sae(sae, features), found)


def test_the_best_ordering_is_that_of_sae_lens(golden_folder: Path, golden_tensors: dict[str, Tensor]) -> None:
    for a, b, wanted in (
        (golden_tensors["a"], golden_tensors["b"], golden_tensors["feature_ordering"]),
        [load_file(golden_folder / "scores.safetensors")[name] for name in ("ordering_a", "ordering_b", "ordering")],
    ):
        cosines = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
        best = cosines.abs().argmax(1)
        assert torch.equal(best[find_best_feature_ordering(a, b)], best[wanted])  # equal matches may come in any order


def test_across_saes_the_one_nearest_to_the_truth_gives_the_order(features: FeatureDictionary) -> None:
    near, far = _shuffled(features, [1, 0, 2, 3, 5, 4], noise=0.01), _shuffled(features, [5, 4, 3, 2, 1, 0], noise=0.4)
    wanted = find_best_feature_ordering_from_sae(near, features)
    assert torch.equal(find_best_feature_ordering_across_saes([far, near], features), wanted)
    assert torch.equal(find_best_feature_ordering_across_saes(iter([near, far]), features), wanted)
    small = _shuffled(features, [4, 2])
    assert find_best_feature_ordering_across_saes([small], features).tolist() == [1, 0]
    with pytest.raises(ConfigError, match="no SAE was given"):
        find_best_feature_ordering_across_saes([], features)


def test_the_similarity_of_an_sae_is_its_cosines_in_the_order_asked_for(features: FeatureDictionary) -> None:
    sae = _shuffled(features, [3, 0, 5, 1, 4, 2])
    figure = _valid(
        plot_sae_feature_similarity(sae, features, reorder_features=True, show_plot=False, show_values=True)
    )
    assert [annotation.text for annotation in figure.layout.annotations] == ["SAE encoder", "SAE decoder"]
    for heat in figure.data:
        torch.testing.assert_close(torch.tensor(heat.z).float().diagonal(), torch.ones(6), atol=1e-3, rtol=0)
        assert (heat.zmin, heat.zmax) == (-1, 1)
        assert heat.texttemplate == "%{z:.2f}"
    plain = plot_sae_feature_similarity(sae, features, decoder_only=True, show_plot=False, title="mine")
    assert plain.layout.title.text == "mine"
    assert len(plain.data) == 1
    assert torch.tensor(plain.data[0].z).argmax(1).tolist() == [3, 0, 5, 1, 4, 2]
    given = plot_sae_feature_similarity(sae, features, reorder_features=torch.tensor([5, 4]), show_plot=False)
    assert torch.tensor(given.data[1].z).argmax(1).tolist() == [2, 4]


def test_an_sae_without_an_encoder_is_drawn_by_its_decoder_alone(features: FeatureDictionary) -> None:
    sae = create("matching_pursuit", d_in=8, d_sae=6)
    with pytest.raises(ConfigError, match="no encoder matrix W_enc; plot it with decoder_only=True"):
        plot_sae_feature_similarity(sae, features, show_plot=False)
    assert len(plot_sae_feature_similarity(sae, features, decoder_only=True, show_plot=False).data) == 1


def test_a_saved_plot_is_a_page_without_network(features: FeatureDictionary, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "plot.html"
    plot_sae_feature_similarity(_shuffled(features, [0, 1, 2]), features, save_path=path, show_plot=False)
    assert_no_network(path.read_text())


def test_a_plot_is_shown_unless_told_otherwise(features: FeatureDictionary, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr(go.Figure, "show", lambda figure: shown.append(figure))
    figure = plot_sae_feature_similarity(_shuffled(features, [0, 1]), features)
    assert shown == [figure]


def test_similarities_side_by_side_put_the_truth_on_the_diagonal(features: FeatureDictionary) -> None:
    truth = features.feature_vectors.detach()
    figure = _valid(plot_similarity({"turned": -truth.flip(0), "half": truth[:3]}, truth))
    assert torch.tensor(figure.data[0].z).float().diagonal().tolist() == pytest.approx([1.0] * 6, abs=1e-3)
    assert torch.tensor(figure.data[1].z).shape == (3, 6)
    most = plot_similarity({"all": torch.randn(50, 8, generator=torch.Generator().manual_seed(0))}, truth, most=4)
    assert torch.tensor(most.data[0].z).shape == (8, 4)


def test_firing_shows_rates_and_how_much_more_often_pairs_fire_than_by_chance() -> None:
    correlation = torch.tensor([[1.0, 0.95, 0.0], [0.95, 1.0, 0.0], [0.0, 0.0, 1.0]])
    generator = ActivationGenerator(3, torch.tensor([0.2, 0.2, 0.5]), correlation_matrix=correlation, seed=0)
    figure = _valid(plot_firing(generator.sample_codes(20_000)))
    assert list(figure.data[0].y) == pytest.approx([0.2, 0.2, 0.5], abs=0.02)
    ratio = torch.tensor(figure.data[1].z)
    assert float(ratio[0, 1]) > 1.5
    assert abs(float(ratio[0, 2])) < 0.2
    assert ratio.diagonal().tolist() == [0.0, 0.0, 0.0]
    assert torch.tensor(_valid(plot_firing(generator.sample_codes(100), most=2)).data[1].z).shape == (2, 2)


def test_recovery_is_the_best_cosine_over_the_firing_rate(features: FeatureDictionary) -> None:
    truth = features.feature_vectors.detach()
    rates = torch.tensor([0.5, 0.2, 0.1, 0.05, 0.02, 0.01])
    figure = _valid(plot_recovery({"half": -truth[:3]}, truth, rates))
    assert list(figure.data[0].x) == pytest.approx(rates.tolist())
    best = list(figure.data[0].y)
    assert best[:3] == pytest.approx([1.0] * 3, abs=1e-5)
    assert max(best[3:]) < 0.5
    assert figure.layout.xaxis.type == "log"


def test_a_pareto_plot_joins_points_in_order() -> None:
    series: Mapping[str, list[tuple[float, float]]] = {"a": [(3, 0.1), (1, 0.3)], "b": []}
    figure = _valid(plot_pareto(series, "L0", "F1"))
    assert list(figure.data[0].x) == [1, 3]
    assert list(figure.data[0].y) == [0.3, 0.1]
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("L0", "F1")


def test_training_is_drawn_key_by_key() -> None:
    history = [{"samples": 1.0, "loss": 5.0}, {"samples": 2.0, "loss": 4.0, "mcc": 0.5}]
    figure = _valid(plot_training(history, ["loss", "mcc"]))
    assert [list(line.x) for line in figure.data] == [[1.0, 2.0], [2.0]]
    with pytest.raises(ConfigError, match="history is empty"):
        plot_training([], ["loss"])


def test_a_report_is_one_page_that_escapes_its_text(tmp_path: Path) -> None:
    report = Report("a < b")
    report.text("x & y")
    report.table(["<name>", "value"], [["one", "1"]])
    for _ in range(2):
        report.heading("Figures")
        report.figure(plot_pareto({"a": [(1, 2)]}, "x", "y"))
    page = report.write(tmp_path / "new" / "report.html").read_text()
    assert_no_network(page)
    assert "<h1>a &lt; b</h1>" in page
    assert "<p>x &amp; y</p>" in page
    assert "<th>&lt;name&gt;</th>" in page
    assert page.count("Plotly.newPlot(") >= 2
    assert math.isclose(len(page), 5e6, rel_tol=0.5)  # the script is in it once, not twice


def test_without_plotly_the_way_to_get_it_is_told(features: FeatureDictionary, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'sae-synthetic\[plots\]'"):
        plot_similarity({"a": features.feature_vectors}, features.feature_vectors)
    with pytest.raises(MissingDependencyError, match="plotly"):
        Report("x")
