"""How the seconds of a probe are divided among its stages."""

from collections.abc import Sequence
from dataclasses import dataclass

from odp_callbacks.engine.config import ProbeConfig
from odp_callbacks.engine.deadline import Deadline
from odp_callbacks.engine.sampling.randomness import Randomness
from odp_callbacks.engine.unit_costs import UnitCosts
from odp_callbacks.engine.update.update_time import GAIN, UpdateTime, random_order

REPORT_SHARE = 0.01
"""Share of the time that is kept for the report."""
UPDATE_SHARE = 0.6
"""Share after which rollouts and update must be done where nodes are measured, too."""
ROLLOUT_SHARE = 0.35
"""Share of the time for rollouts, where what they will cost later is not known before."""
QUESTIONS_FOR_AN_INTERVAL, FEWEST_QUESTIONS = 6, 3
"""Rollouts become no longer than can be measured on so many questions: fewer leave an interval too few degrees of
freedom. Where even short ones take too long for that, fewer questions will do; with less than three there is none."""
SHORT_LENGTH = 32
"""Tokens of a response that is short."""

TRIAL_ROLLOUTS = 3
"""The trial of a student at a length takes about as long as measuring so many rollouts of that length."""


@dataclass(frozen=True)
class TimePlan:
    """The deadlines of the stages of one probe.

    Rollouts go on until measuring what has been sampled would take the rest of the time: a longer response that cannot
    be measured is worth nothing, and a fixed share would be too much on one machine and too little on another.

    Attributes:
        config: The configuration of the probe.
        deadline: Of the whole probe.
        costs: What units of work take, from this probe and earlier ones.
        randomness: The order in which questions are measured.
    """

    config: ProbeConfig
    deadline: Deadline
    costs: UnitCosts
    randomness: Randomness

    @property
    def end(self) -> Deadline:
        """When all but the report must be done."""
        return self.deadline.at_share(1 - REPORT_SHARE)

    @property
    def end_of_update(self) -> Deadline:
        """When the update must be done."""
        return self.deadline.at_share(UPDATE_SHARE) if self.config.measures_nodes else self.end

    def order(self, question_count: int) -> list[int]:
        """The order in which questions are sampled and measured: the last ones are left out if time is short."""
        return random_order(question_count, self.randomness) if self.deadline.is_finite else list(range(question_count))

    def for_rollouts(self, prompt_work: Sequence[float]) -> Deadline | None:
        """When to stop sampling rollouts; None where there is no limit.

        Args:
            prompt_work: The work of one pass over each question's prompt.
        """
        if not self.deadline.is_finite:
            return None
        if not (self.config.update and self.costs.knows(GAIN)):
            return self.deadline.at_share(ROLLOUT_SHARE)
        share = self._measured_share(prompt_work)
        of_prompts = share * self.config.rollouts * self.costs.predict(GAIN, sum(prompt_work))
        return self.end_of_update.earlier(of_prompts, share * self.costs.predict(GAIN, 1.0))

    def longest_rollout(self, prompt_work: Sequence[float]) -> int:
        """A length that no rollout can reach in time; before sampling, the student is tried at the longest length.

        Args:
            prompt_work: As in :meth:`for_rollouts`.
        """
        longest = self.config.max_new_tokens
        if not self.deadline.is_finite:
            return longest
        rollouts = len(prompt_work) * self.config.rollouts
        seconds_per_step = self.costs.predict(GAIN, self._measured_share(prompt_work) * rollouts + TRIAL_ROLLOUTS)
        if not seconds_per_step:
            return longest
        deadline = self.for_rollouts(prompt_work)
        assert deadline is not None
        return max(1, min(longest, int(deadline.remaining_seconds / seconds_per_step)))

    def _measured_share(self, prompt_work: Sequence[float]) -> float:
        """The share of the questions that must be measured, at least."""
        if not prompt_work:
            return 1.0
        length = min(SHORT_LENGTH, self.config.max_new_tokens)
        work = self.config.rollouts * (sum(prompt_work) / len(prompt_work) + length)
        seconds = self.costs.predict(GAIN, work)
        affordable = self.end_of_update.remaining_seconds / 2 / seconds if seconds else QUESTIONS_FOR_AN_INTERVAL
        wanted = min(max(int(affordable), FEWEST_QUESTIONS), QUESTIONS_FOR_AN_INTERVAL)
        return min(1.0, wanted / len(prompt_work))

    def for_update(self) -> UpdateTime:
        """The time for the update."""
        return UpdateTime(self.end_of_update, self.costs, self.randomness)
