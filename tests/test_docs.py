"""What the documentation says is run, so that it cannot rot; what the code writes of it is compared with the code."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from sae_core import create
from sae_core.plugins import reset_registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md"), *(ROOT / "packages").glob("*/README.md")])
TESTED_BY_ITS_PACKAGE = {"docs/synthetic.md", "packages/sae-synthetic/README.md", "packages/sae-lm/README.md"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
RUN = [page for page in PAGES if blocks(page, "python") and name_of(page) not in TESTED_BY_ITS_PACKAGE]


# -- what pages take for granted --------------------------------------------------------------------------------------

Names = dict[str, Any]


def tokenizer() -> Any:
    """Bytes are its tokens, after three special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: n for n, token in enumerate([*special, *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def language_model() -> Names:
    """A tiny Llama of ten layers, its tokenizer, some tokens, and a dictionary that loses nothing at layer 9."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: Any = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 10}
    settings |= {"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    sae = create("standard", d_in=16, d_sae=32).eval()
    both = torch.cat([torch.eye(16), -torch.eye(16)])
    with torch.no_grad():
        sae.encoder.copy_(both)
        sae.W_dec.copy_(both)
    sae.metadata = {"hook_name": "model.layers.9", "context_size": 24}
    tokens = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"model": model, "tokenizer": tokenizer(), "sae": sae, "tokens": tokens}


def foreign_files(folder: Path) -> Names:
    """The files of docs/formats.md, as their libraries write them."""
    from sae_core.format.convert import convert

    convert(create("topk", d_in=8, d_sae=32, k=4), "sparsify", folder / "layers.6")
    weights = {
        "W_enc": torch.randn(64, 8),
        "W_dec": torch.randn(8, 64),
        "b_enc": torch.randn(64),
        "b_dec": torch.randn(8),
    }
    torch.save(weights, folder / "layer7.sae.pt")
    place = folder / "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    place.mkdir(parents=True)
    gemma_scope(place / "params.npz", 1024)
    return {}


def gemma_scope(file: Path, d_sae: int) -> None:
    draw = numpy.random.default_rng(0).normal
    shapes = {"W_enc": (8, d_sae), "W_dec": (d_sae, 8), "b_enc": d_sae, "b_dec": 8}
    arrays = {name: draw(size=shape).astype("float32") for name, shape in shapes.items()}
    numpy.savez(file, threshold=numpy.full(d_sae, 0.5, "float32"), **arrays)


def cached_repositories(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Names:
    """Repositories in a cache of the Hub, which is all that can be reached, and what else docs/pretrained.md speaks of."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    monkeypatch.delenv("SAE_CORE_CATALOGUE", raising=False)

    def repository(name: str, revisions: dict[str, str]) -> Path:
        home = folder / "hub" / f"models--{name.replace('/', '--')}"
        for revision, commit in revisions.items():
            (home / "refs").mkdir(parents=True, exist_ok=True)
            (home / "refs" / revision).write_text(commit)
            (home / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        return home / "snapshots"

    scope = (
        repository("google/gemma-scope-2b-pt-res", {"main": "a" * 40}) / ("a" * 40) / "layer_20/width_16k/average_l0_71"
    )
    scope.mkdir(parents=True)
    gemma_scope(scope / "params.npz", 32)
    made = language_model()
    for commit in ("b" * 40, "c" * 40):
        made["sae"].save(repository("owner/name", {"main": "b" * 40, "v2": "c" * 40}) / commit / "a/folder")
    made["model"].config.name_or_path = str(folder / "model")
    made["tokenizer"].save_pretrained(folder / "model")
    of_gpt2 = language_model()["sae"]
    of_gpt2.metadata["hook_name"] = "blocks.8.hook_resid_pre"
    reformatted = repository("jbloom/GPT2-Small-SAEs-Reformatted", {"main": "d" * 40}) / ("d" * 40)
    of_gpt2.save(reformatted / "blocks.8.hook_resid_pre")
    gpt2(repository("openai-community/gpt2", {"main": "e" * 40}) / ("e" * 40))
    return made


def gpt2(folder: Path) -> None:
    """A GPT-2 of nine layers as wide as the dictionary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings: Any = {
        "vocab_size": 50304,
        "n_positions": 4096,
        "n_embd": 16,
        "n_layer": 9,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(**settings)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


STAGES: dict[str, Callable[[Path, pytest.MonkeyPatch], Names]] = {
    "docs/formats.md": lambda folder, _: foreign_files(folder),
    "docs/pretrained.md": cached_repositories,
    "packages/sae-pretrained/README.md": cached_repositories,
    "docs/language-models.md": lambda _, __: language_model(),
    "docs/coming-from-saelens.md": lambda _, __: language_model(),
    "docs/study.md": lambda _, __: language_model(),
    "docs/how-to/look-inside.md": lambda _, __: language_model(),
}
MADE_STUDY = """
from pathlib import Path
from sae_lm import HuggingFaceSource, HuggingFaceSourceConfig, StudyConfig, TextConfig, study as made_study
Path("text.txt").write_text("A few words of text.\\n\\nAnd some more of them.\\n\\n" * 30)
text = TextConfig(kind="file", path="text.txt")
config = HuggingFaceSourceConfig(model="tiny", hook="model.layers.9", context_size=24, text=text)
source = HuggingFaceSource(config, model=given["model"], tokenizer=given["tokenizer"])
made_study(given["sae"], source, Path("study"), StudyConfig(tokens=300))
most_frequent = int(StudyFolder("study").latents["density"].argmax())
"""
AFTERWARDS: dict[str, str] = {  # functions that a page defines are called
    "docs/language-models.md": """
import json
from pathlib import Path
games = [[3 + (7 * game + move) % 250 for move in range(12)] for game in range(200)]
Path("games.jsonl").write_text("".join(json.dumps({"moves": game}) + "\\n" for game in games))
assert next(my_source(given["model"]).batches(4)).shape == (4, 16)
experiment(given["model"], given["tokens"])
study(given["model"], given["sae"], given["tokens"])
look(given["model"], given["tokenizer"], given["sae"], given["tokens"], 5, 6)
""",
    "docs/coming-from-saelens.md": """
from sae_lm import HuggingFaceSource, HuggingFaceSourceConfig, TextConfig
from pathlib import Path
Path("text.txt").write_text("A few words of text.\\n\\nAnd some more of them.\\n\\n" * 300)
text = TextConfig(kind="file", path="text.txt")
config = HuggingFaceSourceConfig(model="tiny", hook="model.layers.8:input", context_size=24, text=text)
source = HuggingFaceSource(config, model=given["model"], tokenizer=given["tokenizer"])
recipes(given["model"], given["sae"], source, given["tokens"])
""",
    "docs/study.md": MADE_STUDY + "show('study', most_frequent)",
    "docs/how-to/look-inside.md": MADE_STUDY + "tell('study', most_frequent)",
}
REPLACED: dict[str, dict[str, str]] = {
    "README.md": {"300_000": "60_000"},
    "docs/tutorial.md": {"300_000": "60_000"},
    "docs/coming-from-saelens.md": {
        '"blocks.8.hook_resid_pre"': '"model.layers.8:input"',
        "1234": "12",
        "out[:, -1]": "out.logits[:, -1]",
    },
    "docs/language-models.md": {"steer(42, ": "steer(12, ", '"blocks.3.mlp"': '"model.layers.3.mlp"'},
}


@pytest.fixture(autouse=True)
def _fresh_registry() -> Iterator[None]:
    yield
    reset_registry()


@pytest.mark.parametrize("page", RUN, ids=name_of)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_code_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one namespace, as a reader types it in; lines of several pages that do so are a few seconds in all."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("typed_in_by_a_reader")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    given = STAGES[name_of(page)](tmp_path, monkeypatch) if name_of(page) in STAGES else {}
    module.__dict__.update(given, given=given)
    code = "\n".join([*blocks(page, "python"), AFTERWARDS.get(name_of(page), "")])
    for mentioned, instead in REPLACED.get(name_of(page), {}).items():
        assert mentioned in code
        code = code.replace(mentioned, instead)
    with torch.random.fork_rng():
        exec(compile(code, str(page), "exec"), module.__dict__)


def test_every_page_with_code_is_run_somewhere() -> None:
    assert {name_of(page) for page in RUN} >= {
        name_of(p) for p in DOCS.rglob("*.md") if blocks(p, "python")
    } - TESTED_BY_ITS_PACKAGE
    for names in (STAGES, AFTERWARDS, REPLACED):
        assert set(names) <= {name_of(page) for page in RUN}


@every_page
def test_every_python_block_is_python(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


@every_page
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert [page for page in pages if f" {page}" not in navigation] == []


def test_the_run_files_of_a_page_are_run_files(tmp_path: Path) -> None:
    from sae_core.run import read_run

    found = [text for page in (DOCS / "how-to").glob("*.md") for text in blocks(page, "yaml")]
    assert found
    for text in found:
        (tmp_path / "run.yaml").write_text(text)
        read_run(tmp_path / "run.yaml")


def _writer_of_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_writer", ROOT / "tools" / "docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_that_the_code_writes_are_what_it_writes_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails: uv run python tools/docs.py."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("other versions of argparse word help a little differently")
    for name, text in _writer_of_pages().pages().items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, f"{name} is behind: uv run python tools/docs.py"


def test_commands_that_pages_show_exist() -> None:
    from sae_core.plugins import get_registry

    known = {contribution.spec.name.replace("_", "-") for contribution in get_registry().contributions("command")}
    for page in PAGES:
        for command in re.findall(r"`(?:uv run )?sae-core ([a-z][a-z-]*)", page.read_text(encoding="utf-8")):
            assert command in known, f"{name_of(page)}: sae-core {command}"
