"""Errors that are shown to the user."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right. The message is shown as one line, without a traceback."""
