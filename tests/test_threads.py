"""Work that torch does on one thread each, and what begins before the passes of a compilation."""

import functools
import threading
from pathlib import Path

import pytest
import torch

from planish.codegen import cpp_build, cpp_op
from planish.integrate import backend_ahead
from planish.passes.threads import each_by_one, team


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_a_thread() -> int:
    """What a thread that starts now finds."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_each_item_by_one_thread(two_threads: object) -> None:
    """One thread in the work, nested too; as many as before here and in threads of others, also during the work."""

    def inner(item: int) -> tuple[int, int, int]:
        return item * item, torch.get_num_threads(), team()

    def outer(item: int) -> object:
        made = each_by_one(inner, [3, 4, 5], 2)
        return made, torch.get_num_threads(), team(), in_a_thread()

    [found] = each_by_one(outer, [0], 1)
    assert found == ([(9, 1, 2), (16, 1, 2), (25, 1, 2)], 1, 2, 2)
    assert torch.get_num_threads() == team() == in_a_thread() == 2
    assert each_by_one(inner, [], 4) == []


def test_an_error_of_the_work_comes_out(two_threads: object) -> None:
    def fails(item: int) -> int:
        raise ValueError(f"no {item}")

    with pytest.raises(ValueError, match="no 1"):
        each_by_one(fails, [1, 2], 8)
    assert torch.get_num_threads() == in_a_thread() == 2


def test_the_mode_of_the_caller_holds(two_threads: object) -> None:
    """Tensors made in the work are as the caller would have made them; no gradient is taken."""
    weight = torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        [made] = each_by_one(lambda w: w * 2, [weight.detach()], 1)
        assert made.is_inference()
    [made] = each_by_one(lambda w: w * 2, [weight], 1)
    assert not made.is_inference() and not made.requires_grad


def test_a_text_is_compiled_once_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who starts a text that is being compiled waits for the same compiler; afterwards it is looked up anew."""
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path))
    begun, go = [], threading.Event()

    def build(text: str, name: str) -> Path:
        begun.append(text)
        assert go.wait(30)
        return tmp_path

    monkeypatch.setattr(cpp_build, "build", build)
    first, second, other = (cpp_build.start(text, "made") for text in ("one", "one", "two"))
    go.set()
    assert first._future is second._future is not other._future
    assert first._future is not None and other._future is not None
    assert first._future.result(30) == other._future.result(30) == tmp_path
    assert sorted(begun) == ["one", "two"] and not cpp_build._running
    again = cpp_build.start("one", "made")
    assert again._future is not None and again._future is not first._future and again._future.result(30) == tmp_path


def test_what_is_done_once_begins_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in a process; Inductor is not asked ahead of settings of its own; what fails is not seen here."""
    called: list[str] = []

    def asks() -> None:
        called.append("asked")
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.cpu_vec_isa.pick_vec_isa", asks)
    monkeypatch.setattr(cpp_op, "begin", lambda: called.append("library"))
    monkeypatch.setattr(cpp_build, "compiler", lambda: "g++")
    for held in (backend_ahead._libraries, backend_ahead._instructions):
        monkeypatch.setattr(backend_ahead, held.__name__, functools.cache(held.__wrapped__))
    backend_ahead.begin({"cpp.simdlen": 256})
    assert called == ["library"]
    for _ in range(2):
        backend_ahead.begin({"max_autotune": False})
        backend_ahead._instructions().join(30)
    assert called == ["library", "asked"]
