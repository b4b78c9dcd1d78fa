from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from sae_core import SAE, create
from sae_core.cli import main
from sae_core.config import structure
from sae_core.errors import ConfigError


@pytest.fixture
def run_file(saved_model: Path, tmp_path: Path) -> Callable[..., Path]:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Document {i}: {'word ' * (i % 7)}and {i * i} or {i**3}." for i in range(300)))

    def write(**source: Any) -> Path:
        run = {
            "output": str(tmp_path / "out"),
            "sae": {"architecture": "topk", "d_sae": 96, "k": 8},
            "source": {
                "name": "huggingface", "model": str(saved_model), "hook": "model.layers.1", "device": "cpu",
                "context_size": 32, "batch_prompts": 4, "buffer_rows": 2048, "epochs": 2, "cache_activations": True,
                "text": {"kind": "file", "path": str(text), "held_out": 0.1}, **source,
            },
            "train": {"total_samples": 20_000, "batch_size": 256, "lr": 0.003, "progress_bar": False},
        }  # fmt: skip
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(run))
        return file

    return write


def test_the_plan_of_a_run_in_a_model_counts_the_model_before_it_is_loaded(
    run_file: Callable[..., Path], llama: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shorter = ["--set", "train.init_samples=256"]
    assert main(["plan", str(run_file(cache_activations=False)), *shorter, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    memory = {entry["what"]: entry["bytes"] for entry in found["memory"]}
    assert memory["model"] == 4 * sum(parameter.numel() for parameter in llama.parameters())
    assert memory["shuffle buffer"] == 2048 * 32 * 4
    assert found["seconds"]["source"] > 0
    monkeypatch.setattr("sae_core.planning.available_memory", lambda device: -(2**40))
    monkeypatch.setattr("sae_lm.source.load", None)  # it is not even tried
    assert main(["plan", str(run_file())]) == 1
    assert "It cannot run: memory" in capsys.readouterr().out


def test_train_then_eval_from_the_command_line(
    run_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(run_file())]) == 0
    sae = SAE.load(tmp_path / "out")
    assert sae.metadata["hook_name"] == "model.layers.1"
    assert sae.metadata["sae_lm"]["source"]["context_size"] == 32
    capsys.readouterr()

    assert main(["eval", str(tmp_path / "out"), "--tokens", "800", "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    trained, random = result["candidates"]["sae"], result["candidates"]["random"]
    assert trained["explained_variance"] > 0.7 > random["explained_variance"]
    assert trained["l0"] == 8.0 == pytest.approx(random["l0"], rel=0.1)
    assert result["activations"] >= 800
    assert result["text"].endswith("documents held out from training")

    assert main(["eval", str(tmp_path / "out"), "--tokens", "800", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert f"{trained['explained_variance']:.4f}" in shown
    assert "RANDOM SAE" in shown
    kept = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert kept["candidates"]["sae"] == pytest.approx(trained, rel=1e-6)
    assert SAE.load(tmp_path / "out").d_sae == 96  # the results beside it are no part of the SAE
    assert all(len(line) <= 160 for line in shown.splitlines())


def test_eval_on_other_text_uses_all_of_it_and_says_when_it_is_short(
    run_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", str(run_file()), "--set", "train.total_samples=512"])
    (tmp_path / "other.txt").write_text("Some other text.\n\nAnd more of it.")
    capsys.readouterr()
    arguments = ["eval", str(tmp_path / "out"), "--text", str(tmp_path / "other.txt"), "--no-random", "--json"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["activations"] == len("Some other text.And more of it.")
    assert set(json.loads(printed.out)["candidates"]) == {"sae"}
    assert "the text holds only 31 of 8,192 tokens" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens must be positive"),
        (["--batch-prompts", "0"], "--batch-prompts must be positive"),
        (["--text", "nowhere.txt"], "there is no file 'nowhere.txt'"),
        (["--set", "context_siz=3"], "did you mean 'context_size'"),
        (["--set", "context_size"], "write key=value"),
        (["--set", "hook.deeper=1"], "'hook' is one value, not a group of settings"),
        (["--set", "hook=model.layers.9"], "no module 'model.layers.9'"),
        (["--set", "text.held_out=0.0"], "no text was held out in training"),
        (["--metric", "hoier"], "unknown metric 'hoier'"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    ],
)
def test_wrong_use_of_eval_is_one_message(
    run_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    run = yaml.safe_load(run_file().read_text())["source"]
    del run["name"]
    sae = create("topk", d_in=32, d_sae=64, k=4)
    sae.metadata["sae_lm"] = {"source": run}
    sae.save(tmp_path / "saved")
    assert main(["eval", str(tmp_path / "saved"), *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_an_sae_that_does_not_say_its_model_can_be_told(
    saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create("topk", d_in=32, d_sae=64, k=4).save(tmp_path / "bare")
    assert main(["eval", str(tmp_path / "bare")]) == 1
    assert "give hook and model, for example: --set model=NAME" in capsys.readouterr().err
    told = [f"model={saved_model}", "hook=model.layers.0", "context_size=16"]
    sets = [word for setting in told for word in ("--set", setting)]
    assert main(["eval", str(tmp_path / "bare"), *sets, "--tokens", "50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hook"] == "model.layers.0"


def test_model_and_hook_in_the_metadata_suffice(
    saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As SAELens writes them: the hook in TransformerLens's terms, the token policy in a few words."""
    sae = create("topk", d_in=32, d_sae=64, k=4)
    sae.metadata = {
        "model_name": str(saved_model), "model_class_name": "HookedTransformer", "hook_name": "blocks.1.hook_resid_post",
        "context_size": 16, "prepend_bos": False, "dataset_path": "not/downloaded",
    }  # fmt: skip
    sae.save(tmp_path / "theirs")
    (tmp_path / "text.txt").write_text("Some text.\n\nAnd some more of it, not much.")
    arguments = ["eval", str(tmp_path / "theirs"), "--text", str(tmp_path / "text.txt"), "--no-random", "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["hook"], result["context_size"]) == ("model.layers.1", 16)
    assert result["candidates"]["sae"]["l0"] == 4.0


def test_several_saes_share_a_pass_and_each_keeps_its_own_results(
    saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("Some text.\n\nAnd some more of it, not much.")
    for layer in (0, 2):
        sae = create("topk", d_in=32, d_sae=64, k=4 + layer)
        sae.metadata = {"model_name": str(saved_model), "hook_name": f"model.layers.{layer}", "context_size": 16}
        sae.save(tmp_path / "saes" / f"layer{layer}")
    folders = [str(tmp_path / "saes" / f"layer{layer}") for layer in (0, 2)]
    written = ["--csv", str(tmp_path / "all.csv"), "--html", str(tmp_path / "all.html")]
    assert main(["eval", *folders, "--text", str(tmp_path / "text.txt"), "--json", *written]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["candidates"]) == ["layer0", "layer0/random", "layer2", "layer2/random"]
    kept = json.loads((tmp_path / "saes" / "layer2" / "evaluation.json").read_text())
    assert list(kept["candidates"]) == ["layer2", "layer2/random"]
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 5
    assert (tmp_path / "all.html").read_text().startswith("<!doctype html>")
    other = create("topk", d_in=32, d_sae=64, k=4)
    other.metadata = {"model_name": str(saved_model), "hook_name": "model.layers.0", "context_size": 8}
    other.save(tmp_path / "other")
    assert main(["eval", *folders, str(tmp_path / "other")]) == 1
    assert "trained with different settings (context_size); run them apart" in capsys.readouterr().err


def test_an_sae_of_tensor_files_is_evaluated_on_activations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import save_file

    rows = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    save_file({"activations": rows}, tmp_path / "rows.safetensors")
    sae = create("topk", d_in=32, d_sae=64, k=4).eval().requires_grad_(False)
    sae.save(tmp_path / "sae")
    assert main(["eval", str(tmp_path / "sae"), "--data", str(tmp_path / "rows.safetensors"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    expected = 1 - float((rows - sae(rows)).square().sum() / (rows - rows.mean(0)).square().sum())
    assert result["candidates"]["sae"]["explained_variance"] == pytest.approx(expected, rel=1e-4)
    assert result["activations"] == 500
    assert "ce" not in result["candidates"]["sae"]


def test_centred_weights_of_training_are_honoured(tmp_path: Path, tokenizer: Any) -> None:
    """Such an SAE never saw a mean over features; put on activations as they are, it would explain next to nothing."""
    import torch
    from sae_lm.evaluation import evaluate_saes
    from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight += 5.0  # a mean over features that no LayerNorm lets through
    (tmp_path / "text.txt").write_text("\n\n".join(f"Document {i} has {i * i} words." for i in range(40)))
    source = HuggingFaceSource(
        structure(
            {"model": "tiny", "hook": "transformer.h.0", "context_size": 16, "batch_prompts": 4,
             "text": {"kind": "file", "path": str(tmp_path / "text.txt")}},
            HuggingFaceSourceConfig,
        ),
        model=model, tokenizer=tokenizer,
    )  # fmt: skip
    sae = create("standard", d_in=16, d_sae=32)  # every direction, both ways: the identity on what has mean zero
    basis = torch.linalg.qr(torch.cat([torch.ones(16, 1), torch.eye(16)[:, :15]], dim=1)).Q[:, 1:].T
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.W_dec[:30].copy_(torch.cat([basis, -basis]))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.get_parameter("b_enc").zero_()
        sae.b_dec.zero_()
    sae.metadata = {
        "hook_name": "blocks.0.hook_resid_post",
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
    }
    result = evaluate_saes({"sae": sae}, source, tokens=200, part="all", baseline=False).candidates["sae"]
    assert result["explained_variance"] == pytest.approx(1.0, abs=1e-3)
    assert result["ce_recovered"] == pytest.approx(1.0, abs=1e-3)
    sae.metadata["model_from_pretrained_kwargs"] = {"fold_value_biases": True}
    with pytest.raises(ConfigError, match="prepared with fold_value_biases=True"):
        evaluate_saes({"sae": sae}, source, tokens=200, part="all")


def test_held_out_text_of_another_python_is_pointed_out(
    saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = create("topk", d_in=32, d_sae=64, k=4)
    source = {"model": str(saved_model), "hook": "model.layers.0", "context_size": 16}
    sae.metadata["sae_lm"] = {"source": source, "python": "2.7.18"}
    sae.save(tmp_path / "old")
    assert main(["eval", str(tmp_path / "old"), "--tokens", "20", "--no-random", "--json"]) == 0
    assert "trained on the library of Python 2.7.18" in capsys.readouterr().err


def test_preview_shows_what_a_run_would_train_on(
    run_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", str(run_file()), "--rows", "1", "--set", "source.context_size=64"]) == 0
    heading, window = capsys.readouterr().out.splitlines()
    assert heading.startswith("window 0: 64 tokens, ")
    assert window.startswith("  [<s>]Document ")
    assert "[</s>]Document " in window
    assert main(["preview", str(run_file()), "--rows", "0"]) == 1
    assert main(["preview", str(run_file()), "--set", "source.name=synthetic"]) == 1
    assert "this command is for 'huggingface'" in capsys.readouterr().err


def test_listing_the_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sae_core.cli import main; main(['list', 'sources']);"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "huggingface" in done.stdout
