"""A tiny random model whose tokens are as hostile as tokens get, two dictionaries of it and their studies, and a browser."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HOSTILE = (
    "<script>document.title='hacked'</script>", "<img src=x onerror=document.title='hacked'>",
    "</script>", "<!--", "שלום", "مرحبا",
    "👩‍👩‍👧", "zero\u200bwidth", "over\u202eride", "L" * 3000, '"quoted"', "'; DROP TABLE labels; --",
)  # fmt: skip
WORDS = (" cat", " dog", " tree", " river", " python", " blue", " seven", " runs", " sleeps", " and", " the", ".")


def build_model(folder: Path) -> None:
    """A Llama and its tokenizer, saved to `folder`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *alphabet]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*HOSTILE, *WORDS)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    size = tokenizer.get_vocab_size()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1,
                initializer_range=0.3,
            )
        )  # fmt: skip
    model.eval().save_pretrained(folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `text.txt`, and the dictionaries `one` and `two`, each with a study."""
    from sae_core import create
    from sae_core.config import structure
    from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig
    from sae_lm.studies import StudyConfig, study

    folder = tmp_path_factory.mktemp("world")
    build_model(folder / "model")
    generator = torch.Generator().manual_seed(1)
    pieces = [*WORDS * 3, *HOSTILE]
    documents = ["".join(pieces[i] for i in torch.randint(len(pieces), (40,), generator=generator)) for _ in range(60)]
    (folder / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    config = {
        "model": str(folder / "model"), "hook": "model.layers.1", "context_size": 32, "device": "cpu",
        "text": {"kind": "file", "path": str(folder / "text.txt")},
    }  # fmt: skip
    source = HuggingFaceSource(structure(config, HuggingFaceSourceConfig))
    for seed, name in enumerate(("one", "two")):
        sae = create("topk", d_in=32, d_sae=96, k=4, seed=seed)
        sae.metadata = {
            "model_name": str(folder / "model"),
            "hook_name": "model.layers.1",
            "neuronpedia_id": "tiny/1-res",
        }
        sae.save(folder / name)
        study(sae, source, folder / name / "study", StudyConfig(tokens=1500, cofiring_positions=800))
    return folder


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Path:
    """Dictionary `one` with its study, to be written to."""
    return shutil.copytree(world / "one", tmp_path / "one")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless browser; tests that need one are skipped where there is none."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages; a test fails when a page logs an error or asks for anything beyond its own place."""
    troubles: list[str] = []
    contexts: list[Any] = []

    def open_(url: str, *, width: int = 1280, dark: bool = False, expect_errors: bool = False) -> Any:
        context = chromium.new_context(
            viewport={"width": width, "height": 860}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        place = url.partition("index.html")[0].partition("#")[0]
        page.on("pageerror", lambda error: troubles.append(str(error)))
        if not expect_errors:
            page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
        page.on("request", lambda asked: None if asked.url.startswith(place) else troubles.append(asked.url))
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert troubles == []


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., str]]:
    """Serves dictionaries from a thread of this process and gives the address; the same ones are opened once."""
    import uvicorn
    from sae_explorer import open_studied
    from sae_explorer.playing import Model
    from sae_explorer.server import application

    running: list[tuple[Any, threading.Thread]] = []
    addresses: dict[tuple[Path, ...], str] = {}

    def start(*paths: Path) -> str:
        if paths in addresses:
            return addresses[paths]
        opened = open_studied([str(path) for path in paths], device="cpu")
        assert opened.source is not None
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        app: Any = application(opened.studied, Model(opened.source, opened.studied), token="token", port=port)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        running.append((server, thread))
        addresses[paths] = f"http://127.0.0.1:{port}/token/"
        return addresses[paths]

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(20)
