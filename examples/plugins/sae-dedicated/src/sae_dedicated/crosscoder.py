"""A crosscoder some of whose latents belong to one site alone (Jiralerspong and Bricken 2026, arXiv 2602.11729).

    h = (z - b_dec) W_enc + b_enc
    f = relu(h n) for the k largest of h n, else 0,      n the sum of a decoder row's norms at each site
    y = (f / n) W_dec + b_dec,   loss = sum over sites of the mean over rows of |y_site - z_site|^2

The first latents are the first site's, the next the second site's, and so on: their encoder and decoder weights of all other
sites are zero, at the start and after every step. The rest are shared.
"""

# R rows, D d_in, F d_sae

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from sae_core.architectures.linear import LinearConfig, LinearSAE
from sae_core.architectures.parts import squared_error, times_norms, without_norms
from sae_core.codes import Codes
from sae_core.config import option, require
from sae_core.errors import ConfigError
from sae_core.ops.select import TopK
from sae_core.sae import Prepared, SAEConfig, StepContext, StepOutput
from sae_core.sites import Sites
from torch import Tensor

__all__ = ["DedicatedConfig", "DedicatedCrosscoder"]


@dataclass(frozen=True, kw_only=True)
class DedicatedConfig(LinearConfig):
    """Config of `DedicatedCrosscoder`."""

    k: int = option(default=32, help="latents kept in every row")
    dedicated: float = option(default=0.05, help="fraction of all latents that belongs to each site alone")
    rescale_acts_by_decoder_norm: bool = option(default=True, help="n as above; false is n = 1, where norms are folded")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.d_out is None, "d_out must be null: a dedicated latent reads the site that it writes")
        require(len(self.reads) > 1, "reads must name several sites, with their widths")
        require(1 <= self.k <= self.d_sae, f"k must lie in [1, d_sae = {self.d_sae}], not {self.k}")
        most = 1 / len(self.reads)
        require(0 < self.dedicated <= most, f"dedicated must lie in (0, 1 / sites = {most:.3g}], not {self.dedicated}")


@final
class DedicatedCrosscoder(LinearSAE[DedicatedConfig]):
    """TopK crosscoder with latents of one site alone beside the shared ones (arXiv 2602.11729)."""

    architecture: ClassVar[str] = "dedicated"
    config_class: ClassVar[type[SAEConfig]] = DedicatedConfig
    folds: ClassVar[bool] = True

    def reset_parameters(self, generator: torch.Generator) -> None:
        """As the frame starts them, without what dedicated latents may not have."""
        super().reset_parameters(generator)
        self.after_step()

    def latents_of(self, site: str) -> range:
        """The latents that belong to `site` alone."""
        each, number = int(self.config.dedicated * self.d_sae), list(self.reads).index(site)
        return range(number * each, (number + 1) * each)

    @torch.no_grad()
    def after_step(self) -> None:
        """Dedicated latents have no weights at other sites."""
        for site in self.reads:
            rows = slice(self.latents_of(site).start, self.latents_of(site).stop)
            for other, columns in Sites(self.reads).slices().items():
                if other != site:
                    self.encoder[rows, columns] = 0
                    self.W_dec[rows, columns] = 0

    def latent_norms(self) -> Tensor | None:
        """Latents are ranked and reported in units of what they add to all sites."""
        return self.decoder_norms() if self.config.rescale_acts_by_decoder_norm else None

    def unit_norm_config(self, config: DedicatedConfig) -> DedicatedConfig:
        """Where norms have been folded, latents are in these units by themselves; without them, the ranks would change."""
        if not self.config.rescale_acts_by_decoder_norm:
            raise ConfigError(
                f"{self.architecture}: latents are ranked without decoder norms, so these cannot be folded"
            )
        return replace(config, rescale_acts_by_decoder_norm=False)

    def encode_rows(self, prepared: Prepared, context: StepContext | None = None) -> Codes:
        """The k largest latents of every row."""
        norms = self.latent_norms()
        return times_norms(self.select(prepared, TopK(self.config.k, norms), context).map(torch.relu), norms)

    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        """All sites side by side."""
        return super().decode_rows(without_norms(codes, self.latent_norms()), prepared)

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """The squared error of each site, a term each."""
        codes = self.encode_rows(prepared, context)
        y_RD = self.to_loss_space(self.decode_rows(codes, prepared), prepared)
        sites = Sites(self.writes).slices()
        losses = {f"mse/{site}": squared_error(y_RD[:, at], target[:, at]) for site, at in sites.items()}
        return StepOutput(sum(losses.values(), y_RD.new_zeros(())), losses, codes, y_RD, target)
