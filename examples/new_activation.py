"""An architecture with an activation function of its own, written, trained, saved, loaded and checked in one file.

    f = relu(h)^2 / (1 + relu(h))          nearly h where h is large, nearly nothing where it is small

In a package of its own it would be found by its entry point (`sae-core new-plugin`); here, as in a notebook, it is registered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from sae_core.architectures.linear import LinearConfig, LinearSAE
from sae_core.architectures.parts import squared_error
from sae_core.codes import Codes
from sae_core.sae import Prepared, SAEConfig, StepContext, StepOutput, training_option
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SoftConfig(LinearConfig):
    """Config of `SoftSAE`."""

    l1_coefficient: float = training_option(default=0.1, help="weight of the sparsity penalty")


@final
class SoftSAE(LinearSAE[SoftConfig]):
    """Latents that rise slowly from zero."""

    architecture: ClassVar[str] = "soft"
    config_class: ClassVar[type[SAEConfig]] = SoftConfig
    independent_latents: ClassVar[bool] = True

    def encode_rows(self, prepared: Prepared, context: StepContext | None = None) -> Codes:
        """The activation function of what is above zero."""
        return self.pre(prepared, context, floor=0.0).map(lambda h: h.relu().square() / (1 + h.relu()))

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error plus an L1 penalty in units of decoder norms."""
        codes = self.encode_rows(prepared, context)
        y = self.to_loss_space(self.decode_rows(codes, prepared), prepared)
        l1 = self.config.l1_coefficient * codes.row_dots(self.decoder_norms()).mean()
        losses = {"mse": squared_error(y, target), "l1": l1}
        return StepOutput(losses["mse"] + l1, losses, codes, y, target)


# -- in use --------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Train it on sums of a few directions, save and load it, and run the checks of every architecture."""
    import tempfile

    from sae_core import SAE, TrainConfig, Trainer, create
    from sae_core.plugins import ArchitectureSpec, get_registry
    from sae_core.testing import run_checks

    get_registry().register(ArchitectureSpec(name="soft", target=f"{__name__}:SoftSAE", summary="A soft start"))
    drawn = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(48, 24, generator=drawn), dim=-1)
    batches = [3.0 * (torch.rand(256, 48, generator=drawn) < 0.04) @ directions for _ in range(200)]
    sae = create("soft", d_in=24, d_sae=64)
    config = TrainConfig(total_samples=200 * 256, batch_size=256, lr=3e-3, progress_bar=False)
    result = Trainer(sae, batches, config).fit()
    print(f"explained variance {result.history[-1]['explained_variance']:.2f}, L0 {result.history[-1]['l0']:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        loaded = SAE.load(sae.save(f"{folder}/soft"))
        torch.testing.assert_close(loaded(batches[0]), sae(batches[0]))
    failed = [check for check in run_checks("architecture", "soft") if not check.ok]
    print(f"{len(failed)} checks failed", *(f"{check.check}: {check.reason}" for check in failed), sep="\n")


if __name__ == "__main__":
    main()
