"""Settings that all threads of a process share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from contextvars import copy_context


class ProcessWide:
    """A context entered by the first thread that wants it, and left by the last.

    Threads that saved and restored such settings on their own would restore each other's.

    Args:
        make: Returns a new context.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._inside = 0
        self._context = ExitStack()
        self._variables = copy_context()  # of no thread, as another may leave than entered

    @property
    def is_inside(self) -> bool:
        """Whether a thread has entered it."""
        with self._lock:
            return self._inside > 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._variables.run(self._context.enter_context, self._make())
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._variables.run(self._context.close)
