from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_core import create
from sae_core.codes import SparseCodes
from sae_core.config import structure
from sae_core.errors import DataError
from sae_lm.baseline import RandomDictionary
from sae_lm.evaluation import (
    evaluate_activations,
    evaluate_candidates,
    evaluate_sae,
    evaluate_saes,
    first_tokens,
)
from sae_lm.hooks import capture, replaced
from sae_lm.metrics import DEFINITIONS, METRICS_VERSION, intervals, values
from sae_lm.places import Route
from sae_lm.results import LATENT_FIELDS, SUMMARIES
from sae_lm.scoring import Calibration, Candidate, Scores
from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig
from sae_lm.tokens import TokenPolicy, Windows, WindowStream, resolve
from safetensors import safe_open
from torch import nn

BOS, EOS, PAD = 0, 1, 2
DOCUMENTS = [[10 + (7 * i + j * j) % 200 for j in range(5 + i % 9)] for i in range(40)]


def windows_of(rows: int = 4, size: int = 12, **policy: Any) -> tuple[Any, list[Windows]]:
    rules = resolve(TokenPolicy(**{"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, **policy}), None, size)
    return rules, list(WindowStream(DOCUMENTS, rules, rows=rows))


def clean_of(result: Any) -> float:
    return next(iter(result.candidates.values()))["ce_clean"]


def zero_of(result: Any) -> float:
    return next(iter(result.candidates.values()))["ce_zero_ablation"]


def only(x: torch.Tensor) -> tuple[torch.Tensor, None]:
    return x, None


def run(
    model: nn.Module, candidates: dict[str, Any], hook: str = "model.layers.1", saelens: bool = False, **settings: Any
) -> Any:
    rules, windows = windows_of(**settings)
    return evaluate_candidates(model, hook, windows, candidates, rules=rules, saelens=saelens)


def test_identity_recovers_everything_and_zeros_recover_nothing(llama: Any) -> None:
    result = run(llama, {"identity": only, "zeros": lambda x: (torch.zeros_like(x), None)})
    identity, zeros = result.candidates["identity"], result.candidates["zeros"]
    assert identity["explained_variance"] == identity["ce_recovered"] == 1.0
    assert (identity["ce"], identity["kl"], identity["mse"]) == (clean_of(result), 0.0, 0.0)
    assert zeros["ce_recovered"] == 0.0
    assert zeros["ce"] == zero_of(result) != clean_of(result)
    assert zeros["explained_variance"] <= 0.0
    assert zeros["kl"] > 0.0
    assert "l0" not in identity


def test_answering_the_mean_explains_no_variance(llama: Any) -> None:
    seen: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> tuple[torch.Tensor, None]:
        seen.append(x.clone())
        return x, None

    run(llama, {"keep": keep})
    mean = torch.cat(seen).double().mean(0).float()
    result = run(llama, {"mean": lambda x: (mean.expand_as(x), None)})
    assert result.candidates["mean"]["explained_variance"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("packing", ["concatenate", "document"])
def test_neither_batch_size_nor_padding_changes_a_number(llama: Any, packing: str) -> None:
    sae = create("topk", d_in=32, d_sae=64, k=4, seed=0).eval()

    def reconstruct(x: torch.Tensor) -> Any:
        codes = sae.encode_sparse(x)
        return sae.decode(codes), codes

    results = [run(llama, {"sae": reconstruct}, rows=rows, packing=packing, saelens=True) for rows in (1, 3, 64)]
    reference = results[0]
    for result in results[1:]:
        assert (result.activations, result.predictions) == (reference.activations, reference.predictions)
        assert result.candidates["sae"] == pytest.approx(dict(reference.candidates["sae"]), rel=1e-4, abs=1e-7)
        for name, span in result.intervals["sae"].items():
            assert span == pytest.approx(reference.intervals["sae"][name], rel=1e-3, abs=1e-6)
        for name, column in result.latents["sae"].fields.items():
            assert torch.allclose(column, reference.latents["sae"].fields[name], rtol=1e-4)


def test_the_numbers_are_those_of_the_plain_formulas(llama: Any) -> None:
    rules, windows = windows_of(rows=100)
    (batch,) = windows
    noise = torch.randn(int(batch.kept.sum()), 32, generator=torch.Generator().manual_seed(0)) * 0.01

    def noisy(x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x + noise, None

    result = evaluate_candidates(llama, "model.layers.1", windows, {"noisy": noisy}, rules=rules)

    mask = batch.attended.long()
    with torch.no_grad():
        states = llama(batch.tokens, attention_mask=mask, output_hidden_states=True)
        changed = states.hidden_states[2].clone()
        changed[batch.kept] += noise
        handle = llama.model.layers[1].register_forward_hook(lambda *_: changed)
        spliced = llama(batch.tokens, attention_mask=mask).logits
        handle.remove()
    ce_clean, ce_noisy, kl = [], [], []
    for row in range(len(batch)):
        for position in range(batch.tokens.shape[1] - 1):
            target = batch.tokens[row, position + 1]
            if batch.kept[row, position] and batch.attended[row, position + 1] and target != BOS:
                p, q = (logits[row, position].double().log_softmax(0) for logits in (states.logits, spliced))
                ce_clean.append(-p[target])
                ce_noisy.append(-q[target])
                kl.append((p.exp() * (p - q)).sum())
    assert result.predictions == len(ce_clean)
    assert result.activations == int(batch.kept.sum()) > len(ce_clean)
    assert result.windows == len(batch)
    assert clean_of(result) == pytest.approx(float(torch.stack(ce_clean).mean()), rel=1e-5)
    assert result.candidates["noisy"]["ce"] == pytest.approx(float(torch.stack(ce_noisy).mean()), rel=1e-5)
    assert result.candidates["noisy"]["kl"] == pytest.approx(float(torch.stack(kl).mean()), rel=2e-3)
    recovered = (zero_of(result) - result.candidates["noisy"]["ce"]) / (zero_of(result) - clean_of(result))
    assert result.candidates["noisy"]["ce_recovered"] == pytest.approx(recovered)


class Recorder(nn.Module):
    """A causal model with tuple outputs that keeps what arrives behind the hooked block."""

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            return x, "cache"

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(256, 6), Recorder.Block(), nn.Linear(6, 256)
        self.arrived: list[torch.Tensor] = []

    def forward(self, tokens: torch.Tensor) -> Any:
        hidden, cache = self.block(self.embed(tokens))
        assert cache == "cache"
        self.arrived.append(hidden.clone())
        return SimpleNamespace(logits=self.head(hidden))


def test_only_positions_that_count_are_replaced_and_the_tuple_stays(llama: Any) -> None:
    model = Recorder().eval()
    rules, windows = windows_of(rows=100)
    (batch,) = windows
    evaluate_candidates(model, "block", windows, {"sevens": lambda x: (torch.full_like(x, 7.0), None)}, rules=rules)
    clean, sevens, zeros, mean = model.arrived
    assert torch.equal(clean, model.embed(batch.tokens))
    average = clean[batch.kept].mean(0)
    for changed, value in ((sevens, torch.tensor(7.0)), (zeros, torch.tensor(0.0)), (mean, average)):
        assert torch.equal(changed[~batch.kept], clean[~batch.kept])
        assert torch.allclose(changed[batch.kept], value.expand_as(changed[batch.kept]), atol=1e-6)


def test_the_first_tokens_are_the_same_windows_however_they_are_batched() -> None:
    for count in (1, 11, 50, 333, 10_000):
        taken = [
            torch.cat([windows.tokens for windows in first_tokens(windows_of(rows=rows)[1], count)])
            for rows in (1, 5, 100)
        ]
        assert torch.equal(taken[0], taken[1])
        assert torch.equal(taken[0], taken[2])
        kept = [windows.kept.sum().item() for windows in first_tokens(windows_of(rows=1)[1], count)]
        assert sum(kept[:-1]) < count
        assert sum(kept) >= count or count == 10_000


def test_a_model_that_predicts_no_next_token_has_no_cross_entropy() -> None:
    from transformers import BertConfig, BertForMaskedLM

    small = BertConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    result = run(BertForMaskedLM(small).eval(), {"identity": only}, hook="bert.encoder.layer.0", packing="document")
    assert result.predictions == 0
    assert result.candidates["identity"]["explained_variance"] == 1.0
    assert "ce_recovered" not in result.candidates["identity"]
    json.dumps(result.as_dict(), allow_nan=False)


def test_no_token_that_counts_is_an_error(llama: Any) -> None:
    rules, _ = windows_of()
    with pytest.raises(DataError, match="gives no token that counts"):
        evaluate_candidates(llama, "model.layers.1", [], {"identity": only}, rules=rules)


def test_the_numbers_of_reconstruction_are_those_worked_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    y = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 2.0], [2.0, 0.0]])
    codes = SparseCodes.from_dense(torch.tensor([[1.0, -2.0, 0], [0, 0, 0], [0, 0, 3.0], [0, 0, 1.0]]))
    sae = create("topk", d_in=2, d_sae=3, k=2, seed=0)
    saes: Any = {"sae": sae}
    result = evaluate_activations(saes, lambda: [x[:3], x[3:]], baseline=False, saelens=True, resamples=0)
    assert set(result.candidates["sae"]) > {"explained_variance", "l1", "dead_fraction"}

    scores = Scores(
        Candidate(Route((), ()), lambda _: lambda _: (y, codes)), Calibration(x, x, x.double().mean(0)), [], True
    )
    scores.add(x, x, torch.arange(4), torch.tensor([0, 0, 1, 1]), (2, 2))
    found = {**values({**scores.sums.by_window(), **scores.totals()}), **scores.more()}
    errors, spread = [16, 1, 0, 1], [4 + 6.25, 1 + 2.25, 1 + 0.25, 0 + 2.25]
    mean_residual = [(0 + 0 + 0 - 1) / 4, (4 - 1 + 0 + 0) / 4]
    expected = {
        "mse": 18 / 4,
        "explained_variance": 1 - 18 / sum(spread),
        "explained_variance_centered": 1 - (18 - 4 * (mean_residual[0] ** 2 + mean_residual[1] ** 2)) / sum(spread),
        "saelens.explained_variance_legacy": sum(1 - e / s for e, s in zip(errors, spread, strict=True)) / 4,
        "cosine_similarity": (9 / 15 + 0 + 1 + 1) / 4,
        "l2_norm_in": (5 + 0 + 2 + 1) / 4,
        "l2_norm_out": (3 + 1 + 2 + 2) / 4,
        "l2_ratio": (3 / 5 + 1 + 2) / 3,
        "relative_reconstruction_bias": (9 + 1 + 4 + 4) / (9 + 0 + 4 + 2),
        "l0": 4 / 4,
        "l1": (3 + 0 + 3 + 1) / 4,
        "dead_fraction": 0.0,
        "density_median": 0.25,
        "dense_fraction": 1.0,
        "window_consistency": (1 + 1 + 2) / 3,
    }
    assert found == pytest.approx({**expected, "rare_fraction": 0.0})
    table = scores.latents().fields
    assert table["density"].tolist() == [0.25, 0.25, 0.5]
    assert table["mean_active"].tolist() == [1.0, -2.0, 2.0]
    assert table["largest"].tolist() == [1.0, 2.0, 3.0]


def test_explained_variance_is_the_one_that_training_reports(llama: Any) -> None:
    from sae_core.metrics import CosineSimilarity, ExplainedVariance, MeanSquaredError

    metrics: list[Any] = [ExplainedVariance(), MeanSquaredError(), CosineSimilarity()]
    sae = create("topk", d_in=32, d_sae=64, k=8, seed=0).eval()

    def reconstruct(x: torch.Tensor) -> Any:
        y = sae(x)
        for metric in metrics:
            metric.update(x, y, None)
        return y, None

    result = run(llama, {"sae": reconstruct}, rows=3)
    for metric in metrics:
        for name, value in metric.compute().items():
            assert result.candidates["sae"][name] == pytest.approx(value, rel=1e-6)


def test_the_mean_ablation_puts_the_mean_of_what_counts_in_its_place(llama: Any) -> None:
    seen: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> tuple[torch.Tensor, None]:
        seen.append(x)
        return x, None

    run(llama, {"keep": keep})
    mean = torch.cat(seen).double().mean(0).float()
    result = run(llama, {"mean": lambda x: (mean.expand_as(x), None), "zeros": lambda x: (torch.zeros_like(x), None)})
    mean_, zeros = result.candidates["mean"], result.candidates["zeros"]
    assert mean_["ce"] == pytest.approx(mean_["ce_mean_ablation"], rel=1e-6)
    assert mean_["kl"] == pytest.approx(mean_["kl_mean_ablation"], rel=1e-4)
    assert mean_["ce_recovered_mean"] == pytest.approx(0.0, abs=1e-4)
    assert mean_["kl_recovered_mean"] == pytest.approx(0.0, abs=1e-3)
    assert (zeros["ce"], zeros["kl"]) == (zeros["ce_zero_ablation"], zeros["kl_zero_ablation"])
    assert zeros["kl_recovered"] == 0.0


def test_the_numbers_under_saelens_names_are_its_formulas(llama: Any) -> None:
    """Every position is ablated, BOS too; a next token counts wherever the position does; KL counts the last position."""
    result = run(llama, {"half": lambda x: (x / 2, None)}, rows=100, saelens=True)
    _, (batch,) = windows_of(rows=100)
    mask = batch.attended.long()
    with torch.no_grad():
        clean = llama(batch.tokens, attention_mask=mask).logits.double().log_softmax(-1)

        def with_hook(change: Any) -> torch.Tensor:
            with replaced(llama, "model.layers.1", change):
                return llama(batch.tokens, attention_mask=mask).logits.double().log_softmax(-1)

        spliced_ = with_hook(lambda x: torch.where(batch.kept.unsqueeze(-1), x / 2, x))
        ablated = with_hook(torch.zeros_like)
    targets = batch.tokens[:, 1:].unsqueeze(-1)
    counts = batch.kept[:, :-1] & batch.attended[:, 1:]
    ce = {name: -p[:, :-1].gather(-1, targets).squeeze(-1)[counts].mean() for name, p in
          (("without_sae", clean), ("with_sae", spliced_), ("with_ablation", ablated))}  # fmt: skip
    kl = {name: (clean.exp() * (clean - q)).sum(-1)[batch.kept].mean() for name, q in
          (("with_sae", spliced_), ("with_ablation", ablated))}  # fmt: skip
    found = result.candidates["half"]
    for name, value in ce.items():
        assert found[f"saelens.ce_loss_{name}"] == pytest.approx(float(value), rel=1e-5)
    for name, value in kl.items():
        assert found[f"saelens.kl_div_{name}"] == pytest.approx(float(value), rel=5e-3)
    score = (ce["with_ablation"] - ce["with_sae"]) / (ce["with_ablation"] - ce["without_sae"])
    assert found["saelens.ce_loss_score"] == pytest.approx(float(score), rel=1e-3)
    assert found["saelens.ce_loss_with_ablation"] != pytest.approx(found["ce_zero_ablation"], rel=1e-6)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for trial in range(200):
        sums = {"positions": torch.full((50,), 4.0), "l0": torch.randn(50, generator=generator) + 4 * 7.0}
        low, high = intervals(sums, resamples=200, seed=trial)["l0"]
        inside += low <= 7.0 <= high
    assert 0.88 <= inside / 200 <= 0.99
    assert intervals({"positions": torch.ones(1), "l0": torch.ones(1)}) == {}


def test_the_random_dictionary_has_the_l0_asked_for_and_explains_what_random_directions_can() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3000, 16, generator=generator) * torch.linspace(0.1, 2, 16) + 5.0
    other = RandomDictionary(rows[:1500], rows[:1500], d_sae=96, l0=7.3, seed=1)
    y, codes = other(rows[1500:].view(3, 500, 16))
    assert codes.shape == (3, 500, 96)
    assert codes.l0().double().mean().item() == pytest.approx(7.3, rel=0.05)
    explained = 1 - (rows[1500:] - y.view(-1, 16)).square().sum() / (rows[1500:] - rows[1500:].mean(0)).square().sum()
    assert 0.2 < explained < 0.9
    again = RandomDictionary(rows[:1500], rows[:1500], d_sae=96, l0=7.3, seed=1)
    assert torch.equal(again(rows)[0], other(rows)[0])


@pytest.fixture
def source(llama: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., HuggingFaceSource]:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"Document {i}: {'word ' * (i % 7)}and {i * i}." for i in range(200)))

    def make(**changes: Any) -> HuggingFaceSource:
        settings = {
            "model": "tiny", "hook": "model.layers.1", "context_size": 24, "batch_prompts": 4, "buffer_rows": 1024,
            "text": {"kind": "file", "path": str(file), "held_out": 0.2}, **changes,
        }  # fmt: skip
        return HuggingFaceSource(structure(settings, HuggingFaceSourceConfig), model=llama, tokenizer=tokenizer)

    return make


def test_an_sae_is_evaluated_on_held_out_text_beside_a_random_one(source: Callable[..., HuggingFaceSource]) -> None:
    sae = create("topk", d_in=32, d_sae=64, k=8, seed=1).eval()
    counts: list[int] = []
    result = evaluate_sae(sae, source(), tokens=300, progress=counts.append)
    assert set(result.candidates) == {"sae", "random"}
    assert result.candidates["sae"]["l0"] == 8.0
    assert result.candidates["random"]["l0"] == pytest.approx(8.0, rel=0.05)
    assert 300 <= result.activations < 324
    assert counts == sorted(counts)
    assert counts[-1] == result.activations
    low, high = result.intervals["sae"]["ce_recovered"]
    assert low <= result.candidates["sae"]["ce_recovered"] <= high
    repeated = evaluate_sae(sae, source(), tokens=300, baseline=False)
    assert set(repeated.candidates) == {"sae"}
    assert repeated.candidates["sae"] == pytest.approx(dict(result.candidates["sae"]), rel=1e-6)


def test_the_mode_that_an_sae_is_in_changes_no_number(source: Callable[..., HuggingFaceSource]) -> None:
    sae = create("batchtopk", d_in=32, d_sae=64, k=4, seed=1)
    results = [evaluate_sae(sae.train(mode), source(), tokens=200, baseline=False) for mode in (True, False)]
    assert results[0].candidates == results[1].candidates


def test_many_saes_of_one_model_in_one_pass_have_the_numbers_that_they_have_alone(
    source: Callable[..., HuggingFaceSource],
) -> None:
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    saes = {f"layer {n}": create("topk", d_in=32, d_sae=64, k=4 + n, seed=n).eval() for n in range(3)}
    for number, sae in enumerate(saes.values()):
        sae.metadata = {"hook_name": f"model.layers.{number}"}
    made = source(batch_prompts=50)
    handle = made.language_model.model.register_forward_pre_hook(count)
    together = evaluate_saes(saes, made, tokens=200, batch_prompts=50, baseline=False)
    handle.remove()
    assert passes == 1 + 1 + 3 * 3  # up to the places, clean, and for each an SAE, zeros and the mean
    for name, sae in saes.items():
        alone = evaluate_sae(sae, source(), tokens=200, baseline=False)
        assert together.candidates[name] == pytest.approx(dict(alone.candidates["sae"]), rel=1e-4, abs=1e-7)
        assert together.places[name] == sae.metadata["hook_name"]


def test_a_transcoder_is_evaluated_at_its_target(source: Callable[..., HuggingFaceSource], llama: Any) -> None:
    transcoder = create("topk", d_in=32, d_out=32, d_sae=64, k=8, seed=1).requires_grad_(False)
    transcoder.metadata = {"hook_name": "model.layers.1.mlp:input", "hook_name_out": "model.layers.1.mlp"}
    result = evaluate_sae(transcoder, source(), tokens=200)
    windows = list(first_tokens(source().windows("held_out", rows=4), 200))
    x, y = [], []
    for batch in windows:
        found = capture(llama, ["model.layers.1.mlp:input", "model.layers.1.mlp"], batch.tokens,
                        attention_mask=batch.attended.long())  # fmt: skip
        x.append(found["model.layers.1.mlp:input"][batch.kept])
        y.append(found["model.layers.1.mlp"][batch.kept])
    target, predicted = torch.cat(y), transcoder.eval()(torch.cat(x))
    expected = 1 - (target - predicted).square().sum() / (target - target.mean(0)).square().sum()
    assert result.candidates["sae"]["explained_variance"] == pytest.approx(float(expected), rel=1e-3)
    assert result.places["sae"] == "model.layers.1.mlp:input -> model.layers.1.mlp"
    assert "ce_recovered" in result.candidates["random"]


def test_a_temporal_dictionary_is_evaluated_on_whole_windows(
    source: Callable[..., HuggingFaceSource], llama: Any
) -> None:
    sae = create("temporal", d_in=32, d_sae=64, n_heads=2, bottleneck_factor=8, kval_topk=5, seed=0).requires_grad_(
        False
    )
    results = [evaluate_sae(sae, source(), tokens=200, batch_prompts=n, baseline=False) for n in (1, 9)]
    assert results[0].candidates["sae"] == pytest.approx(dict(results[1].candidates["sae"]), rel=1e-4, abs=1e-7)
    x, y = [], []
    for batch in first_tokens(source().windows("held_out", rows=4), 200):
        found = capture(llama, ["model.layers.1"], batch.tokens, attention_mask=batch.attended.long())["model.layers.1"]
        x.append(found[batch.kept])
        y.append(sae.eval()(found)[batch.kept])
    target, predicted = torch.cat(x), torch.cat(y)
    expected = 1 - (target - predicted).square().sum() / (target - target.mean(0)).square().sum()
    assert results[0].candidates["sae"]["explained_variance"] == pytest.approx(float(expected), rel=1e-3)


def test_a_dictionary_of_several_places_is_evaluated_at_all_of_them(source: Callable[..., HuggingFaceSource]) -> None:
    places = ("model.layers.0", "model.layers.2")
    sae = create("topk", d_in=64, d_sae=64, k=5, seed=0, reads=dict.fromkeys(places, 32)).eval()
    result = evaluate_sae(sae, source(), tokens=200)
    assert result.places["sae"] == "model.layers.0, model.layers.2"
    assert result.candidates["sae"]["l0"] == 5.0
    assert {"ce_recovered", "kl_mean_ablation"} <= set(result.candidates["random"])


def test_an_encoder_decoder_has_its_encoder_evaluated_without_cross_entropy() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = T5ForConditionalGeneration(config).eval()
    result = run(model, {"identity": only}, hook="encoder.block.0", packing="document")
    assert result.predictions == 0
    assert result.candidates["identity"]["explained_variance"] == 1.0
    assert "ce" not in result.candidates["identity"]


def test_results_are_json_csv_a_page_and_files_beside_the_sae(
    source: Callable[..., HuggingFaceSource], tmp_path: Path
) -> None:
    import csv

    sae = create("topk", d_in=32, d_sae=64, k=8, seed=1).eval()
    result = evaluate_sae(sae, source(), tokens=100, saelens=True)
    kept = json.loads(result.save(tmp_path, {"sae": "here"}).read_text())
    assert kept["sae"] == "here"
    assert kept["metrics_version"] == 1
    assert kept["candidates"]["sae"]["l0"] == 8.0
    assert kept["intervals"]["sae"]["mse"][0] <= kept["candidates"]["sae"]["mse"]
    with safe_open(tmp_path / "evaluation.safetensors", "pt") as file:
        assert file.get_tensor("sae/density").shape == (64,)
        assert {"sae/encoder_norm", "sae/decoder_norm", "sae/encoder_decoder_cosine"} <= set(file.keys())
    (first, second) = csv.DictReader(result.as_csv().splitlines())
    assert (first["candidate"], second["candidate"]) == ("sae", "random")
    assert float(first["ce"]) == pytest.approx(result.candidates["sae"]["ce"])
    assert float(first["ce_low"]) <= float(first["ce_high"])
    page = result.as_html({"model": "<tiny>"})
    assert "&lt;tiny&gt;" in page
    assert "<script" not in page
    for definition in DEFINITIONS:
        assert html.escape(definition.text) in page
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evaluation.json", "evaluation.safetensors", "text.txt"]


def test_every_number_is_defined_in_the_documentation() -> None:
    page = Path(__file__).parents[3] / "docs" / "metrics.md"
    if not page.is_file():
        pytest.skip("needs the repository")
    text = page.read_text()
    names = [definition.name for definition in DEFINITIONS] + list(SUMMARIES) + list(LATENT_FIELDS)
    missing = [name for name in names if f"`{name}`" not in text]
    assert not missing
    assert f"version {METRICS_VERSION}" in text


def test_further_metrics_are_computed_for_each_candidate_by_itself(source: Callable[..., HuggingFaceSource]) -> None:
    class Largest:
        def __init__(self) -> None:
            self.largest = 0.0

        def update(self, inputs: torch.Tensor, outputs: torch.Tensor, codes: Any) -> None:
            self.largest = max(self.largest, float(codes.values.max()))

        def compute(self) -> dict[str, float]:
            return {"biggest": self.largest}

    sae = create("topk", d_in=32, d_sae=64, k=8, seed=1).eval()
    result = evaluate_sae(sae, source(), tokens=100, more_metrics=[Largest])
    largest = {name: metrics["biggest"] for name, metrics in result.candidates.items()}
    assert 0 < largest["sae"] != largest["random"] > 0


def test_an_sae_that_does_not_fit_the_place_is_refused(source: Callable[..., HuggingFaceSource]) -> None:
    with pytest.raises(DataError, match=r"model\.layers\.1 has shape .* the SAE's width there is 16"):
        evaluate_sae(create("topk", d_in=16, d_sae=64, k=8), source())
    with pytest.raises(DataError, match="gives no token that counts"):
        evaluate_sae(
            create("topk", d_in=32, d_sae=64, k=8), source(text={"kind": "stdlib", "held_out": 0.0}), tokens=10
        )
