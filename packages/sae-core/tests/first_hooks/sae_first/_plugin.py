from sae_core.plugins import (
    ActivationSourceSpec,
    ArchitectureSpec,
    CatalogueSpec,
    CommandSpec,
    LoaderSpec,
    LoggerSpec,
    MetricSpec,
    WriterSpec,
    hookimpl,
)

SAE_CORE_HOOKSPEC = 1


@hookimpl
def sae_register_architectures(core_version):
    assert core_version
    yield ArchitectureSpec(name="first_architecture", target="sae_first.parts:FirstSAE", summary="ReLU latents")


@hookimpl
def sae_register_loaders():
    return [LoaderSpec(name="first_loader", target="sae_first.parts:FirstLoader", summary="An .npz of four arrays")]


@hookimpl
def sae_register_writers():
    yield WriterSpec(name="first_writer", target="sae_first.parts:FirstWriter", summary="An .npz of four arrays")


@hookimpl
def sae_register_activation_sources():
    yield ActivationSourceSpec(name="first_source", target="sae_first.parts:FirstSource", summary="Random rows")


@hookimpl
def sae_register_catalogues():
    yield CatalogueSpec(name="first_catalogue", target="sae_first.parts:FirstCatalogue", summary="One release")


@hookimpl
def sae_register_metrics():
    yield MetricSpec(name="first_metric", target="sae_first.parts:FirstMetric", summary="Mean size of latents")


@hookimpl
def sae_register_loggers():
    yield LoggerSpec(name="first_logger", target="sae_first.parts:FirstLogger", summary="Lines of text")


@hookimpl
def sae_register_commands():
    yield CommandSpec(name="first_command", target="sae_first.command:FirstCommand", summary="Says a word")
