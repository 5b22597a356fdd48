"""The prefixes of rollouts: which tokens are measured, and where continuations are sampled."""
