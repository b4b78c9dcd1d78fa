"""What dictionaries do to a model's predictions while they are trained, on text held out from training.

The windows, the clean model's losses and those with zeros and the mean are found once; every measurement after that costs the
model one pass to the places that are read and one from there to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sae_core.config import require

from sae_lm.ablations import Reference
from sae_lm.evaluation import evaluate_saes

if TYPE_CHECKING:
    from sae_core import SAE

    from sae_lm.source import HeldOutConfig, HuggingFaceSource

__all__ = ["NAMES", "held_out"]

NAMES = ("explained_variance", "l0", "ce", "ce_clean", "ce_recovered", "ce_recovered_mean")
"""What is reported, as `sae_lm.metrics` defines it; a second model's losses begin with ``second.``."""


def held_out(source: HuggingFaceSource, config: HeldOutConfig) -> Callable[[SAE[Any]], Mapping[str, float]]:
    """A function that measures a dictionary on the source's held-out text. Raises ConfigError when there is none."""
    require(
        source.config.text.held_out > 0,
        "eval: no text is held out from training (text.held_out is 0), so there is nothing to measure on",
    )
    reference = Reference()

    def measure(sae: SAE[Any]) -> Mapping[str, float]:
        own = sae.metadata
        sae.metadata = {**own, **source.metadata()}  # where it belongs, which is recorded when training has ended
        try:
            result = evaluate_saes(
                {"sae": sae},
                source,
                tokens=config.tokens,
                batch_prompts=config.batch_prompts,
                baseline=False,
                resamples=0,
                reference=reference,
            )
        finally:
            sae.metadata = own
        numbers = result.candidates["sae"]
        return {name: numbers[name] for name in numbers if name.removeprefix("second.") in NAMES}

    return measure
