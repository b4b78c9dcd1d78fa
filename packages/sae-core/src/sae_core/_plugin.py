"""What sae-core offers to sae-core; read to list plugins, so nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from sae_core.plugins import (
    ActivationSourceSpec,
    ArchitectureSpec,
    CommandSpec,
    LoaderSpec,
    LoggerSpec,
    MetricSpec,
    WriterSpec,
    hookimpl,
)

_ARCHITECTURES = (
    ("standard", "standard:StandardSAE", "ReLU with an L1 penalty"),
    ("gated", "gated:GatedSAE", "A gate and a magnitude for every latent"),
    ("topk", "topk:TopKSAE", "The k largest latents of each sample"),
    ("abstopk", "abstopk:AbsTopKSAE", "The k latents largest in absolute value, signs kept"),
    ("groupmax", "groupmax:GroupMaxSAE", "The largest latent of each of k groups"),
    ("batchtopk", "batchtopk:BatchTopKSAE", "k latents a sample on average over the batch"),
    ("matryoshka_batchtopk", "matryoshka_batchtopk:MatryoshkaBatchTopKSAE", "Nested BatchTopK dictionaries"),
    ("jumprelu", "jumprelu:JumpReLUSAE", "A learnt threshold for each latent, L0 penalty"),
    (
        "cross_layer_transcoder",
        "cross_layer_transcoder:CrossLayerTranscoder",
        "Latents that read one layer and write all later ones",
    ),
    ("matching_pursuit", "matching_pursuit:MatchingPursuitSAE", "Latents one at a time, encoder tied to decoder"),
    ("temporal", "temporal:TemporalSAE", "What earlier positions do not predict, coded sparsely"),
)


@hookimpl
def sae_register_architectures() -> Iterator[ArchitectureSpec]:
    """The architectures that most published dictionaries use."""
    for name, target, summary in _ARCHITECTURES:
        yield ArchitectureSpec(name=name, target=f"sae_core.architectures.{target}", summary=summary)


@hookimpl
def sae_register_loaders() -> Iterator[LoaderSpec]:
    """The native format, which is the ecosystem's."""
    yield LoaderSpec(
        name="sae_lens",
        target="sae_core.format.sae_lens:SaeLensLoader",
        summary="cfg.json + sae_weights.safetensors, as sae-core and SAELens write it",
    )


@hookimpl
def sae_register_writers() -> Iterator[WriterSpec]:
    """The native format, for those architectures that SAELens has."""
    yield WriterSpec(
        name="sae_lens",
        target="sae_core.format.sae_lens_writer:SaeLensWriter",
        summary="cfg.json + sae_weights.safetensors, of what SAELens 6 can read",
    )


@hookimpl
def sae_register_activation_sources() -> Iterator[ActivationSourceSpec]:
    """Activations that are on disk already."""
    yield ActivationSourceSpec(
        name="tensor_files",
        target="sae_core.data.tensor_files:TensorFiles",
        summary="Rows of activations in safetensors or .npy files",
    )


@hookimpl
def sae_register_metrics() -> Iterator[MetricSpec]:
    """What says how good a dictionary is; definitions are in `sae_core.metrics`."""
    for name, target, summary in (
        (
            "explained_variance",
            "ExplainedVariance",
            "1 - squared error / variance, and the same with the residual centred",
        ),
        ("mse", "MeanSquaredError", "Squared error summed over the width, averaged over rows"),
        ("cosine_similarity", "CosineSimilarity", "Mean cosine of input and reconstruction"),
        ("l0", "L0", "Mean number of active latents"),
        ("dead_fraction", "DeadFraction", "Latents that never fired"),
    ):
        yield MetricSpec(name=name, target=f"sae_core.metrics:{target}", summary=summary)


@hookimpl
def sae_register_loggers() -> Iterator[LoggerSpec]:
    """Where training records go besides the log that every run keeps."""
    yield LoggerSpec(
        name="jsonl", target="sae_core.training.loggers:JsonlLogger", summary="One JSON object a line, in a local file"
    )
    yield LoggerSpec(
        name="csv",
        target="sae_core.training.csv_logger:CsvLogger",
        summary="A table with a line a record, in a local file",
    )
    yield LoggerSpec(
        name="tensorboard",
        target="sae_core.training.tensorboard_logger:TensorBoardLogger",
        summary="Curves for TensorBoard (pip install 'sae-core[tensorboard]')",
    )
    yield LoggerSpec(
        name="wandb",
        target="sae_core.training.wandb_logger:WandbLogger",
        summary="Weights & Biases (pip install 'sae-core[wandb]')",
    )


@hookimpl
def sae_register_commands() -> Iterator[CommandSpec]:
    """The command line's own commands."""
    yield CommandSpec(name="train", target="sae_core.cli.train:Train", summary="Train a dictionary from a run file")
    yield CommandSpec(
        name="plan", target="sae_core.cli.plan:Plan", summary="What a run will take: memory, disk and time"
    )
    yield CommandSpec(
        name="convert", target="sae_core.cli.convert:Convert", summary="Write an SAE in another library's format"
    )
    yield CommandSpec(name="list", target="sae_core.cli.list_names:List", summary="What the plugins provide, by kind")
    yield CommandSpec(name="show", target="sae_core.cli.show:Show", summary="One name: its options, docs and provider")
    yield CommandSpec(
        name="list_plugins", target="sae_core.cli.list_plugins:ListPlugins", summary="Installed plugins and their state"
    )
    yield CommandSpec(
        name="doctor", target="sae_core.cli.doctor:Doctor", summary="Check this installation and say what is wrong"
    )
    yield CommandSpec(
        name="check", target="sae_core.cli.check:Check", summary="Does a name keep the promises of its kind?"
    )
    yield CommandSpec(
        name="new_plugin", target="sae_core.cli.new_plugin:NewPlugin", summary="Start a plugin package of your own"
    )
