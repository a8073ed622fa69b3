"""Things that leave a mark on the process that does them are tried in one of their own."""

import os
from collections.abc import Callable


def trouble(attempt: Callable[[], object]) -> str:
    """Why it cannot be done, as far as an OSError says; empty if it can."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        answer = "a bug"
        try:
            attempt()
            answer = ""
        except OSError as error:
            answer = os.strerror(error.errno) if error.errno else str(error)
        finally:
            os.write(writing, answer.encode())
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    return "the attempt was killed" if status else answer
