"""Dictionaries that read two models are put back into both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE, create
from sae_core.cli import main
from sae_core.errors import ConfigError
from sae_lm import evaluate, spliced
from sae_lm.hooks import HookPoint, capture, replaced
from sae_lm.places import Place, Route, route_of
from sae_lm.scoring import Candidate
from sae_lm.tokens import TokenPolicy, Windows, WindowStream, resolve
from torch import Tensor
from torch.nn import functional

DOCUMENTS = [[10 + (7 * i + j * j) % 200 for j in range(5 + i % 9)] for i in range(30)]
PLACE = "model.layers.1"


@pytest.fixture(scope="module")
def tuned(llama: Any) -> Any:
    import copy

    other = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    return other


def windows_of() -> tuple[Any, list[Windows]]:
    rules = resolve(TokenPolicy(bos_token=0, eos_token=1, pad_token=2), None, 12)
    return rules, list(WindowStream(DOCUMENTS, rules, rows=4))


def cross_entropy(model: Any, windows: list[Windows], change: Any = None) -> float:
    """The mean over next tokens that count, position by position and without anything of ours but `replaced`."""
    losses: list[float] = []
    for batch in windows:
        kept = batch.kept

        def put(x: Tensor, kept: Tensor = kept) -> Tensor:
            return torch.where(kept.unsqueeze(-1), change(x), x)

        with torch.no_grad():
            mask = batch.attended.long()
            if change is None:
                logits = model(batch.tokens, attention_mask=mask).logits
            else:
                with replaced(model, PLACE, put):
                    logits = model(batch.tokens, attention_mask=mask).logits
        for row in range(len(batch)):
            for position in range(batch.tokens.shape[1] - 1):
                target = batch.tokens[row, position + 1]
                if kept[row, position] and batch.attended[row, position + 1] and target != 0:
                    losses.append(float(functional.cross_entropy(logits[row, position], target)))
    return sum(losses) / len(losses)


def test_each_model_gets_its_own_columns_back_and_has_losses_of_its_own(llama: Any, tuned: Any) -> None:
    both = tuple(Place(point=HookPoint(PLACE), width=32, second=second) for second in (False, True))
    half = {
        "second halved": Candidate(
            Route(both, both), lambda _: lambda x: (torch.cat([x[:, :32], x[:, 32:] / 2], 1), None)
        )
    }
    rules, windows = windows_of()
    result = evaluate(llama, windows, half, rules=rules, second_model=tuned, resamples=50)
    numbers = result.candidates["second halved"]
    assert result.places == {"second halved": f"{PLACE}, second/{PLACE}"}
    assert (numbers["ce_recovered"], numbers["kl"]) == (1.0, 0.0)
    assert numbers["ce"] == numbers["ce_clean"] == pytest.approx(cross_entropy(llama, windows), rel=1e-5)
    assert numbers["second.ce_clean"] == pytest.approx(cross_entropy(tuned, windows), rel=1e-5)
    assert numbers["second.ce"] == pytest.approx(cross_entropy(tuned, windows, lambda x: x / 2), rel=1e-5)
    zero = cross_entropy(tuned, windows, torch.zeros_like)
    assert numbers["second.ce_zero_ablation"] == pytest.approx(zero, rel=1e-5)
    clean = numbers["second.ce_clean"]
    assert numbers["second.ce_recovered"] == pytest.approx((zero - numbers["second.ce"]) / (zero - clean), rel=1e-4)
    assert "second.ce_recovered" in result.intervals["second halved"]
    x = torch.cat([capture(tuned, [PLACE], w.tokens, attention_mask=w.attended.long())[PLACE][w.kept] for w in windows])
    y = torch.cat([capture(llama, [PLACE], w.tokens, attention_mask=w.attended.long())[PLACE][w.kept] for w in windows])
    spread = sum(((part - part.mean(0)).square().sum() for part in (x, y)), torch.zeros(()))
    explained = 1 - (x / 2).square().sum() / spread
    assert numbers["explained_variance"] == pytest.approx(float(explained), rel=1e-4)


def test_a_dictionary_of_two_models_is_trained_and_evaluated_from_the_command_line(
    saved_model: Path, tuned: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Document {i}: {'word ' * (i % 7)}and {i * i}." for i in range(80)))
    run = {
        "output": str(tmp_path / "out"), "sae": {"architecture": "topk", "d_sae": 96, "k": 8},
        "source": {
            "name": "huggingface", "model": str(saved_model), "second_model": str(tmp_path / "tuned"), "hook": PLACE,
            "device": "cpu", "context_size": 24, "batch_prompts": 4, "buffer_rows": 512, "on_exhausted": "cycle",
            "text": {"kind": "file", "path": str(tmp_path / "text.txt"), "held_out": 0.2},
        },
        "train": {"total_samples": 4096, "batch_size": 128, "lr": 0.003, "progress_bar": False},
        "eval": {"every_samples": 0.5, "tokens": 100},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    last = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])
    assert last["held_out.second.ce_recovered"] != last["held_out.ce_recovered"]
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "out"), "--tokens", "300", "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    sae, random = result["candidates"]["sae"], result["candidates"]["random"]
    assert sae["explained_variance"] > 0.5 > random["explained_variance"]
    assert {"ce_recovered", "second.ce_recovered", "second.kl_recovered_mean"} <= set(sae)
    assert result["hook"] == f"{PLACE}, second/{PLACE}"
    assert main(["lm", "study", str(tmp_path / "out")]) == 1
    assert "the SAE reads two models" in capsys.readouterr().err


def test_a_place_in_a_second_model_needs_one(llama: Any) -> None:
    sae = create("topk", d_in=64, d_sae=32, k=4, reads={PLACE: 32, f"second/{PLACE}": 32})
    with pytest.raises(ConfigError, match="is a place in a second model, and here there is only one: LlamaForCausalLM"):
        route_of(sae, llama)
    with pytest.raises(ConfigError, match="is a place in a second model"), spliced(llama, sae):
        pass
    assert isinstance(sae, SAE)
