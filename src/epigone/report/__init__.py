"""From records to a page: plots, tables and one self-contained HTML file."""

from epigone.report.page import write_report

__all__ = ["write_report"]
