"""A page that shows a run or a comparison: one file of HTML with its charts in it, and nothing else to load."""

from __future__ import annotations

from lamina.report.page import Report, figures, read, write

__all__ = ["Report", "figures", "read", "write"]
