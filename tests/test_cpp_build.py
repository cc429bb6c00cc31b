"""Compiling C++ at run time: the cache, its keys, what goes wrong."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from planish.codegen import cpp_build
from planish.ir.errors import PlanishError

ANSWER = 'extern "C" int answer() { return %d; }\n'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PLANISH_CPP_ARCH", "x86-64-v3")
    return tmp_path / "cache" / "cpp"


def test_a_text_is_compiled_once(cache: Path) -> None:
    pending = cpp_build.start(ANSWER % 42, "answer")
    assert pending.library().answer() == 42 and pending.library() is pending.library()
    path = cpp_build.path_of(ANSWER % 42, "answer")
    made = path.stat().st_mtime_ns
    assert cpp_build.build(ANSWER % 42, "answer") == path and path.stat().st_mtime_ns == made
    assert path.with_suffix(".cpp").read_text() == ANSWER % 42
    assert sorted(p.name for p in cache.iterdir()) == sorted([path.name, path.with_suffix(".cpp").name])


def test_the_name_depends_on_all_that_the_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {cpp_build.path_of(ANSWER % 1, "answer"), cpp_build.path_of(ANSWER % 2, "answer")}
    monkeypatch.setenv("PLANISH_CPP_ARCH", "x86-64-v2")
    names.add(cpp_build.path_of(ANSWER % 1, "answer"))
    monkeypatch.setenv("PLANISH_CPP_ARCH", "native")
    names.add(cpp_build.path_of(ANSWER % 1, "answer"))
    monkeypatch.setattr(cpp_build, "_machine", lambda: "another processor")
    names.add(cpp_build.path_of(ANSWER % 1, "answer"))
    monkeypatch.setattr(cpp_build, "FLAGS", (*cpp_build.FLAGS, "-g"))
    names.add(cpp_build.path_of(ANSWER % 1, "answer"))
    monkeypatch.setenv("PLANISH_CXX", sys.executable)  # another file stands for another compiler
    names.add(cpp_build.path_of(ANSWER % 1, "answer"))
    assert len(names) == 7


def test_processes_that_compile_the_same_text_at_once(cache: Path) -> None:
    code = f"from planish.codegen import cpp_build; print(cpp_build.start({ANSWER % 7!r}, 'answer').library().answer())"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in started] == ["7"] * 3
    assert len(list(cache.glob("*.so"))) == 1 and not list(cache.glob(".making*"))


def test_a_text_that_does_not_compile(cache: Path) -> None:
    pending = cpp_build.start("int answer( {", "wrong")
    for _ in range(2):
        with pytest.raises(PlanishError, match=r"wrong\.cpp: does not compile; .*error"):
            pending.library()
    assert list(cache.iterdir()) == []


def test_a_library_that_was_removed_is_compiled_again() -> None:
    pending = cpp_build.start(ANSWER % 3, "answer")
    path = cpp_build.build(ANSWER % 3, "answer")
    path.unlink()
    assert pending.library().answer() == 3


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANISH_CXX", "")
    assert cpp_build.compiler() == ""
    with pytest.raises(PlanishError, match=r"kernels for the CPU: need a C\+\+ compiler"):
        cpp_build.build(ANSWER % 1, "answer")
    monkeypatch.setenv("PLANISH_CXX", "/nowhere/g++")
    with pytest.raises(PlanishError, match=r"/nowhere/g\+\+: no compiler; |/nowhere/g\+\+: no compiler: "):
        cpp_build.build(ANSWER % 1, "answer")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "file"))
    with pytest.raises(PlanishError, match="the cache cannot be written"):
        cpp_build.build(ANSWER % 1, "answer")


def test_a_forked_process_compiles_by_itself() -> None:
    pending = cpp_build.start(ANSWER % 5, "answer")
    pending._process = os.getpid() + 1  # as if it were started by the parent
    assert pending.library().answer() == 5


def test_constants_are_each_library_s_own(cache: Path) -> None:
    """One text is compiled once; what it leaves open is set in copies."""
    text = """extern "C" {
static float constants[2];
void set_constants(const float *given) { __builtin_memcpy(constants, given, sizeof constants); }
float difference() { return constants[0] - constants[1]; }
}"""
    made = [cpp_build.start(text, "open", given).library() for given in ((3.0, 1.0), (1.0, 3.0), (3.0, 1.0))]
    for library in made:
        library.difference.restype = ctypes.c_float
    assert [library.difference() for library in made] == [2.0, -2.0, 2.0]
    assert len(list(cache.glob("open_*.so"))) == 3 and len(list(cache.glob("*.cpp"))) == 1
