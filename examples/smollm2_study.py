"""From a language model to a steered one, in five steps: cache, train, evaluate, study, steer.

The model is SmolLM2-135M from its wheel and the text is the docstrings of Python's standard library, as in smollm2.yaml, which
says what is trained: nothing is downloaded. Every step leaves its result in a folder, and a step whose result is there already
is not done again, so the script can be stopped and repeated.

    uv run python examples/smollm2_study.py --out runs/smollm2-study
    uv run python examples/smollm2_study.py --out runs/short --set train.total_samples=100000 --rows 60000
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sae_core import SAE, Trainer, create
from sae_core.config import structure
from sae_core.run import RunConfig, read_run
from sae_lm import (
    CachedActivations,
    CachedActivationsConfig,
    HuggingFaceSource,
    HuggingFaceSourceConfig,
    StudyConfig,
    StudyFolder,
    evaluate_sae,
    spliced,
    steer,
    study,
    write_cache,
)

PROMPT = "This function returns the"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Do the five steps and print what came out; returns it, too."""
    asked = parsed(arguments)
    run = read_run(Path(__file__).with_name("smollm2.yaml"), asked.overrides)
    settings = {key: value for key, value in run.source.items() if key != "name"}
    source = HuggingFaceSource(structure(settings, HuggingFaceSourceConfig))
    out: Path = asked.out

    # 1. The model runs over the training text once; its activations go to disk.
    record = write_cache(source, out / "cache", rows=asked.rows)
    print(f"1. cache: {record['rows']:,} activations in {len(record['shards'])} file(s)")

    # 2. Training reads them from there, as often as it likes.
    sae = SAE.load(out / "sae") if (out / "sae" / "cfg.json").is_file() else trained(run, out)
    print(f"2. train: {sae.d_sae:,} latents of {', '.join(source.sites)}")

    # 3. What the dictionary explains on text held out from training, and what it costs the model to run on its output.
    result = evaluate_sae(sae, source, tokens=asked.tokens)
    result.save(out / "sae", {"sae": str(out / "sae")})
    print(f"3. eval, on {result.activations:,} held-out activations and {result.predictions:,} next tokens")
    for name, numbers in result.candidates.items():
        shown = "explained_variance", "l0", "ce_recovered", "kl"
        print(f"   {name:6} " + "  ".join(f"{key} {numbers[key]:.4f}" for key in shown))

    # 4. What each latent is about.
    folder = out / "study"
    if not (folder / "index.json").is_file():
        study(sae, source, folder, StudyConfig(tokens=asked.study_tokens))
    found = StudyFolder(folder)
    latent = asked.latent if asked.latent is not None else telling(found)
    tokens = ", ".join(repr(text) for text, _ in found.promoted(latent)[:6])
    density = found.latents["density"][latent]
    print(f"4. study: latent {latent} is active at {density:.2%} of positions and promotes {tokens}")
    for example in list(found.examples(latent))[:3]:
        marked = [f"[{text}]" if place == example.peak else text for place, text in enumerate(example.texts)]
        print(f"   {example.value:7.2f}  {''.join(marked)[-90:]!r}")

    # 5. The model with that latent turned up at every position of the prompt and of what it writes.
    before, after, gain = steered(sae, source, found, latent, times=asked.times)
    print(f"5. steer: the promoted tokens gain {gain:.2f} nats")
    print(f"   without  {before!r}\n   with     {after!r}")
    return {
        "cache": record,
        "evaluation": result,
        "study": found,
        "latent": latent,
        "texts": (before, after),
        "gain": gain,
    }


def trained(run: RunConfig, out: Path) -> SAE[Any]:
    """What the run file says, trained on the cache."""
    cached = CachedActivations(CachedActivationsConfig(path=out / "cache", seed=run.seed, on_exhausted="cycle"))
    sae = create(**(run.sae or {}), d_in=cached.d_in, seed=run.seed)
    Trainer(sae, cached, run.train).fit()
    sae.save(out / "sae")
    return sae


def telling(found: StudyFolder) -> int:
    """A latent that knows which word comes next: in its top examples that word is among the three tokens it promotes most."""
    from safetensors.torch import load_file

    examples, windows = (load_file(found.path / f"{name}.safetensors") for name in ("examples", "windows"))
    latents, last = found.latents, windows["tokens"].shape[1] - 1
    top = (examples["band"] == 0) & (examples["position"] < last)
    behind = windows["tokens"][examples["window"].clamp_min(0), (examples["position"].long() + 1).clamp(0, last)]
    words = torch.tensor([token for token, text in found.tokens.items() if text.strip().isalpha()])
    expected = (behind.unsqueeze(-1) == latents["promoted_tokens"][:, :3].unsqueeze(1)).any(-1) & torch.isin(
        behind, words
    )
    share = (expected & top).sum(1) / top.sum(1).clamp_min(1)
    effect = latents["promoted_logits"][:, 0] * latents["mean_active"]
    score = share + effect / effect.max() / 100  # among equals, the one that does most for its first token
    seldom = (latents["density"] < 0.02) & (latents["windows"] >= 5)
    return int(torch.where(seldom, score, -torch.inf).argmax())


@torch.no_grad()
def steered(
    sae: SAE[Any], source: HuggingFaceSource, found: StudyFolder, latent: int, *, times: float
) -> tuple[str, str, float]:
    """What the model writes without and with the latent, and what the tokens it promotes gain after the prompt, in nats."""
    model: Any = source.language_model.model
    tokenizer: Any = source.tokenizer
    tokens = torch.tensor([[source.rules.bos_id, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]])
    tokens = tokens.to(source.language_model.device)
    promoted = found.latents["promoted_tokens"][latent][:3].long().to(tokens.device)
    strength = times * float(found.latents["mean_active"][latent])
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": source.rules.pad_id}

    def look() -> tuple[str, float]:
        odds = model(tokens).logits[0, -1].float().log_softmax(-1)[promoted].mean().item()
        written = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return tokenizer.decode(written[0], skip_special_tokens=True), odds

    before, odds_before = look()
    positions = slice(1, None)  # BOS stays as it is
    with spliced(model, sae, error_term=True, edit=steer(latent, strength, positions=positions)):
        after, odds_after = look()
    return before, after, odds_after - odds_before


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2-study"), help="folder for all results")
    parser.add_argument("--rows", type=int, help="activations to cache (default: one pass over the text)")
    parser.add_argument("--tokens", type=int, default=8_192, help="activations to evaluate on (default: 8192)")
    parser.add_argument("--study-tokens", type=int, default=50_000, help="positions to study (default: 50000)")
    parser.add_argument(
        "--latent", type=int, help="the latent to steer (default: one with an effect that is easy to see)"
    )
    parser.add_argument("--times", type=float, default=8.0, help="how often its mean activation to add (default: 8)")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change a setting of smollm2.yaml",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
