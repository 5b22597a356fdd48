"""Pictures, tables and pages of a report."""
