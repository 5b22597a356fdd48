"""The records of a probe: everything that its figures are computed from, without a model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from odp_callbacks.update_records import UpdateRecord

if TYPE_CHECKING:  # what the methods of ProbeReport return; they import it when they are called
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from odp_callbacks.analysis.ranking import Ranking
    from odp_callbacks.analysis.summaries import ClassSummary

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RolloutRecord:
    """One rollout: what the student was asked, what it answered and what reward it got.

    Attributes:
        question: Id of the question.
        prompt: Text of the student's prompt.
        pieces: Text of each response token.
        text: Text of the response as the verifier saw it.
        reward: Reward in [0, 1].
        correct: Whether the reward reached the success threshold.
        truncated: Whether the length limit cut the response.
    """

    question: str
    prompt: str
    pieces: tuple[str, ...]
    text: str
    reward: float
    correct: bool
    truncated: bool


@dataclass(frozen=True)
class TeacherResponse:
    """A response that a teacher sampled by itself, under its own context.

    Attributes:
        teacher: Name of the teacher.
        question: Id of the question.
        text: Text of the response as the verifier saw it.
        reward: Reward in [0, 1].
        correct: Whether the reward reached the success threshold.
        truncated: Whether the length limit cut the response.
    """

    teacher: str
    question: str
    text: str
    reward: float
    correct: bool
    truncated: bool


@dataclass(frozen=True)
class NodeRecord:
    """One node with ``A`` branches, ``K`` teachers and ``M`` LoRA modules; it has ``C = A - 1 + K`` directions.

    The ideal gradient is ``sum_a weight_a (Q_a - Q_0) u_a`` over the branches ``a = 1 .. A - 1``, where ``Q_a`` is the
    success of branch ``a`` and ``u_a`` the gradient that belongs to the direction ``(e_token - p) / temperature`` on
    the logits. The Gram matrices hold the inner products of ``u_1 .. u_{A-1}``, followed by each teacher's distillation
    gradient.

    Attributes:
        rollout: Index of the rollout in its probe.
        question: Id of the question.
        depth: Number of response tokens before the node.
        inclusion: Probability with which the node was selected.
        correct: Whether its rollout was correct.
        tokens: ``(A,)`` int64, the token of each branch; the first is the student's most probable one.
        probability: ``(A,)``, the student's probability of each token.
        weight: ``(A,)``, see :class:`~odp_callbacks.engine.tree.branches.Branch`.
        tail: ``(A,)`` bool: the token was drawn from the tail.
        taken: Index of the branch that the rollout took.
        count: ``(A,)`` int64, number of scored continuations.
        total: ``(A,)``, sum of their rewards.
        total_square: ``(A,)``, sum of their squared rewards.
        exact: ``(A,)`` bool: the branch ends the response, so its success is known.
        gram: ``(M, C, C)`` float64, Gram matrix on each module's LoRA parameters; NaN where the gradients were not
            computed.
        logit_gram: ``(C, C)`` float64, Gram matrix on the logits.
        teacher_probability: ``(K, A)``, each teacher's probability of each token.
        teacher_tail: ``(K,)``, each teacher's probability of all tokens that are not candidates.
        predictors: ``(K,)`` each, by name: divergences, entropies (nats) and cosine of student and teacher, and the
            figures of their likeliest tokens, see :mod:`~odp_callbacks.functional.top_k`.
        gradient_inclusion: Probability with which the gradients were computed, given the outcomes. Its inverse weights
            sums over nodes of what needs gradients. NaN where an error kept them from being computed.
    """

    rollout: int
    question: str
    depth: int
    inclusion: float
    correct: bool
    tokens: NDArray[np.int64]
    probability: Floats
    weight: Floats
    tail: NDArray[np.bool_]
    taken: int
    count: NDArray[np.int64]
    total: Floats
    total_square: Floats
    exact: NDArray[np.bool_]
    gram: Floats
    logit_gram: Floats
    teacher_probability: Floats
    teacher_tail: Floats
    predictors: Mapping[str, Floats]
    gradient_inclusion: float = 1.0

    @property
    def has_gradients(self) -> bool:
        """Whether the node's gradients were computed."""
        return not (self.gram.size and np.isnan(self.gram).all())


@dataclass(frozen=True)
class StepSums:
    """Inner products of summed gradients, from which the step alignment is computed.

    There is one group for each question and correctness. Each group has ``2 + K`` vectors: the ideal gradient from two
    disjoint halves of the continuations and each teacher's distillation gradient, summed over the nodes of the group
    with their token weights.

    Attributes:
        question: ``G`` question ids, one for each group.
        correct: ``G`` flags, whether the group's rollouts were correct.
        gram: ``(G, 2 + K, G, 2 + K)`` float64, inner products on all LoRA parameters.
        vectors: ``(G, 2 + K, L)`` float32, the sums or sketches of them, from which the parts of one probe are merged.
            Files do not hold them, so they are None after loading.
    """

    question: tuple[str, ...]
    correct: tuple[bool, ...]
    gram: Floats
    vectors: NDArray[np.float32] | None = field(default=None, repr=False)


def step_sums(question: tuple[str, ...], correct: tuple[bool, ...], vectors: NDArray[np.float32]) -> StepSums:
    """Compute the inner products of summed gradients.

    Args:
        question: ``G`` question ids.
        correct: ``G`` flags.
        vectors: ``(G, 2 + K, L)`` float32.
    """
    flat_vectors = vectors.reshape(-1, vectors.shape[-1]).astype(np.float64)
    gram = (flat_vectors @ flat_vectors.T).reshape(*vectors.shape[:2], *vectors.shape[:2])
    return StepSums(question, correct, gram, vectors)


@dataclass(frozen=True, repr=False)
class ProbeReport:
    """Everything that one probe measured.

    Attributes:
        teachers: Names of the teachers, in the order of every ``K`` axis.
        modules: Names of the LoRA modules, in the order of every ``M`` axis.
        rollouts: One record for each rollout.
        nodes: One record for each node.
        generated_tokens: Number of generated tokens by stage, ``rollouts`` and ``continuations``.
        continuations: Number of sampled continuations.
        truncated: Number of rollouts and continuations that the length limit cut.
        stage_seconds: Seconds that each stage took.
        settings: The configuration of the probe, as names and JSON values; its geometry is under ``"geometry"``.
        step: Sums of gradients for the step alignment; None if they were not measured.
        updates: Measurements of the update, one for each process that measured a part; empty if there is none.
        token_text: Text of each token that is a branch somewhere, by token id.
        left_out: Number of ``questions`` that could not be used, of ``responses`` that got no reward, and of
            ``continuations`` that count nowhere, because the time ended before those planned with them had finished;
            and what else there was no time for (:data:`~odp_callbacks.analysis.time_shortage.NOT_DONE`).
        slot_steps: Slot-steps of the batch of continuations, ``available`` and ``occupied``: a slot-step is one slot
            during one step of the model, at the largest number of slots that the batch had.
        teacher_responses: Responses that the teachers sampled by themselves; empty if none were asked for.
        preconditioned: The same nodes and continuations with gradients in another geometry, see
            :class:`~odp_callbacks.engine.gradients.preconditioner.Preconditioner`; None if none was asked for.

    Examples:
        >>> report = ProbeReport(("base",), (), (), (), {}, 0, 0, {})  # of no node; a real one comes from a probe
        >>> [(summary.teacher, summary.split) for summary in report.summary()][:2]
        [('base', 'all'), ('base', 'correct')]
    """

    teachers: tuple[str, ...]
    modules: tuple[str, ...]
    rollouts: tuple[RolloutRecord, ...]
    nodes: tuple[NodeRecord, ...]
    generated_tokens: Mapping[str, int]
    continuations: int
    truncated: int
    stage_seconds: Mapping[str, float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    step: StepSums | None = None
    updates: tuple[UpdateRecord, ...] = ()
    token_text: Mapping[int, str] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    slot_steps: Mapping[str, int] = field(default_factory=dict)
    teacher_responses: tuple[TeacherResponse, ...] = ()
    preconditioned: "ProbeReport | None" = None

    def __repr__(self) -> str:
        """Name the sizes; the contents would fill pages."""
        questions = len({rollout.question for rollout in self.rollouts})
        return (
            f"<ProbeReport of {questions} questions, {len(self.rollouts)} rollouts, {len(self.nodes)} nodes; teachers: "
            f"{', '.join(self.teachers)}>"
        )

    @property
    def slot_occupancy(self) -> float:
        """Share of the slots that a continuation occupied, over all steps of the batch; NaN without continuations."""
        available = self.slot_steps.get("available", 0)
        return self.slot_steps.get("occupied", 0) / available if available else float("nan")

    @property
    def confidence(self) -> float:
        """Level of the intervals that the probe was asked for, by the option of a callback; otherwise 0.95."""
        return float(self.settings.get("confidence", 0.95))

    def _level(self, confidence: float | None) -> float:
        return self.confidence if confidence is None else confidence

    def summary(self, confidence: float | None = None, by: str = "correctness") -> "list[ClassSummary]":
        """Summarise the report by teacher and class of nodes, each figure with its interval.

        Args:
            confidence: Level of the intervals, in (0, 1); None for :attr:`confidence`.
            by: What the nodes are split by: ``"correctness"`` of their rollout, ``"depth"``, ``"module"``,
                ``"question"`` or ``"rollout"``.

        Raises:
            ValueError: If ``confidence`` is not in (0, 1) or ``by`` is none of these.
        """
        from odp_callbacks.analysis.summaries import summarise

        return summarise(self, self._level(confidence), by)

    def ranking(self, confidence: float | None = None) -> "Ranking":
        """Rank the teachers by update gain, or by predicted gain where no update was measured.

        They are ranked over all rollouts, by class and by question.

        Args:
            confidence: Level of the intervals, in (0, 1); None for :attr:`confidence`.

        Raises:
            ValueError: If ``confidence`` is not in (0, 1).
        """
        from odp_callbacks.analysis.ranking import rank

        return rank(self, self._level(confidence))

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the report to a folder of Parquet tables, either completely or not at all.

        Args:
            folder: Folder to create, with its parents.
            overwrite: Replace the folder if it exists.

        Returns:
            The folder.

        Raises:
            FileExistsError: If the folder exists and ``overwrite`` is False.
        """
        from odp_callbacks.storage import save

        return save(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ProbeReport":
        """Read a report that :meth:`save` wrote.

        Args:
            folder: The folder.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it holds no records of odp-callbacks, or records that this release cannot read.
        """
        from odp_callbacks.storage import load

        return load(folder)

    def to_html(
        self, path: str | os.PathLike[str], *, title: str = "Is my teacher helping?", confidence: float | None = None
    ) -> Path:
        """Write the report as one HTML file that needs no other file.

        Args:
            path: File to write.
            title: Headline of the page.
            confidence: Level of the intervals, in (0, 1); None for :attr:`confidence`.

        Returns:
            The file.

        Raises:
            ModuleNotFoundError: If the extra ``report`` is not installed.
            ValueError: If the report has neither an update nor nodes.
        """
        try:
            from odp_callbacks.visualization.html_report import write_report
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"`to_html` needs {error.name}; install it with: pip install 'odp-callbacks[report]'", name=error.name
            ) from error

        return write_report(self, path, title=title, confidence=confidence)

    def plot(
        self, kind: str = "gain", ax: "Axes | None" = None, *, confidence: float | None = None
    ) -> "tuple[Figure, Axes]":
        """Plot the report with matplotlib, on axes of yours or on new ones.

        Args:
            kind: ``"gain"`` of each teacher and class of rollouts; with measured tokens also ``"depth"``, the
                gain-weighted alignment over depth, and ``"divergence"``, each token's alignment against the divergence
                of student and teacher there.
            ax: Where to draw; None for new axes.
            confidence: Level of the intervals, in (0, 1); None for :attr:`confidence`.

        Returns:
            The figure and its axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            ValueError: If there is no such plot, or the report has not measured what it shows.
        """
        from odp_callbacks.analysis.summaries import Analysis
        from odp_callbacks.visualization.notebook import plot_report

        return plot_report(Analysis(self, self._level(confidence)), kind, ax)

    def _repr_html_(self) -> str:
        """What a notebook shows: what to do next, a picture of the gains, and all figures in a table."""
        from odp_callbacks.visualization.notebook import notebook_html

        return notebook_html(self)

    def to_pandas(self, confidence: float | None = None) -> "DataFrame":
        """All figures as a pandas table with one row per figure.

        Args:
            confidence: Level of the intervals, in (0, 1); None for :attr:`confidence`.

        Returns:
            A table with the columns ``teacher``, ``split``, ``figure``, ``value``, ``low`` and ``high``, followed by
            ``uncorrected``, ``questions``, ``nodes``, ``note`` and ``geometry``. The splits are ``"all"``,
            ``"correct"``, ``"incorrect"`` and, for the difference between the last two, ``"incorrect-correct"``. Rows
            for the difference between two teachers have ``"a - b"`` as their teacher. Rows of the figure
            ``"contribution"`` have a part of the update as their split: ``"correct depth 4-7"``, ``"layer 3"``,
            ``"module q_proj"`` for a kind of module, or a module's full name. The figure
            ``"correlation_top_k_overlap_with_influence"`` is the rank correlation of a predictor with a target, see
            :mod:`~odp_callbacks.analysis.correlations`. Rows of the figure ``"success"`` have ``"student"`` as their
            teacher, and a class and window of depth as their split.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
            ValueError: If ``confidence`` is not in (0, 1).

        Examples:
            >>> ProbeReport(("base",), (), (), (), {}, 0, 0, {}).to_pandas().iloc[0, :3].tolist()
            ['base', 'all', 'predicted_gain']
        """
        from odp_callbacks.analysis.figure_table import COLUMNS, figure_rows

        return _pandas("to_pandas").DataFrame(figure_rows(self, self._level(confidence)), columns=list(COLUMNS))

    def tokens(self, confidence: float | None = None) -> "DataFrame":
        """Every response token as a row of a pandas table, with its influence and what may predict it.

        Args:
            confidence: Level of the intervals, in (0, 1); None for :attr:`confidence`.

        Returns:
            A table with the columns ``question``, ``rollout``, ``depth``, ``text`` and ``reward``, followed for each
            teacher by ``influence_<teacher>`` and the ends of its interval, ``influence_<teacher>_low`` and
            ``influence_<teacher>_high``. The influences of a teacher add up to its update's contribution. Then come
            ``repetition`` of the whole response and ``student_entropy``, and for each teacher ``reverse_kl_<teacher>``
            and its other :data:`~odp_callbacks.analysis.predictors.TOKEN_PREDICTORS`.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
            ValueError: If ``confidence`` is not in (0, 1).

        Examples:
            >>> list(ProbeReport(("base",), (), (), (), {}, 0, 0, {}).tokens().columns[5:10])
            ['influence_base', 'influence_base_low', 'influence_base_high', 'repetition', 'student_entropy']
        """
        from odp_callbacks.analysis.token_table import token_columns, token_rows

        return _pandas("tokens").DataFrame(token_rows(self, self._level(confidence)), columns=token_columns(self))


def _pandas(method: str) -> Any:
    """Import pandas, which only the tables of a report need."""
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`{method}` needs pandas; install it with: pip install pandas", name="pandas"
        ) from error
    return pandas
