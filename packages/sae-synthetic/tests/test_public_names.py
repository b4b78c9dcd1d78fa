"""Someone who comes from SAELens changes the import line: the names are there, and their arguments are called the same."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sae_synthetic

REFERENCE: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "golden" / "signatures.json").read_text())

LEFT_OUT = {  # autocast of a trainer is set on the trainer here, and an SAE scales its own activations
    "SyntheticActivationIterator": {"autocast"},
    "train_toy_sae": {"autocast_sae", "autocast_data"},
    "eval_sae_on_synthetic_data": {"activation_scaler"},
}

ALIASES = [  # no signatures: types and protocols
    "ActivationsModifier",
    "ActivationsModifierInput",
    "CorrelationMatrixInput",
    "FeatureDictionaryInitializer",
    "FiringProbabilityConfig",
    "MagnitudeConfig",
]


@pytest.mark.parametrize("name", REFERENCE)
def test_arguments_have_the_names_order_and_defaults_of_sae_lens(name: str) -> None:
    first, _, method = name.partition(".")
    thing = getattr(sae_synthetic, first)
    thing = getattr(thing, method) if method else thing
    ours = {p.name: p.default for p in inspect.signature(thing).parameters.values() if p.name != "self"}
    wanted = {key: value for key, value in REFERENCE[name].items() if key not in LEFT_OUT.get(name, ())}
    assert list(ours)[: len(wanted)] == list(wanted)
    for key, default in wanted.items():
        if default == "required":
            continue  # code that gives an argument goes on working where it has a default
        if default == "other":
            assert ours[key] is not inspect.Parameter.empty, key
        else:
            assert ours[key] == default[0], key
    if first != "SyntheticDataEvalResult":  # a result, made here only
        required = [key for key in list(ours)[len(wanted) :] if ours[key] is inspect.Parameter.empty]
        assert not required, "an argument that SAELens does not have must have a default"


def test_arguments_left_out_are_really_those_of_sae_lens() -> None:
    for name, missing in LEFT_OUT.items():
        assert missing <= set(REFERENCE[name])


def test_every_name_is_where_the_list_of_names_says() -> None:
    assert set(ALIASES) < set(sae_synthetic.__all__)
    for name in set(sae_synthetic.__all__) - {"__version__"}:
        assert name != sae_synthetic._HOMES[name], "a module of that name would shadow it once imported"
        value = getattr(sae_synthetic, name)
        home = importlib.import_module(f"sae_synthetic.{sae_synthetic._HOMES[name]}")
        assert value is getattr(home, name)
        assert name in home.__all__, name
    with pytest.raises(AttributeError, match="has no attribute 'FeatureDict'"):
        sae_synthetic.FeatureDict  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, sae_synthetic, sae_synthetic._plugin; print({'torch', 'numpy', 'scipy', 'plotly'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
