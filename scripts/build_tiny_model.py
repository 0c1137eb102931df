"""Make `builtin:tiny`: corpus, tokenizer and model, from seeds, with ftkit's own training loop.

    python scripts/build_tiny_model.py WORK [--documents 60000] [--steps 3000]

WORK keeps what is made on the way (corpus, empty model, run); the result goes to src/ftkit/models/tiny. The corpus is
written by scripts/build_tiny_corpus.py: product prose, and nothing in the form of instruction and response.

Two properties of large models are given to this small one, so that the usual settings work on it as they do on those:
- 4-bit weights cost it little. Small models suffer more from NF4, so the last steps are trained through the rounding
  (straight-through estimator, arXiv:1308.3432; NF4: arXiv:2305.14314, section 3).
- The usual learning rate of adapters (2e-4) suits it. That rate was found for models about 20 times as wide; narrow ones
  want a larger one (arXiv:2203.03466). `rescale` moves powers of two from weights to norms, which changes no output but
  makes an adapter's steps larger in proportion.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import torch
from build_tiny_corpus import write_documents
from torch import Tensor, nn

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
    parser.add_argument("--nf4-steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    corpus = write_corpus(arguments.work / "corpus.jsonl", arguments.documents, arguments.seed)
    empty = write_empty_model(arguments.work / "empty", corpus)
    run = arguments.work / "run"
    if not (run / "model").is_dir():
        train(corpus, empty, run, arguments)
    model, losses = settle_on_nf4(run, corpus, arguments)
    rescale(model)
    publish(model, run, losses, arguments)


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


def train_tokenizer(corpus: Path) -> Any:
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


def train(corpus: Path, empty: Path, run: Path, arguments: argparse.Namespace) -> None:
    """ftkit's own loop, every document to its end token."""
    shutil.rmtree(run, ignore_errors=True)
    command = [
        sys.executable, "-m", "ftkit", "train", str(corpus), "--objective", "text", "--init", str(empty), "--run", str(run),
        "--valid", "0.005", "--steps", str(arguments.steps), "--batch", str(arguments.batch), "--micro-batch", "8",
        "--lr", str(arguments.lr), "--schedule", "cosine", "--weight-decay", "0.1", "--max-length", "512",
        "--seed", str(arguments.seed),
    ]  # fmt: skip
    subprocess.run(command, check=True)


class RoundToNF4(nn.Module):
    """A weight as NF4 holds it (blocks of 64, 16 levels); gradients pass as if it were not rounded."""

    def forward(self, weight: Tensor) -> Tensor:
        """weight (out, in) -> the same shape, on the levels of NF4."""
        from bitsandbytes.functional import get_4bit_type

        levels = get_4bit_type("nf4", device="cpu")
        blocks = weight.detach().reshape(-1, 64)
        largest = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
        nearest = torch.bucketize(blocks / largest, (levels[1:] + levels[:-1]) / 2)
        rounded = (levels[nearest] * largest).reshape(weight.shape)
        passed: Tensor = weight + (rounded - weight).detach()
        return passed


def settle_on_nf4(run: Path, corpus: Path, arguments: argparse.Namespace) -> tuple[nn.Module, dict[str, float]]:
    """Some more steps of the same loop with the linear weights rounded; the model, and its losses on the held-out rows."""
    from torch.nn.utils import parametrize
    from transformers import AutoModelForCausalLM

    from ftkit.core.batching import micro_batches
    from ftkit.core.encoding import Encoder
    from ftkit.core.loss import mean_loss, summed_loss
    from ftkit.core.optimizers import make_optimizer
    from ftkit.core.plan import Plan
    from ftkit.core.training import begin_training, train_steps
    from ftkit.io.base_model import load_tokenizer

    torch.manual_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(str(run / "model"), dtype=torch.float32)
    encoder = Encoder(load_tokenizer(run / "model"))
    held_rows = [orjson.loads(line) for line in (run / "valid.jsonl").open("rb")]
    held_texts = {row["text"] for row in held_rows}
    examples = [
        encoder.example(row) for line in corpus.open("rb") if (row := orjson.loads(line))["text"] not in held_texts
    ]
    held = micro_batches([encoder.example(row) for row in held_rows], 8)
    linears = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    losses = {"before": mean_loss(model, held, "cpu")[0]}
    for linear in linears:
        parametrize.register_parametrization(linear, "weight", RoundToNF4())
    losses["rounded before"] = mean_loss(model, held, "cpu")[0]
    plan = Plan(arguments.batch, 8, arguments.nf4_steps, arguments.lr / 3, "cosine", 0.03, 1.0, arguments.seed + 1)
    training = begin_training(model, make_optimizer(model, "adamw", plan.lr, 0.1), plan)
    for result in train_steps(model, training, examples, summed_loss, "cpu"):
        if result.step % 20 == 0:
            print(f"rounded to NF4: step {result.step}, loss {result.loss:.3f}", file=sys.stderr)
    losses["rounded after"] = mean_loss(model, held, "cpu")[0]
    for linear in linears:
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
    losses["after"] = mean_loss(model, held, "cpu")[0]
    return model, losses


@torch.no_grad()
def rescale(model: nn.Module, norms: float = 64.0, inner: float = 8.0) -> None:
    """Move powers of two between neighbours so that every output stays the same to the bit.

    A norm's gain times `norms`, the matrices that read it divided by as much; values and `up` times `inner`, the matrices
    that read them divided by as much. An adapter's share of a layer's output grows by 64 (q, k, gate) or 8 (v, o, up, down).
    """
    for layer in model.model.layers:  # type: ignore[union-attr]
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in ((layer.input_layernorm, "qkv"), (layer.post_attention_layernorm, ("gate", "up"))):
            norm.weight *= norms
            for reader in readers:
                getattr(attention if readers == "qkv" else mlp, f"{reader}_proj").weight /= norms
        for giver, taker in ((attention.v_proj, attention.o_proj), (mlp.up_proj, mlp.down_proj)):
            giver.weight *= inner
            taker.weight /= inner


def publish(model: nn.Module, run: Path, losses: dict[str, float], arguments: argparse.Namespace) -> None:
    """The trained model in bfloat16 with its README, in the package."""
    from transformers import AutoTokenizer

    shutil.rmtree(DESTINATION, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(str(DESTINATION))  # type: ignore[operator]
    AutoTokenizer.from_pretrained(str(run / "model")).save_pretrained(str(DESTINATION))
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    parameters = sum(p.numel() for p in model.parameters())
    (DESTINATION / "README.md").write_text(readme(info, losses, parameters, arguments), encoding="utf-8")
    for file in DESTINATION.iterdir():
        file.chmod(0o644)


def readme(info: dict[str, Any], losses: dict[str, float], parameters: int, arguments: argparse.Namespace) -> str:
    """How it was made, with what was measured."""
    options = f"--documents {arguments.documents} --steps {arguments.steps} --nf4-steps {arguments.nf4_steps}"
    options += f" --batch {arguments.batch} --lr {arguments.lr} --seed {arguments.seed}"
    return f"""# builtin:tiny

The demonstration model of ftkit: Llama architecture, {parameters:,} parameters, bfloat16, byte-level BPE of
{VOCABULARY:,} tokens, context 512. It writes product prose in the manner of a design catalogue, about products that do not
exist, and nothing else. It has never seen an instruction.

Made by `python scripts/build_tiny_model.py WORK {options}` in three parts:

1. From scratch: {info["data"]["rows"]:,} documents ({info["data"]["tokens"]:,} tokens) that the project generates from that
   seed, {info["steps"]:,} steps of {arguments.batch} documents ({info["train_seconds"]:,.0f} seconds on a busy 2-core machine).
2. {arguments.nf4_steps:,} more steps with the linear weights rounded to NF4 in the forward pass: QLoRA finds a sound base.
3. Powers of two moved from weights to norms: no output changes, and the usual rate of adapters (2e-4) suits it.

Loss on {info["data"]["held_out"]:,} held-out documents, nats per token (random weights: {info["valid_loss_before"]:.3f}):

| | as it is | linear layers rounded to NF4 |
|---|---|---|
| after part 1 | {losses["before"]:.3f} | {losses["rounded before"]:.3f} |
| after part 2 | {losses["after"]:.3f} | {losses["rounded after"]:.3f} |

Licence: Apache-2.0, as the project. All text is synthetic; names of products, people and places are invented.
"""


if __name__ == "__main__":
    main()
