"""Threads for what may wait. Those of a device run a request each, the ring itself, or the watch
over it. So whoever serves the ring can stay with a system call that does not return, and another
thread of the same kind serves on.
"""

import queue
import threading
from collections.abc import Callable
from typing import Final, TypeAlias

Task: TypeAlias = Callable[[], None]


class Workers:
    """Threads that stay for the next task. Safe to use from several threads.

    A task catches its own exceptions.
    """

    def __init__(self, name: str) -> None:
        self._name: Final = name
        self._lock = threading.Lock()
        """Guards the numbers; held across no call that waits."""
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._idle = 0
        self._wanted: list[Task] = []
        self._closed = False

    def start(self, task: Task) -> bool:
        """Run the task on a thread that has nothing else to do; False if none can be had."""
        with self._lock:
            if self._idle:
                self._idle -= 1
                self._tasks.put(task)
                return True
        thread = threading.Thread(target=self._run, args=(task,), name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the limit of threads, or of memory
            return False
        return True

    def when_idle(self, callback: Task) -> None:
        """Call back once, on some thread, when ``start`` can succeed again after it could not."""
        with self._lock:
            if not self._idle:
                self._wanted.append(callback)
                return
        callback()

    def reserve(self) -> bool:
        """Have one thread wait for a task, for the next ``start``; False if none can be had."""
        with self._lock:
            if self._idle:
                return True
        return self.start(_nothing)

    def close(self) -> None:
        """No task will follow. Threads end when they have none; nobody waits for the others."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, 0
        for _ in range(idle):
            self._tasks.put(None)

    def _run(self, first: Task) -> None:
        task: Task | None = first
        while task is not None:
            task()
            task = None  # whatever it holds is let go before the thread waits
            with self._lock:
                if self._closed:
                    return
                self._idle += 1
                wanted, self._wanted = self._wanted, []
            for callback in wanted:
                callback()
            task = self._tasks.get()


def _nothing() -> None:
    pass
