"""Base models: found by name, refused where unsafe, damaged or no decoder, and loaded only if every weight is there."""

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftkit import console
from ftkit.errors import ExitCode, UserError
from ftkit.io.base_model import (
    BUILTIN,
    Base,
    check_base,
    check_tensors,
    config_sha256,
    context_length,
    find_base,
    load_tokenizer,
    load_weights,
    refuse_code,
    transformers_config,
    weights_sha256,
)

UP = "model.layers.1.mlp.up_proj.weight"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copy(tiny_model, tmp_path):
    """A copy of the tiny model whose config is changed; None takes a key out."""

    def make(name="copy", **changes):
        folder = tmp_path / name
        shutil.copytree(tiny_model, folder)
        config = json.loads((folder / "config.json").read_text())
        config = {key: value for key, value in {**config, **changes}.items() if key not in changes or value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def change_weights(folder, change):
    """Rewrite model.safetensors with what `change` does to its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(work, *arguments, **options):
    """The exit-4 error of a call; it has a hint, and is one line."""
    with pytest.raises(UserError) as error:
        work(*arguments, **options)
    assert error.value.exit_code == ExitCode.MODEL
    assert error.value.hint and "\n" not in error.value.message
    return error.value


def check(folder):
    return check_base(find_base(str(folder)))


def load(folder):
    return load_weights(find_base(str(folder)), dtype=torch.float32, device="cpu")


def parameter_shapes(folder):
    from ftkit.core.meta_model import build_meta_model

    model = build_meta_model(transformers_config(find_base(str(folder))), torch.float32)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


# finding


def test_a_folder_is_found_by_any_path_to_it(tiny_model, monkeypatch):
    monkeypatch.chdir(tiny_model.parent)
    for name in (str(tiny_model), "tiny", "./tiny", "./tiny/"):
        base = find_base(name)
        assert base.folder == tiny_model.resolve() and base.name == name and base.revision is None


def test_the_builtin_model_is_a_folder_of_the_package():
    assert find_base(BUILTIN).folder.is_absolute()
    assert find_base(BUILTIN).short_name == "tiny"


@pytest.mark.parametrize(
    ("name", "short"),
    [("Qwen/Qwen3-0.6B", "Qwen3-0.6B"), ("/a/b c/", "b-c"), ("~/ü/!!", "-"), (BUILTIN, "tiny"), ("/", "model")],
)
def test_a_short_name_fits_into_a_file_name(name, short):
    assert Base(name, "x").short_name == short


@pytest.mark.parametrize("name", ["./tinny", "../models/tinny"])
def test_a_mistyped_folder_names_the_nearest(tmp_path, monkeypatch, name):
    place = tmp_path / "models"
    (place / "tiny").mkdir(parents=True)
    monkeypatch.chdir(place)
    error = refused(find_base, name)
    assert error.message == f"{name}: no such model folder"
    assert "did you mean" in error.hint and "tiny'" in error.hint


def test_a_file_is_no_model_and_names_its_folder(copy):
    folder = copy()
    error = refused(find_base, str(folder / "model.safetensors"))
    assert "a file, not a model folder" in error.message and str(folder) in error.hint


def test_gguf_is_refused_as_a_file_and_as_a_folder(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for work, name in ((find_base, "x/model.gguf"), (check, tmp_path)):
        assert "GGUF is for llama.cpp" in refused(work, str(name)).message


# the config


def test_a_folder_without_a_config_is_no_model(copy):
    folder = copy()
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(check, folder).message


def test_an_adapter_folder_is_told_from_a_model(copy):
    folder = copy()
    (folder / "config.json").rename(folder / "adapter_config.json")
    error = refused(check, folder)
    assert "an adapter, not a base model" in error.message and "ftkit chat" in error.hint


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_broken_config_is_not_json(copy, content):
    folder = copy()
    (folder / "config.json").write_bytes(content)
    assert "config.json is not JSON" in refused(check, folder).message


def test_a_config_that_is_no_object_is_refused(copy):
    folder = copy()
    (folder / "config.json").write_text("[1]")
    assert "holds no settings" in refused(check, folder).message


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}},
        {"trust_remote_code": True},
        {"text_config": {"deep": [{"trust_remote_code": True}]}},
        {"_attn_implementation_internal": "sdpa"},
        {"_attn_implementation": "someone/kernel"},
        {"attn_implementation": {"": "someone/kernel"}},
        {"transformers_weights": "pytorch_model.bin"},
    ],
)
def test_a_config_that_brings_code_is_refused_by_the_name_of_the_key(copy, changes):
    error = refused(check, copy(**changes))
    key = next(iter(changes))
    assert f"'{'trust_remote_code' if key == 'text_config' else key}'" in error.message


def test_keys_that_only_look_alike_are_accepted():
    refuse_code({"trust_remote_code": False, "auto_map": None, "_attn_implementation": "sdpa", "x": "a/b"}, "m")


def test_code_beside_a_tokenizer_is_never_run(copy, tmp_path):
    folder = copy()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    load_tokenizer(find_base(str(folder)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"model_type": "bert", "architectures": None}, "bert"),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, "BertLMHeadModel"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "ViTForImageClassification"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ],
)
def test_what_does_not_write_text_is_refused_by_its_architecture(copy, changes, named):
    error = refused(check, copy(**changes))
    assert error.message.endswith(f"{named} does not generate text") and "ForCausalLM" in error.hint


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "nosuch"}, "nosuch"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int"),
        ({"hidden_size": 30}, "not a multiple"),
        ({"num_attention_heads": 0}, "zero"),
    ],
)
def test_a_config_that_transformers_cannot_read_says_why(copy, changes, reason):
    error = refused(check, copy(**changes))
    assert "transformers cannot read its config.json" in error.message and reason in error.message


def test_the_context_is_what_the_config_says(copy):
    assert context_length(transformers_config(find_base(str(copy())))) == 512


# weight files


def test_pickled_weights_are_refused_with_the_way_out(copy):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refused(check, folder)
    assert "only pickled weights (pytorch_model.bin)" in error.message and "safetensors" in error.hint


def test_a_shard_that_the_index_lists_and_is_missing_is_named(copy):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "b.safetensors: missing" in refused(check, folder).message


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": [1]}', '{"weight_map": {}}', '{"weight_map": 5}'])
def test_a_damaged_index_is_refused(copy, index):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    assert "damaged index" in refused(check, folder).message


def test_an_index_beside_a_single_file_is_passed_over_as_transformers_does(copy):
    folder = copy()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    check(folder)
    load(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "an HTML page"),
        (bytes(4096), "filled with zeros"),
        (b"PK\x03\x04" + bytes(100), "a pickle"),
        (b"\x80\x02}q\x00." + bytes(100), "a pickle"),
        (b"abc", "too short"),
        (struct.pack("<Q", 2**63) + b"{}", "cut off"),
        (struct.pack("<Q", 9) + b"not json!", "not JSON"),
    ],
)
def test_what_is_in_the_weight_file_instead_is_told(copy, content, words):
    folder = copy()
    (folder / "model.safetensors").write_bytes(content)
    error = refused(check, folder)
    assert words in error.message and "model.safetensors" in error.message


def test_a_file_that_is_cut_off_says_so(copy):
    folder = copy()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    assert "cut off?" in refused(check, folder).message


def write_raw(path, header, data=bytes(8)):
    """A safetensors file with just this header text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b'{"a": %s, "a": %s}' % ((json.dumps(ENTRY).encode(),) * 2), "'a' stands twice"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [2, 6]}}, "'b' overlaps"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [6, 10]}}, "'b' leaves a hole"),
        ({"a": {**ENTRY, "shape": [2]}}, "'a' has a wrong entry"),
        ({"a": {**ENTRY, "dtype": "F99"}}, "'a' has a wrong entry"),
        ({"a": {**ENTRY, "data_offsets": [4, 0]}}, "'a' has a wrong entry"),
        ({"a": {**ENTRY, "data_offsets": [0, 4.0]}}, "'a' has a wrong entry"),
        ({"a": {**ENTRY, "shape": [-1, -1]}}, "'a' has a wrong entry"),
        ({"a": 5}, "'a' has a wrong entry"),
        ({"a": ENTRY}, "its tensors end at"),
    ],
)
def test_a_header_that_lies_is_refused_by_the_tensor(copy, header, words):
    folder = copy()
    write_raw(folder / "model.safetensors", header)
    assert words in refused(check, folder).message


def test_a_tensor_of_a_wrong_shape_is_named_before_anything_is_loaded(copy):
    folder = copy()
    change_weights(folder, lambda tensors: tensors.update({UP: torch.zeros(60, 32)}))
    error = refused(check_tensors, find_base(str(folder)), parameter_shapes(folder))
    assert f"tensor '{UP}' is [60, 32], config.json makes it [64, 32]" in error.message


def test_a_missing_tensor_is_named_before_and_while_loading(copy):
    folder = copy()
    change_weights(folder, lambda tensors: tensors.pop(UP))
    for work in (lambda: check_tensors(find_base(str(folder)), parameter_shapes(folder)), lambda: load(folder)):
        assert f"its files lack '{UP}' (1 in all)" in refused(work).message


def test_a_layer_more_in_the_config_than_in_the_files_is_not_made_up(copy):
    folder = copy(num_hidden_layers=3)
    assert "its files lack 'model.layers.2." in refused(load, folder).message
    assert "(9 in all)" in refused(check_tensors, find_base(str(folder)), parameter_shapes(folder)).message


def test_tensors_without_a_place_are_said(copy, capsys):
    folder = copy(num_hidden_layers=1)
    check_tensors(find_base(str(folder)), parameter_shapes(folder))
    load(folder)
    assert "no layer takes 'model.layers.1.input_layernorm.weight' (9 tensors left out)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stories260k", "tinystories-chat-3m"])
def test_real_models_pass_every_check(shared, name):
    folder = shared / "models" / name  # tied embeddings; GPT-Neo
    check(folder)
    check_tensors(find_base(str(folder)), parameter_shapes(folder))


def test_loaded_weights_are_those_of_the_file_frozen_and_in_the_format_asked_for(tiny_model):
    base = find_base(str(tiny_model))
    model = load_weights(base, dtype=torch.bfloat16, device="cpu")
    stored = load_file(tiny_model / "model.safetensors")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, stored[name].bfloat16()) for name, p in model.named_parameters())


# identity


def test_the_weights_checksum_tells_trainings_apart_and_copies_not(copy):
    one, other = find_base(str(copy("one"))), find_base(str(copy("other")))
    assert weights_sha256(one) == weights_sha256(other) and config_sha256(one) == config_sha256(other)
    change_weights(other.folder, lambda tensors: tensors[UP].mul_(1.001))
    assert weights_sha256(one) != weights_sha256(other) and config_sha256(one) == config_sha256(other)


# tokenizers


def test_without_a_tokenizer_the_files_that_could_be_one_are_listed(copy):
    folder = copy()
    (folder / "tokenizer.json").unlink()
    error = refused(load_tokenizer, find_base(str(folder)))
    assert "has no tokenizer" in error.message and "tokenizer.json" in error.hint


def test_a_broken_tokenizer_says_why(copy):
    folder = copy()
    (folder / "tokenizer.json").write_text('{"x":')
    assert "its tokenizer cannot be loaded: Expecting value" in refused(load_tokenizer, find_base(str(folder))).message


def test_a_tokenizer_that_cannot_stop_is_refused(copy):
    folder = copy()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "no end-of-text token" in refused(load_tokenizer, find_base(str(folder))).message


def test_a_tokenizer_larger_than_the_embedding_tells_both_sizes(tiny_model):
    error = refused(load_tokenizer, find_base(str(tiny_model)), 300)
    assert "ids up to 458" in error.message and "300 rows" in error.message


# the hub, without one


def in_new_process(code, **environment):
    """Run Python with other settings of the hub's library, which reads them once; its output as JSON lines, seconds."""
    started = time.monotonic()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr, time.monotonic() - started


FIND = """
import json, sys
from ftkit import console
console.silence_libraries()
from ftkit.errors import UserError
from ftkit.io.base_model import find_base
for name, revision in json.loads(sys.stdin.read() or 'null') or NAMES:
    try:
        base = find_base(name, revision)
        print(json.dumps([base.location, base.revision]))
    except UserError as error:
        print(json.dumps([int(error.exit_code), error.message, error.hint]))
"""


def test_an_id_that_is_not_in_the_cache_is_told_at_once_offline_and_without_a_network(tmp_path):
    (tmp_path / "tiny").mkdir()
    code = f"import os; os.chdir({str(tmp_path)!r}); NAMES = [('acme/nosuch', None), ('tinny', None)]" + FIND
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    no_network = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}  # nobody listens there
    for environment in (offline, no_network):
        (there, typo), said, seconds = in_new_process(code, **environment)
        assert there[0] == typo[0] == ExitCode.MODEL and said == ""
        assert there[1] == "acme/nosuch: no folder here, not in the cache, and Hugging Face cannot be reached"
        assert "builtin:tiny" in there[2] and typo[2] == "did you mean 'tiny'?"
        assert seconds < 20  # the hub's library alone would retry for half a minute


class FakeHub(BaseHTTPRequestHandler):
    """Answers as the hub does where it gives nothing: an error code for each name of a repository."""

    def do_HEAD(self):
        code = {"gated": "GatedRepo", "branch": "RevisionNotFound", "gguf": "EntryNotFound"}
        name = self.path.split("/")[2]
        self.send_response(403 if name == "gated" else 404)
        self.send_header("X-Error-Code", code.get(name, "RepoNotFound"))
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments):
        pass


def test_what_the_hub_answers_becomes_what_to_do(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = "[('acme/gated', None), ('acme/branch', 'v9'), ('acme/gguf', None), ('acme/none', None)]"
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": "hf_secret",
    }
    (gated, branch, gguf, none), said, _ = in_new_process(f"NAMES = {names}" + FIND, **environment)
    server.shutdown()
    assert {answer[0] for answer in (gated, branch, gguf, none)} == {ExitCode.MODEL}
    assert "consent" in gated[1] and "hf auth login" in gated[2]
    assert "no revision v9" in branch[1] and "has no config.json" in gguf[1] and "not on Hugging Face" in none[1]
    assert "hf_secret" not in said + str([gated, branch, gguf, none])


def test_an_id_in_the_cache_works_without_a_network_and_is_pinned_to_its_commit(tiny_model, tmp_path):
    repository = tmp_path / "hub" / "models--acme--tiny"
    shutil.copytree(tiny_model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    code = """
import json, torch
from ftkit import console
console.silence_libraries()
from ftkit.io.base_model import check_base, find_base, load_tokenizer, load_weights
base = find_base("acme/tiny")
config = check_base(base)
tokenizer = load_tokenizer(base, config.vocab_size)
model = load_weights(base, dtype=torch.float32, device="cpu")
print(json.dumps([base.location, base.revision, str(base.folder), len(tokenizer), model.config.hidden_size]))
"""
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    [found], said, seconds = in_new_process(code, **environment)
    assert found == ["acme/tiny", COMMIT, "None", 459, 32] and said == ""
    assert seconds < 30


def test_the_default_is_said_once_with_what_to_pass_instead(capsys):
    from ftkit.io.base_model import say_default

    console.set_level(console.NORMAL)
    say_default("Qwen/Qwen3-0.6B")
    assert capsys.readouterr().err == ""
    say_default(BUILTIN)
    assert "--model" in capsys.readouterr().err
