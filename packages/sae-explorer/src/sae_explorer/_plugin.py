"""What sae-explorer offers to sae-core; read to list plugins, so nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from sae_core.plugins import CommandSpec, hookimpl


@hookimpl
def sae_register_commands() -> Iterator[CommandSpec]:
    """Looking at latents, as a page or with the model behind it."""
    yield CommandSpec(
        name="dashboard",
        target="sae_explorer.cli.dashboard:DashboardCommand",
        summary="Write a page that shows the latents of a saved SAE, to be opened without a network",
    )
    yield CommandSpec(
        name="explore",
        target="sae_explorer.cli.explore:Explore",
        summary="Look at the latents of SAEs in a local page with the model behind it: type, steer, label",
    )
