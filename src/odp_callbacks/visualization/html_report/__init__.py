"""The report: one HTML file that says which teacher helps, where, and how sure that is."""

from odp_callbacks.visualization.html_report.page import write_report

__all__ = ["write_report"]
