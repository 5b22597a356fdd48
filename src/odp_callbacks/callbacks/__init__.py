"""Callbacks for trainers: they decide when to measure, and log what was measured."""
