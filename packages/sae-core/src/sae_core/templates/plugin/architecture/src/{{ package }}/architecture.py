"""The {{ name }} architecture. As rendered it is a ReLU dictionary with an L1 penalty; make it yours.

    f = relu((z - b_dec) W_enc + b_enc)
    y = f W_dec + b_dec
    loss = mean over rows of  |y - z|^2 + l1_coefficient * sum_i f_i |W_dec_i|

The linear frame has the tensors, their start, the products, decoding, normalisation, folding and files, and makes it an SAE,
a transcoder (with d_out) and a crosscoder (with reads) at once. What is here is what makes this architecture another one.
"""

# R rows, O d_out

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from sae_core.architectures.linear import LinearConfig, LinearSAE
from sae_core.architectures.parts import squared_error
from sae_core.codes import Codes
from sae_core.config import require
from sae_core.sae import Prepared, SAEConfig, StepContext, StepOutput, training_option
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class {{ config_name }}(LinearConfig):
    """Config of `{{ class_name }}`. Fields of inference use `option`, those of training `training_option`."""

    l1_coefficient: float = training_option(default=1.0, help="weight of the sparsity penalty")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.l1_coefficient >= 0, f"l1_coefficient must not be negative: {self.l1_coefficient}")


@final
class {{ class_name }}(LinearSAE[{{ config_name }}]):
    """One sentence that `sae-core show {{ name }}` prints."""

    architecture: ClassVar[str] = "{{ name }}"
    config_class: ClassVar[type[SAEConfig]] = {{ config_name }}
    folds: ClassVar[bool] = True  # the input is read by `pre` alone, and rescaling a latent changes nothing but its size
    independent_latents: ClassVar[bool] = True  # each latent's value is its own, so some of them can be loaded alone

    def encode_rows(self, prepared: Prepared) -> Codes:
        """Latents of normalised rows; in eval mode each row on its own."""
        return self.pre(prepared, floor=0.0).map(torch.relu)

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error plus the L1 penalty, in units of decoder norms."""
        codes = self.pre(prepared, context, floor=0.0).map(torch.relu)
        y_RO = self.to_loss_space(self.decode_rows(codes, prepared), prepared)
        losses = {
            "mse": squared_error(y_RO, target),
            "l1": self.config.l1_coefficient * codes.row_dots(self.decoder_norms()).mean(),
        }
        return StepOutput(losses["mse"] + losses["l1"], losses, codes, y_RO, target)
