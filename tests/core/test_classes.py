"""The loss of a head for classes is transformers' own, whatever stands behind a text in its batch."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight
from transformers import AutoModelForSequenceClassification, BertConfig, DistilBertConfig, GPT2Config, LlamaConfig

from ftkit.core.adapters import make_trainable, trainable_parameters
from ftkit.core.batching import make_batch
from ftkit.core.class_evaluation import as_example, log_probabilities
from ftkit.core.classes import balanced_weights, class_logits, class_loss, class_names, class_scores
from ftkit.core.targets import resolve_targets
from ftkit.core.train_settings import TrainSettings
from ftkit.io.class_head import ClassHead, with_classes

NAMES = ("bad", "fine", "good")
SMALL = {"vocab_size": 64, "max_position_embeddings": 64}
WIDE = {**SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "bert": lambda: BertConfig(**WIDE),
    "distilbert": lambda: DistilBertConfig(**SMALL, dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    "gpt2": lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": lambda: LlamaConfig(**WIDE, num_key_value_heads=2),
}
HEADS = {
    "bert": ["bert.pooler", "classifier"],
    "distilbert": ["classifier", "pre_classifier"],
    "gpt2": ["score"],
    "llama": ["score"],
}
every_kind = pytest.mark.parametrize("kind", list(CONFIGS))


def build(kind, dtype=torch.float32):
    torch.manual_seed(0)
    config = with_classes(CONFIGS[kind](), NAMES, pad_id=2)
    return AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval()


def texts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (length,), generator=generator).tolist() for length in (9, 5, 17)]


@every_kind
def test_the_loss_is_that_of_transformers_row_by_row(kind):
    """So no row sees a pad, and the head reads the last token of each row."""
    model, labels = build(kind), [2, 0, 1]
    with torch.no_grad():
        theirs = sum(
            float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([label])).loss)
            for ids, label in zip(texts(), labels, strict=True)
        )
        batch = make_batch([as_example(ids, label) for ids, label in zip(texts(), labels, strict=True)])
        assert float(class_loss(model, batch)) == pytest.approx(theirs, rel=1e-5)
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in texts()])
        torch.testing.assert_close(class_logits(model, batch), alone, rtol=1e-4, atol=1e-5)
        logs = torch.stack(log_probabilities(model, [as_example(ids) for ids in texts()]))
        torch.testing.assert_close(logs, alone.log_softmax(-1), rtol=1e-4, atol=1e-5)


@every_kind
def test_the_config_asks_for_the_head_and_carries_the_labels(kind):
    config = build(kind).config
    assert config.id2label == dict(enumerate(NAMES)) and config.label2id["good"] == 2 and config.num_labels == 3
    assert config.architectures[0].endswith("ForSequenceClassification")


@every_kind
def test_an_adapter_leaves_the_head_whole_and_trains_it_beside(kind):
    model = build(kind, torch.bfloat16)
    head = ClassHead(model)
    assert head.names == HEADS[kind]
    for target in resolve_targets(model, "all-linear"):
        assert not any(name == target or name.endswith("." + target) for name in head.names)
        assert not any(
            head.holds(name) for name, _ in model.named_modules() if name == target or name.endswith("." + target)
        )
    tuned = make_trainable(model, TrainSettings(r=2))
    named = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or ".modules_to_save." in name for name in named)
    for name in head.names:
        assert any(f"{name}.modules_to_save" in each for each in named)
    assert {p.dtype for p in trainable_parameters(tuned)} == {torch.float32}
    batch = make_batch([as_example(ids, 1) for ids in texts()])
    class_loss(tuned, batch).backward()
    assert class_logits(tuned, batch).dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable_parameters(tuned))


def test_labels_are_numbered_by_size_or_alphabet():
    assert class_names([10, 2, 2, 0]) == ("0", "2", "10")
    assert class_names(["b", " a", "b "]) == ("a", "b") and class_names(["b", 3]) == ("3", "b")


def test_balanced_weights_are_scikit_learns():
    classes = [0, 0, 0, 1, 2, 2]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=classes)
    assert balanced_weights(classes) == pytest.approx([expected[number] for number in classes])
    assert sum(balanced_weights(classes)) == pytest.approx(len(classes))


def test_accuracy_and_macro_f1_are_scikit_learns():
    truths, told = [0, 0, 1, 2, 2, 2, 1], [0, 1, 1, 2, 0, 2, 1]
    found = class_scores(truths, told, NAMES)
    assert found["accuracy"] == pytest.approx(5 / 7)
    assert found["macro_f1"] == pytest.approx(f1_score(truths, told, average="macro"))
