"""What ftkit prep writes is what other programs read: `datasets` loads every kind, TRL's trainers make batches of it."""

import pytest
from prep_shell import jsonl

CHAT = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
CALL = {"type": "function", "function": {"name": "area", "arguments": {"x": 2}}}
CALLING = [
    CHAT[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]
KINDS = {
    "pairs": {"prompt": "Below is a question:\nwhy?", "completion": " Because."},
    "chats": {"messages": CHAT},
    "calls": {"messages": CALLING, "tools": [{"type": "function", "function": {"name": "area"}}]},
    "texts": {"text": "Once upon a time."},
    "labels": {"text": "a", "label": "x"},
    "preferences": {"prompt": "Below is a question:\nwhy?", "chosen": " Because.", "rejected": " No."},
    "preferred chats": {"prompt": CHAT[:3], "chosen": CHAT[3:4], "rejected": CHAT[5:6]},
    "judged": {"prompt": "Why?", "completion": " Because.", "label": True},
    "judged chats": {"prompt": CHAT[:1], "completion": CHAT[1:2], "label": False},
}


@pytest.fixture
def dataset(prep, tmp_path, monkeypatch):
    """Rows of a kind, written by prep and read by `datasets`."""
    import datasets

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))

    def read(name, *options, rows=None):
        rows = rows or [KINDS[name], KINDS[name]]
        result = prep("-o", "rows.jsonl", "--dedupe", "none", "--force", *options, stdin=jsonl(*rows))
        assert result.exit_code == 0, result.stderr
        path, cache = str(tmp_path / "rows.jsonl"), str(tmp_path / "cache")
        return datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)

    return read


@pytest.mark.parametrize("name", KINDS)
def test_datasets_reads_every_kind_of_row(dataset, name):
    (row, again) = dataset(name).to_list()
    assert row == again == KINDS[name]


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="TRL is in the dev extra")


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    """The small model's tokenizer, with a chat template that knows tools."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(tiny_model)
    found.pad_token = "<|im_end|>"
    found.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return found


@pytest.fixture
def batch_of(trl, tokenizer, tiny_model, tmp_path):
    """The first batch that one of TRL's trainers makes of a data set."""

    def make(kind, data):
        options = {"output_dir": str(tmp_path / "run"), "report_to": "none", "use_cpu": True, "bf16": False}
        config = getattr(trl, f"{kind}Config")(**options, per_device_train_batch_size=2, gradient_checkpointing=False)
        trainer = getattr(trl, f"{kind}Trainer")(
            str(tiny_model), args=config, train_dataset=data, processing_class=tokenizer
        )
        return next(iter(trainer.get_train_dataloader()))

    return make


def trained(tokenizer, batch, row=0):
    """The text of the tokens that count."""
    labels = batch["labels"][row]
    return tokenizer.decode(batch["input_ids"][row][labels != -100])


@pytest.mark.parametrize("template", [[], ["--template", "alpaca"]])
def test_trl_trains_the_very_tokens_of_a_completion_that_ftkit_trains(dataset, batch_of, tokenizer, template):
    from ftkit.core.encoding import Encoder

    rows = [{"question": "why?", "answer": "Because of the rain."}] * 2 if template else None
    data = dataset("pairs", *template, rows=rows)
    batch = batch_of("SFT", data)
    ours = Encoder(tokenizer, None).example(data[0])
    assert batch["input_ids"][0].tolist() == ours.ids
    assert [label != -100 for label in batch["labels"][0].tolist()] == [bool(counted) for counted in ours.counted]
    assert trained(tokenizer, batch) == data[0]["completion"] + tokenizer.eos_token


def test_trl_trains_conversations_tool_calls_and_texts_whole(dataset, batch_of, tokenizer):
    chat = trained(tokenizer, batch_of("SFT", dataset("chats", "--template", "chatml")))
    assert chat == tokenizer.apply_chat_template(CHAT, tokenize=False)
    call = trained(tokenizer, batch_of("SFT", dataset("calls")))
    assert '"name": "area"' in call and call.endswith("It is 4.<|im_end|>\n")
    assert trained(tokenizer, batch_of("SFT", dataset("texts"))) == "Once upon a time." + tokenizer.eos_token


@pytest.mark.parametrize("name", ["preferences", "preferred chats"])
@pytest.mark.parametrize("kind", ["DPO", "Reward"])
def test_trl_makes_batches_of_pairs_of_answers(dataset, batch_of, tokenizer, name, kind):
    texts = tokenizer.batch_decode(batch_of(kind, dataset(name))["input_ids"], skip_special_tokens=True)
    row = KINDS[name]
    chosen, rejected = (
        side if isinstance(side, str) else side[0]["content"] for side in (row["chosen"], row["rejected"])
    )
    assert [chosen.strip() in text for text in texts] == [True, True, False, False]
    assert [rejected.strip() in text for text in texts] == [False, False, True, True]


@pytest.mark.parametrize("name", ["judged", "judged chats"])
def test_trl_makes_batches_of_judged_answers(dataset, batch_of, name):
    batch = batch_of("KTO", dataset(name))
    assert list(batch["label"]) == [KINDS[name]["label"]] * 2
