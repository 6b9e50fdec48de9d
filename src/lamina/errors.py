"""Errors that are shown to the user."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right. The message is shown as one line, without a traceback."""


class DoesNotFitError(UserError):
    """No network has a plan that the budgets allow."""


_PLACES = {
    errno.EEXIST: "is in the way: it is no folder; name another place",
    errno.ENOTDIR: "is below a file, which is no folder; name another place",
    errno.EISDIR: "is a folder, not a file; name a file",
    errno.EACCES: "cannot be used: permission is denied; allow it, or name another place",
    errno.EPERM: "cannot be used: it is not permitted; allow it, or name another place",
    errno.EROFS: "is on a file system that cannot be written to; name another place",
    errno.ENAMETOOLONG: "is too long a name; name another place",
    errno.ELOOP: "is a link to itself; name another place",
}


def about_place(error: OSError) -> str | None:
    """What to say where a path cannot be what it was given for; None where something else went wrong."""
    told = _PLACES.get(error.errno or 0)
    return f"{error.filename} {told}" if told and error.filename is not None else None


def nearest(given: str, accepted: Iterable[str]) -> str:
    """A hint at the accepted name nearest to what was given, then the list of all."""
    accepted = list(accepted)
    close = difflib.get_close_matches(given, accepted, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}accepted: {', '.join(accepted)}"
