"""A page that shows a run or a comparison: one file of HTML with its charts in it, and nothing else to load."""

from __future__ import annotations

from lamina.report.page import PAGE, Report, figures, read

__all__ = ["PAGE", "Report", "figures", "read"]
