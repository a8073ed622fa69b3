"""What would come of a configuration file, found out without serving it.

No socket is made, and none is looked at: a daemon may be serving the same file, and what gives the
sockets, or makes folders for them, may not have run yet.
"""

from contextlib import ExitStack

from ninepd.configfile import ConfigFile
from ninepd.errors import UsageError
from ninepd.logs import concerning
from ninepd.offer import Candidate
from ninepd.process import raise_file_limit


def check(path: str) -> tuple[list[str], list[str]]:
    """What would be served, and all that is wrong; a line each. UsageError: there is no such file.

    As far as this user can tell: another may have other privileges.
    """
    file = ConfigFile(path, activated=None)
    file_limit = raise_file_limit()
    served = []
    with ExitStack() as held:  # all of them, as they are when they are served
        for number, export in file.exports.items():
            try:
                with concerning(export.tag):
                    candidate = Candidate(export, file_limit)
                    held.callback(candidate.close_directory)
                    served.append(str(candidate))
            except UsageError as error:
                file.blame(number, error)
    return served, file.problems
