"""Read, compute and write at the same time: reading runs ahead and writing behind, in threads of their own."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

W = TypeVar("W")
R = TypeVar("R")
C = TypeVar("C")

_READERS = 2
_AHEAD = 4  # pieces of work that are read while one is computed
_BEHIND = 4  # results that wait to be written; a killed process has to make these again


def overlap(
    work: Iterable[W],
    read: Callable[[W], R],
    compute: Callable[[W, R], C],
    write: Callable[[W, C], None],
    done: Callable[[W], None],
) -> None:
    """Put every piece of work through read, compute and write, in order.

    Args:
        work: the pieces.
        read: runs in threads, ahead of `compute`.
        compute: runs in this thread.
        write: runs in one thread, so writes never overlap each other.
        done: called in this thread when a piece has been handed to `write`.

    Raises:
        Exception: the first one that any of them raised; pieces written before stay written.
    """
    pieces = iter(work)
    with ThreadPoolExecutor(_READERS) as readers, ThreadPoolExecutor(1) as writer:
        ahead: deque[tuple[W, Future[R]]] = deque()
        behind: deque[Future[None]] = deque()

        def fill() -> None:
            while len(ahead) < _AHEAD and (piece := next(pieces, None)) is not None:
                ahead.append((piece, readers.submit(read, piece)))

        try:
            fill()
            while ahead:
                piece, future = ahead.popleft()
                content = future.result()
                fill()
                behind.append(writer.submit(write, piece, compute(piece, content)))
                done(piece)
                while len(behind) > _BEHIND or (behind and behind[0].done()):
                    behind.popleft().result()
            while behind:
                behind.popleft().result()
        finally:
            for _, future in ahead:
                future.cancel()
