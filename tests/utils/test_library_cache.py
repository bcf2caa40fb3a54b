"""The cache of compiled code: whose folder it is, and that a damaged library is compiled again, never loaded."""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path

import pytest

from cllm_gpu.simulator import build, manifest
from cllm_gpu.utils.compiler import compile_library, find_compiler
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.library_cache import cache_directory, code_folder

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="not run: needs a C++ compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o000, 0o077])
def test_the_folder_is_its_owners_alone(cache: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        folder = code_folder("compiled")
    finally:
        os.umask(before)
    assert folder == cache / "compiled"
    assert (mode(cache), mode(folder)) == (0o700, 0o700)


@pytest.mark.parametrize("bits", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_may_write_is_refused(bits: int) -> None:
    folder = code_folder("compiled")
    folder.chmod(bits)
    with pytest.raises(UserError, match=rf"others may write {folder} \(mode {bits:o}\).*CLLM_CACHE_DIR.*chmod go-w"):
        code_folder("compiled")
    folder.chmod(0o755)
    assert code_folder("compiled") == folder


def test_a_folder_of_another_user_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = code_folder("compiled")
    if os.geteuid() == 0:
        os.chown(folder, 12345, -1)
        owner = 12345
    else:
        owner = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(UserError, match=f"belongs to another user .id {owner}.: .*CLLM_CACHE_DIR"):
        code_folder("compiled")


def test_prepared_data_may_have_made_the_cache_first(cache: Path) -> None:
    (cache / "data").mkdir(parents=True)
    cache.chmod(0o775)
    code_folder("compiled")
    assert mode(cache) == 0o755


def test_paths_are_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLM_CACHE_DIR", "cache")
    with pytest.raises(UserError, match="CLLM_CACHE_DIR is 'cache'; it must be an absolute path"):
        cache_directory()
    monkeypatch.delenv("CLLM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_directory() == Path("/home/somebody/.cache/cllm_gpu")


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "empty", "changed", "no digest", "other digest", "longer"])
def test_a_damaged_library_is_compiled_again(tmp_path: Path, damage: str) -> None:
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int seven() { return 7; }\n')
    target = compile_library([source], [], [])
    assert compile_library([source], [], []) == target
    content, digest = target.read_bytes(), target.with_name(target.name + ".sha256")
    target.unlink()  # a new file: what was loaded before keeps its memory
    {
        "truncated": lambda: target.write_bytes(content[: len(content) // 2]),
        "empty": lambda: target.write_bytes(b""),
        "changed": lambda: target.write_bytes(bytes([content[0] ^ 1]) + content[1:]),
        "no digest": lambda: (target.write_bytes(content), digest.unlink()),
        "other digest": lambda: (target.write_bytes(content), digest.write_text("0" * 64)),
        "longer": lambda: target.write_bytes(content + b"\0"),
    }[damage]()
    assert compile_library([source], [], []) == target
    assert ctypes.CDLL(str(target)).seven() == 7


@needs_compiler
def test_a_damaged_kernel_is_compiled_again() -> None:
    source = 'extern "C" __global__ void k(int* y) { y[0] = 7; }'
    first = build.build(source, (), (), False).library
    (record,) = [path for path in first.parent.glob("*.json") if manifest.read(path) is not None]
    (code,) = (first.parent / "sources").iterdir()
    content = first.read_bytes()
    first.unlink()
    first.write_bytes(content[:1000])
    assert manifest.read(record) is None
    code.write_text("nonsense")
    for part in build.runtime_objects(False):
        part.write_bytes(part.read_bytes()[:100])
    again = build.build(source, (), (), False).library
    assert again == first
    assert manifest.read(record) is not None
    assert ctypes.CDLL(str(again)).sim_kernel_0() is not None


@needs_compiler
def test_a_record_names_libraries_beside_it_only(tmp_path: Path) -> None:
    built = build.build('extern "C" __global__ void k(int* y) { y[0] = 8; }', (), (), False)
    (record,) = [path for path in built.library.parent.glob("*.json") if manifest.read(path) is not None]
    other = tmp_path / "other.so"
    for path in (built.library, built.library.with_name(built.library.name + ".sha256")):
        (tmp_path / path.name.replace(built.library.stem, "other")).write_bytes(path.read_bytes())
    record.write_text(record.read_text().replace(built.library.name, str(other)))
    assert manifest.read(record) is None
