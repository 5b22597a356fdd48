"""The tree of prefixes: which tokens are measured, and how continuations are spent on them."""
