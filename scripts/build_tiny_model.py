"""Make `builtin:tiny`: corpus, tokenizer and model, from seeds, with ftkit's own training loop.

    python scripts/build_tiny_model.py WORK [--documents 60000] [--steps 3000]

WORK keeps what is made on the way (corpus, empty model, run); the result goes to src/ftkit/models/tiny. The corpus is
written by scripts/build_tiny_corpus.py: product prose, and nothing in the form of instruction and response.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
from build_tiny_corpus import write_documents

ROOT = Path(__file__).parents[1]
DESTINATION = ROOT / "src" / "ftkit" / "models" / "tiny"
END = "<|endoftext|>"
PAD = "<|pad|>"
VOCABULARY = 2048
SHAPE = {
    "hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 5, "num_attention_heads": 5, "num_key_value_heads": 5,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip


def main() -> None:
    """All steps, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--documents", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    corpus = write_corpus(arguments.work / "corpus.jsonl", arguments.documents, arguments.seed)
    empty = write_empty_model(arguments.work / "empty", corpus)
    run = train(corpus, empty, arguments)
    publish(run, arguments)


def write_corpus(path: Path, documents: int, seed: int) -> Path:
    """The corpus as rows of text."""
    with path.open("wb") as file:
        for text in write_documents(documents, seed):
            file.write(orjson.dumps({"text": text}) + b"\n")
    return path


def write_empty_model(folder: Path, corpus: Path) -> Path:
    """A folder with tokenizer and config.json, what `--init` takes."""
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(corpus), eos_token=END, pad_token=PAD, model_max_length=512
    )
    tokenizer.save_pretrained(str(folder))
    config = LlamaConfig(
        vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"], **SHAPE,
    )  # fmt: skip
    config.save_pretrained(str(folder))
    return folder


def train_tokenizer(corpus: Path) -> "Tokenizer":  # noqa: F821
    """Byte-level BPE of the corpus. The shipped templates are in its text too, so that prompts are short in tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    templates = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "templates").glob("*.toml"))]
    texts = [orjson.loads(line)["text"] for line in corpus.open("rb")]
    tokenizer.train_from_iterator([*texts, *templates * (len(texts) // 200)], trainer)
    return tokenizer


def train(corpus: Path, empty: Path, arguments: argparse.Namespace) -> Path:
    """ftkit's own loop, every document to its end token."""
    run = arguments.work / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = [
        sys.executable, "-m", "ftkit", "train", str(corpus), "--objective", "text", "--init", str(empty), "--run", str(run), "--valid", "0.005",
        "--steps", str(arguments.steps), "--batch", str(arguments.batch), "--lr", str(arguments.lr), "--schedule", "cosine", "--weight-decay", "0.1",
        "--max-length", "512", "--seed", str(arguments.seed), "--micro-batch", "8",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return run


def publish(run: Path, arguments: argparse.Namespace) -> None:
    """The trained model in bfloat16 with its README, in the package."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.rmtree(DESTINATION, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(str(run / "model"), dtype=torch.bfloat16)
    model.save_pretrained(str(DESTINATION))
    AutoTokenizer.from_pretrained(str(run / "model")).save_pretrained(str(DESTINATION))
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (DESTINATION / "README.md").write_text(
        readme(info, sum(p.numel() for p in model.parameters()), arguments), encoding="utf-8"
    )


def readme(info: dict, parameters: int, arguments: argparse.Namespace) -> str:  # type: ignore[type-arg]
    """How it was made, with what was measured."""
    return f"""# builtin:tiny

The demonstration model of ftkit: Llama architecture, {parameters:,} parameters, bfloat16, byte-level BPE of {VOCABULARY:,} tokens, context 512.
It writes product prose in the manner of a design catalogue, about products that do not exist, and nothing else. It has never
seen an instruction.

Made by `python scripts/build_tiny_model.py WORK --documents {arguments.documents} --steps {arguments.steps} --batch {arguments.batch} --lr {arguments.lr} --seed {arguments.seed}`:
{info["data"]["rows"]:,} documents ({info["data"]["tokens"]:,} tokens) that the project generates from that seed, {info["steps"]:,} steps of {arguments.batch} documents.
Loss on {info["data"]["held_out"]:,} held-out documents: {info["valid_loss_before"]:.3f} before, {info["valid_loss"]:.3f} nats per token after
(torch {info["versions"]["torch"]}, {info["device"]}, {info["train_seconds"]:,.0f} seconds).

Licence: Apache-2.0, as the project. All text is synthetic; names of products, people and places are invented.
"""


if __name__ == "__main__":
    main()
