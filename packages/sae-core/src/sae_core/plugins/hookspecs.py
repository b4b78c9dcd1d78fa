"""The hooks that a plugin may implement: the contract between sae-core and everything that extends it.

A plugin is a distribution with an entry point in the group ``sae_core.plugins`` that names a light module, by custom
``<package>._plugin``. That module holds functions marked with `hookimpl`; each yields or returns specs
(`sae_core.plugins.specs`). A hook implementation may take any subset of a hook's arguments.

Nothing here runs during training: what is installed must not change results.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from sae_core.plugins.specs import (
        ActivationSourceSpec,
        ArchitectureSpec,
        CatalogueSpec,
        CommandSpec,
        LoaderSpec,
        LoggerSpec,
        MetricSpec,
        WriterSpec,
    )

__all__ = ["ENTRY_POINT_GROUP", "HOOKSPEC_VERSION", "PROJECT", "hookimpl", "hookspec", "new_manager"]

PROJECT = "sae_core"
ENTRY_POINT_GROUP = "sae_core.plugins"
HOOKSPEC_VERSION = 1
"""Raised only when a hook is removed or changes meaning; a plugin may state the one it needs as SAE_CORE_HOOKSPEC."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


def new_manager() -> pluggy.PluginManager:
    """A manager that knows these hooks and no plugin."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(sys.modules[__name__])
    return manager


@hookspec
def sae_register_architectures(core_version: str) -> Iterable[ArchitectureSpec]:  # pyright: ignore[reportReturnType]
    """Dictionary architectures, for `create(name, ...)`, for `architecture:` in a run file, and for loading what was
    saved with them. The target is a subclass of `sae_core.SAE` with a `config_class`.

    ```python
    from sae_core.plugins import ArchitectureSpec, hookimpl

    @hookimpl
    def sae_register_architectures():
        yield ArchitectureSpec(name="cubic", target="sae_cubic.cubic:CubicSAE", summary="Cubic activation")
    ```
    """


@hookspec
def sae_register_loaders(core_version: str) -> Iterable[LoaderSpec]:  # pyright: ignore[reportReturnType]
    """Checkpoint formats that `SAE.load` and `SAE.from_pretrained` can read. The target satisfies
    `sae_core.protocols.Loader` and is made without arguments. A loader reads files that are there; it downloads nothing
    and guesses nothing.

    ```python
    from sae_core.plugins import LoaderSpec, hookimpl

    @hookimpl
    def sae_register_loaders():
        yield LoaderSpec(name="mylab", target="sae_mylab.loader:MyLabLoader", summary="My lab's .npz files")
    ```
    """


@hookspec
def sae_register_writers(core_version: str) -> Iterable[WriterSpec]:  # pyright: ignore[reportReturnType]
    """Formats that `sae-core convert` can write. The target satisfies `sae_core.protocols.Writer` and is made without
    arguments. A writer fills the folder that it is given, refuses with a `FormatError` what its format cannot express,
    and approximates nothing. `sae_core.format.express` has what most need: refusals, and moving b_dec to where the
    format wants it.

    ```python
    from sae_core.plugins import WriterSpec, hookimpl

    @hookimpl
    def sae_register_writers():
        yield WriterSpec(name="theirs", target="sae_theirs.writer:TheirWriter", summary="What their tool reads")
    ```
    """


@hookspec
def sae_register_activation_sources(core_version: str) -> Iterable[ActivationSourceSpec]:  # pyright: ignore[reportReturnType]
    """Where activations come from, for `source:` in a run file. The target satisfies
    `sae_core.protocols.ActivationSource`, has a `config_class`, and takes one instance of it.

    ```python
    from sae_core.plugins import ActivationSourceSpec, hookimpl

    @hookimpl
    def sae_register_activation_sources():
        yield ActivationSourceSpec(name="vit", target="sae_vision.source:ViTSource", summary="Vision transformers")
    ```
    """


@hookspec
def sae_register_catalogues(core_version: str) -> Iterable[CatalogueSpec]:  # pyright: ignore[reportReturnType]
    """Lists of published SAEs, for `SAE.from_pretrained`. The target satisfies `sae_core.protocols.Catalogue` and is
    made without arguments.

    ```python
    from sae_core.plugins import CatalogueSpec, hookimpl

    @hookimpl
    def sae_register_catalogues():
        yield CatalogueSpec(name="ourlab", target="sae_ourlab.catalogue:OurLab", summary="Our lab's releases")
    ```
    """


@hookspec
def sae_register_metrics(core_version: str) -> Iterable[MetricSpec]:  # pyright: ignore[reportReturnType]
    """Streaming metrics for evaluation. The target satisfies `sae_core.protocols.Metric` and is made without arguments.

    ```python
    from sae_core.plugins import MetricSpec, hookimpl

    @hookimpl
    def sae_register_metrics():
        yield MetricSpec(name="hoyer", target="sae_hoyer.metric:Hoyer", summary="Hoyer sparsity of the latents")
    ```
    """


@hookspec
def sae_register_loggers(core_version: str) -> Iterable[LoggerSpec]:  # pyright: ignore[reportReturnType]
    """Destinations for training records. A logger runs only when a run asks for it by name. The target satisfies
    `sae_core.protocols.Logger`, has a `config_class`, and takes one instance of it. A run makes one logger for each
    dictionary: `start(run)` tells it the settings, the folder and the dictionary (`RunFacts`), `log(record)` follows at
    every flush, `close()` at the end. What it raises is reported once and never stops the run.

    ```python
    from sae_core.plugins import LoggerSpec, hookimpl

    @hookimpl
    def sae_register_loggers():
        yield LoggerSpec(name="mlflow", target="sae_mlflow.logger:MlflowLogger", summary="MLflow")
    ```
    """


@hookspec
def sae_register_commands(core_version: str) -> Iterable[CommandSpec]:  # pyright: ignore[reportReturnType]
    """Subcommands of `sae-core`. The target satisfies `sae_core.protocols.Command` and is made without arguments. A
    dash in a command's name is written as an underscore. Only the command that runs is imported; heavy imports still
    belong inside `run`, so that `--help` is quick.

    ```python
    from sae_core.plugins import CommandSpec, hookimpl

    @hookimpl
    def sae_register_commands():
        yield CommandSpec(name="gallery", target="sae_dash.cli:Gallery", summary="Write a gallery of features")
    ```
    """
