"""What sae-lm offers to sae-core; read to list plugins, so nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from sae_core.plugins import ActivationSourceSpec, CommandSpec, hookimpl


@hookimpl
def sae_register_activation_sources() -> Iterator[ActivationSourceSpec]:
    """Activations of language models."""
    yield ActivationSourceSpec(
        name="huggingface",
        target="sae_lm.source:HuggingFaceSource",
        summary="Activations of any Hugging Face model, by module path",
    )
    yield ActivationSourceSpec(
        name="huggingface_columns",
        target="sae_lm.columns:HuggingFaceColumns",
        summary="Activations of models of pictures, sound and other data in columns",
    )
    yield ActivationSourceSpec(
        name="activation_cache",
        target="sae_lm.cached:CachedActivations",
        summary="Activations from a cache on disk",
    )


@hookimpl
def sae_register_commands() -> Iterator[CommandSpec]:
    """Looking at the data before training, and at the model after it."""
    yield CommandSpec(
        name="eval",
        target="sae_lm.cli.eval:Eval",
        summary="Evaluate a saved SAE in its language model on held-out text",
    )
    yield CommandSpec(
        name="lm",
        target="sae_lm.cli.lm:Lm",
        summary="Pretokenise text, cache activations to disk, study the latents of a saved SAE",
    )
    yield CommandSpec(
        name="preview",
        target="sae_lm.cli.preview:Preview",
        summary="Show the first windows of tokens a run would train on",
    )
    yield CommandSpec(
        name="migrate",
        target="sae_lm.cli.migrate:Migrate",
        summary="Turn a runner config of SAELens into a run file",
    )
