"""What the plugin host says when something is wrong: one warning class and the words of its messages.

A message about a missing name tells the whole way out: what is known, what is near, which package would bring it, and
which installed plugin failed or is switched off, since the missing name is probably theirs.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from sae_core.errors import PluginError, did_you_mean
from sae_core.plugins.records import Contribution, PluginInfo, canonical

__all__ = ["OUR_EXTENSIONS", "PluginWarning", "ambiguous_name", "one_line", "plugin_trouble", "unknown_name"]

_LONGEST = 600  # characters of a reason; the whole story is in the traceback that `list-plugins -v` prints

OUR_EXTENSIONS: dict[str, dict[str, str]] = {
    "sae-explorer": {"command": "dashboard explore"},
    "sae-lm": {"source": "activation_cache huggingface huggingface_columns", "command": "eval lm migrate preview"},
    "sae-loaders-gemmascope": {"loader": "gemma_2 gemma_2_transcoder gemma_3"},
    "sae-pretrained": {
        "catalogue": "public user",
        "command": "pretrained",
        "loader": "connor_rob_hook_z crosscoder deepseek_r1 dictionary_learning_1 goodfire llama_scope "
        "llama_scope_r1_distill mntss_clt_layer_transcoder mwhanna_transcoder openai openmoss qwen_scope saev sparsify "
        "temporal",
        "writer": "circuit_tracer dictionary_learning sparsify",
    },
    "sae-synthetic": {
        "architecture": "matryoshka_l1",
        "source": "synthetic synthetic_sites",
        "command": "compare demo synthetic",
    },
}
"""What this project's own extensions provide, by distribution and kind; a test of the workspace keeps it true."""


class PluginWarning(UserWarning):
    """An installed plugin could not be used, or a switch names a plugin that is not there."""


def one_line(error: BaseException) -> str:
    """``"Type: message"`` on one line, for a PluginError the message alone; never raises, whatever `error` does.

    >>> one_line(ValueError("first\\n  second"))
    'ValueError: first second'
    """
    shown = str(error) if type(error).__module__ == PluginError.__module__ else ""
    line = " ".join((shown or traceback.format_exception_only(error)[-1]).split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + " …"


def plugin_trouble(plugin: PluginInfo) -> str:
    """One sentence about a plugin that cannot be used."""
    what = {"failed": "failed to load", "conflict": "is in conflict"}.get(plugin.state, f"is {plugin.state}")
    return f"plugin {plugin.qualified} {plugin.version} {what}: {plugin.reason}"


def unknown_name(
    kind: str, name: str, known: Sequence[str], plugins: Sequence[PluginInfo], qualified: Sequence[str] = ()
) -> str:
    """The message for a name that nobody provides; `known` are names to write, `qualified` those with their owners."""
    owner, colon, bare = name.rpartition(":")
    near = did_you_mean(name, qualified if colon else known)
    lines = [f"unknown {kind} {name!r}{near}", f"known: {', '.join(known) or 'none'}"]
    names = bare.replace("-", "_")  # a command is typed with dashes
    for home in (
        [canonical(owner)] if colon else [d for d, gives in OUR_EXTENSIONS.items() if names in _all(gives, kind)]
    ):
        states = {plugin.state for plugin in plugins if plugin.distribution == home}
        if home == "local":
            lines.append(
                f"{bare!r} was registered in a program of its own; register it here too: get_registry().register(...)"
            )
        elif not states:
            import shlex  # needed only for messages

            lines.append(f"{bare!r} comes with {home}, which is not installed: pip install {shlex.quote(home)}")
        elif "loaded" not in states:
            lines.append(f"{bare!r} comes with {home}, which is {', '.join(sorted(states))}; see below")
    lines += [plugin_trouble(plugin) for plugin in plugins if plugin.state in ("failed", "incompatible", "disabled")]
    return "\n".join(lines)


def _all(gives: dict[str, str], kind: str) -> list[str]:
    return (" ".join(gives.values()) if kind == "name" else gives.get(kind, "")).split()


def ambiguous_name(kind: str, name: str, claims: Sequence[Contribution]) -> str:
    """The message for a bare name that several distributions provide."""
    lines = [f"{kind} {name!r} is provided by {len(claims)} plugins; say which one is meant:"]
    lines += [f"  {c.qualified}  ({c.distribution} {c.version}, {c.spec.target})" for c in claims]
    return "\n".join(lines)
