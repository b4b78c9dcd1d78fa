"""Neuronpedia, against a local server: links, what it says of a latent, lists, refusals."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
from sae_core import create
from sae_core.errors import ConfigError
from sae_lm.neuronpedia import NeuronpediaError, fetch_latent, key_works, latent_url, make_list, quick_list_url

ID = "gpt2-small/8-res-jb"
LATENT = {
    "modelId": "gpt2-small", "index": "5", "explanations": [{"description": "names of rivers"}], "frac_nonzero": 0.01,
    "maxActApprox": "Infinity", "pos_str": ["Nile"], "neg_str": ["dry"],
    "activations": [{"tokens": ["the", "Nile"], "values": [0, 4.5]}],
}  # fmt: skip


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, code: int, body: Any) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            seen.append(self.path)
            known = {f"/api/feature/{ID}/5": LATENT, f"/api/feature/{ID}/6": None, f"/api/feature/{ID}/7": b"<html>"}
            self.answer(200, known[self.path]) if self.path in known else self.answer(
                404, {"message": "no such latent"}
            )

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("x-api-key"), body))
            if self.headers.get("x-api-key") != "right":
                self.answer(401, {"message": "wrong key"})
            elif self.path == "/api/test":
                self.answer(200, {"message": "ok"})
            else:
                self.answer(
                    200, {"url": "https://example.org/list/1"} if body["name"] != "bad" else {"message": "bad name"}
                )

        def log_message(self, format: str, *args: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("NEURONPEDIA_URL", f"http://127.0.0.1:{running.server_port}/")
    for proxy in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    yield seen
    running.shutdown()
    running.server_close()
    thread.join()


def test_links_name_the_latent_and_nothing_is_asked(server: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEURONPEDIA_URL")
    sae = create("topk", d_in=4, d_sae=8, k=2)
    sae.metadata["neuronpedia_id"] = ID
    assert latent_url(sae, 5) == f"https://www.neuronpedia.org/{ID}/5"
    assert latent_url(sae, 5, embed=True).endswith("/5?embed=true")
    query = parse_qs(urlparse(quick_list_url(sae, [1, 2], name="my list")).query)
    assert query["name"] == ["my list"]
    assert json.loads(query["features"][0])[1] == {"modelId": "gpt2-small", "layer": "8-res-jb", "index": "2"}
    assert server == []
    with pytest.raises(ConfigError, match="there is no latent 8"):
        latent_url(sae, 8)
    sae.metadata = {}
    with pytest.raises(ConfigError, match="have no neuronpedia_id"):
        latent_url(sae, 1)
    with pytest.raises(ConfigError, match="is no id such as"):
        latent_url("gpt2-small", 1)


def test_a_latent_is_fetched_and_understood(server: list[Any]) -> None:
    found = fetch_latent(ID, 5)
    assert found.explanations == ("names of rivers",)
    assert (found.density, found.largest) == (0.01, float("inf"))
    assert (found.promoted, found.suppressed) == (("Nile",), ("dry",))
    assert found.examples == ((("the", "Nile"), (0.0, 4.5)),)
    assert found.raw["modelId"] == "gpt2-small"


def test_every_refusal_is_one_error(server: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for latent, message in ((6, "does not know this"), (7, "is no JSON"), (8, "answered 404: .*no such latent")):
        with pytest.raises(NeuronpediaError, match=message):
            fetch_latent(ID, latent)
    with pytest.raises(NeuronpediaError, match="answered 401"):
        make_list(ID, [1], name="n", api_key="wrong")
    with pytest.raises(NeuronpediaError, match="no list was made: bad name"):
        make_list(ID, [1], name="bad", api_key="right")
    with pytest.raises(ConfigError, match="set NEURONPEDIA_API_KEY"):
        make_list(ID, [1], name="n")
    monkeypatch.setenv("NEURONPEDIA_URL", "http://127.0.0.1:9")
    with pytest.raises(NeuronpediaError, match="cannot be reached"):
        fetch_latent(ID, 5)
    with pytest.raises(NeuronpediaError, match="cannot be reached"):
        key_works("right")


def test_a_list_is_made_with_a_description_each(server: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "right")
    url = make_list(ID, {3: "rivers", 4: "lakes"}, name="water", description="wet", test_text="The Nile")
    assert url == "https://example.org/list/1"
    path, key, body = server[-1]
    assert (path, key) == ("/api/list/new-with-features", "right")
    assert body == {
        "name": "water", "description": "wet", "testText": "The Nile",
        "features": [
            {"modelId": "gpt2-small", "layer": "8-res-jb", "index": 3, "description": "rivers"},
            {"modelId": "gpt2-small", "layer": "8-res-jb", "index": 4, "description": "lakes"},
        ],
    }  # fmt: skip
    assert key_works()
    assert not key_works("wrong")
