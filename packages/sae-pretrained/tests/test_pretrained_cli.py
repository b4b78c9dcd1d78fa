"""``sae-core pretrained`` from the command line, against the local Hub."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE, create
from sae_core.cli import main

# huggingface_hub 2.4 uploads large files in a way that its own HTTP library calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

REPOSITORY = "jbloom/GPT2-Small-SAEs-Reformatted"
ID = "blocks.8.hook_resid_pre"
RELEASE = "gpt2-small-res-jb"


@pytest.fixture(autouse=True)
def _this_hub(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a small SAE, as `sae.save` writes it."""
    sae = create("standard", d_in=8, d_sae=32, seed=3)
    sae.metadata = {"hook_name": ID, "model_name": "gpt2-small", "context_size": 128, "prepend_bos": True}
    return sae.save(tmp_path / "l8")


@pytest.fixture
def published(hub: Any, saved: Path) -> Any:
    """The same SAE on the Hub, where the catalogue says it is."""
    files = {f"{ID}/{path.name}": path.read_bytes() for path in saved.iterdir()}
    return hub.add(REPOSITORY, files, lfs=(f"{ID}/sae_weights.safetensors",))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = main(["pretrained", *arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = main(["pretrained", *arguments])
    captured = capsys.readouterr()
    assert code == 1
    assert "sae-core: error: " in captured.err  # perhaps behind a progress bar
    return captured.err


# --- list ---


def test_list_fits_80_columns_and_names_are_whole(capsys: pytest.CaptureFixture[str]):
    lines = run(capsys, "list").splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:1] == ["sae_bench_gemma-2-2b_vanilla_width-2pow16_date-1109"] for line in lines)
    assert lines[-1] == "170 releases, 13857 SAEs"


@pytest.mark.parametrize(
    ("filters", "releases", "saes"),
    [
        (["--model", "gemma-2-2b"], 20, 1731),
        (["--model", "gpt2-small"], 18, None),
        (["--model", "GPT2"], 18, None),
        (["--format", "qwen_scope"], 14, 544),
        (["--search", "saebench"], 3 + 6, None),
        (["--layer", "63"], 2, 2),
        (["--model", "pythia", "--layer", "4", "--format", "dictionary_learning_1"], 4, 20 + 28 + 24 + 24),
    ],
)
def test_list_filters(capsys: pytest.CaptureFixture[str], filters: list[str], releases: int, saes: int | None):
    found = json.loads(run(capsys, "list", *filters, "--json"))
    assert len(found) == releases
    if saes is not None:
        assert sum(release["n_saes"] for release in found) == saes


def test_list_json_has_these_keys(capsys: pytest.CaptureFixture[str]):
    found = json.loads(run(capsys, "list", "--search", "gpt2-small-res-jb-feature", "--json"))
    assert found == [
        {
            "release": "gpt2-small-res-jb-feature-splitting",
            "models": ["openai-community/gpt2"],
            "format": "sae_lens",
            "repository": "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8",
            "revision": None,
            "catalogue": "public",
            "links": {
                "dashboards": "https://www.neuronpedia.org/gpt2sm-rfs-jb",
                "model": "https://huggingface.co/gpt2",
            },
            "n_saes": 8,
            "layers": [8],
        }
    ]


def test_list_says_when_nothing_is_found_and_which_formats_there_are(capsys: pytest.CaptureFixture[str]):
    assert "no release passes these filters" in run(capsys, "list", "--search", "no such thing")
    assert run(capsys, "list", "--search", "no such thing", "--json") == "[]\n"
    assert "did you mean 'qwen_scope'" in refused(capsys, "list", "--format", "qwen-scope")


def test_a_file_named_on_the_command_line_is_listed_too(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("lab-saes: {repository: lab/saes, model: lab/m, saes: [{id: only}]}\n")
    found = json.loads(run(capsys, "list", "--catalogue", str(tmp_path / "mine.yaml"), "--model", "lab/m", "--json"))
    assert [(release["release"], release["catalogue"]) for release in found] == [("lab-saes", "user")]
    (tmp_path / "mine.yaml").write_text("lab-saes: {repo: lab/saes, saes: [{id: only}]}\n")
    assert "unknown key 'repo'" in refused(capsys, "list", "--catalogue", str(tmp_path / "mine.yaml"))


# --- show ---


def test_show_a_release_lists_its_ids_in_order(capsys: pytest.CaptureFixture[str]):
    out = run(capsys, "show", RELEASE)
    assert "base model   openai-community/gpt2" in out
    ids = [line.split()[0] for line in out.splitlines() if line.startswith("blocks.")]
    assert ids[:3] == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
    assert len(ids) == 13
    assert len(json.loads(run(capsys, "show", RELEASE, "--json"))["saes"]) == 13


def test_show_an_sae_reads_its_config_and_not_its_weights(capsys: pytest.CaptureFixture[str], hub: Any, published: Any):
    found = json.loads(run(capsys, "show", RELEASE, ID, "--json"))
    assert (found["architecture"], found["config"]["d_sae"], found["l0"]) == ("standard", 32, 60.0)
    assert found["metadata"]["hf_hook_name"] == "transformer.h.8:input"
    assert found["metadata"]["sae_core"]["base_model"] == "openai-community/gpt2"
    assert found["metadata"]["sae_core"]["origin"]["revision"] == published.commit
    assert hub.lines("GET", "/cdn/") == []  # where the weights are
    out = run(capsys, "show", RELEASE, ID)
    assert "config (read without the weights)" in out
    assert "context_size" in out


def test_show_without_fetching_sends_nothing(capsys: pytest.CaptureFixture[str], hub: Any):
    out = run(capsys, "show", RELEASE, ID, "--no-fetch")
    assert "https://www.neuronpedia.org/gpt2-small/8-res-jb" in out
    assert hub.log == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "gpt2-small-res-jbb"], "did you mean 'gpt2-small-res-jb'"),
        (["show", RELEASE, "blocks.8.hook_resid"], "did you mean 'blocks.8.hook_resid_pre'"),
        (["show", "lab/saes"], "name a folder of it too"),
        (["download", "lab/nothing", "l8"], "the Hub shows no repository 'lab/nothing'"),
        (["download", RELEASE, ID], "the Hub shows no repository"),
        (["verify", "no/such/folder"], "no such file or folder"),
        (["verify", RELEASE, ID, "--format", "sae_lens"], "--format is for local copies"),
        (["download", RELEASE, ID, "--dtype", "float16"], "give --output DIR too"),
        (["upload", "no/such/folder", "lab/saes"], "no such folder"),
    ],
)
def test_wrong_input_is_one_clear_error(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    assert message in refused(capsys, *arguments)


# --- from_pretrained, download, verify ---


def test_from_pretrained_gives_the_published_sae_and_says_where_it_is_from(published: Any, saved: Path):
    sae = SAE.from_pretrained(RELEASE, ID)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sae(x), SAE.load(saved)(x), rtol=0, atol=0)
    assert sae.metadata["neuronpedia_id"] == "gpt2-small/8-res-jb"
    assert sae.metadata["l0"] == 60.0
    assert sae.metadata["model_name"] == "gpt2-small"  # as the file says, in TransformerLens's terms
    assert sae.metadata["hf_hook_name"] == "transformer.h.8:input"
    assert (sae.metadata["context_size"], sae.metadata["prepend_bos"]) == (128, True)
    assert sae.metadata["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    assert sae.metadata["sae_core"]["base_model"] == "openai-community/gpt2"
    assert sae.metadata["sae_core"]["origin"] == {
        "release": RELEASE,
        "sae_id": ID,
        "repository": REPOSITORY,
        "path": ID,
        "revision": published.commit,
    }


def test_from_pretrained_casts_and_takes_a_revision(published: Any):
    first = published.commit
    published.files["note.txt"] = b"later"
    published.commit_now()
    sae = SAE.from_pretrained(RELEASE, ID, dtype="bfloat16", revision=first)
    assert sae.dtype == torch.bfloat16
    assert sae.metadata["sae_core"]["origin"]["revision"] == first


def test_a_hub_repository_is_loaded_by_folder(hub: Any, published: Any, saved: Path):
    files = {f"layer_8/{path.name}": path.read_bytes() for path in saved.iterdir()}
    hub.add("lab/own", files)
    sae = SAE.from_pretrained("lab/own", "layer_8")
    assert sae.metadata["sae_core"]["base_model"] == "openai-community/gpt2"  # from the name that the file gives
    assert sae.metadata["sae_core"]["origin"]["repository"] == "lab/own"
    with pytest.raises(Exception, match="no folder or file 'layer_9'; did you mean 'layer_8'"):
        SAE.from_pretrained("lab/own", "layer_9")


def test_download_names_its_files_and_a_second_one_sends_nothing(
    capsys: pytest.CaptureFixture[str], hub: Any, published: Any
):
    found = json.loads(run(capsys, "download", RELEASE, ID, "--json"))
    assert [file["name"] for file in found["files"]] == [f"{ID}/cfg.json", f"{ID}/sae_weights.safetensors"]
    assert all(Path(file["path"]).stat().st_size == file["size"] for file in found["files"])
    assert f"{ID}/sae_weights.safetensors: checksum as the Hub states it" in found["findings"]
    hub.log.clear()
    assert "ok  encodes and decodes random rows" in run(capsys, "download", RELEASE, ID)
    assert hub.log == []


def test_what_download_writes_out_loads_and_verifies(
    capsys: pytest.CaptureFixture[str], published: Any, saved: Path, tmp_path: Path
):
    out = run(capsys, "download", RELEASE, ID, "--output", str(tmp_path / "copy"))
    assert f"written to {tmp_path / 'copy'}" in out
    assert SAE.load(tmp_path / "copy").metadata["sae_core"]["origin"]["release"] == RELEASE
    verified = run(capsys, "verify", str(tmp_path / "copy"))
    assert "ok  sae_weights.safetensors: SHA-256 as recorded in SHA256SUMS" in verified
    assert "exists already" in refused(capsys, "download", RELEASE, ID, "--output", str(tmp_path / "copy"))


def test_verify_finds_one_changed_bit(capsys: pytest.CaptureFixture[str], published: Any, tmp_path: Path):
    run(capsys, "download", RELEASE, ID, "--output", str(tmp_path / "copy"))
    weights = tmp_path / "copy" / "sae_weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    message = refused(capsys, "verify", str(tmp_path / "copy"))
    assert "damaged or changed: SHA-256" in message
    assert "sae_weights.safetensors" in message


def test_verify_checks_the_cached_copy_of_a_release(
    capsys: pytest.CaptureFixture[str], hub: Any, published: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sae_pretrained.hub._CHEAP", -1)  # as if the file were too large to be compared on every look
    path = next(file["path"] for file in json.loads(run(capsys, "download", RELEASE, ID, "--json"))["files"][1:])
    assert "checksum as the Hub states it" in run(capsys, "verify", RELEASE, ID)
    with Path(path).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert "the cached copy is damaged: SHA-256" in refused(capsys, "verify", RELEASE, ID)


def test_verify_names_what_is_wrong_with_a_local_folder(capsys: pytest.CaptureFixture[str], saved: Path):
    assert "every tensor has the checksum it was saved with: 4 tensors" in run(capsys, "verify", str(saved))
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / "sae_weights.safetensors")
    tensors["W_dec"][3, 1] = float("nan")
    save_file(tensors, saved / "sae_weights.safetensors")
    message = refused(capsys, "verify", str(saved))
    assert "'W_dec' holds 1 values that are NaN or infinite" in message
    tensors["W_dec"][3, 1] = 0.0
    save_file(tensors, saved / "sae_weights.safetensors")  # as another library would
    assert "whether its numbers are those that were saved is unchecked" in run(capsys, "verify", str(saved))


def test_verify_finds_one_changed_bit_by_what_save_wrote(capsys: pytest.CaptureFixture[str], saved: Path):
    weights = saved / "sae_weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    assert "has changed since it was saved (CRC-32)" in refused(capsys, "verify", str(saved))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("{config}  cfg.json\n", "it has no checksum of sae_weights.safetensors, from which this SAE was read"),
        ("{config}  cfg.json\n{weights}  ../sae_weights.safetensors\n", "is not a relative path inside its folder"),
        ("{config}  cfg.json\n{weights}  gone\n", "it names 'gone', which is not in this folder"),
        ("{config} cfg.json", "line 1 is"),
    ],
)
def test_verify_says_what_is_wrong_with_a_list_of_checksums(
    capsys: pytest.CaptureFixture[str], saved: Path, lines: str, said: str
):
    sums = {"config": saved / "cfg.json", "weights": saved / "sae_weights.safetensors"}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sums.items()}
    (saved / "SHA256SUMS").write_text(lines.format(**hashes))
    assert said in refused(capsys, "verify", str(saved))


def test_verify_knows_a_list_of_checksums_of_an_earlier_save(
    capsys: pytest.CaptureFixture[str], published: Any, tmp_path: Path
):
    run(capsys, "download", RELEASE, ID, "--output", str(tmp_path / "copy"))
    sae = SAE.load(tmp_path / "copy")
    with torch.no_grad():
        sae.W_dec.mul_(2)
    sae.save(tmp_path / "copy")
    message = refused(capsys, "verify", str(tmp_path / "copy"))
    assert "SHA256SUMS is of an earlier save; write it again, or delete it" in message


# --- upload ---


@pytest.fixture
def logged_in(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)


def writes(hub: Any) -> list[Any]:
    return [request for request in hub.log if request.method not in ("GET", "HEAD")]


def test_a_dry_run_shows_everything_and_sends_nothing(capsys: pytest.CaptureFixture[str], hub: Any, saved: Path):
    out = run(capsys, "upload", str(saved), "lab/new", "--id", "layer_8", "--dry-run", "--private")
    assert "lab/new (main), which will be made, private" in out
    names = [line.split()[0] for line in out.splitlines() if "new" in line.split()[-1:]]
    assert names == ["layer_8/cfg.json", "layer_8/sae_weights.safetensors", "README.md"]
    assert "nothing was sent" in out
    assert writes(hub) == []


@pytest.mark.usefixtures("logged_in")
def test_what_is_uploaded_can_be_loaded_by_anyone(
    capsys: pytest.CaptureFixture[str], hub: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
):
    (saved / "notes.txt").write_text("not to be shared")
    out = run(capsys, "upload", str(saved), "lab/new")
    assert 'SAE.from_pretrained("lab/new", "l8")' in out
    repository = hub.repositories["lab/new"]
    assert sorted(repository.files) == ["README.md", "l8/cfg.json", "l8/sae_weights.safetensors"]
    assert len(repository.history) == 2  # made empty, then one commit with everything
    assert repository.private is False
    monkeypatch.delenv("HF_TOKEN")
    sae = SAE.from_pretrained("lab/new", "l8")
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sae(x), SAE.load(saved)(x), rtol=0, atol=0)


@pytest.mark.usefixtures("logged_in")
def test_the_card_is_valid_metadata_and_a_table(capsys: pytest.CaptureFixture[str], hub: Any, saved: Path):
    from huggingface_hub import ModelCard

    run(capsys, "upload", str(saved), "lab/new")
    card = ModelCard(hub.repositories["lab/new"].files["README.md"].decode())
    assert card.data.library_name == "saelens"
    assert card.data.tags == ["sparse-autoencoder", "sae-core"]
    assert card.data.base_model == ["openai-community/gpt2"]
    assert "| `l8` | standard | 8 | 32 | openai-community/gpt2 | `blocks.8.hook_resid_pre` |" in card.text


@pytest.mark.usefixtures("logged_in")
def test_the_same_again_sends_nothing(capsys: pytest.CaptureFixture[str], hub: Any, saved: Path):
    run(capsys, "upload", str(saved), "lab/new")
    hub.log.clear()
    assert "it is all there already" in run(capsys, "upload", str(saved), "lab/new")
    assert [request for request in writes(hub) if "paths-info" not in request.path] == []


@pytest.mark.usefixtures("logged_in")
def test_nothing_is_replaced_without_force(capsys: pytest.CaptureFixture[str], hub: Any, saved: Path, tmp_path: Path):
    run(capsys, "upload", str(saved), "lab/new")
    create("standard", d_in=8, d_sae=32, seed=4).save(tmp_path / "other")
    before = dict(hub.repositories["lab/new"].files)
    message = refused(capsys, "upload", str(tmp_path / "other"), "lab/new", "--id", "l8")
    assert "--force replaces them\n  l8/cfg.json\n  l8/sae_weights.safetensors" in message
    assert hub.repositories["lab/new"].files == before
    run(capsys, "upload", str(tmp_path / "other"), "lab/new", "--id", "l8", "--force")
    sent = hub.repositories["lab/new"].files["l8/sae_weights.safetensors"]
    assert sent == (tmp_path / "other" / "sae_weights.safetensors").read_bytes()


@pytest.mark.usefixtures("logged_in")
def test_a_second_sae_joins_the_list_and_leaves_the_rest_of_the_card_alone(
    capsys: pytest.CaptureFixture[str], hub: Any, saved: Path
):
    run(capsys, "upload", str(saved), "lab/new")
    repository = hub.repositories["lab/new"]
    repository.files["README.md"] = repository.files["README.md"].replace(b"# new", b"# Our SAEs\n\nRead the paper.")
    repository.commit_now()
    run(capsys, "upload", str(saved), "lab/new", "--id", "blocks.9/again")
    card = repository.files["README.md"].decode()
    assert "Read the paper." in card
    assert card.index("| `blocks.9/again` |") < card.index("| `l8` |")
    assert card.count("| `l8` |") == 1


@pytest.mark.usefixtures("logged_in")
def test_a_card_that_people_wrote_is_left_alone(capsys: pytest.CaptureFixture[str], hub: Any, saved: Path):
    hub.add("lab/theirs", {"README.md": b"# By hand\n"})
    run(capsys, "upload", str(saved), "lab/theirs", "--force")
    assert hub.repositories["lab/theirs"].files["README.md"] == b"# By hand\n"


@pytest.mark.usefixtures("logged_in")
def test_a_folder_of_saes_is_uploaded_in_one_commit(capsys: pytest.CaptureFixture[str], hub: Any, tmp_path: Path):
    for layer in (1, 2):
        create("standard", d_in=8, d_sae=16, seed=layer).save(tmp_path / "run" / f"layer_{layer}")
    found = json.loads(run(capsys, "upload", str(tmp_path / "run"), "lab/both", "--json", "--private"))
    assert found["ids"] == ["layer_1", "layer_2"]
    repository = hub.repositories["lab/both"]
    assert (found["commit"], repository.private) == (repository.commit, True)
    assert len(repository.history) == 2
    assert "holds 2: layer_1, layer_2" in refused(capsys, "upload", str(tmp_path / "run"), "lab/both", "--id", "x")


@pytest.mark.usefixtures("logged_in")
def test_a_damaged_sae_is_not_uploaded(capsys: pytest.CaptureFixture[str], hub: Any, saved: Path):
    (saved / "sae_weights.safetensors").write_bytes(b"not tensors")
    assert "damaged or not a safetensors file" in refused(capsys, "upload", str(saved), "lab/new")
    assert hub.repositories == {}


@pytest.mark.usefixtures("logged_in")
def test_an_upload_that_breaks_off_leaves_the_repository_as_it_was(
    capsys: pytest.CaptureFixture[str], hub: Any, saved: Path
):
    repository = hub.add("lab/new", {"README.md": b"# By hand\n"})
    hub.next("PUT /staged", times=9, status=400)
    assert "Error while uploading 'l8/sae_weights.safetensors'" in refused(capsys, "upload", str(saved), "lab/new")
    assert list(repository.files) == ["README.md"]
    assert len(repository.history) == 1


@pytest.mark.usefixtures("logged_in")
def test_a_repository_of_others_is_refused_with_what_the_hub_says(
    capsys: pytest.CaptureFixture[str], hub: Any, saved: Path
):
    hub.add("big/theirs", {})
    hub.next("POST /api/models", status=403, headers={"X-Error-Message": "you may not write here"})
    assert "the Hub forbids this: you may not write here" in refused(capsys, "upload", str(saved), "big/theirs")


def test_uploading_needs_a_token(capsys: pytest.CaptureFixture[str], hub: Any, saved: Path):
    assert "run `hf auth login`" in refused(capsys, "upload", str(saved), "lab/new")
    assert writes(hub) == []


@pytest.mark.parametrize("sae_id", ["../up", "/abs", "a//b", "."])
def test_an_id_that_is_no_plain_path_is_refused(capsys: pytest.CaptureFixture[str], saved: Path, sae_id: str):
    assert "must be a plain relative path" in refused(
        capsys, "upload", str(saved), "lab/new", "--id", sae_id, "--dry-run"
    )


@pytest.mark.parametrize("repository", ["new", "lab/", "a/b/c"])
def test_a_repository_is_owner_and_name(capsys: pytest.CaptureFixture[str], saved: Path, repository: str):
    assert "REPO must be owner/name" in refused(capsys, "upload", str(saved), repository)
