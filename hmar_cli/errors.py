"""The one exception that a user is meant to see, and others in one line."""

import errno
from collections.abc import Sequence


class UserError(Exception):
    """A mistake of the user's, or of their data: shown as one line and a hint, exit code 2.

    Args:
        message: one line that says what is wrong, with the value that was met.
        hint: one line that says what to do about it; empty if there is nothing to add.
        details: further lines, where several mistakes are reported at once.
    """

    def __init__(self, message: str, hint: str = "", details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.hint = hint
        self.details = tuple(details)


def first_line(error: Exception) -> str:
    """The first line of what an exception says; its kind, where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def from_os_error(error: OSError) -> UserError:
    """Turn an operating-system error (full disk, no permission, missing file) into one clear line."""
    where = f": {error.filename}" if error.filename else ""
    hints = {
        errno.ENOSPC: "free some space or choose another --out; files already complete are kept",
        errno.EDQUOT: "your disk quota is used up; choose another --out",
        errno.EACCES: "check the permissions of this path",
        errno.ENOENT: "check the spelling of the path",
        errno.EEXIST: "something else lies there: choose another path",
        errno.ENOTDIR: "a part of this path is a file: choose another path",
        errno.EISDIR: "a folder lies there: give the name of a file",
        errno.EROFS: "nothing can be written there: choose another path",
    }
    return UserError(f"{error.strerror or error}{where}", hints.get(error.errno or 0, ""))
