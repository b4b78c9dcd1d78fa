"""What sae-pretrained offers to sae-core; read to list plugins, so nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from sae_core.plugins import CatalogueSpec, CommandSpec, LoaderSpec, WriterSpec, hookimpl


@hookimpl
def sae_register_catalogues() -> Iterator[CatalogueSpec]:
    """Public releases, and the user's own."""
    yield CatalogueSpec(
        name="public", target="sae_pretrained.catalogue:PublicCatalogue", summary="Published SAEs: 170 releases"
    )
    yield CatalogueSpec(
        name="user",
        target="sae_pretrained.catalogue:UserCatalogue",
        summary="Your own entries, from YAML or TOML files",
    )


@hookimpl
def sae_register_loaders() -> Iterator[LoaderSpec]:
    """Formats of other libraries and of single publications."""
    loaders = "sae_pretrained.loaders"
    yield LoaderSpec(
        name="dictionary_learning_1",
        target=f"{loaders}.dictionary_learning:DictionaryLearningLoader",
        summary="dictionary_learning: ae.pt + config.json, seven classes",
    )
    yield LoaderSpec(
        name="sparsify",
        target=f"{loaders}.sparsify:SparsifyLoader",
        summary="EleutherAI's sparsify: sae.safetensors + cfg.json, transcoders too",
    )
    yield LoaderSpec(
        name="openai", target=f"{loaders}.openai:OpenAILoader", summary="OpenAI's sparse_autoencoder: one .pt file"
    )
    yield LoaderSpec(
        name="llama_scope",
        target=f"{loaders}.llama_scope:LlamaScopeLoader",
        summary="Llama Scope: hyperparams.json + checkpoints/final.safetensors",
    )
    yield LoaderSpec(
        name="llama_scope_r1_distill",
        target=f"{loaders}.llama_scope_r1_distill:LlamaScopeR1DistillLoader",
        summary="Llama-Scope-R1-Distill: config.json + sae_weights.safetensors",
    )
    yield LoaderSpec(
        name="openmoss",
        target=f"{loaders}.openmoss:OpenMOSSLoader",
        summary="OpenMOSS's lm-saes 2: config.json + sae_weights.safetensors",
    )
    yield LoaderSpec(
        name="deepseek_r1",
        target=f"{loaders}.deepseek_r1:DeepSeekR1Loader",
        summary="qresearch's DeepSeek-R1 SAEs: one .pt file",
    )
    yield LoaderSpec(
        name="goodfire", target=f"{loaders}.goodfire:GoodfireLoader", summary="Goodfire's Llama SAEs: one .pt file"
    )
    yield LoaderSpec(
        name="connor_rob_hook_z",
        target=f"{loaders}.connor_rob_hook_z:ConnorRobHookZLoader",
        summary="Attention SAEs of GPT-2: name.pt + name_cfg.json",
    )
    yield LoaderSpec(
        name="mwhanna_transcoder",
        target=f"{loaders}.mwhanna_transcoder:MwhannaTranscoderLoader",
        summary="Per-layer transcoders in circuit-tracer's layout",
    )
    yield LoaderSpec(
        name="mntss_clt_layer_transcoder",
        target=f"{loaders}.mntss_clt_layer_transcoder:MntssCLTLayerLoader",
        summary="One layer of a cross-layer transcoder",
    )
    yield LoaderSpec(
        name="qwen_scope", target=f"{loaders}.qwen_scope:QwenScopeLoader", summary="Qwen-Scope: layer{n}.sae.pt"
    )
    yield LoaderSpec(
        name="temporal",
        target=f"{loaders}.temporal:TemporalLoader",
        summary="Temporal SAEs: conf.yaml + latest_ckpt.safetensors",
    )
    yield LoaderSpec(
        name="saev", target=f"{loaders}.saev:SaevLoader", summary="saev (vision): a line of JSON, then torch.save"
    )
    yield LoaderSpec(
        name="crosscoder",
        target=f"{loaders}.crosscoder:CrosscoderLoader",
        summary="Crosscoders, as dictionaries on concatenated activations",
    )


@hookimpl
def sae_register_writers() -> Iterator[WriterSpec]:
    """Formats of other libraries that ``sae-core convert`` writes."""
    writers = "sae_pretrained.writers"
    yield WriterSpec(
        name="dictionary_learning",
        target=f"{writers}.dictionary_learning:DictionaryLearningWriter",
        summary="dictionary_learning: ae.pt + config.json",
    )
    yield WriterSpec(
        name="sparsify",
        target=f"{writers}.sparsify:SparsifyWriter",
        summary="EleutherAI's sparsify: sae.safetensors + cfg.json",
    )
    yield WriterSpec(
        name="circuit_tracer",
        target=f"{writers}.circuit_tracer:CircuitTracerWriter",
        summary="circuit-tracer: transcoders, of one layer or across layers",
    )


@hookimpl
def sae_register_commands() -> Iterator[CommandSpec]:
    """Finding, fetching, checking and sharing SAEs."""
    yield CommandSpec(
        name="pretrained",
        target="sae_pretrained.cli:Pretrained",
        summary="List, show, download, verify and upload SAEs",
    )
