"""From records to figures with intervals: arithmetic on arrays, no model needed."""
