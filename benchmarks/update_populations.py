"""Populations of questions and rollouts whose success gradient is known exactly, for the calibration of updates."""

import itertools
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.helpers.models import LETTERS, tiny, word_tokenizer
from tests.helpers.worlds import World

from odp_callbacks.engine.gradients.loss_directions import distillation_direction
from odp_callbacks.functional.updates import leave_one_out_advantages
from odp_callbacks.records import Floats
from odp_callbacks.update_records import TokenInfluence, UpdateGram, gram_of_rows

PARAMETERS, RESPONSES, TOKENS, TEACHERS = 300, 12, 4, 2
FOLDS = 4
"""As many as the engine has."""


@dataclass(frozen=True)
class Sample:
    """What a measurement sees of one draw of questions and rollouts, and the truth about it.

    Attributes:
        gram: Inner products of its gradients.
        influence: Of every token.
        gains: ``(K, 3)``, true gain along the directions of all groups but one, averaged over the one that is left
            out; for all rollouts, correct and incorrect ones.
        contributions: ``(K, 2)``, true gain along the parts of the whole direction, over its norm.
        influences: ``(N, K)``, true influence of every token.
    """

    gram: UpdateGram
    influence: TokenInfluence
    gains: Floats
    contributions: Floats
    influences: Floats


@dataclass(frozen=True)
class Population:
    """Finitely many questions with finitely many responses each, from which samples are drawn with replacement.

    Attributes:
        probability: ``(Q, R)``, of each response to its question.
        reward: ``(Q, R)``, 0 or 1.
        score: ``(Q, R, P)``, gradient of each response's log-probability; its mean is zero for each question.
        tokens: ``(Q, R, T, K, P)``, distillation gradient of each token for each teacher.
    """

    probability: Floats
    reward: Floats
    score: Floats
    tokens: Floats

    @property
    def gradient(self) -> Floats:
        """The exact gradient of the mean reward, ``(P,)``."""
        return np.einsum("qr,qrp->p", self.probability * self.reward, self.score) / len(self.reward)

    def draw(self, questions: int, rollouts: int, groups: int, rng: np.random.Generator) -> Sample:
        """Draw questions, and rollouts of each; measure them as the engine does.

        Args:
            questions: How many questions.
            rollouts: Rollouts of each.
            groups: Groups of questions; as many as questions, or fewer.
            rng: Random stream.
        """
        drawn = rng.integers(0, len(self.reward), questions)
        cumulative = self.probability[drawn].cumsum(axis=1)
        places = (rng.random((questions, rollouts))[..., None] * cumulative[:, None, -1:] > cumulative[:, None]).sum(-1)
        owner = np.repeat(np.arange(questions), rollouts)
        question, response = drawn[owner], places.ravel()
        reward = self.reward[question, response]
        advantage = leave_one_out_advantages(torch.from_numpy(reward), torch.from_numpy(owner)).numpy() / rollouts
        group = owner * groups // questions
        success = np.zeros((groups, self.score.shape[-1]))
        np.add.at(success, group, advantage[:, None] * self.score[question, response])
        tokens = self.tokens[question, response]  # (B, T, K, P)
        kind = (reward < 1).astype(int)
        directions = np.zeros((groups, tokens.shape[2], 2, tokens.shape[-1]))
        np.add.at(directions, (group, slice(None), kind), tokens.sum(axis=1))
        counts = np.zeros((groups, 2))
        np.add.at(counts, (group, kind), tokens.shape[1])
        sizes = np.bincount(np.arange(questions) * groups // questions, minlength=groups).astype(float)
        gram = gram_of_rows(sizes, counts, success, directions)
        norm = np.linalg.norm(directions.sum(axis=(0, 2)), axis=-1)
        influence = influence_of(success, sizes, group, tokens, norm)
        gradient = self.gradient
        flat = tokens.reshape(-1, *tokens.shape[2:])  # (N, K, P)
        return Sample(
            gram,
            influence,
            gains_along(gradient, directions, sizes),
            directions.sum(axis=0) @ gradient / norm[:, None],
            flat @ gradient / norm,
        )


def gains_along(gradient: Floats, directions: Floats, sizes: Floats) -> Floats:
    """True gain along the direction of all other groups, ``(K, 3)``; NaN where a direction is zero."""
    whole = np.stack([directions.sum(axis=2), directions[:, :, 0], directions[:, :, 1]], axis=2)  # (F, K, 3, P)
    others = whole.sum(axis=0) - whole
    norms = np.linalg.norm(others, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        gains = np.where(norms > 1e-9, others @ gradient / norms, np.nan)
    mean: Floats = np.einsum("f,fkc->kc", sizes / sizes.sum(), gains)
    return mean


def influence_of(success: Floats, sizes: Floats, group: Floats, tokens: Floats, norm: Floats) -> TokenInfluence:
    """What the engine's passes along the success gradients of a few folds give for each token."""
    groups = len(success)
    folds = min(FOLDS, groups)
    fold_of_group = np.arange(groups) * folds // groups
    weight = np.bincount(fold_of_group, weights=sizes, minlength=folds)
    means = np.stack([success[fold_of_group == fold].sum(axis=0) / weight[fold] for fold in range(folds)])
    by_fold = np.einsum("btkp,sp->sbtk", tokens, means, optimize=True)
    own = fold_of_group[group]
    by_fold[own, np.arange(len(own))] = np.nan
    count = len(own) * tokens.shape[1]
    return TokenInfluence(
        np.repeat(np.arange(len(own)), tokens.shape[1]),
        np.tile(np.arange(tokens.shape[1]), len(own)),
        by_fold.reshape(folds, count, -1).astype(np.float32),
        weight,
        norm,
        np.linalg.norm(tokens, axis=-1).reshape(count, -1).astype(np.float32),
    )


def synthetic(signal: float, seed: int = 0, questions: int = 300) -> Population:
    """A population with noise much larger than the signal.

    Questions differ in difficulty: some are never or always answered correctly. Gradients have a decaying spectrum,
    and lengths of responses have a heavy tail. Rollouts of a question share a part of their gradients. The two teachers
    share most of their direction, and what they ask for depends on whether the rollout is correct.

    Args:
        signal: Size of what all questions' success gradients share, and of what the teachers' directions share with
            it.
        seed: Of the population.
        questions: How many.
    """
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, PARAMETERS + 1) ** -0.5

    def vectors(*shape: int) -> Floats:
        drawn = rng.standard_normal((*shape, PARAMETERS)) * spectrum
        return drawn / np.sqrt((spectrum**2).sum())

    difficulty = rng.beta(0.6, 1.4, questions)
    reward = (rng.random((questions, RESPONSES)) < difficulty[:, None]).astype(float)
    length = rng.lognormal(0.0, 0.6, (questions, RESPONSES))
    shared_gradient = vectors()
    centred = reward - reward.mean(axis=1, keepdims=True)
    score = np.sqrt(length)[..., None] * vectors(questions, RESPONSES)
    score += centred[..., None] * (signal * shared_gradient + 0.5 * vectors(questions))[:, None]
    score -= score.mean(axis=1, keepdims=True)
    common = vectors() + signal * shared_gradient
    tokens = np.empty((questions, RESPONSES, TOKENS, TEACHERS, PARAMETERS))
    rollout_noise, token_noise = vectors(questions, RESPONSES), vectors(questions, RESPONSES, TOKENS)
    for teacher in range(TEACHERS):
        mean = 0.25 * common + 0.12 * vectors()
        of_class = np.stack([0.15 * vectors() - 0.1 * signal * shared_gradient, 0.15 * vectors()])
        of_question = 0.5 * vectors(questions)
        of_rollout = 0.5 * rollout_noise + 0.3 * vectors(questions, RESPONSES)
        whole = mean + of_class[reward.astype(int)] + of_question[:, None] + of_rollout
        of_token = token_noise + 0.5 * vectors(questions, RESPONSES, TOKENS)
        of_token -= of_token.mean(axis=2, keepdims=True)
        share = rng.dirichlet(np.full(TOKENS, 0.7), (questions, RESPONSES))
        tokens[:, :, :, teacher] = length[..., None, None] * (share[..., None] * whole[:, :, None] + 0.5 * of_token)
    return Population(np.full(reward.shape, 1 / RESPONSES), reward, score, tokens)


def enumerated(seed: int = 3) -> Population:
    """A population of real gradients: a tiny Llama with LoRA whose every response to 120 prompts is enumerated.

    A response is rewarded by a rule on its tokens, which questions share in part. The teachers are the base model with
    the prompt, and with a word before it.

    Args:
        seed: Of model and rewards.
    """
    rng = np.random.default_rng(seed)
    world = make_student(seed)
    worth = rng.normal(size=(4, 4))
    questions = [enumerate_question(world, prompt, worth, rng) for prompt in prompts_of(world)]
    return Population(*(np.stack(column) for column in zip(*questions, strict=True)))


def make_student(seed: int, size: int = 4) -> World:
    """A tiny Llama of three words and an end, whose responses have at most three tokens."""
    ids = {"eos_token_id": 0, "pad_token_id": None, "bos_token_id": None}
    model = tiny("llama", vocabulary=size, seed=seed, scale=0.1, initializer_range=0.2, **ids)
    tokenizer = word_tokenizer(["</s>", *LETTERS[: size - 1]], bos=False, chat=False)
    return World(model, tokenizer, defaultdict(float), horizon=3, size=size)


def prompts_of(world: World) -> list[str]:
    """All prompts of one to four words."""
    words = [world.text((token,)) for token in range(1, world.size)]
    return [" ".join(chosen) for length in range(1, 5) for chosen in itertools.product(words, repeat=length)]


def enumerate_question(world: World, prompt: str, worth: Floats, rng: np.random.Generator) -> tuple[Floats, ...]:
    """Probability, reward, score and token gradients of every response to a prompt."""
    world.prompt = prompt
    direction = distillation_direction("reverse_kl", None, None, 1.0)
    scores: dict[tuple[int, ...], Floats] = {}
    gradients: dict[tuple[int, ...], Floats] = {}
    with torch.no_grad():
        nodes = world.solve()
        with world.model.disable_adapter():
            hinted = {prefix: world.model(world.ids(prefix)[None]).logits[0, -1] for prefix in nodes}
            world.prompt = f"c {prompt}"
            other = {prefix: world.model(world.ids(prefix)[None]).logits[0, -1] for prefix in nodes}
        world.prompt = prompt
    for prefix, node in nodes.items():
        logits = node.logits.detach()
        of_success = torch.eye(world.size, dtype=torch.float64) - torch.softmax(logits, dim=-1)
        sampled = torch.zeros(1, dtype=torch.long)
        of_teachers = [direction(logits[None], teacher[prefix][None], sampled)[0] for teacher in (hinted, other)]
        rows = world.parameter_gradients(node, *of_success, *of_teachers).numpy()
        scores[prefix], gradients[prefix] = rows[: world.size], rows[world.size :]
    responses = world.responses()
    offset, own = rng.normal(-1.0, 1.5), rng.normal(size=worth.shape) * 0.5
    found: list[tuple[float, float, Floats, Floats]] = []
    for response, probability in responses.items():
        prefixes = [response[:depth] for depth in range(len(response))]
        tokens = np.zeros((world.horizon, TEACHERS, rows.shape[-1]))
        tokens[: len(prefixes)] = [gradients[prefix] for prefix in prefixes]
        score = sum(scores[prefix][token] for prefix, token in zip(prefixes, response, strict=True))
        value = offset + sum((worth + own)[depth, token] for depth, token in enumerate(response))
        found.append((probability, float(value > 0), score, tokens))
    return tuple(np.array(column) for column in zip(*found, strict=True))
