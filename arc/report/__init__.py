"""report.html of a run: `python -m arc.report RUN` makes it anew."""

from arc.report.page import keep_predictions, main, try_report, write_report

__all__ = ["keep_predictions", "main", "try_report", "write_report"]
