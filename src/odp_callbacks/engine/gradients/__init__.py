"""Gradients on the LoRA parameters: vector-Jacobian products, Gram matrices, and their geometry."""
