"""Reading from the Hub, with the real client and a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from sae_core.errors import FormatError
from sae_core.protocols import FileSource
from sae_pretrained.hub import HubFiles
from sae_pretrained.hub_errors import HubError
from sae_pretrained.transfer import Patience

HASTY = Patience(attempts=4, first_wait=0.01)
WEIGHTS = bytes(range(256)) * 40_000  # 10 MB
FILES = {"layer_1/cfg.json": b'{"d_in": 8}', "layer_1/sae_weights.safetensors": WEIGHTS, "README.md": b"hello"}
LARGE = "layer_1/sae_weights.safetensors"


@pytest.fixture
def repository(hub: Any) -> Any:
    return hub.add("lab/saes", FILES, lfs=(LARGE,))


def source(hub: Any, tmp_path: Path, revision: str | None = None, **options: Any) -> HubFiles:
    options.setdefault("patience", HASTY)
    return HubFiles("lab/saes", revision, cache_dir=tmp_path / "cache", endpoint=hub.url, **options)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# --- what is there ---


def test_a_repository_is_a_file_source(hub: Any, repository: Any, tmp_path: Path):
    files = source(hub, tmp_path)
    assert isinstance(files, FileSource)
    assert files.files() == sorted(FILES)
    assert files.exists("layer_1/cfg.json")
    assert not files.exists("layer_2/cfg.json")
    assert files.path("layer_1/cfg.json").read_bytes() == FILES["layer_1/cfg.json"]
    assert files.path(LARGE).read_bytes() == WEIGHTS
    assert files.location == f"lab/saes@{repository.commit}"


def test_other_tools_find_what_was_fetched(hub: Any, repository: Any, tmp_path: Path):
    from huggingface_hub import hf_hub_download, scan_cache_dir

    path = source(hub, tmp_path).path(LARGE)
    found = hf_hub_download("lab/saes", LARGE, cache_dir=tmp_path / "cache", local_files_only=True)
    assert Path(found) == path
    report = scan_cache_dir(tmp_path / "cache")
    assert not report.warnings
    assert [repo.repo_id for repo in report.repos] == ["lab/saes"]
    assert report.size_on_disk == len(WEIGHTS)


def test_what_other_tools_fetched_is_found_without_a_request(hub: Any, repository: Any, tmp_path: Path):
    from huggingface_hub import hf_hub_download

    hf_hub_download("lab/saes", LARGE, cache_dir=tmp_path / "cache", endpoint=hub.url)
    hub.log.clear()
    assert source(hub, tmp_path).path(LARGE).read_bytes() == WEIGHTS
    assert hub.log == []


def test_a_cached_sae_needs_no_request(hub: Any, repository: Any, tmp_path: Path):
    first = source(hub, tmp_path)
    first.path(LARGE)
    hub.log.clear()
    again = source(hub, tmp_path)
    assert again.exists(LARGE)
    assert not again.exists("layer_9/cfg.json")
    assert again.path(LARGE) == first.path(LARGE)
    assert hub.log == []


def test_names_never_leave_the_repository(hub: Any, repository: Any, tmp_path: Path):
    for name in ("../secret", "/etc/passwd", "a/../../b"):
        with pytest.raises(FormatError, match="not a relative path"):
            source(hub, tmp_path).path(name)


# --- revisions ---


def test_a_branch_stays_at_its_commit_until_it_is_refreshed(hub: Any, repository: Any, tmp_path: Path):
    before = source(hub, tmp_path)
    before.path("README.md")
    repository.files["README.md"] = b"changed"
    old, new = repository.commit, repository.commit_now()
    assert source(hub, tmp_path).path("README.md").read_bytes() == b"hello"
    refreshed = source(hub, tmp_path, refresh=True)
    assert refreshed.path("README.md").read_bytes() == b"changed"
    assert (before.commit, refreshed.commit) == (old, new)
    assert source(hub, tmp_path).commit == new


def test_a_commit_is_used_as_it_is(hub: Any, repository: Any, tmp_path: Path):
    files = source(hub, tmp_path, repository.commit)
    assert files.path("README.md").read_bytes() == b"hello"
    assert all(repository.commit in request.path for request in hub.log)


def test_an_unknown_revision_is_named(hub: Any, repository: Any, tmp_path: Path):
    with pytest.raises(HubError, match="lab/saes: the Hub has no revision 'v9'"):
        source(hub, tmp_path, "v9").files()


# --- ranges ---


def test_a_range_is_read_without_the_rest(hub: Any, repository: Any, tmp_path: Path):
    files = source(hub, tmp_path)
    assert files.read_range(LARGE, 1000, 1010) == WEIGHTS[1000:1010]
    assert files.read_range(LARGE, 1010, 9000) == WEIGHTS[1010:9000]  # out of what was read before
    assert [request.headers["range"] for request in hub.lines("GET", "/cdn/")] == [f"bytes=1000-{1000 + 2**16 - 1}"]
    assert files.read_range(LARGE, 60_000, 200_000) == WEIGHTS[60_000:200_000]
    assert len(hub.lines("GET", "/cdn/")) == 2
    assert not (tmp_path / "cache" / "models--lab--saes" / "blobs").exists()


def test_a_range_of_a_cached_file_needs_no_request(hub: Any, repository: Any, tmp_path: Path):
    files = source(hub, tmp_path)
    files.path(LARGE)
    hub.log.clear()
    assert files.read_range(LARGE, 5, 9) == WEIGHTS[5:9]
    assert hub.log == []


def test_a_range_past_the_end_is_what_there_is(hub: Any, repository: Any, tmp_path: Path):
    files = source(hub, tmp_path)
    assert files.read_range("README.md", 3, 99) == b"lo"
    assert files.read_range("README.md", 4, 98) == b"o"
    assert files.read_range("README.md", 99, 120) == b""
    assert files.read_range("README.md", 2, 2) == b""


def test_a_server_that_ignores_ranges_gives_the_same_bytes(hub: Any, repository: Any, tmp_path: Path):
    hub.next("GET /cdn/", ignore_range=True)
    assert source(hub, tmp_path).read_range(LARGE, 1000, 1010) == WEIGHTS[1000:1010]


def test_a_missing_file_is_missing_for_a_range_too(hub: Any, repository: Any, tmp_path: Path):
    with pytest.raises(FormatError, match=r"did you mean 'README\.md'"):
        source(hub, tmp_path).read_range("REDME.md", 0, 10)


# --- refusals ---


def test_a_wrong_file_name_is_answered_with_near_ones(hub: Any, repository: Any, tmp_path: Path):
    with pytest.raises(FormatError, match=r"no such file 'layer_1/cfg\.jsn'; did you mean 'layer_1/cfg\.json'"):
        source(hub, tmp_path).path("layer_1/cfg.jsn")


def test_a_repository_that_is_not_there_is_explained(hub: Any, tmp_path: Path):
    with pytest.raises(HubError, match=r"no repository 'lab/saes': .* you are not logged in \(`hf auth login`"):
        source(hub, tmp_path).files()
    assert len(hub.log) == 1  # asking again would not help


def test_a_private_repository_needs_a_token(hub: Any, repository: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    repository.private = True
    with pytest.raises(HubError, match="private and you are not logged in"):
        source(hub, tmp_path).files()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert source(hub, tmp_path).path("README.md").read_bytes() == b"hello"


def test_a_wrong_token_is_named_as_such(hub: Any, repository: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(HubError, match="does not accept your token; make a new one"):
        source(hub, tmp_path).files()


def test_a_gated_repository_says_what_to_accept_and_how_to_log_in(
    hub: Any, repository: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    repository.gated = True
    with pytest.raises(HubError, match="gated") as caught:
        source(hub, tmp_path).path("README.md")
    for advice in (
        "you are not logged in",
        "https://huggingface.co/lab/saes",
        "accept its conditions",
        "hf auth login",
    ):
        assert advice in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    with pytest.raises(HubError, match="the account of your token may not read it"):
        source(hub, tmp_path).path("README.md")


def test_the_token_goes_to_the_hub_and_to_nobody_else(
    hub: Any, repository: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    files = source(hub, tmp_path)
    files.read_range(LARGE, 0, 10)
    files.path(LARGE)
    elsewhere = hub.lines("GET", "/cdn/")
    assert len(elsewhere) == 2
    assert all("authorization" not in request.headers for request in elsewhere)
    assert all("authorization" in request.headers for request in hub.log if request not in elsewhere)


def test_a_plain_403_says_what_the_server_says(hub: Any, repository: Any, tmp_path: Path):
    hub.next("/api/models", status=403, headers={"X-Error-Message": "IP range not allowed"})
    with pytest.raises(HubError, match="the Hub forbids this: IP range not allowed"):
        source(hub, tmp_path).files()


# --- failures that pass ---


def test_after_429_the_client_waits_as_long_as_it_is_told(
    hub: Any, repository: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    hub.next("/api/models", status=429, headers={"Retry-After": "1"})
    started = time.monotonic()
    assert source(hub, tmp_path).files() == sorted(FILES)
    assert time.monotonic() - started >= 1.0
    assert "the Hub answers with 429; waiting 1.0 s (attempt 1 of 4)" in caplog.text


def test_a_date_in_retry_after_is_understood(hub: Any, repository: Any, tmp_path: Path):
    hub.next("/api/models", status=503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})
    assert source(hub, tmp_path).files() == sorted(FILES)


def test_a_wait_beyond_patience_is_not_begun(hub: Any, repository: Any, tmp_path: Path):
    hub.next("/api/models", status=429, headers={"Retry-After": "7200"})
    with pytest.raises(HubError, match=r"too many requests to the Hub; try again in 7200 seconds\nlogged-in users"):
        source(hub, tmp_path).files()
    assert len(hub.log) == 1


@pytest.mark.parametrize("where", ["GET /api/models", "HEAD /lab/saes", "GET /cdn/"])
def test_500_then_ok_is_ok_wherever_it_happens(hub: Any, repository: Any, tmp_path: Path, where: str):
    hub.next(where, times=2, status=500)
    assert source(hub, tmp_path).path(LARGE).read_bytes() == WEIGHTS
    assert len(hub.faults) == 0


def test_500_for_ever_is_said_after_all_attempts(hub: Any, repository: Any, tmp_path: Path):
    hub.next("/api/models", times=9, status=502)
    with pytest.raises(HubError, match=r"the Hub answers with an error \(502\)"):
        source(hub, tmp_path).files()
    assert len(hub.log) == HASTY.attempts


def test_a_server_that_is_not_there_is_named_by_its_address(tmp_path: Path):
    files = HubFiles("lab/saes", cache_dir=tmp_path, endpoint="http://127.0.0.1:9", patience=HASTY)
    with pytest.raises(HubError, match=r"cannot reach .*: .*\ncheck the network"):
        files.files()


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub keeps what arrived in steps of 10 MB, more than the files here have."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_cut_connection_is_resumed_where_it_stopped(hub: Any, repository: Any, tmp_path: Path, reset: bool):
    hub.next("GET /cdn/", cut_after=4_000_000, reset=reset)
    hub.next("GET /cdn/", cut_after=3_000_000, reset=reset)
    assert source(hub, tmp_path).path(LARGE).read_bytes() == WEIGHTS
    starts = [int(request.headers.get("range", "bytes=0-")[6:-1]) for request in hub.lines("GET", "/cdn/")]
    assert len(starts) == 3
    assert starts[0] == 0
    if not reset:  # what a reset connection had in flight is lost with it, and huggingface_hub begins again
        assert starts == [0, 4_000_000, 7_000_000]


@pytest.mark.usefixtures("small_steps")
def test_many_cuts_do_not_exhaust_the_patience_while_there_is_progress(hub: Any, repository: Any, tmp_path: Path):
    hub.next("GET /cdn/", times=9, cut_after=1_100_000)
    assert source(hub, tmp_path).path(LARGE).read_bytes() == WEIGHTS
    assert len(hub.lines("GET", "/cdn/")) == 10


@pytest.mark.usefixtures("small_steps")
def test_a_server_that_ignores_the_resumption_starts_the_file_again(hub: Any, repository: Any, tmp_path: Path):
    hub.next("GET /cdn/", cut_after=4_000_000)
    hub.next("GET /cdn/", ignore_range=True)
    assert source(hub, tmp_path).path(LARGE).read_bytes() == WEIGHTS


# --- answers that are none ---


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>log in</html>",
        b"",
        b"[]",
        b"null",
        b'{"id": "lab/saes"}',
        b'{"id": "lab/saes", "sha": 7, "siblings": []}',
        b'{"id": "lab/saes", "sha": "../../../../escaped", "siblings": []}',
        b'{"id": "lab/saes", "sha": "../refs/main", "siblings": []}',
        b'{"id": "lab/saes", "sha": "' + b"0" * 40 + b'", "siblings": 3}',
        b'{"id": "lab/saes", "sha": "' + b"0" * 40 + b'", "siblings": [{"name": 1}]}',
        b'{"id": "lab/saes", "sha": "' + b"0" * 40 + b'", "siblings": [{"rfilename": 1}]}',
    ],
)
def test_a_listing_that_is_none_is_one_error_and_writes_nothing(
    hub: Any, repository: Any, tmp_path: Path, answer: bytes
):
    hub.next("/api/models", times=9, status=200, body=answer)
    with pytest.raises(HubError, match=r"lab/saes@main: .*(is it a Hub|none of a Hub's|states no commit)"):
        source(hub, tmp_path).files()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("status", [416, 418, 503])
def test_a_status_that_nobody_expects_is_one_error(hub: Any, repository: Any, tmp_path: Path, status: int):
    files = source(hub, tmp_path)
    assert files.files()
    hub.next("GET /cdn/", times=20, status=status)
    with pytest.raises(HubError, match=f"the Hub answers with an error \\({status}\\)"):
        files.path(LARGE)
    hub.faults.clear()
    assert files.path(LARGE).read_bytes() == WEIGHTS


def test_a_page_in_place_of_a_file_is_one_error_and_is_not_kept(hub: Any, repository: Any, tmp_path: Path):
    files = source(hub, tmp_path)
    assert files.files()
    hub.next("GET /cdn/", times=20, status=200, body=b"<html>log in</html>")
    with pytest.raises((HubError, FormatError), match=r"the transfer failed|damaged in transfer"):
        files.path(LARGE)
    hub.faults.clear()
    assert files.path(LARGE).read_bytes() == WEIGHTS


def test_a_date_without_a_zone_in_retry_after_means_utc(hub: Any, repository: Any, tmp_path: Path):
    hub.next("/api/models", status=503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00"})
    assert source(hub, tmp_path).files() == sorted(FILES)


# --- the cache ---


@pytest.mark.parametrize("content", [b"", b"not a commit", b"../../etc", b"\xff\xfe"])
def test_a_damaged_ref_is_asked_for_again(hub: Any, repository: Any, tmp_path: Path, content: bytes):
    first = source(hub, tmp_path)
    commit = first.commit
    ref = next(path for path in tmp_path.rglob("refs/main"))
    ref.write_bytes(content)
    assert source(hub, tmp_path).commit == commit
    assert ref.read_text() == commit


@pytest.mark.parametrize("content", [b"", b"{", b"3", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_list_of_files_is_asked_for_again(hub: Any, repository: Any, tmp_path: Path, content: bytes):
    assert source(hub, tmp_path).files() == sorted(FILES)
    listing = next(tmp_path.rglob("sae-core-listings/*.json"))
    listing.write_bytes(content)
    assert source(hub, tmp_path).files() == sorted(FILES)
    assert json.loads(listing.read_text()) == sorted(FILES)


def test_a_small_file_that_is_damaged_in_the_cache_is_fetched_again(
    hub: Any, repository: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = source(hub, tmp_path).path("README.md")
    path.write_bytes(b"something else")
    assert source(hub, tmp_path).path("README.md").read_bytes() == FILES["README.md"]
    path.write_bytes(b"something else")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"the cached copy is damaged: git blob id .* go online once"):
        source(hub, tmp_path).path("README.md")


def test_a_cache_that_cannot_be_written_is_named(hub: Any, repository: Any, tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        HubError, match=r"the cache of the Hub, .*/cache, cannot be written: .*HF_HUB_CACHE names another"
    ):
        source(hub, tmp_path).path(LARGE)


# --- damage ---


@pytest.mark.parametrize("name", [LARGE, "README.md"], ids=["SHA-256", "git blob id"])
def test_a_damaged_file_is_fetched_once_more(
    hub: Any, repository: Any, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
):
    hub.next("GET /cdn/" if name == LARGE else "GET /lab/saes", damage=True)
    assert source(hub, tmp_path).path(name).read_bytes() == FILES[name]
    assert "damaged in transfer" in caplog.text


def test_a_file_that_is_damaged_twice_is_refused_and_not_kept(hub: Any, repository: Any, tmp_path: Path):
    hub.next("GET /cdn/", times=2, damage=True)
    with pytest.raises(FormatError, match=f"{LARGE}: damaged in transfer, twice: SHA-256 [0-9a-f]+ instead of"):
        source(hub, tmp_path).path(LARGE)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1000]


def test_damage_on_disk_is_found_by_the_checksum(hub: Any, repository: Any, tmp_path: Path):
    files = source(hub, tmp_path)
    path = files.path(LARGE)
    assert files.damage(LARGE) is None
    with path.open("r+b") as file:
        file.write(b"\xff")
    assert "SHA-256" in (files.damage(LARGE) or "")


# --- offline ---


def test_offline_the_cache_is_enough(hub: Any, repository: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source(hub, tmp_path).path(LARGE)
    hub.log.clear()
    offline(monkeypatch)
    files = source(hub, tmp_path, refresh=True)
    assert files.path(LARGE).read_bytes() == WEIGHTS
    assert files.files() == sorted(FILES)
    assert hub.log == []


def test_offline_files_of_other_tools_are_listed_too(
    hub: Any, repository: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import hf_hub_download

    hf_hub_download("lab/saes", LARGE, cache_dir=tmp_path / "cache", endpoint=hub.url)
    offline(monkeypatch)
    assert source(hub, tmp_path).files() == [LARGE]


@pytest.mark.parametrize("cached", [False, True], ids=["nothing cached", "another file cached"])
def test_offline_what_is_not_cached_is_explained(
    hub: Any, repository: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
):
    if cached:
        source(hub, tmp_path).path("README.md")
    hub.log.clear()
    offline(monkeypatch)
    with pytest.raises(HubError, match="not in the local cache, and HF_HUB_OFFLINE is set"):
        source(hub, tmp_path).path(LARGE)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        source(hub, tmp_path).read_range(LARGE, 0, 8)
    assert hub.log == []


def test_the_environment_chooses_server_cache_and_offline_mode(hub: Any, repository: Any, tmp_path: Path):
    code = """
        import json, sys
        from sae_pretrained import HubFiles
        from sae_core.errors import SaeCoreError
        try:
            path = HubFiles("lab/saes").path(sys.argv[1])
            print(json.dumps([str(path), path.stat().st_size]))
        except SaeCoreError as error:
            print(json.dumps([type(error).__name__, str(error)]))
    """

    def run(name: str, **settings: str) -> list[Any]:
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "c")} | settings
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), name], env=env, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    path, size = run("README.md")
    assert path.startswith(str(tmp_path / "c"))
    assert size == 5
    asked = len(hub.log)
    assert run("README.md", HF_HUB_OFFLINE="1") == [path, size]
    assert run(LARGE, HF_HUB_OFFLINE="1")[0] == "HubError"
    assert len(hub.log) == asked
