"""Tests; what they share is in ``tests.helpers``."""

import os

# Triton's kernels run in its interpreter. It reads this when it is first imported, which torch may do.
os.environ.setdefault("TRITON_INTERPRET", "1")
