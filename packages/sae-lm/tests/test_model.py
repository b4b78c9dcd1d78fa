from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core.errors import ConfigError
from sae_lm.model import ModelFiles, load, locate, place


def fake_distribution(folder: Path, *files: str) -> None:
    (folder / "fake_weights").mkdir()
    (folder / "fake_weights" / "__init__.py").write_text("raise SystemExit('imported')")
    for file in files:
        (folder / "fake_weights" / file).write_text("weights")
    info = folder / "fake_weights-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-weights\nVersion: 1.2\n")
    (info / "RECORD").write_text("".join(f"fake_weights/{file},,\n" for file in ("__init__.py", *files)))


@pytest.mark.parametrize("spelling", ["fake-weights", "fake_weights"])
def test_a_file_in_a_distribution_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    fake_distribution(tmp_path, "small.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    found = locate(f"package:{spelling}/small.gguf")
    assert found == ModelFiles(str(tmp_path / "fake_weights"), "small.gguf", "1.2")
    assert "fake_weights" not in sys.modules
    with pytest.raises(ConfigError, match=r"carries no 'smal\.gguf'; did you mean 'small\.gguf'\?"):
        locate(f"package:{spelling}/smal.gguf")


def test_names_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no package 'no-such-thing' is installed"):
        locate("package:no-such-thing/x.gguf")
    with pytest.raises(ConfigError, match="there is no such file"):
        locate(str(tmp_path / "x.gguf"))
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(ConfigError, match=r"not a \.gguf file"):
        locate(str(tmp_path / "weights.bin"))
    assert locate(str(tmp_path)) == ModelFiles(str(tmp_path))


def test_a_local_folder_is_loaded_in_eval_mode_without_gradients(saved_model: Path, llama: Any) -> None:
    loaded = load(str(saved_model), device="cpu")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer.bos_token_id == 0
    assert (loaded.model_type, loaded.device) == ("llama", torch.device("cpu"))
    tokens = torch.tensor([[0, 5, 9]])
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, llama(tokens).logits)
    half = load(str(saved_model), device="cpu", dtype="bfloat16", model_class="AutoModel", tokenizer="none")
    assert half.tokenizer is None
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert type(half.model).__name__ == "LlamaModel"


def test_what_cannot_be_loaded_is_one_clear_error(tmp_path: Path, saved_model: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model '.*empty' cannot be loaded"):
        load(str(tmp_path / "empty"), device="cpu")
    with pytest.raises(ConfigError, match="did you mean 'AutoModelForCausalLM'"):
        load(str(saved_model), model_class="AutoModelForCasualLM")
    with pytest.raises(ConfigError, match="device 'cuda:77' cannot be used here"):
        place("cuda:77")
    with pytest.raises(ConfigError, match="device 'gpu' cannot be used here"):
        place("gpu")


def test_a_local_path_that_is_not_there_is_no_question_for_the_hub(saved_model: Path) -> None:
    for name in ("./nowhere", "/nowhere/at/all", "runs/of/mine", str(saved_model.parent / "modell0")):
        with pytest.raises(ConfigError, match="there is no such folder"):
            locate(name)
    with pytest.raises(ConfigError, match=f"did you mean '{saved_model.name}'"):
        locate(str(saved_model.parent / (saved_model.name + "x")))


def test_a_model_that_cannot_be_fetched_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("You are trying to access a gated repo. 401 Client Error")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(
        ConfigError, match=r"'some/model' cannot be loaded: .*gated repo.*; ask for access on the model's page"
    ):
        load("some/model", with_tokenizer=False, device="cpu")

    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("We couldn't connect to the Hub.\nCheck your internet connection.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", unreachable)
    with pytest.raises(ConfigError, match="fetch the model once while online, or name a local folder") as caught:
        load("some/model", with_tokenizer=False, device="cpu")
    assert len(str(caught.value).splitlines()) == 1


def test_a_quantised_model_is_left_where_it_is_and_as_it_is(saved_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers marks what a quantiser has made, and such models refuse to be moved or cast."""
    from transformers import LlamaForCausalLM

    def refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise ValueError("`.to` is not supported for quantized models")

    with monkeypatch.context() as patched:
        patched.setattr(LlamaForCausalLM, "to", refuse)
        with pytest.raises(ValueError, match="not supported for quantized models"):
            load(str(saved_model), device="cpu", with_tokenizer=False)
        patched.setattr(LlamaForCausalLM, "is_quantized", True, raising=False)
        assert load(str(saved_model), device="cpu", with_tokenizer=False).model.is_quantized


def test_options_reach_from_pretrained_and_a_placed_model_is_not_moved(
    saved_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    loaded = load(str(saved_model), device="cpu", with_tokenizer=False, options={"attn_implementation": "eager"})
    assert loaded.model.config._attn_implementation == "eager"
    moved: list[Any] = []
    monkeypatch.setattr(LlamaForCausalLM, "to", lambda self, *args: moved.append(args) or self)
    monkeypatch.setattr(LlamaForCausalLM, "hf_device_map", {"": "cpu"}, raising=False)
    load(str(saved_model), device="cpu", with_tokenizer=False)
    assert moved == []
    with pytest.raises(ConfigError, match="cannot be loaded: TypeError"):
        load(str(saved_model), device="cpu", with_tokenizer=False, options={"no_such_option": 1})
