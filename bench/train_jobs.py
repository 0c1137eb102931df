"""The jobs of bench/train.py: a model folder and the same rows in the form that each program reads.

Rows come from `../shared/data`. Their ids are those of prompt and completion encoded as one text; a row whose two parts
encoded apart would give others is left out, so that every program trains the same tokens.
"""

import json
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ftkit.core.encoding import Encoder, Example
from ftkit.io.template_files import load_template

BATCH = 16
VALID_ROWS = 24
SYSTEM_TOKENS = 600
SHOTS = 5
SPECIALS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
TOKENIZER_TEXTS = (
    "instruct/code_alpaca_2k.json", "instruct/gsm8k_train.jsonl", "chat/oasst_questions_first476.jsonl",
    "text/tiny_shakespeare.txt", "text/wiki_demo.txt",
)  # fmt: skip

Row = dict[str, str]
"""prompt and completion."""


@dataclass(frozen=True)
class Job:
    """What one table measures: each of `rows` once or more in `steps` steps of BATCH rows.

    tokens and counted: of all rows of all steps, shared starts as often as they occur; counted ones are trained.
    valid: (ids, first trained place) of rows that nobody trains.
    """

    name: str
    folder: Path
    model: Path
    max_length: int
    steps: int
    rows: int
    tokens: int
    counted: int
    valid: list[tuple[list[int], int]]

    @property
    def epochs(self) -> float:
        """Passes over the rows."""
        return self.steps * BATCH / self.rows


@dataclass(frozen=True)
class Kind:
    """A data set: its title, its longest row, the model that learns it (None: the random one), steps for each asked.

    ways: which programs take part; with a SentencePiece tokenizer, others than these train other tokens.
    """

    title: str
    max_length: int
    model: str | None = None
    steps_times: int = 1
    ways: tuple[str, ...] = ("ftkit", "TRL", "TRL, packing", "LLaMA-Factory", "LitGPT")


KINDS = {
    "alpaca": Kind("Code Alpaca, alpaca template", 512),
    "gsm8k": Kind(f"GSM8K behind {SHOTS} examples", 2048),
    "system": Kind(f"chats behind a system prompt of {SYSTEM_TOKENS} tokens", 2048),
    "stories": Kind("stories260k, Code Alpaca, alpaca template", 512, "stories260k", 10, ("ftkit", "TRL")),
}


def make_job(name: str, shared: Path, work: Path, steps: int) -> Job:
    """Write the rows of a data set under work/NAME; the model is made once for all.

    Raises FileNotFoundError where `shared` has not got the data.
    """
    kind = KINDS[name]
    model = copy_model(shared / "models" / kind.model, work) if kind.model else make_model(shared / "data", work)
    encoder = Encoder(AutoTokenizer.from_pretrained(model))
    steps *= kind.steps_times
    fitting = list(rows_that_fit(make_rows(name, shared / "data", encoder), encoder, kind.max_length))
    random.Random(0).shuffle(fitting)
    valid, train = fitting[:VALID_ROWS], fitting[VALID_ROWS:]
    rows = min(steps, len(train) // BATCH) * BATCH
    train = train[:rows]
    folder = work / name
    write_rows(folder, [row for row, _ in train], [row for row, _ in valid])
    passes = steps * BATCH / rows
    return Job(
        name,
        folder,
        model,
        kind.max_length,
        steps,
        rows,
        round(passes * sum(len(example.ids) for _, example in train)),
        round(passes * sum(sum(example.counted) for _, example in train)),
        [(example.ids, example.counted.index(True)) for _, example in valid],
    )


def make_rows(name: str, data: Path, encoder: Encoder) -> list[Row]:
    """All rows of a data set, rendered."""
    if name == "gsm8k":
        return gsm8k_rows(data)
    return system_rows(data, encoder) if name == "system" else alpaca_rows(data)


def alpaca_rows(data: Path) -> list[Row]:
    """Code Alpaca behind Stanford's prompts."""
    template = load_template("alpaca")
    records = json.loads((data / "instruct/code_alpaca_2k.json").read_text(encoding="utf-8"))
    return [
        {"prompt": template.render_prompt(record), "completion": template.render_completion(record)}
        for record in records
        if record["output"]
    ]


def gsm8k_rows(data: Path) -> list[Row]:
    """Questions behind the same solved ones, as few-shot prompts are written."""
    records = read_jsonl(data / "instruct/gsm8k_train.jsonl")
    asked = [f"Question: {record['question']}\nAnswer:\n" for record in records]
    preamble = "".join(
        f"{prompt}{record['answer']}\n\n" for prompt, record in zip(asked[:SHOTS], records, strict=False)
    )
    return [
        {"prompt": preamble + prompt, "completion": record["answer"]}
        for prompt, record in zip(asked[SHOTS:], records[SHOTS:], strict=True)
    ][:1000]


def system_rows(data: Path, encoder: Encoder) -> list[Row]:
    """One-turn chats, all behind the same long text."""
    text = (data / "text/tiny_shakespeare.txt").read_text(encoding="utf-8")
    system = encoder.tokenizer.decode(encoder.encode(text[: 10 * SYSTEM_TOKENS])[:SYSTEM_TOKENS])
    turns = re.compile(r"### Human: (.*) ### Assistant:", re.DOTALL)
    records = read_jsonl(data / "chat/oasst_questions_first476.jsonl")
    found = [(turns.fullmatch(record["input"]), record["output"]) for record in records]
    return [
        {"prompt": f"{system}\n\nUser: {match[1]}\nBot:\n", "completion": answer}
        for match, answer in found
        if match and len(encoder.encode(answer)) <= SYSTEM_TOKENS
    ]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_that_fit(rows: Sequence[Row], encoder: Encoder, max_length: int) -> Iterator[tuple[Row, Example]]:
    """Rows that are short enough, and mean the same tokens however they are encoded."""
    for row in rows:
        example = encoder.example(dict(row))
        whole = encoder.tokenizer(row["prompt"] + row["completion"]).input_ids
        if (
            len(example.ids) < max_length
            and example.ids[:-1] == whole
            and row["completion"].strip() == row["completion"]
        ):
            yield row, example


def write_rows(folder: Path, train: list[Row], valid: list[Row]) -> None:
    """rows/train.jsonl (ftkit, TRL), llamafactory/, litgpt/."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("rows", "llamafactory", "litgpt"):
        (folder / name).mkdir(parents=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in train]
    (folder / "rows/train.jsonl").write_text("".join(lines), encoding="utf-8")
    write_json(folder / "llamafactory/rows.json", instructions(train, SPECIALS["bos_token"]))
    write_json(folder / "llamafactory/dataset_info.json", {"rows": {"file_name": "rows.json"}})
    write_json(folder / "litgpt/train.json", instructions(train))
    write_json(folder / "litgpt/val.json", instructions(valid))


def instructions(rows: list[Row], start: str = "") -> list[Row]:
    """Rendered prompts as instructions that need no template; LLaMA-Factory's empty one puts no BOS in front."""
    return [{"instruction": start + row["prompt"], "input": "", "output": row["completion"]} for row in rows]


def write_json(path: Path, value: Any) -> Path:
    """One JSON file (which is YAML too); its path."""
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def make_model(data: Path, work: Path) -> Path:
    """A Llama of 58 M random float32 weights with a vocabulary of 32,000, of the shape that the figures are about."""
    folder = work / "model"
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(data, folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32_000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
                         num_attention_heads=8, max_position_embeddings=2048, rms_norm_eps=1e-5,
                         tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_tokenizer(data: Path, folder: Path) -> None:
    """A byte-level BPE of 32,000 learnt from the data; one BOS in front, as Llama's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    texts = [(data / name).read_text(encoding="utf-8") for name in TOKENIZER_TEXTS]
    pieces = (text[at : at + 10_000].replace("\\n", "\n") for text in texts for at in range(0, len(text), 10_000))
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=list(SPECIALS.values()), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder)


def write_tokenizer_config(folder: Path) -> None:
    """By hand: transformers 5 writes a class that older peers do not know. LitGPT reads that there is a BOS here."""
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<unk>", "add_bos_token": True,
             "model_max_length": 2048, "clean_up_tokenization_spaces": False}  # fmt: skip
    write_json(folder / "tokenizer_config.json", {**SPECIALS, **facts})


def copy_model(source: Path, work: Path) -> Path:
    """A small real model with a pad token, which TRL asks for."""
    folder = work / source.name
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", {**config, "pad_token": "<unk>"})
    return folder
