"""Process many images in several local processes, with ordered results and a bounded number of pending tasks."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import cv2

from m2f.eval.errors import EvaluationError

CHUNK = 16
"""Tasks per message to a worker."""
START_SECONDS = 4.0
"""Cost of starting processes, mostly imports, with a margin for slow disks. Processes must save more time than this."""
Task = TypeVar("Task")
Result = TypeVar("Result")


def map_tasks(
    work: Callable[[Sequence[Task]], Sequence[Result]], tasks: Sequence[Task], workers: int
) -> Iterator[Result]:
    """Yield the result of `work` for every task, in order. `work` gets at most `CHUNK` tasks at a time.

    Work and tasks are pickled for worker processes, which get new tasks as they become free. The first tasks run in
    this process, and so do all others if starting processes would cost more time than it saves. Raises the errors of
    `work`, and EvaluationError if a worker dies.
    """
    num_local = len(tasks) if workers == 1 else CHUNK
    start = time.perf_counter()
    yield from _in_chunks(work, tasks[:num_local])
    rest = tasks[num_local:]
    seconds = (time.perf_counter() - start) / max(1, num_local) * len(rest)
    if seconds * (1 - 1 / workers) < START_SECONDS:
        yield from _in_chunks(work, rest)
    else:
        yield from _map_in_processes(work, rest, workers)


def _in_chunks(work: Callable[[Sequence[Task]], Sequence[Result]], tasks: Sequence[Task]) -> Iterator[Result]:
    for start in range(0, len(tasks), CHUNK):
        yield from work(tasks[start : start + CHUNK])


def _map_in_processes(
    work: Callable[[Sequence[Task]], Sequence[Result]], tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """Yield the results in the order of the tasks. At most 2 * workers + 1 chunks are pending at a time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])  # import it once instead of once per worker
    pool = ProcessPoolExecutor(workers, context, initializer=cv2.setNumThreads, initargs=(1,))
    waiting = iter(tasks)
    chunks = iter(lambda: tuple(itertools.islice(waiting, CHUNK)), ())
    pending: deque[Future[Sequence[Result]]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(work, chunk))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise EvaluationError(
            "a worker process died, probably because memory ran out; use fewer processes (--workers)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
