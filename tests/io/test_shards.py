"""Safetensors files: written as others read them; damaged ones refused, in words."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from ftkit.errors import ExitCode, UserError
from ftkit.io.shards import INDEX, SINGLE, NewTensor, plan_shards, read_chunks, read_header, read_layout, write_shards
from ftkit.io.tensors import bytes_of, is_finite, read_tensor, same_values

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.weight": torch.arange(5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "flags": torch.tensor([True, False, True]),
    "number": torch.tensor(7, dtype=torch.int64),
}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.bool: "BOOL", torch.int64: "I64"}


def described(tensors):
    return [NewTensor(name, DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(folder, tensors, **options):
    folder.mkdir(exist_ok=True)
    write_shards(folder, described(tensors), lambda new: [bytes_of(tensors[new.name])], **options)
    return folder


def read_all(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("shard_bytes", [1, 30, 10**9])
def test_what_is_written_is_what_the_safetensors_library_reads(tmp_path, shard_bytes):
    found = read_all(write(tmp_path / "x", TENSORS, shard_bytes=shard_bytes))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert {name: place.shape for name, place in read_layout(tmp_path / "x").items()} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }


def test_one_shard_has_no_index_and_several_have_one_that_lists_every_tensor(tmp_path):
    one, many = write(tmp_path / "one", TENSORS), write(tmp_path / "many", TENSORS, shard_bytes=30)
    assert [file.name for file in one.iterdir()] == [SINGLE]
    index = json.loads((many / INDEX).read_text())
    assert set(index["weight_map"]) == set(TENSORS)
    assert set(index["weight_map"].values()) == {file.name for file in many.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())


def test_the_order_in_which_tensors_come_does_not_show_in_the_bytes(tmp_path):
    turned = dict(reversed(TENSORS.items()))
    for shard_bytes in (30, 10**9):
        a = write(tmp_path / "a", TENSORS, shard_bytes=shard_bytes)
        b = write(tmp_path / "b", turned, shard_bytes=shard_bytes)
        assert {f.name: f.read_bytes() for f in a.iterdir()} == {f.name: f.read_bytes() for f in b.iterdir()}


def test_the_index_comes_last(tmp_path):
    def content(new):
        assert not (tmp_path / INDEX).exists()
        if new.name == "flags":
            raise RuntimeError("interrupted")
        return [bytes_of(TENSORS[new.name])]

    with pytest.raises(RuntimeError):
        write_shards(tmp_path, described(TENSORS), content, shard_bytes=1)
    assert not (tmp_path / INDEX).exists()


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 100))
def test_no_shard_is_larger_than_the_limit_but_for_a_single_tensor(sizes, limit):
    tensors = [NewTensor(f"t{number}", "U8", (size,)) for number, size in enumerate(sizes)]
    shards = plan_shards(tensors, limit)
    assert sorted(t.name for shard in shards for t in shard) == sorted(t.name for t in tensors), "each in one shard"
    assert all(sum(t.nbytes for t in shard) <= limit or sum(t.nbytes > 0 for t in shard) == 1 for shard in shards)


def test_every_tensor_is_aligned_to_its_values(tmp_path):
    for place in read_layout(write(tmp_path / "x", TENSORS)).values():
        width = place.nbytes // max(1, torch.Size(place.shape).numel())
        assert width == 0 or place.start % width == 0


def test_a_tensor_comes_back_in_chunks_and_whole(tmp_path):
    places = read_layout(write(tmp_path / "x", TENSORS))
    assert [len(chunk) for chunk in read_chunks(places["b.weight"], 16)] == [16, 16, 16]
    assert torch.equal(read_tensor(places["b.weight"]), TENSORS["b.weight"])
    assert read_tensor(places["empty"]).shape == (0, 3)


def test_values_are_compared_to_the_bit_and_through_a_cast(tmp_path):
    weight = torch.randn(3, 4)
    versions = {"same": weight, "cast": weight.bfloat16(), "other": weight + torch.eye(3, 4) * 1e-6}
    places = {name: read_layout(write(tmp_path / name, {"w": tensor}))["w"] for name, tensor in versions.items()}
    old = read_layout(write(tmp_path / "old", {"w": weight}))["w"]
    assert {name: same_values(old, place) for name, place in places.items()} == {
        "same": True,
        "cast": True,
        "other": False,
    }


def test_nan_and_infinity_are_seen_in_every_format():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for bad in (float("nan"), float("inf"), float("-inf")):
            assert is_finite(torch.ones(9, dtype=dtype))
            assert not is_finite(torch.tensor([1.0, bad, 2.0], dtype=dtype))


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start, end):
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}


ENTRY = json.dumps(entry(0, 1)).encode()
DAMAGED = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "page": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
    "zeros": (bytes(4096), "filled with zeros"),
    "pickle": (b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01", "pickle"),
    "short": (b"abc", "too short"),
    "endless header": (struct.pack("<Q", 2**63) + b"{}" * 40, "cut off?"),
    "no JSON": (raw(b"{not json" + b" " * 60), "not JSON"),
    "twice": (raw(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", b"x"), "'a' stands twice"),
    "hole": (raw({"a": entry(0, 2), "b": entry(3, 4)}, b"xxxx"), "'b' leaves a hole"),
    "overlap": (raw({"a": entry(0, 2), "b": entry(1, 4)}, b"xxxx"), "'b' overlaps"),
    "cut": (raw({"a": entry(0, 100)}, b"x" * 60), "cut off?"),
    "wrong shape": (raw({"a": entry(0, 8) | {"dtype": "F32"}}, b"x" * 8), "'a' has a wrong entry"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_with_what_is_wrong(tmp_path, kind):
    content, words = DAMAGED[kind]
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_header(tmp_path / SINGLE)
    assert raised.value.exit_code == ExitCode.MODEL
    assert words in raised.value.message and SINGLE in raised.value.message


@pytest.mark.parametrize("header_bytes", [0x3C20, 0x4B50, 0x1780])  # lengths that begin with " <", "PK", "\\x80"
def test_a_header_whose_length_looks_like_other_content_is_read(tmp_path, header_bytes):
    text = json.dumps({"a": entry(0, 1)}).encode()
    (tmp_path / SINGLE).write_bytes(raw(text.ljust(header_bytes), b"x"))
    assert list(read_header(tmp_path / SINGLE)) == ["a"]


def test_a_shard_that_the_index_lists_and_that_is_not_there_is_named(tmp_path):
    folder = write(tmp_path / "x", TENSORS, shard_bytes=30)
    missing = sorted(folder.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(UserError, match=missing.name):
        read_layout(folder)


def test_an_index_that_points_out_of_its_folder_is_refused(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="leaves the folder"):
        read_layout(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(UserError, match="'a' is also in"):
        read_layout(tmp_path)


def test_pickled_weights_are_refused_by_name(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        read_layout(tmp_path)
