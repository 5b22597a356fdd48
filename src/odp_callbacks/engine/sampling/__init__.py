"""Sampling from the student: many continuations of shared prefixes in one batch."""
