"""Room for what will be written and loaded, asked for before it is needed."""

import shutil

import pytest

from ftkit.errors import ExitCode, UserError
from ftkit.io import free_space
from ftkit.io.free_space import available_memory, require_disk, require_memory, size


def test_a_disk_with_too_little_room_is_exit_74_with_both_sizes(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    require_disk(tmp_path / "not" / "yet", 1000, "3 checkpoints take", hint="make room")
    with pytest.raises(UserError, match=f"3 checkpoints take {size(free * 2)}, the disk has") as caught:
        require_disk(tmp_path, free * 2, "3 checkpoints take", hint="make room")
    assert caught.value.exit_code == ExitCode.IO


def test_memory_that_the_machine_lacks_is_exit_5():
    free = available_memory()
    if free is None:
        pytest.skip("only Linux says how much memory is free")
    require_memory(1000, "loading it")
    with pytest.raises(UserError, match="loading it takes") as caught:
        require_memory(free * 2, "loading it")
    assert caught.value.exit_code == ExitCode.MEMORY


def test_the_free_memory_is_what_linux_calls_available(tmp_path, monkeypatch):
    facts = tmp_path / "meminfo"
    facts.write_text("MemTotal:  24 kB\nMemFree: 1 kB\nMemAvailable:   5 kB\nBuffers: 3 kB\n")
    monkeypatch.setattr(free_space, "MEMORY_FACTS", facts)
    assert available_memory() == 5 * 1024
    monkeypatch.setattr(free_space, "MEMORY_FACTS", tmp_path / "elsewhere")
    assert available_memory() is None
    require_memory(1e30, "anything")  # unknown: nothing is refused


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "2 KB"), (12e6, "12 MB"), (13.5e9, "13.5 GB")]
)
def test_sizes_in_words(count, words):
    assert size(count) == words
