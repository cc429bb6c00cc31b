"""Work on small matrices, by threads in which torch starts no threads of its own.

A team of threads meets at a barrier behind every operation. Where a processor is busy with something else (another
process, a compiler), each barrier waits for the scheduler: milliseconds, for operations of microseconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")
_here = threading.local()


def team() -> int:
    """How many threads torch has, also for who is one of them: see `each_by_one`."""
    return getattr(_here, "team", 0) or torch.get_num_threads()


def each_by_one(work: Callable[[Item], Made], items: Sequence[Item], workers: int) -> list[Made]:
    """`work` of each item.

    No autocast is in force, and no gradient is taken.

    Args:
        workers: threads, at least 1; no more than there are items start.
    """
    if not items:
        return []
    workers, threads = min(workers, len(items)), team()
    inference = torch.is_inference_mode_enabled()
    ready = threading.Barrier(workers + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread takes over the number of all when it is first asked
        torch.set_num_threads(1)  # of this thread, and of all that start from now on
        _here.team = threads
        ready.wait()

    def run(item: Item) -> Made:
        with torch.inference_mode(inference), torch.no_grad():
            return work(item)

    with ThreadPoolExecutor(workers, "planish-by-one", begin) as pool:
        made = [pool.submit(run, item) for item in items]
        ready.wait()
        others = threading.Thread(target=torch.set_num_threads, args=(threads,))  # not of this thread
        others.start()
        others.join()
        return [each.result() for each in made]
