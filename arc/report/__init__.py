"""report.html of a run: `python -m arc.report RUN` makes it anew. And the event files for TensorBoard."""

from arc.report.events import open_events
from arc.report.page import gallery_html, keep_predictions, main, try_report, write_report

__all__ = ["gallery_html", "keep_predictions", "main", "open_events", "try_report", "write_report"]
