"""Training steps against twins written with nothing but dense products and autograd.

SAELens has no training form of transcoders, crosscoders and temporal SAEs, and no GroupMax. Each twin here is the formula of
the architecture's docstring, written down naively: every latent of every row exists, and autograd does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sae_core import SAE, ActivationBatch, StepContext, create
from torch import Tensor

D_IN, D_SAE, D_OUT, ROWS = 10, 48, 7, 30
DEAD = [3, 9, 20, 21, 30, 33, 47]  # more than the half of d_in that the auxiliary loss chooses
Weights = dict[str, Tensor]


def mse(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum(-1).mean()


@dataclass(frozen=True)
class Frame:
    """What the linear frame computes, for one batch."""

    w: Weights
    x: Tensor
    target: Tensor
    transcodes: bool
    sites: tuple[int, ...]

    def h(self, bias: str = "b_enc") -> Tensor:
        centred = self.x if self.transcodes else self.x - self.w["b_dec"]
        return centred @ self.w["encoder"].T + self.w[bias]

    @property
    def n(self) -> Tensor:
        return torch.stack([part.norm(dim=-1) for part in self.w["W_dec"].split(self.sites, -1)]).sum(0)

    def y(self, f: Tensor, width: int = D_SAE) -> Tensor:
        y = f[:, :width] @ self.w["W_dec"][:width] + self.w["b_dec"]
        return y + self.x @ self.w["W_skip"].T if "W_skip" in self.w else y


Twin = Callable[[Frame], Tensor]


def standard(t: Frame) -> Tensor:
    f = t.h().relu()
    return mse(t.y(f), t.target) + 0.3 * (f * t.n).sum(-1).mean()


def gated(t: Frame, frozen: bool = True) -> Tensor:
    gate = t.h("b_gate")
    magnitude = (gate - t.w["b_gate"]) * t.w["r_mag"].exp() + t.w["b_mag"]
    outputs = ("W_dec", "b_dec", "W_skip") if frozen else ()
    held = replace(t, w={name: w.detach() if name in outputs else w for name, w in t.w.items()})
    penalty = 0.3 * (gate.relu() * held.n).sum(-1).mean()
    return mse(t.y((gate > 0) * magnitude.relu()), t.target) + penalty + mse(held.y(gate.relu()), t.target)


def gated_unfrozen(t: Frame) -> Tensor:
    return gated(t, frozen=False)


def of_dead(t: Frame, left: Tensor, dead: list[int], sizes: Callable[[Tensor], Tensor] = lambda ranks: ranks) -> Tensor:
    """The best of the dead, half of d_in at most, predict what is left over."""
    h, k_aux = t.h()[:, dead], D_IN // 2
    ranks = sizes(h * t.n[dead].detach())
    kept = ranks >= ranks.topk(min(k_aux, len(dead))).values[:, -1:]
    return min(len(dead) / k_aux, 1.0) * mse((h * kept) @ t.w["W_dec"][dead], left.detach())


def topk(t: Frame) -> Tensor:
    h = t.h()
    ranks = h * t.n.detach()
    y = t.y(h.relu() * (ranks >= ranks.topk(6).values[:, -1:]))
    return mse(y, t.target) + of_dead(t, t.target - y, DEAD)


def abstopk(t: Frame) -> Tensor:
    h = t.h()
    ranks = (h * t.n.detach()).abs()
    y = t.y(h * (ranks >= ranks.topk(6).values[:, -1:]))
    return mse(y, t.target) + of_dead(t, t.target - y, DEAD, torch.abs)


def groupmax(t: Frame) -> Tensor:
    """Six groups of eight."""
    h = t.h()
    ranks = (h * t.n.detach()).unflatten(-1, (6, 8))
    y = t.y(h.relu() * (ranks == ranks.amax(-1, keepdim=True)).flatten(-2))
    return mse(y, t.target) + of_dead(t, t.target - y, DEAD)


def best_of_the_batch(t: Frame) -> Tensor:
    h = t.h()
    ranks = h * t.n.detach()
    return h.relu() * (ranks >= ranks.flatten().topk(int(4.5 * ROWS)).values[-1])


def batchtopk(t: Frame) -> Tensor:
    y = t.y(best_of_the_batch(t))
    return mse(y, t.target) + of_dead(t, t.target - y, DEAD)


def matryoshka(t: Frame, by_level: bool = False) -> Tensor:
    f = best_of_the_batch(t)
    levels = [t.y(f, width) for width in (12, 32, D_SAE)]
    added = ([3, 9], [20, 21, 30], [33, 47]) if by_level else ([], [], DEAD)
    total = t.x.new_zeros(())
    for y, dead in zip(levels, added, strict=True):
        total = total + mse(y, t.target) + (of_dead(t, t.target - y, dead) if dead else 0.0)
    return total


def matryoshka_by_level(t: Frame) -> Tensor:
    return matryoshka(t, by_level=True)


def borrowed(value: Tensor, gradient_in_threshold: Tensor, threshold: Tensor) -> Tensor:
    """`value` with a made-up derivative with respect to the threshold."""
    fake = gradient_in_threshold.detach() * threshold
    return value + fake - fake.detach()


def jumprelu(t: Frame, smooth: bool = False, frozen: bool = True) -> Tensor:
    h, theta, bandwidth = t.h(), t.w["threshold"], 0.4
    window = ((h - theta).abs() < bandwidth / 2).double() / bandwidth
    f = borrowed(h * (h > theta), -window * theta, theta)
    count = torch.tanh(4.0 * f * t.n) if smooth else borrowed((h > theta).double(), -window, theta)
    below = 0.2 * ((theta - h).relu() * (t.n.detach() if frozen else t.n))[:, DEAD].sum(-1).mean()
    return mse(t.y(f), t.target) + 0.3 * count.sum(-1).mean() + below


def jumprelu_smooth_unfrozen(t: Frame) -> Tensor:
    return jumprelu(t, smooth=True, frozen=False)


def temporal(w: Weights, x: Tensor, k: int | None = None) -> Tensor:
    """Two layers, two heads, position by position; sequences of ten rows."""
    total = x.new_zeros(())
    encoder = w.get("encoder", w["W_dec"]).T
    for sequence in x.reshape(-1, 10, D_IN):
        left, predicted = sequence - w["b_dec"], torch.zeros_like(sequence)
        for layer in ("attn_layers.0.", "attn_layers.1."):
            codes = (left @ encoder / (4 * D_IN)).relu()
            context = torch.cat([torch.zeros_like(codes[:1]), codes[:-1]])
            q, keys, v = (
                source @ w[f"{layer}{name}.weight"].T + w[f"{layer}{name}.bias"]
                for name, source in (("q_target", codes), ("k_ctx", context), ("v_ctx", context))
            )
            rows: list[Tensor] = []
            for t in range(10):
                heads: list[Tensor] = []
                for q_h, k_h, v_h in zip(q[t].chunk(2), keys.chunk(2, -1), v.chunk(2, -1), strict=True):
                    weights = F.softmax(k_h[: t + 1] @ q_h / q_h.numel() ** 0.5, 0)
                    heads.append(weights @ v_h[: t + 1])
                rows.append(torch.cat(heads) @ w[f"{layer}c_proj.weight"].T + w[f"{layer}c_proj.bias"])
            p = torch.stack(rows).relu() @ w["W_dec"]
            share = (p * left).sum(-1, keepdim=True) / (p.norm(dim=-1, keepdim=True) + 1e-6).square()
            left, predicted = left - share * p, predicted + share * p
        novel = (left @ encoder / (4 * D_IN)).relu()
        if k is not None:
            novel = novel * (novel >= novel.topk(k).values[:, -1:])
        y = novel @ w["W_dec"] + predicted + w["b_dec"]
        penalty = 0.2 * (novel * w["W_dec"].norm(dim=-1)).sum() if k is None else 0.0
        total = total + (y - sequence).square().sum() + penalty
    return total / ROWS


def temporal_topk(w: Weights, x: Tensor) -> Tensor:
    return temporal(w, x, k=5)


JUMPS = {"l0_coefficient": 0.3, "jumprelu_bandwidth": 0.4, "pre_act_loss_coefficient": 0.2}
SMOOTH_UNFROZEN = {"jumprelu_sparsity_loss_mode": "tanh", "freeze_decoder_in_pre_act": False}
NESTED = {"k": 4.5, "matryoshka_widths": [12, 32]}
CASES: dict[str, tuple[str, dict[str, Any], Twin]] = {
    "standard": ("standard", {"l1_coefficient": 0.3}, standard),
    "gated": ("gated", {"l1_coefficient": 0.3}, gated_unfrozen),
    "gated, frozen": ("gated", {"l1_coefficient": 0.3, "freeze_decoder_in_aux": True}, gated),
    "topk": ("topk", {"k": 6}, topk),
    "abstopk": ("abstopk", {"k": 6}, abstopk),
    "groupmax": ("groupmax", {"k": 6}, groupmax),
    "batchtopk": ("batchtopk", {"k": 4.5}, batchtopk),
    "matryoshka": ("matryoshka_batchtopk", NESTED, matryoshka),
    "matryoshka by level": (
        "matryoshka_batchtopk",
        NESTED | {"use_matryoshka_aux_loss": True},
        matryoshka_by_level,
    ),
    "jumprelu": ("jumprelu", JUMPS, jumprelu),
    "jumprelu, smooth, not frozen": ("jumprelu", JUMPS | SMOOTH_UNFROZEN, jumprelu_smooth_unfrozen),
}
SHAPES: dict[str, dict[str, Any]] = {
    "SAE": {},
    "transcoder": {"d_out": D_OUT},
    "skip transcoder": {"d_out": D_OUT, "skip": True, "writes": {"a": 3, "b": 4}},
    "crosscoder": {"reads": {"a": 6, "b": 4}},
}
ATTENTION = {"n_heads": 2, "bottleneck_factor": 4, "n_attn_layers": 2}
TEMPORAL: dict[str, tuple[dict[str, Any], Callable[[Weights, Tensor], Tensor]]] = {
    "relu": ({"sae_diff_type": "relu", "l1_coefficient": 0.2}, temporal),
    "untied": ({"sae_diff_type": "relu", "l1_coefficient": 0.2, "tied_weights": False}, temporal),
    "topk": ({"kval_topk": 5}, temporal_topk),
}


def drawn(architecture: str, config: dict[str, Any]) -> SAE[Any]:
    sae = create(architecture, d_in=D_IN, d_sae=D_SAE, dtype="float64", **config)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.5)
            if name == "threshold":
                parameter.abs_()
    return sae.train()


def batch() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    x = torch.randn(ROWS, D_IN, generator=random, dtype=torch.float64) * 1.5
    return x, torch.randn(ROWS, D_OUT, generator=random, dtype=torch.float64)


def equals_its_twin(sae: SAE[Any], inputs: Tensor | ActivationBatch, twin: Callable[[Weights], Tensor]) -> None:
    loss = sae.training_step(inputs, StepContext(dead=torch.tensor(DEAD))).loss
    loss.backward()
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in sae.named_parameters()}
    expected = twin(weights)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_naive_twins(
    case: str, shape: str, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_core.ops.active.prefer_sparse", lambda **_: sparse)
    architecture, config, twin = CASES[case]
    sae, (x, target) = drawn(architecture, config | SHAPES[shape]), batch()
    transcodes, sites = "d_out" in SHAPES[shape], tuple(sae.writes.values())
    inputs, wanted = (ActivationBatch(x, target), target) if transcodes else (x, x)
    equals_its_twin(sae, inputs, lambda w: twin(Frame(w, x, wanted, transcodes, sites)))


def test_a_joint_decoder_norm_is_that_of_whole_rows() -> None:
    """The penalty of a crosscoder is then that of an SAE on the same columns, and else it is larger."""
    sites, (x, _) = {"a": 6, "b": 4}, batch()
    saes = [
        drawn("standard", {"l1_coefficient": 0.3} | fields)
        for fields in ({}, {"reads": sites, "decoder_norm": "joint"}, {"reads": sites})
    ]
    steps = [sae.training_step(x) for sae in saes]
    for step in steps:
        step.loss.backward()
    torch.testing.assert_close(steps[1].losses["l1"], steps[0].losses["l1"], rtol=1e-12, atol=0)
    torch.testing.assert_close(saes[1].W_dec.grad, saes[0].W_dec.grad, rtol=1e-10, atol=1e-12)
    assert steps[2].losses["l1"] > 1.05 * steps[0].losses["l1"]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("case", TEMPORAL)
def test_loss_and_gradients_of_a_temporal_sae_equal_the_naive_twins(
    case: str, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_core.ops.active.prefer_sparse", lambda **_: sparse)
    config, twin = TEMPORAL[case]
    x, _ = batch()
    equals_its_twin(drawn("temporal", config | ATTENTION), x.view(-1, 10, D_IN), lambda w: twin(w, x))


def test_annealing_p_keeps_the_penalty_as_large_as_the_l1_norm() -> None:
    """Same size as with p = 1, but other directions; without keeping the scale, it is far larger."""
    x = torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    schedule = {"from": 1.0, "to": 0.5, "over": 1.0}
    plain, annealed, kept = (
        create("standard", d_in=D_IN, d_sae=D_SAE, dtype="float64", seed=4, **fields)
        for fields in ({}, {"lp_norm": schedule}, {"lp_norm": schedule, "lp_norm_keeps_scale": True})
    )
    end = StepContext(progress=1.0)
    l1 = plain.training_step(x, end).losses["l1"]
    torch.testing.assert_close(kept.training_step(x, end).losses["l1"], l1)
    assert annealed.training_step(x, end).losses["l1"] > 3 * l1
    plain.training_step(x, end).losses["l1"].backward()
    kept.training_step(x, end).losses["l1"].backward()
    assert not torch.allclose(plain.b_enc.grad, kept.b_enc.grad, rtol=1e-2)
