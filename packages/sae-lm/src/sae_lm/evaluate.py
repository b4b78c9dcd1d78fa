"""How well reconstructions stand in for activations inside the model they came from.

Each batch of windows runs through the model clean, with each candidate's reconstruction in place of the activation, and
with zeros there. One mask decides everything: a position counts if the token policy keeps it. Only such positions are
replaced and enter the reconstruction metrics; all others, BOS for instance, pass through untouched. The cross-entropy of a
next token counts where the position that predicts it counts, and the token itself is neither padding nor BOS.

    CE recovered = (CE zero - CE candidate) / (CE zero - CE clean)        1: as if untouched; 0: as bad as zeros
    KL = E sum p_clean (log p_clean - log p_candidate)

`evaluate_candidates` takes any function as a candidate. `evaluate_sae` puts a random dictionary of the same shape beside
an SAE: a number is only as good as its distance to that one's.
"""

# R windows, C positions in a window, K positions that count, N predictions that count, V vocabulary, D d_in

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from sae_core import SAE, create
from sae_core.codes import SparseCodes
from sae_core.config import unstructure
from sae_core.errors import ConfigError, DataError
from sae_core.metrics import L0, CosineSimilarity, DeadFraction, ExplainedVariance, MeanSquaredError
from sae_core.protocols import Metric
from torch import Tensor, nn
from torch.nn import functional

from sae_lm.hooks import HookPoint, capture, replaced
from sae_lm.inputs import flatten_positions, model_inputs
from sae_lm.model import next_token_logits
from sae_lm.source import HuggingFaceSource
from sae_lm.text import Part
from sae_lm.tokens import TokenRules, Windows

__all__ = [
    "MASK_RULE",
    "Evaluation",
    "Reconstruct",
    "evaluate_candidates",
    "evaluate_sae",
    "first_tokens",
    "random_like",
]

MASK_RULE = (
    "positions kept by the token policy are replaced and measured; a next token counts where its position is kept and it "
    "is neither padding nor BOS"
)
_LOGITS_AT_ONCE = 256  # rows of float32 log-probabilities in work at a time: they are as wide as the vocabulary


class Reconstruct(Protocol):
    """Maps activations (rows, d_in) to reconstructions of the same shape, and to the codes between if there are any."""

    def __call__(self, x: Tensor, /) -> tuple[Tensor, SparseCodes | None]: ...


@final
@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What came out. Cross-entropies are in nats a token, and NaN for models that do not predict next tokens.

    `candidates` maps each candidate to its metrics: ``explained_variance``, ``explained_variance_centered``, ``mse``,
    ``cosine_similarity``, with codes also ``l0`` and ``dead_fraction``; ``ce``, ``ce_recovered`` and ``kl``.
    """

    activations: int
    predictions: int
    windows: int
    ce_clean: float
    ce_zero_ablation: float
    candidates: Mapping[str, Mapping[str, float]]

    def as_dict(self) -> dict[str, Any]:
        """JSON values; a number that does not exist is None."""
        candidates = {name: _plain(metrics) for name, metrics in self.candidates.items()}
        counts = {"activations": self.activations, "predictions": self.predictions, "windows": self.windows}
        clean = _plain({"ce_clean": self.ce_clean, "ce_zero_ablation": self.ce_zero_ablation})
        return {**counts, "mask": MASK_RULE, **clean, "candidates": candidates}


def _plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def evaluate_sae(
    sae: SAE,
    source: HuggingFaceSource,
    *,
    tokens: int = 8_192,
    part: Part = "held_out",
    batch_prompts: int = 8,
    baseline: bool = True,
    seed: int = 0,
    more_metrics: Sequence[Callable[[], Metric]] = (),
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Evaluate `sae` on about `tokens` activations of the source's held-out text, `batch_prompts` windows at a time.

    The candidates are ``sae`` and, with `baseline`, ``random``: `random_like` of it. Raises ConfigError when the widths
    differ or the dictionary does not reconstruct its input, DataError when there is no such text.
    """
    if not sae.reconstructs_input:
        raise ConfigError(
            f"eval: {sae.architecture} maps one place to another; only dictionaries of one place are spliced"
        )
    if sae.d_in != source.d_in:
        raise ConfigError(f"eval: the SAE has d_in {sae.d_in}, but {source.point} has width {source.d_in}")
    candidates = {"sae": _of_sae(sae)}
    if baseline:
        candidates["random"] = _of_sae(random_like(sae, seed=seed))
    return evaluate_candidates(
        source.language_model.model,
        source.point,
        first_tokens(source.windows(part, rows=batch_prompts), tokens),
        candidates,
        rules=source.rules,
        more_metrics=more_metrics,
        progress=progress,
    )


@torch.no_grad()
def random_like(sae: SAE, *, seed: int = 0) -> SAE:
    """A dictionary of the same architecture and config whose directions were never trained, at its best.

    Initialised as for training, but with decoder rows of unit norm, as trained ones have in files; the bias and input
    normalisation, which say where the data are, are the trained ones.
    """
    config = {**unstructure(sae.config), "decoder_init_norm": 1.0}
    other = create(sae.architecture, seed=seed, device=sae.device, dtype=sae.dtype, **config)
    other.start_at(sae.offset())
    other.normalization.load_state_dict(sae.normalization.state_dict())
    return other.eval()


def _of_sae(sae: SAE) -> Reconstruct:
    def reconstruct(x: Tensor, /) -> tuple[Tensor, SparseCodes | None]:
        given = x.to(sae.device, torch.float32)
        codes = sae.encode_sparse(given)
        return sae.decode(codes, x=given).to(x.device), codes

    return reconstruct


def first_tokens(stream: Iterable[Windows], count: int) -> Iterator[Windows]:
    """The first windows that together hold `count` positions that count; the same ones however they are batched."""
    for windows in stream:
        totals_R = windows.kept.sum(1).cumsum(0)
        needed = int((totals_R < count).sum()) + 1  # the window that reaches `count` is the last
        yield Windows(windows.tokens[:needed], windows.attended[:needed], windows.kept[:needed])
        count -= int(totals_R[-1])
        if count <= 0:
            return


@torch.inference_mode()
def evaluate_candidates(
    model: nn.Module,
    point: HookPoint | str,
    stream: Iterable[Windows],
    candidates: Mapping[str, Reconstruct],
    *,
    rules: TokenRules,
    more_metrics: Sequence[Callable[[], Metric]] = (),
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Run `model` on every window with each candidate in place of the activation at `point`.

    `more_metrics` make further metrics for the candidates that give codes. `progress` is called with the number of
    activations after each batch. Raises DataError when no position counts.
    """
    point = HookPoint.parse(point) if isinstance(point, str) else point
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    metrics = {name: _Metrics(more_metrics) for name in candidates}
    clean, zero = _Losses(), _Losses()
    losses = {name: _Losses() for name in candidates}
    activations = count = 0

    for windows in stream:
        args, kwargs = model_inputs(model, windows, device)
        counting_K = windows.kept.flatten().nonzero().squeeze(1)
        count += len(windows)
        activations += len(counting_K)
        if not len(counting_K):
            continue

        activation, output = _run_and_read(model, point, args, kwargs)
        counting_K = counting_K.to(activation.device)
        x_KD = flatten_positions(activation, windows.tokens, point)[counting_K]
        predicted = _Predictions.of(model, output, windows, rules)
        del output  # as wide as the vocabulary, and no longer needed
        for name, reconstruct in candidates.items():
            y_KD, codes = reconstruct(x_KD)
            metrics[name].update(x_KD, y_KD, codes)
            if predicted is not None:
                with replaced(model, point, _splice(counting_K, y_KD)):
                    losses[name].add(_Predictions.of(model, model(*args, **kwargs), windows, rules), predicted)
        if predicted is not None:
            clean.add(predicted, None)
            with replaced(model, point, _splice(counting_K, torch.zeros_like(x_KD))):
                zero.add(_Predictions.of(model, model(*args, **kwargs), windows, rules), None)
        if progress is not None:
            progress(activations)

    if not activations:
        raise DataError("eval: the text gives no token that counts")
    return Evaluation(
        activations=activations,
        predictions=clean.count,
        windows=count,
        ce_clean=clean.ce(),
        ce_zero_ablation=zero.ce(),
        candidates={name: {**metrics[name].compute(), **losses[name].compared(clean, zero)} for name in candidates},
    )


def _run_and_read(model: nn.Module, point: HookPoint, args: Any, kwargs: Any) -> tuple[Tensor, Any]:
    """The activation at `point` and the model's output, from one pass."""
    seen: list[Tensor] = []

    def read(activation: Tensor) -> Tensor:
        seen.append(activation.clone())  # later modules may write into it
        return activation

    with replaced(model, point, read):
        output = model(*args, **kwargs)
    if not seen:
        capture(model, [point], *args, **kwargs)  # says which module did not run
    return seen[0], output


def _splice(counting_K: Tensor, y_KD: Tensor) -> Callable[[Tensor], Tensor]:
    """Put the rows `y_KD` where they count, and leave the rest of the activation as it is."""

    def splice(activation: Tensor) -> Tensor:
        rows_PD = activation.reshape(-1, y_KD.shape[-1]).clone()
        rows_PD[counting_K] = y_KD.to(rows_PD)
        return rows_PD.view(activation.shape)

    return splice


@final
@dataclass(frozen=True, eq=False)
class _Predictions:
    """The logits (N, V) of the next tokens that count, and these tokens (N,)."""

    logits: Tensor
    targets: Tensor

    @classmethod
    def of(cls, model: nn.Module, output: Any, windows: Windows, rules: TokenRules) -> _Predictions | None:
        """None for a model without next-token logits."""
        logits_RCV = next_token_logits(model, output, windows.tokens)
        if logits_RCV is None:
            return None
        following_RC = windows.tokens[:, 1:]
        counts_RC = windows.kept[:, :-1] & windows.attended[:, 1:]
        if rules.bos_id is not None:
            counts_RC = counts_RC & (following_RC != rules.bos_id)
        positions = functional.pad(counts_RC, (0, 1)).flatten().nonzero().squeeze(1).to(logits_RCV.device)
        targets = following_RC[counts_RC].to(logits_RCV.device)
        return cls(logits_RCV.flatten(0, 1)[positions], targets)


@final
class _Losses:
    """Sums of cross-entropy and of KL divergence from the clean run."""

    def __init__(self) -> None:
        self.count = 0
        self._ce = 0.0
        self._kl = 0.0

    def add(self, run: _Predictions | None, clean: _Predictions | None) -> None:
        assert run is not None  # the clean run of the same model had logits
        for start in range(0, len(run.targets), _LOGITS_AT_ONCE):
            part = slice(start, start + _LOGITS_AT_ONCE)
            log_q = run.logits[part].float().log_softmax(-1)
            self._ce -= _sum(log_q.gather(1, run.targets[part].unsqueeze(1)))
            if clean is not None:
                log_p = clean.logits[part].float().log_softmax(-1)
                self._kl += _sum((log_p.exp() * (log_p - log_q)).sum(-1))
        self.count += len(run.targets)

    def ce(self) -> float:
        return self._ce / self.count if self.count else math.nan

    def compared(self, clean: _Losses, zero: _Losses) -> dict[str, float]:
        gap = zero.ce() - clean.ce()
        return {
            "ce": self.ce(),
            "ce_recovered": (zero.ce() - self.ce()) / gap if gap else math.nan,
            "kl": self._kl / self.count if self.count else math.nan,
        }


def _sum(values: Tensor) -> float:
    return values.cpu().double().sum().item()


@final
class _Metrics:
    """All metrics of one candidate."""

    def __init__(self, more: Sequence[Callable[[], Metric]]) -> None:
        self._rows: list[Metric] = [ExplainedVariance(), MeanSquaredError(), CosineSimilarity()]
        self._codes: list[Metric] = [L0(), DeadFraction(), *(make() for make in more)]
        self._has_codes = False

    def update(self, x: Tensor, y: Tensor, codes: SparseCodes | None) -> None:
        self._has_codes = codes is not None
        for metric in [*self._rows, *(self._codes if codes is not None else [])]:
            metric.update(x, y, codes)

    def compute(self) -> dict[str, float]:
        computed: dict[str, float] = {}
        for metric in [*self._rows, *(self._codes if self._has_codes else [])]:
            computed.update(metric.compute())
        return computed
