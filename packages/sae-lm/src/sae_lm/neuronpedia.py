"""Neuronpedia: links to its pages of latents, what it knows of one, and lists made there.

An SAE's ``neuronpedia_id``, such as ``gpt2-small/8-res-jb``, is in its metadata where a catalogue knows it. Nothing is sent or
opened by itself: links are returned, and requests are made by the functions that say so. ``NEURONPEDIA_URL`` names another
server.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

from sae_core import SAE
from sae_core.config import require
from sae_core.errors import ConfigError, DataError, SaeCoreError

__all__ = [
    "NeuronpediaError",
    "NeuronpediaLatent",
    "fetch_latent",
    "key_works",
    "latent_url",
    "make_list",
    "quick_list_url",
]

_TIMEOUT = 30.0


class NeuronpediaError(SaeCoreError):
    """Neuronpedia cannot be reached, refuses, or answers with something else; `status` is its HTTP status, if it gave one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@final
@dataclass(frozen=True, kw_only=True)
class NeuronpediaLatent:
    """What Neuronpedia says of a latent: its explanations, the fraction of tokens that activate it, its largest activation, the
    tokens it promotes and suppresses, examples as (tokens, activations), and `raw`, everything as it came."""

    explanations: tuple[str, ...]
    density: float | None
    largest: float | None
    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]
    examples: tuple[tuple[tuple[str, ...], tuple[float, ...]], ...]
    raw: Mapping[str, Any]


def latent_url(sae: SAE[Any] | str, latent: int, *, embed: bool = False) -> str:
    """The address of a latent's page; with `embed` in the form for a frame.

    `sae` is an SAE whose metadata have a ``neuronpedia_id``, or such an id. Raises ConfigError without one.

    >>> latent_url("gpt2-small/8-res-jb", 123)
    'https://www.neuronpedia.org/gpt2-small/8-res-jb/123'
    """
    model, name = _id_of(sae)
    ending = "?embed=true" if embed else ""
    return f"{_server()}/{model}/{name}/{_latent(sae, latent)}{ending}"


def quick_list_url(sae: SAE[Any] | str, latents: Sequence[int], *, name: str = "latents") -> str:
    """The address of a page that shows several latents; nothing is stored there.

    >>> quick_list_url("gpt2-small/8-res-jb", [1], name="a b").partition("&")[0]
    'https://www.neuronpedia.org/quick-list/?name=a%20b'
    """
    model, layer = _id_of(sae)
    listed = [{"modelId": model, "layer": layer, "index": str(_latent(sae, latent))} for latent in latents]
    query = urllib.parse.urlencode({"name": name, "features": json.dumps(listed)}, quote_via=urllib.parse.quote)
    return f"{_server()}/quick-list/?{query}"


def fetch_latent(sae: SAE[Any] | str, latent: int) -> NeuronpediaLatent:
    """Ask Neuronpedia for a latent. Raises NeuronpediaError when it cannot be reached or does not know it."""
    model, name = _id_of(sae)
    raw = _request(f"/api/feature/{model}/{name}/{_latent(sae, latent)}")
    return NeuronpediaLatent(
        explanations=tuple(str(one.get("description", "")) for one in _items(raw, "explanations")),
        density=_number(raw.get("frac_nonzero")),
        largest=_number(raw.get("maxActApprox")),
        promoted=tuple(str(token) for token in raw.get("pos_str") or ()),
        suppressed=tuple(str(token) for token in raw.get("neg_str") or ()),
        examples=tuple(
            (tuple(map(str, one.get("tokens") or ())), tuple(_number(v) or 0.0 for v in one.get("values") or ()))
            for one in _items(raw, "activations")
        ),
        raw=raw,
    )


def make_list(
    sae: SAE[Any] | str,
    latents: Mapping[int, str] | Sequence[int],
    *,
    name: str,
    description: str = "",
    test_text: str | None = None,
    api_key: str | None = None,
) -> str:
    """Make a list of latents in your account, with a description each where a mapping is given; return its address.

    The key is `api_key` or the environment variable ``NEURONPEDIA_API_KEY``. Raises NeuronpediaError when it is refused.
    """
    model, layer = _id_of(sae)
    described = dict(latents) if isinstance(latents, Mapping) else dict.fromkeys(latents, "")
    require(bool(described), "neuronpedia: a list needs at least one latent")
    body: dict[str, Any] = {
        "name": name,
        "description": description,
        "features": [
            {"modelId": model, "layer": layer, "index": _latent(sae, latent), "description": text}
            for latent, text in described.items()
        ],
    }
    if test_text is not None:
        body["testText"] = test_text
    answer = _request("/api/list/new-with-features", body, _key(api_key))
    if not isinstance(url := answer.get("url"), str):
        raise NeuronpediaError(f"neuronpedia: no list was made: {answer.get('message') or answer}")
    return url


def key_works(api_key: str | None = None) -> bool:
    """Whether Neuronpedia accepts the key. Raises NeuronpediaError when it cannot be reached."""
    key = _key(api_key)
    try:
        _request("/api/test", {"apiKey": key}, key)
    except NeuronpediaError as error:
        if error.status in (400, 401, 403):
            return False
        raise
    return True


def _id_of(sae: SAE[Any] | str) -> tuple[str, str]:
    found = sae if isinstance(sae, str) else sae.metadata.get("neuronpedia_id")
    if not isinstance(found, str):
        raise ConfigError(
            "neuronpedia: the SAE's metadata have no neuronpedia_id; give one, such as 'gpt2-small/8-res-jb'"
        )
    model, slash, name = found.strip("/").partition("/")
    require(
        bool(slash) and bool(name) and "/" not in name, f"neuronpedia: {found!r} is no id such as 'gpt2-small/8-res-jb'"
    )
    return urllib.parse.quote(model), urllib.parse.quote(name)


def _latent(sae: SAE[Any] | str, latent: int) -> int:
    beyond = latent < 0 or (not isinstance(sae, str) and latent >= sae.d_sae)
    require(not beyond, f"neuronpedia: there is no latent {latent}")
    return int(latent)


def _server() -> str:
    return os.environ.get("NEURONPEDIA_URL", "https://www.neuronpedia.org").rstrip("/")


def _key(api_key: str | None) -> str:
    key = api_key or os.environ.get("NEURONPEDIA_API_KEY")
    if not key:
        raise ConfigError("neuronpedia: this needs a key; give api_key= or set NEURONPEDIA_API_KEY")
    return key


def _request(path: str, body: Mapping[str, Any] | None = None, key: str | None = None) -> Mapping[str, Any]:
    url = _server() + path
    headers = {"Accept": "application/json"}
    data = None
    if body is not None:
        data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
    if key is not None:
        headers["x-api-key"] = key
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=_TIMEOUT) as response:
            content = response.read()
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:200]
        raise NeuronpediaError(
            f"neuronpedia: {url} answered {error.code}: {said or error.reason}", error.code
        ) from None
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise NeuronpediaError(f"neuronpedia: {url} cannot be reached: {error}") from None
    try:
        answer = json.loads(content)
    except ValueError:
        raise NeuronpediaError(f"neuronpedia: {url} answered with something that is no JSON") from None
    if not isinstance(answer, dict):
        raise NeuronpediaError(f"neuronpedia: {url} does not know this: {str(answer)[:200]}")
    return cast("Mapping[str, Any]", answer)


def _items(raw: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    items = raw.get(key) or []
    if not isinstance(items, list):
        raise DataError(f"neuronpedia: {key!r} is no list")
    return [cast("Mapping[str, Any]", item) for item in cast("list[Any]", items) if isinstance(item, dict)]


def _number(value: Any) -> float | None:
    """JSON has no NaN and no infinity; Neuronpedia writes them as words."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None
