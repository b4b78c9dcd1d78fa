"""Hook points by their other name: module paths of Hugging Face models in TransformerLens terms, and the other way round.

Only where both libraries mean the same tensor. TransformerLens's ``hook_resid_post`` is the output of a whole block in
every decoder below; for the parts of a block that holds only in some families, which are listed by name.
"""

from __future__ import annotations

import re

from sae_lm.hooks import HookPoint

__all__ = ["module_path", "transformer_lens_name"]

_BLOCKS = re.compile(r"(?:model|transformer|gpt_neox)\.(?:layers|h)\.(\d+)(?:\.(.+))?")
_EMBEDDINGS = ("model.embed_tokens", "transformer.wte", "gpt_neox.embed_in")

_DECODERS = frozenset(
    {"gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text",
     "phi", "phi3", "stablelm", "olmo", "olmo2"}
)  # fmt: skip
# Families without a norm between a part's output and the residual stream, so that the part's output is what is added.
_PLAIN_PARTS = frozenset({"gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"})
_PARTS = {"mlp": "hook_mlp_out", "self_attn": "hook_attn_out", "attn": "hook_attn_out", "attention": "hook_attn_out"}


def transformer_lens_name(model_type: str | None, point: HookPoint) -> str | None:
    """The TransformerLens name of `point` in a causal model of this ``config.model_type``, or None where there is none.

    >>> transformer_lens_name("llama", HookPoint("model.layers.9"))
    'blocks.9.hook_resid_post'
    >>> transformer_lens_name("gpt2", HookPoint("transformer.h.0.mlp"))
    'blocks.0.hook_mlp_out'
    >>> transformer_lens_name("bert", HookPoint("bert.encoder.layer.3")) is None
    True
    """
    if model_type not in _DECODERS:
        return None
    match = _BLOCKS.fullmatch(point.module)
    if match is None:
        is_embedding = point.module in _EMBEDDINGS and point.at == "output" and model_type in _PLAIN_PARTS
        return "hook_embed" if is_embedding else None
    layer, part = match.groups()
    if part is None:
        return f"blocks.{layer}.hook_resid_{'post' if point.at == 'output' else 'pre'}"
    if part in _PARTS and model_type in _PLAIN_PARTS and point.at == "output":
        return f"blocks.{layer}.{_PARTS[part]}"
    return None


_STACKS = {"gpt2": "transformer.h", "gpt_neo": "transformer.h", "gptj": "transformer.h", "gpt_neox": "gpt_neox.layers"}
_EMBED = {"gpt2": "transformer.wte", "gpt_neo": "transformer.wte", "gpt_neox": "gpt_neox.embed_in"}
# Parts of a block by family: what they add to the stream, what goes into their last projection, and the stream between them.
_GPT2_PARTS = {
    "hook_mlp_out": "mlp", "hook_attn_out": "attn", "attn.hook_z": "attn.c_proj:input", "mlp.hook_post": "mlp.c_proj:input",
    "hook_resid_mid": "ln_2:input", "hook_mlp_in": "mlp:input", "mlp.hook_in": "mlp:input",
}  # fmt: skip
_LLAMA_PARTS = {
    "hook_mlp_out": "mlp", "hook_attn_out": "self_attn", "attn.hook_z": "self_attn.o_proj:input",
    "mlp.hook_post": "mlp.down_proj:input", "hook_resid_mid": "post_attention_layernorm:input", "mlp.hook_in": "mlp:input",
}  # fmt: skip
_NEOX_PARTS = {
    "hook_mlp_out": "mlp", "hook_attn_out": "attention", "attn.hook_z": "attention.dense:input",
    "mlp.hook_post": "mlp.dense_4h_to_h:input", "mlp.hook_in": "mlp:input",
}  # fmt: skip
_FAMILY_PARTS = {
    "gpt2": _GPT2_PARTS, "gpt_neox": _NEOX_PARTS,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA_PARTS),
}  # fmt: skip


def module_path(model_type: str | None, name: str) -> HookPoint | None:
    """Where in a causal model of this ``config.model_type`` a TransformerLens hook is, or None where nothing is the same.

    >>> str(module_path("gpt2", "blocks.8.hook_resid_pre"))
    'transformer.h.8:input'
    >>> str(module_path("llama", "blocks.2.attn.hook_z"))
    'model.layers.2.self_attn.o_proj:input'
    >>> module_path("llama", "blocks.2.attn.hook_pattern") is None
    True
    """
    if model_type not in _DECODERS:
        return None
    stack = _STACKS.get(model_type, "model.layers")
    if name == "hook_embed":
        return HookPoint(_EMBED.get(model_type, "model.embed_tokens")) if model_type in _PLAIN_PARTS else None
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None:
        return None
    layer, place = match.groups()
    if place in ("hook_resid_post", "hook_resid_pre"):
        return HookPoint(f"{stack}.{layer}", "output" if place == "hook_resid_post" else "input")
    part = _FAMILY_PARTS.get(model_type, {}).get(place)
    return None if part is None else HookPoint.parse(f"{stack}.{layer}.{part}")
