"""What TensorBoard gets besides scalars: histograms of per-token alignment, and coloured rollouts."""

import warnings
from typing import Any

import numpy as np

from odp_callbacks.evidence import gather
from odp_callbacks.records import ProbeReport


def write_tensorboard(writer: Any, report: ProbeReport, step: int) -> None:
    """Write histograms and pictures of a probe.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``.
        report: The probe's report.
        step: Optimizer step.
    """
    evidence = gather(report.nodes, teachers=len(report.teachers))
    cosine = evidence.cosine
    for k, teacher in enumerate(report.teachers):
        for split, wanted in (("correct", True), ("incorrect", False)):
            values = cosine[evidence.correct == wanted, k]
            values = values[~np.isnan(values)]
            if values.size:
                writer.add_histogram(f"odp/alignment_histogram/{teacher}/{split}", values, step)
    try:
        from odp_callbacks.pictures import rollout_figure, telling_rollout
    except ImportError:  # matplotlib belongs to the extra `tensorboard`
        return
    with warnings.catch_warnings():
        # A script that matplotlib's font lacks shows as boxes; that is no news for the training log.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for split, wanted in (("correct", True), ("incorrect", False)):
            index = telling_rollout(report, wanted)
            if index is not None:
                writer.add_figure(f"odp/rollout/{split}", rollout_figure(report, index), step)
