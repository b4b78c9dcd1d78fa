"""The catalogue: what it says about every published SAE, how it is extended, and how it refuses."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sae_core.errors import ConfigError, UnknownNameError
from sae_core.protocols import Catalogue
from sae_pretrained.catalogue import FolderCatalogue, PublicCatalogue, UserCatalogue, lookup
from sae_pretrained.release_file import parse_release, sort_key

HERE = Path(__file__).parent
REPOSITORY = Path(__file__).parents[3]
SOURCE = Path(
    os.environ.get("SAE_PRETRAINED_SOURCE", REPOSITORY.parent / "shared" / "catalogue" / "pretrained_saes.yaml")
)
DIGEST = json.loads((HERE / "catalogue_digest.json").read_text())
PUBLIC = PublicCatalogue()


# --- what it holds ---


def test_the_public_catalogue_has_170_releases_and_13857_saes():
    assert len(PUBLIC.releases()) == 170
    assert sum(len(PUBLIC.sae_ids(release)) for release in PUBLIC.releases()) == 13857


def test_every_fact_of_every_release_is_that_of_the_catalogue_it_was_made_from():
    found: dict[str, list[object]] = {}
    for release in PUBLIC.releases():
        lines = [
            json.dumps(
                [
                    sae_id,
                    entry.repo_id,
                    entry.path,
                    entry.model,
                    entry.format,
                    entry.l0,
                    entry.variance_explained,
                    entry.neuronpedia_id,
                    entry.overrides,
                    entry.links,
                ],
                sort_keys=True,
            )
            for sae_id, entry in PUBLIC.entries(release).items()
        ]
        found[release] = [len(lines), hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()]
    assert found == DIGEST


def test_the_source_itself_expands_to_the_same_ids_paths_l0_and_neuronpedia_ids():
    if not SOURCE.is_file():
        pytest.skip(f"the catalogue this one was made from is not here: {SOURCE} (set SAE_PRETRAINED_SOURCE)")
    source = yaml.load(SOURCE.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    compared = 0
    assert set(source) == set(PUBLIC.releases())
    for release, facts in source.items():
        entries = PUBLIC.entries(release)
        listed = [sae for outer in facts["saes"] for sae in (outer, *outer.get("saes", ()))]  # nested by a slip
        assert {sae["id"] for sae in listed} == set(entries)
        for sae in listed:
            entry = entries[sae["id"]]
            assert entry.path == str(sae["path"])
            assert entry.l0 == sae.get("l0")
            assert entry.neuronpedia_id == sae.get("neuronpedia")
            assert entry.variance_explained == sae.get("variance_explained")
            assert entry.overrides.get("norm_scaling_factor") == sae.get("norm_scaling_factor")
            assert entry.overrides.items() >= facts.get("config_overrides", {}).items()
            assert entry.repo_id == facts["repo_id"]
            assert entry.format == (facts["conversion_func"] or "sae_lens")
            compared += 1
    assert compared == 13857 + 3


def test_the_saes_of_the_nested_release_can_be_looked_up():
    for layer in (2, 6, 10):
        entry = lookup("gpt2-small-res_scefr-ajt", f"blocks.{layer}.hook_resid_pre")
        assert (entry.repo_id, entry.path, entry.neuronpedia_id) == (
            "neuronpedia/gpt2-small__res_scefr-ajt",
            f"{layer}-res_scefr-ajt",
            f"gpt2-small/{layer}-res_scefr-ajt",
        )


def test_paths_are_text_even_where_they_look_like_numbers():
    assert lookup("mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_7").path == "7"


def test_facts_that_the_files_lack_are_overrides():
    assert lookup("gpt2-small-mlp-tm", "blocks.1.hook_mlp_out").overrides == {
        "dataset_path": "Skylion007/openwebtext",
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
        "norm_scaling_factor": 2.3693984005104283,
    }


def test_every_model_is_named_by_its_hub_id():
    models = {entry.model for release in PUBLIC.releases() for entry in PUBLIC.entries(release).values()}
    assert len(models) == 38
    assert all(model is not None and model.count("/") == 1 for model in models)


def test_almost_every_sae_says_its_layer():
    without = [
        entry.sae_id
        for release in PUBLIC.releases()
        for entry in PUBLIC.entries(release).values()
        if entry.layer is None
    ]
    assert all(sae_id.startswith("embedding/") for sae_id in without)
    assert len(without) == 8


def test_ids_come_in_the_order_of_their_numbers():
    assert PUBLIC.sae_ids("gpt2-small-res-jb") == [
        *(f"blocks.{n}.hook_resid_pre" for n in range(11)),
        "blocks.11.hook_resid_post",
        "blocks.11.hook_resid_pre",
    ]


def test_the_catalogues_satisfy_the_protocol():
    assert isinstance(PUBLIC, Catalogue)
    assert isinstance(UserCatalogue(), Catalogue)


def test_a_look_up_in_a_fresh_process_imports_nothing_heavy_and_reads_one_release():
    code = """
        import sys
        opened = []
        sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
        from sae_pretrained import lookup
        entry = lookup("gemma-scope-9b-pt-res", "layer_9/width_1m/average_l0_9")
        assert not {"torch", "numpy", "yaml", "huggingface_hub"} & set(sys.modules)
        releases = {name for name in opened if name.endswith(".toml")}
        assert len(releases) == 1, releases
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


# --- wrong names ---


def test_an_unknown_release_is_answered_with_near_ones():
    with pytest.raises(UnknownNameError, match="did you mean 'gpt2-small-res-jb'"):
        lookup("gpt2-smal-res-jb", "blocks.8.hook_resid_pre")


def test_an_unknown_id_is_answered_with_near_ones():
    with pytest.raises(
        UnknownNameError, match=r"no SAE 'layer_20/width_16k'\ndid you mean 'layer_20/width_16k/canonical'"
    ):
        lookup("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k")


def test_a_release_name_that_is_a_path_is_an_unknown_name():
    for name in ("../releases/gpt2-small-res-jb", "..", "/etc/passwd", ""):
        with pytest.raises(UnknownNameError):
            PUBLIC.lookup(name, "x")


def test_a_hub_repository_is_a_release_whose_ids_are_folders():
    entry = lookup("lab/my-saes@v2", "layer_3")
    assert (entry.repo_id, entry.path, entry.revision, entry.format) == ("lab/my-saes", "layer_3", "v2", None)


def test_a_folder_of_a_listed_repository_brings_the_facts_its_files_lack():
    entry = lookup("tommmcgrath/gpt2-small-mlp-out-saes", "sae_group_gpt2_blocks.1.hook_mlp_out_24576:v0")
    assert entry.release == "gpt2-small-mlp-tm"
    assert entry.overrides["norm_scaling_factor"] == 2.3693984005104283


# --- the user's own entries ---

LAB = """
lab-saes:
  repository: lab/saes
  model: lab/small
  format: sae_lens
  saes:
    - id: layer_{layer}/{width}
      columns: layer width
      rows: |
        0..2 1k,4k
        10   1k
"""


def user_catalogue(tmp_path: Path, text: str, name: str = "lab.yaml") -> UserCatalogue:
    (tmp_path / name).write_text(text)
    return UserCatalogue([tmp_path / name])


def every_entry_of(tmp_path: Path, text: str) -> list[object]:
    catalogue = user_catalogue(tmp_path, text)
    return [catalogue.entries(release) for release in catalogue.releases()]


def test_a_users_file_adds_releases(tmp_path: Path):
    catalogue = user_catalogue(tmp_path, LAB)
    assert catalogue.releases() == ["lab-saes"]
    assert catalogue.sae_ids("lab-saes") == [
        *(f"layer_{layer}/{width}" for layer, width in product((0, 1, 2), ("1k", "4k"))),
        "layer_10/1k",
    ]


def test_a_users_file_may_be_toml(tmp_path: Path):
    text = '[lab-saes]\nrepository = "lab/saes"\n[[lab-saes.saes]]\nid = "a"\nl0 = 3\n'
    assert user_catalogue(tmp_path, text, "lab.toml").lookup("lab-saes", "a").l0 == 3.0


@pytest.mark.parametrize("how", ["config folder", "variable"])
def test_users_files_are_found_in_the_config_folder_and_by_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    folder = tmp_path / "sae-core" / "catalogue"
    folder.mkdir(parents=True)
    (folder / "lab.yaml").write_text(LAB)
    if how == "config folder":
        if sys.platform != "linux":
            pytest.skip("XDG_CONFIG_HOME is read on Linux only")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    else:
        monkeypatch.setenv("SAE_CORE_CATALOGUE", str(folder / "lab.yaml"))
    assert UserCatalogue().lookup("lab-saes", "layer_2/4k").repo_id == "lab/saes"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAB + "lab-saes: {}\n", r"lab.yaml: line 12: the key 'lab-saes' is given twice"),
        (LAB.replace("model:", "modle:"), r"lab.yaml: release 'lab-saes': unknown key 'modle'; did you mean 'model'"),
        (LAB.replace("columns:", "column:"), r"lab.yaml: release 'lab-saes': SAE group 1: unknown key 'column'"),
        (LAB.replace("  repository: lab/saes\n", ""), r"missing key 'repository'"),
        (LAB.replace("layer width", "layer"), r"'id' is 'layer_\{layer\}/\{width\}'; its placeholders must be columns"),
        (LAB.replace("10   1k", "10"), r"'10' has 1 cells for 2 columns"),
        (LAB.replace("10   1k", "2 1k"), r"the id 'layer_2/1k' is given twice"),
        (LAB.replace("lab/small", "7"), r"'model' must be text, not 7"),
        (LAB.replace("      columns", "      l0: many\n      columns"), r"'l0' must be a number, not 'many'"),
        (LAB.replace("layer width", "layer width extra").replace("1k", "1k x"), r"no template uses the column 'extra'"),
        (LAB.replace("{width}", "{width.__class__}"), r"its placeholders must be columns"),
        (LAB.replace("    - id", "    id"), r"not valid YAML|must be a list"),
        ("- lab-saes\n", r"expected a mapping of release names"),
        ("lab-saes: 3\n", r"expected a mapping with the keys repository, model"),
        ("a: [\n", r"lab.yaml: not valid YAML"),
        ("? [1, 2]\n: x\n", r"cannot be a key"),
        ("12: {}\n", r"the release name 12 must be text"),
        (LAB.replace("lab-saes", "gpt2-small-res-jb"), r"'gpt2-small-res-jb' comes with sae-pretrained"),
    ],
)
def test_a_malformed_file_is_refused_by_name_and_key(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        every_entry_of(tmp_path, text)
    assert "lab.yaml" in str(caught.value)


def test_a_release_in_two_files_is_refused_with_both_names(tmp_path: Path):
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(LAB)
    with pytest.raises(ConfigError, match=r"b\.yaml: release 'lab-saes' is also described in .*a\.yaml"):
        UserCatalogue([tmp_path / "a.yaml", tmp_path / "b.yaml"]).releases()


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such catalogue file"):
        UserCatalogue([tmp_path / "none.yaml"]).releases()


# --- the compact form ---


def _tool():
    path = Path(__file__).parents[1] / "tools" / "build_releases.py"
    spec = importlib.util.spec_from_file_location("build_releases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = _tool()
CELL = st.sampled_from(["0", "1", "2", "3", "10", "16k", "65k", "", "_affine"])


@given(st.sets(st.tuples(CELL, CELL, CELL), min_size=1, max_size=30))
def test_what_the_tool_writes_expands_to_exactly_the_saes_it_was_given(saes: set[tuple[str, str, str]]):
    written = TOOL._aligned(TOOL._fewest_rows(sorted(saes)))
    group = {"id": "{a}|{b}|{c}", "columns": "a b c", "rows": "\n".join(written)}
    entries = parse_release("r", {"repository": "lab/saes", "saes": [group]}, "file")
    assert sorted(entries) == sorted("|".join(cells) for cells in saes)


def test_the_tool_takes_out_a_nested_release(tmp_path: Path):
    release = {"conversion_func": None, "links": {}, "model": "gpt2-small", "repo_id": "lab/saes"}
    inner = {**release, "saes": [{"id": "a", "path": "a"}, {"id": "lost", "path": "c"}]}
    (tmp_path / "s.yaml").write_text(
        yaml.safe_dump({"lab": {**release, "saes": [{"id": "a", "path": "a"}, {"id": "b", "path": 7, **inner}]}})
    )
    found = TOOL.read_source(tmp_path / "s.yaml")["lab"]["saes"]
    assert found == [{"id": "a", "path": "a"}, {"id": "b", "path": "7"}, {"id": "lost", "path": "c"}]


@given(st.lists(st.integers(0, 999), unique=True))
def test_names_sort_by_the_numbers_in_them(numbers: list[int]):
    assert sorted((f"layer_{n}/x" for n in numbers), key=sort_key) == [f"layer_{n}/x" for n in sorted(numbers)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("0..300000000", "the range 0..300000000 has more than 100000 numbers"),
        ("0..99999999999999999999", "has more than 100000 numbers"),
        ("5..1", "the range 5..1 is empty; the smaller number comes first"),
    ],
)
def test_a_range_that_nobody_means_is_refused_before_it_is_written_out(row: str, said: str):
    facts = {"repository": "lab/saes", "saes": [{"id": "layer_{layer}", "columns": "layer", "rows": row}]}
    with pytest.raises(ConfigError, match=said):
        parse_release("lab-saes", facts, "lab.yaml")


def test_a_group_of_more_saes_than_anybody_has_is_refused():
    group = {"id": "{a}{b}", "columns": "a b", "rows": "0..999 0..999"}
    with pytest.raises(ConfigError, match="more than 100000 SAEs in one group; are its ranges right"):
        parse_release("lab-saes", {"repository": "lab/saes", "saes": [group]}, "lab.yaml")


def test_the_tool_says_what_a_newer_source_would_change_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def source(*saes: tuple[int, float]) -> dict[str, Any]:
        listed = [{"id": f"blocks.{n}", "path": f"l{n}", "l0": l0} for n, l0 in saes]
        return {"repo_id": "lab/saes", "model": "openai-community/gpt2", "format": "sae_lens", "saes": listed}

    monkeypatch.setattr(TOOL, "RELEASES", tmp_path)
    for name in ("kept", "gone"):
        (tmp_path / f"{name}.toml").write_text(TOOL.write_release(name, source((0, 5.0), (1, 6.0))))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    newer = {"kept": source((1, 6.5), (2, 7.0)), "fresh": source((0, 1.0))}
    assert TOOL.differences(newer) == [
        "+ fresh: 1 SAEs of openai-community/gpt2, lab/saes",
        "- gone: gone",
        "+ kept: blocks.2",
        "- kept: blocks.0",
        "~ kept: blocks.1: l0 6.0 -> 6.5",
    ]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_package_brings_releases_as_a_folder_of_files(tmp_path: Path):
    (tmp_path / "lab-saes.toml").write_text(
        'repository = "lab/saes"\nmodel = "lab/small"\n[[saes]]\nid = "layer_{layer}"\ncolumns = "layer"\nrows = "0..2"\n'
    )

    class LabCatalogue(FolderCatalogue):
        folder = tmp_path

    catalogue = LabCatalogue()
    assert isinstance(catalogue, Catalogue)
    assert catalogue.releases() == ["lab-saes"]
    assert catalogue.sae_ids("lab-saes") == ["layer_0", "layer_1", "layer_2"]
    assert catalogue.lookup("lab-saes", "layer_1").repo_id == "lab/saes"
    with pytest.raises(UnknownNameError, match="has no SAE 'layer_3'"):
        catalogue.lookup("lab-saes", "layer_3")
