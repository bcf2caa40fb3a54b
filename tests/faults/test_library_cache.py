"""A library of the cache, truncated and with bits flipped at random: compiled again, and never loaded as it is."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from cllm_gpu.utils.compiler import compile_library, find_compiler
from cllm_gpu.utils.library_cache import is_sound

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_compiler() is None, reason="not run: needs a C++ compiler"),
]
LOADS, CHECKS = 40, 2000


def damaged(content: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        return content[: chance.randrange(len(content))]
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


def test_damaged_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path / "cache"))
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int seven() { return 7; }\n')
    target = compile_library([source], [], [])
    content, chance = target.read_bytes(), random.Random(13)
    undetected = 0
    for _ in range(CHECKS):
        target.write_bytes(damaged(content, chance))
        undetected += is_sound(target, [target])
    failed = 0
    program = (
        "import ctypes, pathlib, sys; from cllm_gpu.utils.compiler import compile_library\n"
        "sys.exit(ctypes.CDLL(str(compile_library([pathlib.Path(sys.argv[1])], [], []))).seven() - 7)"
    )
    for _ in range(LOADS):
        target.write_bytes(damaged(content, chance))
        failed += subprocess.run([sys.executable, "-c", program, str(source)], check=False).returncode != 0
    print(f"libraries damaged: {CHECKS + LOADS}, undetected: {undetected}, starts that failed: {failed} of {LOADS}")
    assert (undetected, failed) == (0, 0)
