"""The protocol of arXiv:2605.10889 on a model: rollouts, logits along representative paths, and targeted rollouts.

:class:`PaperProbe` runs it; what it computes is defined in :mod:`odp_callbacks.analysis.paper`.
"""

from odp_callbacks.engine.paper.config import PaperConfig
from odp_callbacks.engine.paper.probe import PaperProbe

__all__ = ["PaperConfig", "PaperProbe"]
