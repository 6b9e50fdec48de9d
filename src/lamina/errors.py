"""Errors that are shown to the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right. The message is shown as one line, without a traceback."""


class DoesNotFitError(UserError):
    """No network has a plan that the budgets allow."""


def nearest(given: str, accepted: Iterable[str]) -> str:
    """A hint at the accepted name nearest to what was given, then the list of all."""
    accepted = list(accepted)
    close = difflib.get_close_matches(given, accepted, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}accepted: {', '.join(accepted)}"
