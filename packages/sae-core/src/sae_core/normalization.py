"""Input normalisations: what an SAE does to activations before it encodes them, and how it undoes that afterwards.

An SAE takes and returns the model's own units. Inside, it may work on normalised activations ``z``; `apply` gives ``z``
together with a `Units`, which knows the way back. Nothing is remembered between calls, so encoding two batches before
decoding the first one is as good as any other order.

Sites are normalised apart, each by statistics of its own: `Normalization` is one such map for every site of its columns.

Two kinds exist. `layer_norm` and `constant_norm_rescale` depend on each input row, so decoding needs that row's `Units`.
`expected_average_only_in`, `covariance_whitening` and `constant_scalar_rescale` are fixed affine maps, found once from data
(`fit`) or given; they can be folded into the weights, and saving does so.
"""

# R rows, D width of the input or of one site

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, final, get_args

import torch
from torch import Tensor, nn

from sae_core.errors import ConfigError
from sae_core.sites import Sites

__all__ = ["AffineMap", "Normalization", "NormalizationName", "Units"]

NormalizationName = Literal[
    "none",
    "layer_norm",
    "constant_norm_rescale",
    "constant_scalar_rescale",
    "expected_average_only_in",
    "covariance_whitening",
]
_PER_ROW = ("layer_norm", "constant_norm_rescale")
_FITTED = ("expected_average_only_in", "covariance_whitening")
_LAYER_NORM_EPS = 1e-5
_WHITENING_EPS = 1e-3
_FIT_ROWS = 4096  # looked at in float64 at a time


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """The way back from normalised space: ``y -> (y @ matrix or y) * scale + shift``, within every site.

    `scale` is a number, () or (rows, 1); `shift` (rows, 1) or (width,); `matrix` (width, width); None stands for the
    identity. Where there are several sites, `parts` holds their ways back and `sizes` their widths.
    """

    scale: Tensor | float | None = None
    shift: Tensor | None = None
    matrix: Tensor | None = None
    parts: tuple[Units, ...] = ()
    sizes: tuple[int, ...] = ()

    def undo(self, y_RD: Tensor) -> Tensor:
        """Normalised reconstructions in the model's units."""
        if self.parts:
            split = y_RD.split(self.sizes, dim=-1)
            return torch.cat([part.undo(y) for part, y in zip(self.parts, split, strict=True)], dim=-1)
        if self.matrix is not None:
            y_RD = y_RD @ self.matrix
        if self.scale is not None:
            y_RD = y_RD * self.scale
        if self.shift is not None:
            y_RD = y_RD + self.shift
        return y_RD


@dataclass(frozen=True, slots=True, eq=False)
class AffineMap:
    """``z = (x - shift) M`` and its inverse, float64, for folding: a diagonal M is kept as its (width,) diagonal."""

    shift: Tensor
    matrix: Tensor
    inverse: Tensor

    @classmethod
    def joined(cls, parts: Sequence[AffineMap]) -> AffineMap:
        """The map of sites side by side."""
        if all(part.matrix.dim() == 1 for part in parts):
            return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("shift", "matrix", "inverse")))
        square = [[m if m.dim() == 2 else m.diag() for m in (part.matrix, part.inverse)] for part in parts]
        matrix, inverse = (torch.block_diag(*matrices) for matrices in zip(*square, strict=True))
        return cls(torch.cat([part.shift for part in parts]), matrix, inverse)


@final
class Normalization(nn.Module):
    """One normalisation, applied to every site of its columns by statistics of that site, which it keeps as buffers.

    `sites` are the sites, or the width of the only one.
    `per_row` tells whether undoing needs the input's own statistics; `folds` whether it can be folded into the weights.
    """

    def __init__(self, name: NormalizationName, sites: Sites | int, factor: float = 1.0) -> None:
        super().__init__()
        sites = Sites({"": sites}) if isinstance(sites, int) else sites
        if name not in get_args(NormalizationName):
            raise ConfigError(f"normalize_activations: {name!r} is not one of {', '.join(get_args(NormalizationName))}")
        self.name: NormalizationName = name
        self.sizes = tuple(sites.sizes)
        self.factor = factor
        self.site = nn.ModuleList(_OfOneSite(name, width, factor) for width in sites.sizes)

    @property
    def parts(self) -> list[_OfOneSite]:
        """One map a site."""
        return cast("list[_OfOneSite]", list(self.site))

    @property
    def per_row(self) -> bool:
        """Whether the way back differs from row to row."""
        return self.name in _PER_ROW

    @property
    def folds(self) -> bool:
        """Whether this is a fixed affine map other than the identity."""
        return self.name in (*_FITTED, "constant_scalar_rescale")

    @property
    def learns(self) -> bool:
        """Whether this takes statistics from data."""
        return self.name in _FITTED

    @property
    def fitted(self) -> bool:
        """Whether it has the statistics that it needs."""
        return all(part.fitted for part in self.parts)

    def forward(self, x_RD: Tensor) -> tuple[Tensor, Units]:
        """Normalised activations and the way back. All-zero rows stay zero under every normalisation of scale."""
        if self.name == "none":
            return x_RD, Units()
        if len(self.sizes) == 1:
            return self.parts[0](x_RD)
        done = [part(x) for part, x in zip(self.parts, x_RD.split(self.sizes, dim=-1), strict=True)]
        return torch.cat([z for z, _ in done], dim=-1), Units(parts=tuple(u for _, u in done), sizes=self.sizes)

    def restore(self, y_RD: Tensor) -> Tensor:
        """Undo a normalisation that is the same for every row; raises ConfigError for the per-row ones."""
        if self.per_row:
            raise ConfigError(
                f"normalize_activations: {self.name!r} differs from row to row, so latents alone do not determine the "
                "reconstruction; pass the input too: sae.decode(latents, x=x)"
            )
        return self(y_RD.new_zeros(1, sum(self.sizes)))[1].undo(y_RD)

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Learn the statistics from batches (..., width) of activations; does nothing for the others.

        `expected_average_only_in` scales by sqrt(width) / mean ||x||. `covariance_whitening` maps by
        ``(x - mean) E diag(lambda + 1e-3)^(-1/2)`` with the eigenvectors E of the unbiased covariance, in float64. Both
        for each site apart. Raises ConfigError for fewer than two usable rows.
        """
        if not self.learns:
            return
        sites = [batch.reshape(-1, sum(self.sizes)).split(self.sizes, dim=-1) for batch in batches]
        for number, part in enumerate(self.parts):
            part.fit([chunk for batch in sites for chunk in batch[number].split(_FIT_ROWS)])

    def set_scale(self, scale: float) -> None:
        """Give `expected_average_only_in` a known factor, the same for every site, instead of fitting it."""
        for part in self.parts:
            part.set_scale(scale)

    def fixed_map(self) -> AffineMap:
        """``z = (x - shift) M`` in float64 on the CPU, for folding into weights; ConfigError where it is no fixed map."""
        return AffineMap.joined([part.fixed_map() for part in self.parts])

    @property
    def uniform_scale(self) -> float | None:
        """The one factor by which all lengths grow, or None where directions or sites are treated differently."""
        scales = {part.uniform_scale for part in self.parts}
        return scales.pop() if len(scales) == 1 else None


@final
class _OfOneSite(nn.Module):
    """The normalisation of one site."""

    scale: Tensor | None
    mean: Tensor | None
    whiten: Tensor | None
    unwhiten: Tensor | None

    def __init__(self, name: NormalizationName, width: int, factor: float) -> None:
        super().__init__()
        self.name: NormalizationName = name
        self.width = width
        self.factor = factor
        whitens = name == "covariance_whitening"
        self.register_buffer("scale", torch.full((), torch.nan) if name == "expected_average_only_in" else None)
        self.register_buffer("mean", torch.full((width,), torch.nan) if whitens else None)
        self.register_buffer("whiten", torch.full((width, width), torch.nan) if whitens else None)
        self.register_buffer("unwhiten", torch.full((width, width), torch.nan) if whitens else None)
        self.fitted = name not in _FITTED
        self.register_load_state_dict_post_hook(_notice_fit)

    def forward(self, x_RD: Tensor) -> tuple[Tensor, Units]:
        """Normalised activations of this site and the way back."""
        if self.name == "layer_norm":
            mean = x_RD.mean(-1, keepdim=True)
            centred = x_RD - mean
            std = centred.norm(dim=-1, keepdim=True) / max(self.width - 1, 1) ** 0.5  # N - 1; for no rows, too
            return centred / (std + _LAYER_NORM_EPS), Units(std, mean)  # no epsilon on the way back, as SAELens has it
        if self.name == "constant_norm_rescale":
            norm = x_RD.norm(dim=-1, keepdim=True)
            factor = torch.where(norm > 0, self.width**0.5 / norm, 1.0)
            return x_RD * factor, Units(1 / factor)
        if self.name == "constant_scalar_rescale":
            return x_RD * self.factor, Units(1 / self.factor)
        if not self.fitted:
            raise ConfigError(
                f"normalize_activations: {self.name!r} takes its statistics from data and has none yet; "
                "train the SAE, or call sae.fit_normalization(batch) with activations of the model"
            )
        if self.scale is not None:
            return x_RD * self.scale, Units(1 / self.scale)
        mean, whiten, unwhiten = (
            cast("Tensor", part).to(x_RD.dtype) for part in (self.mean, self.whiten, self.unwhiten)
        )
        return (x_RD - mean) @ whiten, Units(None, mean, unwhiten)

    def fit(self, batches: Sequence[Tensor]) -> None:
        """Learn from batches (rows, width), in float64 on the CPU."""
        count, norms = 0, 0.0
        total = torch.zeros(self.width, dtype=torch.float64)
        second = torch.zeros(self.width, self.width, dtype=torch.float64)
        for batch in batches:
            rows = batch.to("cpu", torch.float64)
            count += rows.shape[0]
            norms += float(rows.norm(dim=-1).sum())
            if self.mean is not None:
                total += rows.sum(0)
                second += rows.T @ rows
        if count < 2 or norms == 0.0:
            raise ConfigError(
                f"normalize_activations: {self.name!r} needs activations to fit, found {count} usable rows"
            )
        if self.scale is not None:
            self.scale.fill_(self.width**0.5 * count / norms)
        else:
            self._fit_whitening(total / count, second, count)
        self.fitted = True

    def _fit_whitening(self, mean: Tensor, second: Tensor, count: int) -> None:
        assert self.mean is not None
        assert self.whiten is not None
        assert self.unwhiten is not None
        covariance = (second - count * torch.outer(mean, mean)) / (count - 1)
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
        root = (eigenvalues.clamp(min=0) + _WHITENING_EPS).sqrt()
        self.mean.copy_(mean)
        self.whiten.copy_(eigenvectors / root)
        self.unwhiten.copy_((eigenvectors * root).T)

    def set_scale(self, scale: float) -> None:
        """Take a known factor."""
        if self.scale is None:
            raise ConfigError(f"normalize_activations: {self.name!r} has no scale to set")
        self.scale.fill_(scale)
        self.fitted = True

    def fixed_map(self) -> AffineMap:
        """The map of this site."""
        if self.name == "none":
            ones = torch.ones(self.width, dtype=torch.float64)
            return AffineMap(torch.zeros_like(ones), ones, ones)
        if self.name in _PER_ROW or not self.fitted:
            raise ConfigError(f"normalize_activations: {self.name!r} is not a fixed map that could be folded")
        if self.whiten is not None and self.mean is not None and self.unwhiten is not None:
            return AffineMap(self.mean.double().cpu(), self.whiten.double().cpu(), self.unwhiten.double().cpu())
        scale = self.factor if self.scale is None else float(self.scale)
        ones = torch.ones(self.width, dtype=torch.float64)
        return AffineMap(torch.zeros_like(ones), ones * scale, ones / scale)

    @property
    def uniform_scale(self) -> float | None:
        """The factor by which lengths grow, or None where directions are treated differently."""
        if self.name == "covariance_whitening" or self.name in _PER_ROW:
            return None
        if self.scale is not None:
            return float(self.scale)
        return self.factor if self.name == "constant_scalar_rescale" else 1.0


def _notice_fit(module: nn.Module, _: object) -> None:
    """After loading a state: whether it held statistics."""
    site = cast("_OfOneSite", module)
    buffers = [buffer for buffer in (site.scale, site.mean) if buffer is not None]
    site.fitted = not any(bool(buffer.isnan().any()) for buffer in buffers if not buffer.is_meta)
