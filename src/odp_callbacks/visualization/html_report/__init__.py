"""The HTML report: one file that says which teacher helps, on which tokens, and how certain that is."""

from odp_callbacks.visualization.html_report.page import write_report

__all__ = ["write_report"]
