"""The server: what it answers is what the model says, strangers are refused, and what fails costs nothing else."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core.cli import main
from sae_core.errors import ConfigError, DataError
from sae_explorer import open_studied
from sae_explorer.cli.explore import names_of
from sae_explorer.playing import Change, Model
from sae_explorer.server import application, listen
from starlette.testclient import TestClient

TOKEN, PORT = "secret", 4321
BASE = f"http://127.0.0.1:{PORT}/{TOKEN}"


@pytest.fixture(scope="module")
def opened(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    own = tmp_path_factory.mktemp("labelled")  # labels are written beside the studies
    found = open_studied([str(shutil.copytree(world / name, own / name)) for name in ("one", "two")], device="cpu")
    assert found.source is not None
    named = {Path(name).name: studied for name, studied in found.studied.items()}
    for name, studied in named.items():
        studied.name = name
    return named, Model(found.source, named)


@pytest.fixture
def client(opened: tuple[Any, Model]) -> Iterator[Callable[..., Any]]:
    with TestClient(application(*opened, token=TOKEN, port=PORT), base_url=BASE) as http:  # pyright: ignore

        def ask(method: str, path: str, **given: Any) -> Any:
            headers = {"origin": f"http://127.0.0.1:{PORT}", **given.pop("headers", {})}
            return http.request(method, f"{BASE}/{path}", headers=headers, **given)

        yield ask


def dense(world: Path, ids: list[int], sae: Any) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "model")
    with torch.no_grad():
        return sae.encode(model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2])[0]


def test_latents_on_a_text_are_those_of_the_model(opened: tuple[Any, Model], world: Path) -> None:
    named, model = opened
    found = model.fires("one", "the cat sleeps. <script>")
    ids = model.tokens("the cat sleeps. <script>")
    expected = dense(world, ids, named["one"].sae)
    assert found["counts"] == [False, *[True] * (len(ids) - 1)]
    for position, fired in enumerate(found["fired"]):
        if found["counts"][position]:
            active = {n: float(expected[position, n]) for n in expected[position].nonzero().squeeze(1).tolist()}
            assert {n: v for n, v, _ in fired} == pytest.approx(active, rel=1e-3)
            assert [abs(v) for _, v, _ in fired] == sorted((abs(v) for _, v, _ in fired), reverse=True)


def test_an_effect_is_what_the_text_s_probability_changes_by(opened: tuple[Any, Model]) -> None:
    from sae_lm import spliced, steer

    named, model = opened
    text, lm = "the cat sleeps. the dog runs", model.model
    found, tokens = model.fires("one", text), torch.tensor([model.tokens(text)])
    assert found["effects"]

    def probability(latent: int, position: int, by: float) -> float:
        edit = steer(latent, by, positions=position)
        with torch.no_grad(), spliced(lm, {"model.layers.1": named["one"].sae}, error_term=True, edit=edit):
            logits = lm(tokens, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        return float(logits.gather(1, tokens[0, 1:].unsqueeze(1)).sum())

    for position in (1, 4):
        for latent, value, effect in found["fired"][position][:2]:
            slope = (probability(latent, position, 0.01) - probability(latent, position, -0.01)) / 0.02
            assert effect == pytest.approx(value * slope, rel=2e-2, abs=2e-3)


def test_a_text_costs_one_pass_and_where_there_are_no_effects_it_stops_at_the_dictionary(
    opened: tuple[Any, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, passed = opened[1], list[int]()
    latents = [[each[:2] for each in fired] for fired in model.fires("one", "the cat")["fired"]]
    with ExitStack() as hooks:
        for number, layer in enumerate(model.model.model.layers):
            handle = layer.register_forward_hook(lambda *_, number=number: passed.append(number))
            hooks.callback(handle.remove)
        model.fires("one", "the cat")
        assert passed == [0, 1, 2]
        passed.clear()
        monkeypatch.setitem(model.__dict__, "_predicts_text", False)  # as an encoder
        silent = model.fires("one", "the cat")
        assert passed == [0, 1]
    assert [[each[:2] for each in fired] for fired in silent["fired"]] == latents
    assert not silent["effects"]
    assert {effect for fired in silent["fired"] for _, _, effect in fired} == {None}


def test_the_untouched_row_is_the_model_and_the_other_is_steered(opened: tuple[Any, Model], world: Path) -> None:
    from sae_lm import spliced, steer
    from transformers import AutoModelForCausalLM

    named, model = opened
    ids, lm = torch.tensor([model.tokens("the cat")]), AutoModelForCausalLM.from_pretrained(world / "model")
    steps = list(model.generate("one", "the cat", Change(latent=7, amount=40.0), tokens=8))
    assert steps[-1]["plain"] != steps[-1]["edited"]
    kept = torch.ones(1, 64, dtype=torch.bool)
    kept[0, 0] = False
    for key, edit in (("plain", None), ("edited", steer(7, 40.0))):
        seen = ids
        for _ in range(len(steps)):
            with (
                torch.no_grad(),
                spliced(lm, {"model.layers.1": named["one"].sae}, error_term=True, edit=edit, where=kept),
            ):
                seen = torch.cat([seen, lm(seen, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        text = model.tokenizer.decode(seen[0, ids.shape[1] :].tolist()).partition("</s>")[0]
        assert steps[-1][key] == text.removesuffix("\ufffd")
    removed = list(model.generate("one", "the cat", Change(latent=7, how="remove"), tokens=2))
    assert set(removed[0]) == {"plain", "edited"}


def test_a_generation_stops_when_it_is_told_to(opened: tuple[Any, Model]) -> None:
    stop = threading.Event()
    steps = opened[1].generate("one", "the cat", Change(latent=7, amount=1.0), tokens=100, temperature=1.0, stop=stop)
    next(steps)
    stop.set()
    assert list(steps) == []


def test_what_cannot_be_asked_is_refused(opened: tuple[Any, Model]) -> None:
    model = opened[1]
    with pytest.raises(DataError, match="5,000 characters; at most 4,000"):
        model.fires("one", "x" * 5000)
    with pytest.raises(DataError, match="the text is empty"):
        model.fires("one", "")
    with pytest.raises(DataError, match="are the most that fit"):
        model.fires("one", "x" * 600)
    for change, tokens in ((Change(latent=96), 4), (Change(latent=1, how="explode"), 4), (Change(latent=1), 1000)):  # pyright: ignore
        with pytest.raises(ConfigError):
            next(model.generate("one", "the", change, tokens=tokens))


def test_strangers_are_refused(client: Callable[..., Any]) -> None:
    label = {"dictionary": "one", "latent": 1, "label": "x", "note": ""}
    assert client("GET", "").status_code == 200
    assert client("GET", "", headers={"host": "evil.example"}).status_code == 403
    assert client("GET", "", headers={"host": f"evil.example:{PORT}"}).status_code == 403
    assert client("GET", "../wrong/").status_code == 403
    assert client("GET", "api/dictionaries", headers={"origin": "http://evil.example"}).status_code == 403
    assert client("POST", "api/label", json=label, headers={"origin": "http://evil.example"}).status_code == 403
    assert client("POST", "api/label", json=label, headers={"origin": "null"}).status_code == 403
    assert (
        client("POST", "api/label", content=json.dumps(label), headers={"content-type": "text/plain"}).status_code
        == 400
    )
    assert client("POST", "api/label", json=label).status_code == 200
    policy = client("GET", "").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_what_fails_is_said_and_the_server_goes_on(
    client: Callable[..., Any], opened: tuple[Any, Model], monkeypatch: Any
) -> None:
    for path in (
        "latent?dictionary=one&latent=96", "latent?dictionary=none&latent=1", "latent?dictionary=one&latent=x",
        "latents?dictionary=one&sort=no", "latents?dictionary=one&min_density=nan", "compare?a=one&b=one",
    ):  # fmt: skip
        answer = client("GET", f"api/{path}")
        assert (answer.status_code, list(answer.json())) == (400, ["error"]), path
    for body in ({}, {"dictionary": ["one"]}, {"dictionary": "one", "text": "x" * 9000}):
        assert client("POST", "api/text", json=body).status_code == 400
    assert client("POST", "api/text", content="[", headers={"content-type": "application/json"}).status_code == 400
    assert client("POST", "api/text", json={"text": "x" * 300_000}).status_code == 400

    def breaks(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(opened[1].model, "forward", breaks)
    asked = {"dictionary": "one", "latent": 1, "text": "the cat", "job": "a", "amount": 1.0, "tokens": 3}
    assert "out of luck" in client("POST", "api/generate", json=asked).text
    assert client("POST", "api/text", json={"dictionary": "one", "text": "the"}).json() == {
        "error": "RuntimeError: out of luck"
    }
    monkeypatch.undo()
    lines = client("POST", "api/generate", json=asked).text.splitlines()
    assert 1 <= len(lines) <= 3
    assert all(set(json.loads(line)) == {"plain", "edited"} for line in lines)


def test_no_more_than_two_generations_run_at_once(
    client: Callable[..., Any], opened: tuple[Any, Model], monkeypatch: Any
) -> None:
    started, go_on = threading.Semaphore(0), threading.Event()

    def slow(self: Model, *_: Any, **__: Any) -> Iterator[dict[str, str]]:
        started.release()
        go_on.wait(30)
        yield {"plain": "", "edited": ""}

    monkeypatch.setattr(Model, "generate", slow)
    asked = {"dictionary": "one", "latent": 1, "text": "the cat", "amount": 1.0}
    threads = [
        threading.Thread(target=client, args=("POST", "api/generate"), kwargs={"json": {**asked, "job": str(n)}})
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    assert all(started.acquire(timeout=30) for _ in threads)
    assert "running already" in client("POST", "api/generate", json={**asked, "job": "3"}).text
    assert client("POST", "api/stop", json={"job": "1"}).json() == {"stopped": True}
    go_on.set()
    for thread in threads:
        thread.join()
    assert "running already" not in client("POST", "api/generate", json={**asked, "job": "4"}).text


def test_compared_dictionaries_match_as_their_cosines_say(
    client: Callable[..., Any], opened: tuple[Any, Model]
) -> None:
    found = client("GET", "api/compare?a=one&b=two").json()
    a, b = (torch.nn.functional.normalize(opened[0][name].sae.W_dec.detach(), dim=-1) for name in ("one", "two"))
    cosines = a @ b.T
    best = cosines.max(1)
    mutual = [n for n in range(96) if int(cosines[:, best.indices[n]].argmax()) == n and float(best.values[n]) >= 0.7]
    assert found["matched"] == len(mutual)
    assert [pair[0] for pair in found["pairs"]] == sorted(mutual, key=lambda n: -float(best.values[n]))
    alive = opened[0]["one"].study.latents["count"] > 0
    assert found["only_a_count"] == int(((best.values < 0.5) & alive).sum())
    assert found["mean"] == pytest.approx(float(best.values.mean()), abs=1e-3)


def test_dictionaries_of_different_models_are_refused_before_any_study(world: Path, tmp_path: Path) -> None:
    from sae_core import create

    other = create("topk", d_in=32, d_sae=8, k=2)
    other.metadata = {"model_name": "elsewhere", "hook_name": "model.layers.1"}
    other.save(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"of different models: .*model, .*other of elsewhere"):
        open_studied([str(world / "one"), str(tmp_path / "other")], device="cpu")
    other.metadata = {}
    other.save(tmp_path / "silent")
    with pytest.raises(ConfigError, match="silent does not say of which model it is"):
        open_studied([str(world / "one"), str(tmp_path / "silent")], device="cpu")
    assert not list(tmp_path.glob("*/study"))


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with listen() as listening:
        assert listening.proto == socket.IPPROTO_TCP  # else asyncio leaves Nagle's algorithm on
        port = listening.getsockname()[1]
        assert main(["explore", "nowhere", "--port", str(port)]) == 1
    assert f"port {port} cannot be had" in capsys.readouterr().err
    assert main(["explore", "nowhere", "--port", "1e6"]) == 1
    assert "port 1000000 cannot be had" in capsys.readouterr().err


def test_a_release_and_an_id_are_one_name(world: Path) -> None:
    assert names_of([str(world / "one"), str(world / "two")]) == [str(world / "one"), str(world / "two")]
    assert names_of(["a:b", "c:d"]) == ["a:b", "c:d"]
    with pytest.raises(ConfigError, match="1 folders for 2 dictionaries"):
        open_studied([str(world / "one"), str(world / "two")], studies=["x"])
