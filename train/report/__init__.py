"""report.html: a finished run on one page."""
