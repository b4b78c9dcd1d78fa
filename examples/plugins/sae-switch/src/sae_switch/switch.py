"""Switch SAE: a router sends each row to one small dictionary of several (Mudide et al. 2024, arXiv 2410.08201).

    p = softmax((z - c) W_router^T),   e = argmax p
    f = p_e relu(h) for the k largest of h = (z - b_dec) W_enc + b_enc among the latents of expert e, else 0
    y = f W_dec + b_dec
    loss = mean over rows of |y - z|^2 + balance * experts * sum over e of (share of rows sent to e) (mean of p_e)

Latents of one expert are neighbours. The product runs over the chosen expert's latents alone.
"""

# R rows, D d_in, F d_sae, E experts, K kept latents a row

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from sae_core.architectures.linear import LinearConfig, LinearSAE
from sae_core.architectures.parts import kaiming_rows, squared_error
from sae_core.codes import Codes, SparseCodes
from sae_core.config import option, require
from sae_core.ops.encode import encode_entries
from sae_core.ops.select import TopK
from sae_core.sae import Axis, Prepared, SAEConfig, StepContext, StepOutput, training_option
from torch import Tensor, nn

__all__ = ["SwitchConfig", "SwitchSAE"]


@dataclass(frozen=True, kw_only=True)
class SwitchConfig(LinearConfig):
    """Config of `SwitchSAE`."""

    k: int = option(default=32, help="latents kept in every row")
    experts: int = option(default=16, help="number of dictionaries; divides d_sae")
    balance: float = training_option(default=3.0, help="weight of the loss that keeps the experts equally busy")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.experts > 0 and self.d_sae % self.experts == 0, f"experts must divide d_sae = {self.d_sae}")
        width = self.d_sae // self.experts
        require(1 <= self.k <= width, f"k must lie in [1, d_sae / experts = {width}], not {self.k}")
        require(self.balance >= 0, f"balance must not be negative: {self.balance}")


@final
class SwitchSAE(LinearSAE[SwitchConfig]):
    """One of several TopK dictionaries for each row, chosen by a router (arXiv 2410.08201)."""

    architecture: ClassVar[str] = "switch"
    config_class: ClassVar[type[SAEConfig]] = SwitchConfig
    AXES: ClassVar[Mapping[str, Axis]] = {**LinearSAE.AXES, "router": Axis(None), "router_centre": Axis(None)}

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__(config)
        self.router = nn.Parameter(torch.empty(config.experts, config.d_in))
        self.router_centre = nn.Parameter(torch.zeros(config.d_in))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """The experts as the frame starts its latents, the router at random."""
        super().reset_parameters(generator)
        kaiming_rows(self.router, generator)

    def routes(self, z_RD: Tensor) -> Tensor:
        """(rows, experts): the router's probabilities."""
        return torch.softmax((z_RD - self.router_centre) @ self.router.t(), dim=-1)

    def encode_rows(self, prepared: Prepared) -> Codes:
        """The k largest latents of each row's expert, times its probability; waits once for the device."""
        k, n = self.config.k, self.config.experts
        p_R, expert_R = self.routes(prepared.z).max(-1)
        order = expert_R.argsort(stable=True)
        groups = order.split(torch.bincount(expert_R, minlength=n).tolist())
        weights = self.encoder.view(n, -1, self.d_in).unbind(), self.get_parameter("b_enc").view(n, -1).unbind()
        kept = [
            encode_entries(prepared.z[rows], self.centre(), W, b, TopK(k))
            for rows, W, b in zip(groups, *weights, strict=True)
        ]
        back, first_R = order.argsort(), expert_R * (self.d_sae // n)
        values_RK = torch.cat([codes.values.view(-1, k) for codes in kept])[back].relu() * p_R[:, None]
        indices_RK = torch.cat([codes.indices.view(-1, k) for codes in kept])[back] + first_R[:, None]
        return SparseCodes.regular(values_RK, indices_RK, self.d_sae)

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error, and the balance of the experts."""
        codes = self.encode_rows(prepared)
        y_RD = self.to_loss_space(self.decode_rows(codes, prepared), prepared)
        p_RE = self.routes(prepared.z)
        shares_E = torch.nn.functional.one_hot(p_RE.argmax(-1), self.config.experts).to(p_RE.dtype).mean(0)
        balance = self.config.balance * self.config.experts * (shares_E * p_RE.mean(0)).sum()
        losses = {"mse": squared_error(y_RD, target), "balance": balance}
        return StepOutput(losses["mse"] + balance, losses, codes, y_RD, target, {"busiest_expert": shares_E.max()})
