"""``sae-core synthetic score PATH --world DIR``: any SAE against a saved world, an untrained one beside it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from sae_core import SAE

__all__ = ["print_scores"]

_SHOWN = {
    "mcc": "MCC",
    "signed_mcc": "MCC, signed",
    "uniqueness": "uniqueness",
    "classification/f1_score": "F1",
    "classification/precision": "precision",
    "classification/recall": "recall",
    "explained_variance": "explained variance",
    "shrinkage": "|output| / |input|",
    "sae_l0": "L0",
    "true_l0": "L0 of the features",
    "dead_latents": "dead latents",
}


def print_scores(args: argparse.Namespace) -> int:
    """Load, score, print."""
    from sae_core.cli.tables import table
    from sae_core.sae import as_device, load_named

    device = as_device(args.device)
    sae = load_named(args.sae).to(device)
    found = _scores(sae, device, args)
    if args.json:
        print(json.dumps({"sae": args.sae, "world": str(args.world), "scores": found}, indent=2))
        return 0
    whole = found.get("whole", found)
    flat, random = _flat(whole), _flat(whole["baseline"])
    rows = [[label, _number(flat[name]), _number(random[name])] for name, label in _SHOWN.items()]
    print(table(["SCORE", f"{sae.architecture}, {sae.d_sae} latents", "UNTRAINED"], rows))
    if sites := found.get("sites"):
        columns = ["mcc", "exclusive_features", "exclusive_found", "exclusive_latents", "exclusive_right"]
        print()
        print(
            table(
                ["SITE", "MCC", "ONLY HERE", "FOUND", "LATENTS ONLY HERE", "RIGHT"],
                [[name, *(_number(scores[column]) for column in columns)] for name, scores in sites.items()],
            )
        )
    return 0


def _scores(sae: SAE, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    from sae_core.errors import FormatError

    from sae_synthetic.evaluation import eval_sae_on_synthetic_data
    from sae_synthetic.model import SYNTHETIC_MODEL_CONFIG_FILENAME, SyntheticModel
    from sae_synthetic.multi_site import MULTI_SITE_CONFIG_FILENAME, MultiSiteModel
    from sae_synthetic.multi_site_evaluation import eval_sae_on_multi_site_model

    folder: Path = args.world
    if (folder / MULTI_SITE_CONFIG_FILENAME).is_file():
        world = MultiSiteModel.load_from_disk(folder, device)
        return eval_sae_on_multi_site_model(sae, world, args.samples, args.batch_size).to_dict()
    if not (folder / SYNTHETIC_MODEL_CONFIG_FILENAME).is_file():
        raise FormatError(
            f"{folder}: no world there; SyntheticModel.save or MultiSiteModel.save writes one "
            f"({SYNTHETIC_MODEL_CONFIG_FILENAME} or {MULTI_SITE_CONFIG_FILENAME} is looked for)"
        )
    model = SyntheticModel.load_from_disk(folder, device)
    found = eval_sae_on_synthetic_data(
        sae, model.feature_dict, model.activation_generator, args.samples, args.batch_size
    )
    return found.to_dict()


def _flat(scores: dict[str, Any]) -> dict[str, Any]:
    return {**scores, **{f"classification/{name}": value for name, value in scores["classification"].items()}}


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
