"""``odp-callbacks study``: the findings of arXiv:2605.10889, asked of other students and tasks."""
