"""What sae-synthetic offers to sae-core; read to list plugins, so nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from sae_core.plugins import ActivationSourceSpec, ArchitectureSpec, CommandSpec, hookimpl


@hookimpl
def sae_register_architectures() -> Iterator[ArchitectureSpec]:
    """What the experiments need and sae-core does not have."""
    yield ArchitectureSpec(
        name="matryoshka_l1",
        target="sae_synthetic.matryoshka_l1:MatryoshkaL1SAE",
        summary="Nested ReLU dictionaries, L1 penalty, weighted inner losses",
    )


@hookimpl
def sae_register_activation_sources() -> Iterator[ActivationSourceSpec]:
    """Activations whose features are known."""
    yield ActivationSourceSpec(
        name="synthetic",
        target="sae_synthetic.source:SyntheticSource",
        summary="Sums of known features that fire at random",
    )
    yield ActivationSourceSpec(
        name="synthetic_sites",
        target="sae_synthetic.multi_site_source:MultiSiteSource",
        summary="The same features at several sites, or inputs with targets",
    )


@hookimpl
def sae_register_commands() -> Iterator[CommandSpec]:
    """The demo, the experiments, and comparisons."""
    yield CommandSpec(
        name="demo",
        target="sae_synthetic.cli.demo:Demo",
        summary="Train an SAE on synthetic data with known features, in about a minute",
    )
    yield CommandSpec(
        name="synthetic",
        target="sae_synthetic.cli.synthetic:Synthetic",
        summary="Run published experiments on synthetic data, score SAEs against it",
    )
    yield CommandSpec(
        name="compare",
        target="sae_synthetic.cli.compare:Compare",
        summary="Compare two SAEs latent by latent",
    )
