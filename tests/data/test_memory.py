"""Preparing and opening a corpus takes memory for a few pieces of it, whatever its size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FILE_BYTES = 64 * 2**20
# Two shard blocks of 4 MiB, eight verification buffers of 4 MiB, and under 10 MiB of pieces of text: 50 MiB.
# The file alone would be 64 MiB, its tokens 128 MiB.
BOUND_BYTES = 56 * 2**20

PROGRAM = """
import sys
from pathlib import Path
from cllm_gpu.data import open_dataset

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

def opened(path):
    return open_dataset(path, tokenizer="bytes", validation_fraction=0.05, seed=1, cache_folder=Path(sys.argv[3]),
                        context=64)

opened(sys.argv[1])
before = peak()
dataset = opened(sys.argv[2])
print(peak() - before, len(dataset.train) + len(dataset.validation))
"""

RECORDS = {
    "lines.txt": "This is a line of text, neither short nor long.\n",
    "one_line.txt": "This is a text without any line end at all. ",
    "lines.jsonl": '{"text": "' + "This is a record with a text of usual length." * 40 + '"}\n',
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("name", RECORDS)
def test_memory_is_bounded(tmp_path: Path, name: str) -> None:
    record = RECORDS[name].encode()
    small, large = (tmp_path / f"{size}_{name}" for size in ("small", "large"))
    small.write_bytes(record * 100)
    block = record * (2**20 // len(record))
    with large.open("wb") as file:
        for _ in range(FILE_BYTES // len(block)):
            file.write(block)
    command = [sys.executable, "-c", PROGRAM, str(small), str(large), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    growth, tokens = map(int, done.stdout.split())
    print(f"{name}: {growth / 2**20:.1f} MiB for {large.stat().st_size / 2**20:.0f} MiB")
    assert tokens > FILE_BYTES * 0.95
    assert growth <= BOUND_BYTES
    large.unlink()
