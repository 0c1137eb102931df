"""ftkit chat with several adapters: one base in memory, each row its own adapter, comparisons, votes, saved chats."""

import io
import json
import shutil

import pytest
import torch
from conftest import assert_refused

from ftkit.commands import chat_terminal
from ftkit.commands.chat_rows import preference_rows
from ftkit.commands.chat_session import Session, Vote
from ftkit.commands.chat_subjects import load_speakers, open_asked
from ftkit.core.adapter_choice import BASE, is_more_than_lora, unmixable, use_adapter
from ftkit.core.answering import passes
from ftkit.core.conversation import Conversation, answers_to
from ftkit.core.decoding import Decoding
from ftkit.core.generation import Sampling
from ftkit.errors import ExitCode
from ftkit.io.ready_lines import ReadyLines
from ftkit.io.several_adapters import short_names

torch.set_num_threads(1)


def make_adapter(base, folder, seed, **options):
    """An adapter with random weights, as PEFT writes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **options)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    tuned.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(scope="session")
def adapters(tiny_model, tmp_path_factory):
    """Folders of adapters on the tiny model: two plain ones, one with DoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    made = {name: make_adapter(tiny_model, folder / name, seed) for seed, name in enumerate(("fable", "poem"))}
    return made | {"dora": make_adapter(tiny_model, folder / "dora", 2, use_dora=True)}


def open_speakers(*folders, template="chatml"):
    """As chat opens them, in float32: in bfloat16 batches may round a near tie the other way."""
    speakers = load_speakers(open_asked([str(folder) for folder in folders]), template, "cpu")
    speakers[0].model.float()
    return speakers


@pytest.fixture(scope="session")
def speakers(adapters):
    """fable, poem and their base, which takes conversations."""
    return open_speakers(adapters["fable"], adapters["poem"])


TEXTS = ["Once upon a time", "a", "Below is an instruction that describes a task", "Response", "b c d", "Write"]


def asked(speakers, texts=TEXTS):
    """Each text for the speakers in turn."""
    chosen = [speakers[number % len(speakers)] for number in range(len(texts))]
    said = [[{"role": "user", "content": text}] for text in texts]
    return [(speaker, speaker.prompt(turns, 8)) for speaker, turns in zip(chosen, said, strict=True)]


def test_names_are_the_parts_of_paths_that_differ():
    assert short_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert short_names(["runs/a/adapter", "runs/b/adapter"]) == ["a", "b"]
    assert short_names(["x/tuned", "y/tuned"]) == ["x/tuned", "y/tuned"]
    assert short_names(["org/llama", "runs/a/merged"]) == ["llama", "a"]


def test_a_mixed_batch_answers_as_each_adapter_alone(speakers):
    assert [speaker.name for speaker in speakers] == ["fable", "poem", "base"]
    rows, sampling = asked(speakers), Sampling(12)
    together = answers_to(rows, sampling)
    assert together == [answers_to([row], sampling)[0] for row in rows]
    assert len({tuple(answers_to([(speaker, rows[0][1])], sampling)[0].ids) for speaker in speakers}) == 3


def test_one_pass_with_rows_of_several_adapters_has_the_logits_of_each_alone(speakers):
    model, prompts = speakers[0].model, [[5, 6, 7], [5, 6, 7], [9, 8]]
    mixed = Decoding(model, prompts, adapters=["adapter0", BASE, "adapter1"]).logits()
    alone = torch.cat(
        [
            Decoding(model, [ids], adapters=[name]).logits()
            for ids, name in zip(prompts, ["adapter0", BASE, "adapter1"], strict=True)
        ]
    )
    assert torch.allclose(mixed, alone, rtol=1e-4, atol=1e-4)
    assert (mixed[0] - mixed[1]).abs().max() > 0.1


def test_dora_answers_one_by_one_and_it_is_said(adapters, capsys):
    found = open_speakers(adapters["fable"], adapters["dora"])
    assert "dora: more than plain LoRA" in capsys.readouterr().err
    assert unmixable(found[0].model, ["adapter0", "adapter1", BASE]) == ["adapter1"]
    assert passes(found[0].model, ["adapter0", "adapter1", BASE, "adapter1"]) == [[0, 2], [1, 3]]
    rows = asked(found)
    assert answers_to(rows, Sampling(8)) == [answers_to([row], Sampling(8))[0] for row in rows]


def test_only_lora_shares_passes():
    from peft import LoHaConfig, LoraConfig

    assert is_more_than_lora(LoHaConfig(r=4)) and is_more_than_lora(LoraConfig(modules_to_save=["lm_head"]))
    assert not is_more_than_lora(LoraConfig(r=4, use_rslora=True))


def test_switching_moves_no_weights(speakers):
    model = speakers[0].model
    places = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    for name in ("adapter1", BASE, "adapter0", "adapter1"):
        use_adapter(model, name)
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == places
    assert not any(tensor.requires_grad for tensor in model.parameters())


def test_an_adapter_of_another_base_is_refused_and_named(adapters, tiny_model, tmp_path, run_here):
    from transformers import AutoModelForCausalLM

    other = tmp_path / "other-base"
    shutil.copytree(tiny_model, other)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(other)
    stray = make_adapter(other, tmp_path / "stray", 3)
    result = run_here("chat", adapters["fable"], stray, "-p", "hello")
    assert_refused(result, ExitCode.MODEL, "stray", "their bases are", other, tiny_model)
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    assert len(open_asked([str(adapters["fable"]), str(copy)])) == 2  # a copy of the base is the base


def test_an_adapter_with_biases_can_only_be_alone(adapters, tiny_model, tmp_path, run_here):
    biased = make_adapter(tiny_model, tmp_path / "biased", 4, bias="all")
    result = run_here("chat", adapters["fable"], biased, "-p", "hello")
    assert_refused(result, ExitCode.MODEL, "biased changes the base's own biases")
    assert [speaker.name for speaker in open_speakers(biased)] == ["biased"]


def test_what_cannot_be_switched_off_is_alone_and_has_no_base_beside_it(adapters, tiny_model, tmp_path, run_here):
    from peft import IA3Config, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    configs = {
        "prompt": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]),
    }
    for name, config in configs.items():
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path / name)
    result = run_here("chat", adapters["fable"], tmp_path / "prompt", "-p", "hello")
    assert_refused(result, ExitCode.MODEL, "virtual tokens in front of every prompt")
    assert [speaker.name for speaker in open_speakers(tmp_path / "prompt")] == ["prompt"]
    result = run_here("chat", adapters["fable"], tmp_path / "ia3", "-p", "hello")
    assert_refused(result, ExitCode.MODEL, "adapters of different kinds (IA3 and LORA)")
    assert [speaker.name for speaker in open_speakers(tmp_path / "ia3")] == ["ia3", "base"]


def test_rows_name_the_adapter_that_answers_them(adapters, run_here):
    names = ["poem", None, "base", "fable", "poem"]
    rows = [{"prompt": "Once upon a time"} | ({"adapter": name} if name else {}) for name in names]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    options = ("chat", adapters["fable"], adapters["poem"], "--max-new", 6, "--json")
    result = run_here(*options, stdin=lines)
    assert result.exit_code == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["adapter"] for row in found] == ["poem", "fable", None, "fable", "poem"]
    assert found[0] == found[4] and found[1] == found[3] and len({row["answer"] for row in found}) == 3
    bad = run_here(*options, stdin=lines + '{"prompt": "x", "adapter": "peom"}\n')
    assert bad.exit_code == ExitCode.DATA and bad.stdout == result.stdout  # those before it are answered
    assert "<stdin>:6: no adapter 'peom' here" in bad.stderr and "did you mean 'poem'?" in bad.stderr


# what people type


@pytest.fixture
def type_lines(speakers, capsys, tmp_path, monkeypatch):
    """Type lines to a conversation with three speakers; returns (the session, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*lines, chosen=speakers):
        waiting = iter(lines)

        def read_line():
            line = next(waiting, None)
            if line is None:
                raise EOFError
            return line

        session = Session(Conversation(chosen[0], Sampling(4)), chosen)
        chat_terminal.converse(session, read_line)
        return session, *capsys.readouterr()

    return run


def test_an_adapter_is_chosen_by_name_and_sees_the_conversation(type_lines):
    session, _, err = type_lines("Hello.", "/adapter", "/adapter poem", "And now?", "/adapter peom")
    assert "  fable (answers now)\n  poem\n  base\n" in err
    assert "poem answers, and sees the conversation so far" in err and "did you mean 'poem'?" in err
    assert session.conversation.speaker.name == "poem" and len(session.conversation.turns) == 4
    alone = type_lines("Hello.", "/adapter poem", "And now?", chosen=session.speakers)[0]
    assert alone.conversation.turns == session.conversation.turns


def test_all_answers_stand_side_by_side_and_change_nothing(type_lines, speakers):
    session, out, err = type_lines("/compare Hello.", "/compare", "/compare Hello.")
    answers = Conversation(speakers[0], Sampling(4)).compare("Hello.", speakers)
    for speaker, answer in zip(speakers, answers, strict=True):
        assert f"{speaker.name}: {answer.text.strip()}" in out
    assert session.conversation.turns == [] and "/compare needs a question" in err
    assert "nothing to compare it with" in type_lines("/compare x", chosen=speakers[:1])[2]


def test_a_vote_is_blind_and_becomes_rows_that_prep_reads(type_lines, tmp_path, run_here):
    session, out, err = type_lines("/vote Hello.", "b", "/vote And?", "no vote but a question", "a")
    assert not any(f"{name}:" in out for name in ("fable", "poem", "base"))
    assert "which is best? a, b, c" in err and "votes so far: " in err and sum(session.wins.values()) == 1
    rows = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    [winner] = session.wins
    assert [row["chosen_by"] for row in rows] == [winner] * 2
    assert {row["rejected_by"] for row in rows} == {"fable", "poem", "base"} - {winner}
    assert rows[0]["prompt"] == [{"role": "user", "content": "Hello."}]
    assert [turn["content"] for turn in session.conversation.turns[::2]] == ["no vote but a question", "a"]
    prepared = run_here("prep", "votes.jsonl")
    assert prepared.exit_code == 0, prepared.stderr
    assert {"prompt", "chosen", "rejected"} == set(json.loads(prepared.stdout.splitlines()[0]))


def test_an_empty_answer_makes_no_row():
    vote = Vote(
        [{"role": "user", "content": "Hi"}], False, {"a": "", "b": "x", "c": "y"}, {"a": "p", "b": "q", "c": "r"}
    )
    assert preference_rows(vote, "a") == []
    [row] = preference_rows(vote, "b")
    assert row == {"prompt": "Hi", "chosen": "x", "rejected": "y", "chosen_by": "q", "rejected_by": "r"}


def test_saved_conversations_are_training_rows(type_lines, tmp_path, run_here):
    _, _, err = type_lines(
        "/save", "One?", "/system be brief", "Two?", "/save", "/save", "Three?", "/save", "/save no/x"
    )
    assert "nothing has been said yet" in err and "nothing has been said since the last /save" in err
    assert "its beginning is there already" in err and "no/x: No such file or directory" in err
    short, long = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert [turn["role"] for turn in short["messages"]] == ["system", *["user", "assistant"] * 2]
    assert long["messages"][:5] == short["messages"] and len(long["messages"]) == 7
    prepared = run_here("prep", "chat.jsonl", "--template", "chatml")
    assert prepared.exit_code == 0 and json.loads(prepared.stdout.splitlines()[0])["messages"] == short["messages"]


def test_rows_are_added_to_rows_only_and_behind_a_line_that_was_cut_off(type_lines, tmp_path):
    (tmp_path / "notes.txt").write_text("mine\n")
    (tmp_path / "cut.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"')
    _, _, err = type_lines("One?", "/save notes.txt", "/save cut.jsonl", "Two?", "/save cut.jsonl")
    assert "notes.txt: is there and holds no rows" in err and (tmp_path / "notes.txt").read_text() == "mine\n"
    _, cut, one, two = (tmp_path / "cut.jsonl").read_text().splitlines()
    assert cut == '{"prompt"' and len(json.loads(one)["messages"]) == 2 and len(json.loads(two)["messages"]) == 4


def test_questions_that_were_asked_alone_are_saved_as_rows_of_their_own(type_lines, adapters, tmp_path, run_here):
    alone = open_speakers(adapters["fable"], template="alpaca")
    type_lines("One?", "Two?", "/save", "Three?", "/save", "/vote Four?", "a", chosen=alone)
    rows = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["One?", "Two?", "Three?"]
    [vote] = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert vote["prompt"] == "Four?" and {vote["chosen_by"], vote["rejected_by"]} == {"fable", "base"}
    for name in ("chat.jsonl", "votes.jsonl"):
        prepared = run_here("prep", name, "--template", "alpaca")
        assert prepared.exit_code == 0 and "alpaca@" in prepared.stdout, prepared.stderr


def test_retry_and_undo_do_not_read_again_what_was_read(type_lines, speakers):
    session, *_ = type_lines("Tell me a story about a fox.", "/retry")
    assert speakers[0].kept.computed == 1
    type_lines("Tell me a story about a fox.", "And?", "/undo", "So?", chosen=session.speakers)
    assert 1 < speakers[0].kept.computed < 20


# lines as they come


def test_lines_in_memory_are_ready_and_whole():
    lines = ReadyLines(io.BytesIO(b"one\n\ntwo"))
    assert lines.is_ready() and list(lines) == [b"one\n", b"\n", b"two"] and lines.is_ready()


def test_a_line_is_ready_when_it_is_whole_and_not_blank(tmp_path):
    import os

    read, write = os.pipe()
    with os.fdopen(read, "rb") as source, os.fdopen(write, "wb", buffering=0) as sink:
        lines = ReadyLines(source)
        assert not lines.is_ready()
        sink.write(b"half")
        assert not lines.is_ready()
        sink.write(b" a line\n\n")
        assert lines.is_ready() and next(lines) == b"half a line\n"
        assert not lines.is_ready()  # the blank line is nothing to wait for
        sink.close()
        assert lines.is_ready() and list(lines) == [b"\n"]


def test_who_asks_line_by_line_is_answered_line_by_line(tiny_model):
    import subprocess
    import sys

    command = [sys.executable, "-m", "ftkit", "chat", str(tiny_model), "--max-new", "2", "--json", "-q"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        for text in ("one", "two"):
            program.stdin.write(f"{text}\n\n".encode())
            program.stdin.flush()
            assert json.loads(program.stdout.readline())["prompt"] == text
        program.stdin.close()
        assert program.wait(60) == 0
