"""Gradients on the LoRA parameters."""
