"""What messages suggest exists: the hook that was meant, a name with its owner, a package and a command that are there."""

from __future__ import annotations

from pathlib import Path

import pytest
from sae_core import SAE, create
from sae_core.errors import FormatError, UnknownNameError
from sae_core.testing import PluginFolder


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("sae_register_archs", "sae_register_architectures"),
        ("sae_register_architecture", "sae_register_architectures"),
        ("sae_register_sources", "sae_register_activation_sources"),
        ("sae_register_lodgers", "sae_register_loggers"),
        ("register_writers", "sae_register_writers"),
    ],
)
def test_a_misspelt_hook_is_answered_with_the_one_that_was_meant(wrong: str, right: str) -> None:
    from sae_core.plugins.manager import near_hook

    assert near_hook(wrong) == f"; did you mean {right!r}?"


def test_no_hook_is_suggested_for_what_is_near_none() -> None:
    from sae_core.plugins.manager import near_hook

    assert near_hook("sae_register_zebras") == ""


def test_a_misspelt_owner_is_answered_with_the_name_that_was_meant(rival: type[SAE]) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'sae-rival:topk'"):
        create("sae-rivl:topk", d_in=4, d_sae=8)


def test_files_of_no_known_format_say_which_packages_bring_more_unless_they_are_here(
    site: PluginFolder, tmp_path: Path
) -> None:
    (tmp_path / "weights.bin").touch()
    load = f"from sae_core import SAE\ntry: SAE.load({str(tmp_path)!r})\nexcept ValueError as error: print(error)"
    said = site.python(load).stdout
    assert "no known format (looked for: sae_lens)" in said
    assert "further formats come with sae-loaders-gemmascope and sae-pretrained, not in use here" in said
    with pytest.raises(FormatError, match=r"it holds: weights\.bin$"):
        SAE.load(tmp_path)


CATALOGUE = """
from sae_core.plugins import CatalogueSpec, hookimpl

@hookimpl
def sae_register_catalogues():
    yield CatalogueSpec(name="ours", target="sae_ours.shelf:Shelf", summary="A test")
"""
SHELF = """
from sae_core.errors import UnknownNameError

class Shelf:
    def releases(self): return ["our-release"]
    def sae_ids(self, release): return ["a"]
    def lookup(self, release, sae_id): raise UnknownNameError(f"unknown release {release!r}")
    def files(self, entry): raise NotImplementedError
"""
ASK = """
from sae_core import SAE
from sae_core.errors import UnknownNameError
try:
    SAE.from_pretrained("our-relese", "a")
except UnknownNameError as error:
    print(error)
"""


def test_a_release_that_nobody_lists_names_no_command_that_is_not_installed(site: PluginFolder) -> None:
    """Where sae-pretrained is switched off and somebody else's catalogue is there, or none."""
    said = site.python(ASK).stdout
    assert "there is no catalogue to look it up in" in said
    assert "'public' comes with sae-pretrained, which is disabled; see below" in said
    site.add("sae-ours", CATALOGUE, files={"shelf.py": SHELF})
    said = site.python(ASK).stdout
    assert said == "unknown release 'our-relese'; did you mean 'our-release'?\ncatalogues: ours\n"
