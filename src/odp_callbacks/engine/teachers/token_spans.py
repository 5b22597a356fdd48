"""Where the tokens of two tokenizers stand for the same text: spans of a response between the ends that both share.

Where a span is one token of either tokenizer, both models have chosen the next token after the same text, and their
policies can be compared on the tokens whose text is the same in both vocabularies. Where a span has several tokens of
one, the other model made one choice in place of several. TRL's GOLD merges the probabilities of such a group and sorts
what has no counterpart; arXiv:2606.09456 maps signals from token to token. Here such a token is counted, not measured.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNFINISHED_CHARACTER = "\ufffd"
"""What tokenizers decode a part of a character to."""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""Names of tokens that stand for a byte where no other token does; some have the text of an ordinary token."""
CONTEXT_TOKENS = 4
"""Tokens before one that its text is decoded after, at least."""


class Span(NamedTuple):
    """Tokens of a student and of a teacher that stand for the same text.

    Attributes:
        student: Indices of the student's tokens.
        teacher: Indices of the teacher's tokens.
    """

    student: range
    teacher: range

    @property
    def is_pair(self) -> bool:
        """Whether it is one token of either."""
        return len(self.student) == len(self.teacher) == 1


def aligned_spans(student_ends: Sequence[int | None], teacher_ends: Sequence[int | None]) -> list[Span]:
    """Cut two tokenisations of one text at the ends that they share.

    Args:
        student_ends: For each of the student's tokens, the number of characters of the text up to its end; None where
            the token ends within a character. They do not fall.
        teacher_ends: The same for the teacher's tokens.

    Returns:
        Spans in their order. Together they have every token of either once. What follows the last shared end is the
        last span, one side of which may be empty.

    Examples:
        >>> [(list(span.student), list(span.teacher)) for span in aligned_spans([1, 3, 6], [1, 2, 3, 6])]
        [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    shared = ({*student_ends} & {*teacher_ends}) - {None}
    # A token without a text has the end of the one before it, to whose span it belongs.
    student_cuts, teacher_cuts = (
        {end: place + 1 for place, end in enumerate(ends) if end in shared} for ends in (student_ends, teacher_ends)
    )
    cuts = [(0, 0), *((student_cuts[end], teacher_cuts[end]) for end in student_cuts)]
    if cuts[-1] != (len(student_ends), len(teacher_ends)):
        cuts.append((len(student_ends), len(teacher_ends)))
    return [
        Span(range(student_start, student_stop), range(teacher_start, teacher_stop))
        for (student_start, teacher_start), (student_stop, teacher_stop) in pairwise(cuts)
    ]


def token_ends(tokenizer: Any, token_ids: Sequence[int]) -> list[int | None]:
    """Where in the decoded text each token ends.

    Each token is decoded behind a few that stand before it, so that the time grows with the number of tokens.

    Args:
        tokenizer: A tokenizer.
        token_ids: The tokens.

    Returns:
        Number of characters up to the end of each token; None where it ends within a character, or where the decoder
        changes earlier text. Beyond a place where the pieces are not the decoded text, all are None.
    """
    text = decoded(tokenizer, token_ids)
    ends: list[int | None] = []
    length, start, done = 0, 0, 0  # characters so far; tokens from `start` are decoded, those before `done` are counted
    for place in range(1, len(token_ids) + 1):
        before, now = decoded(tokenizer, token_ids[start:done]), decoded(tokenizer, token_ids[start:place])
        piece = now[len(before) :]
        if not now.startswith(before) or not text.startswith(piece, length):
            ends.append(None)
            continue
        length += len(piece)
        ends.append(length)
        start, done = max(0, place - CONTEXT_TOKENS) if place >= 2 * CONTEXT_TOKENS else 0, place
    return ends


def decoded(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of tokens, special ones included, with nothing tidied up."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


class TokenAlignment:
    """Finds a student's tokens in the tokenisation of a teacher, by their text.

    Args:
        student_tokenizer: The student's tokenizer.
        teacher_tokenizer: The teacher's tokenizer.

    Attributes:
        student_ids: ``(V',)`` int64, for each of the teacher's tokens the student's token with the same text in the
            middle of a text; -1 where there is none, or several.

    Raises:
        ValueError: If the two share no token.
    """

    def __init__(self, student_tokenizer: Any, teacher_tokenizer: Any) -> None:
        self.student_tokenizer, self.teacher_tokenizer = student_tokenizer, teacher_tokenizer
        self.student_ids = _same_texts(student_tokenizer, teacher_tokenizer)
        self._ends = student_tokenizer.eos_token_id, teacher_tokenizer.eos_token_id
        if None not in self._ends:
            self.student_ids[self._ends[1]] = self._ends[0]
        if not (self.student_ids >= 0).any():
            raise ValueError("`tokenizer` shares no token with the student's: no text of a token is the same in both.")

    def teacher_tokens(self, response_ids: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode a response for the teacher, and pair the tokens of both.

        A token that ends the response stands for the teacher's own token of that kind.

        Args:
            response_ids: The student's tokens.

        Returns:
            The teacher's tokens; and pairs of places, in the student's and in the teacher's tokens, where both have one
            token for the same piece of the text.
        """
        response_ids = list(response_ids)
        ends = bool(response_ids) and None not in self._ends and response_ids[-1] == self._ends[0]
        own = response_ids[:-1] if ends else response_ids
        text = decoded(self.student_tokenizer, own)
        theirs = list(self.teacher_tokenizer(text, add_special_tokens=False)["input_ids"])
        agreed = _shared_length(text, decoded(self.teacher_tokenizer, theirs))
        student_ends, teacher_ends = (
            [end if end is not None and end <= agreed else None for end in token_ends(tokenizer, ids)]
            for tokenizer, ids in ((self.student_tokenizer, own), (self.teacher_tokenizer, theirs))
        )
        spans = aligned_spans(student_ends, teacher_ends)
        shared_ends = {*student_ends} & {*teacher_ends} - {None}
        pairs = [
            (span.student[0], span.teacher[0])
            for span in spans
            if span.is_pair
            # Behind the last shared end nothing is known to be the same text.
            and student_ends[span.student[0]] in shared_ends
            # At the start of a text, a token may have another text than in the middle.
            and self.student_ids[theirs[span.teacher[0]]] == own[span.student[0]]
        ]
        if not ends:
            return theirs, pairs
        if not own or (len(text) in shared_ends and agreed == len(text)):
            pairs.append((len(own), len(theirs)))
        return [*theirs, self._ends[1]], pairs


def _shared_length(text: str, other: str) -> int:
    """Number of characters at the start in which two texts agree."""
    if text == other:
        return len(text)
    return next(
        (place for place, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other))
    )


def _same_texts(student_tokenizer: Any, teacher_tokenizer: Any) -> Tensor:
    """For each of the teacher's tokens the student's with the same text, ``(V',)``; -1 where it is not just one."""
    students, teachers = token_texts(student_tokenizer), token_texts(teacher_tokenizer)
    of_text = _unique_places(students)
    unique = _unique_places(teachers)
    student_ids = torch.full((len(teachers),), -1, dtype=torch.long)
    for text, place in unique.items():
        student_ids[place] = of_text.get(text, -1)
    return student_ids


def _unique_places(texts: Sequence[str]) -> dict[str, int]:
    """The place of each text that stands there once."""
    places: dict[str, int] = {}
    repeated = set()
    for place, text in enumerate(texts):
        if text in places:
            repeated.add(text)
        places[text] = place
    return {text: place for text, place in places.items() if text and text not in repeated}


def token_texts(tokenizer: Any) -> list[str]:
    """The text of each token of a vocabulary in the middle of a text; empty for a byte and a part of a character.

    Args:
        tokenizer: A tokenizer.
    """
    size, special = len(tokenizer), set(tokenizer.all_special_ids)
    # Any token that is plain text will do as the one before.
    for anchor in range(size):
        before = decoded(tokenizer, [anchor])
        if anchor not in special and before.isascii() and before.isalpha():
            break
    texts = _decoded_each(tokenizer, [[anchor, token] for token in range(size)])
    names = tokenizer.convert_ids_to_tokens(range(size))
    return [
        text[len(before) :]
        if text.startswith(before) and UNFINISHED_CHARACTER not in text and not BYTE.fullmatch(name or "")
        else ""
        for text, name in zip(texts, names, strict=True)
    ]


def _decoded_each(tokenizer: Any, sequences: Sequence[list[int]]) -> list[str]:
    """The texts of many short sequences; a tokenizer in Rust decodes a whole vocabulary in a second."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        texts: list[str] = backend.decode_batch(list(sequences), skip_special_tokens=False)
        return texts
    return [decoded(tokenizer, sequence) for sequence in sequences]
