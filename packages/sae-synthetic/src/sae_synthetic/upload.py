"""A synthetic model on its way to the Hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from sae_core.config import require

from sae_synthetic.forest import HierarchyNode
from sae_synthetic.hub import send_files
from sae_synthetic.model import (
    SYNTHETIC_MODEL_CONFIG_FILENAME,
    SYNTHETIC_MODEL_HIERARCHY_FILENAME,
    SYNTHETIC_MODEL_WEIGHTS_FILENAME,
    SyntheticModel,
)

__all__ = ["upload_synthetic_model_to_huggingface"]

_FILES = (
    SYNTHETIC_MODEL_CONFIG_FILENAME,
    SYNTHETIC_MODEL_WEIGHTS_FILENAME,
    SYNTHETIC_MODEL_HIERARCHY_FILENAME,
)


def upload_synthetic_model_to_huggingface(
    model: SyntheticModel | Path | str,
    hf_repo_id: str,
    hf_path: str | None = None,
    hf_revision: str = "main",
    add_default_readme: bool = True,
    private: bool = False,
) -> str:
    """Send a model, or the folder of a saved one, to the Hub as one commit; returns the commit's id.

    `hf_path` is the folder in the repository, by default its root. The repository is made if need be, `private` or not;
    files of the same names there are replaced. A README that says what the model is and how to load it is added where there
    is none. A saved model is loaded first: what cannot be loaded is not sent. Raises FormatError for that, SyntheticHubError
    where the Hub refuses.
    """
    inside = (hf_path or "").strip("/")
    require(".." not in inside.split("/"), f"hf_path: {hf_path!r} must be a folder inside the repository")
    loaded = model if isinstance(model, SyntheticModel) else SyntheticModel.load_from_disk(model)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) if isinstance(model, SyntheticModel) else Path(model)
        if isinstance(model, SyntheticModel):
            model.save(folder)
        prefix = f"{inside}/" if inside else ""
        return send_files(
            hf_repo_id,
            {prefix + name: folder / name for name in _FILES if (folder / name).is_file()},
            if_missing={"README.md": _readme(loaded, hf_repo_id, inside).encode()} if add_default_readme else {},
            revision=hf_revision,
            private=private,
            message=f"Add synthetic model {inside}".rstrip(),
        )


def _readme(model: SyntheticModel, repo_id: str, folder: str) -> str:
    cfg = model.cfg
    lines = [f"- {cfg.num_features:,} features in {cfg.hidden_dim:,} dimensions"]
    if model.hierarchy is not None:
        roots = model.hierarchy.roots
        used, deepest = len(model.hierarchy.feature_indices_used), max(map(_depth, roots), default=0)
        lines.append(f"- a hierarchy of {len(roots):,} trees over {used:,} features, {deepest} levels deep")
    if model.correlation_matrix is not None:
        rank = model.correlation_matrix.correlation_factor.shape[1]
        lines.append(f"- correlated firing of rank {rank}")
    argument = f', model_path="{folder}"' if folder else ""
    return "\n".join(
        [
            "---",
            "tags: [sparse-autoencoder, synthetic-data]",
            "---",
            "",
            f"# {repo_id}",
            "",
            "A synthetic model: activations whose features are known, to judge sparse autoencoders by.",
            "",
            *lines,
            "",
            "```python",
            "from sae_synthetic import SyntheticModel  # or, with SAELens: from sae_lens.synthetic import SyntheticModel",
            "",
            f'model = SyntheticModel.from_pretrained("{repo_id}"{argument})',
            "activations, features = model.sample_with_features(1024)",
            "```",
            "",
        ]
    )


def _depth(node: HierarchyNode) -> int:
    return 1 + max(map(_depth, node.children), default=0)
