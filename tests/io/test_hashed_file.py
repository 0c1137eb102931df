"""A file that is written and hashed by threads."""

import os
from hashlib import sha256
from pathlib import Path

import pytest

from ftkit.io import hashed_file
from ftkit.io.hashed_file import HashedFile


def test_what_is_written_is_what_was_given_with_its_sha256(tmp_path, monkeypatch):
    monkeypatch.setattr(hashed_file, "WAITING_BYTES", 1000)
    monkeypatch.setattr(hashed_file, "FLUSHED_BYTES", 3000)
    pieces = [os.urandom(size) for size in (10, 999, 5000, 0, 1)] * 5
    with HashedFile(tmp_path / "file") as file:
        for piece in pieces:
            file.write(piece)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert file.sha256 == sha256(b"".join(pieces)).hexdigest()


def test_a_full_disk_is_told_by_the_end_of_the_block():
    with pytest.raises(OSError, match="No space left"), HashedFile(Path("/dev/full")) as file:
        file.write(b"x")
