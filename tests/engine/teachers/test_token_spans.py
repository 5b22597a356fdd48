"""Tokens of two tokenizers that stand for the same text, on tokenizers trained here."""

from collections.abc import Iterator
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from odp_callbacks.engine.teachers.token_spans import TokenAlignment, aligned_spans, decoded, token_ends, token_texts
from tests.helpers.models import word_tokenizer

CORPUS = [
    "the cat sat on the mat and the dog ate the cake",
    "a number such as 12 and 345 adds up to 357, doesn't it?",
    "naïve café, 東京 and 🎉 are words, too",
]
TEXTS = st.text(alphabet="the catsdog 12,é東🎉\n", max_size=24)


def byte_tokenizer(size: int, eos: str = "<|end|>") -> PreTrainedTokenizerFast:
    """A byte-level BPE with so many tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=[eos], show_progress=False)
    backend.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)


def words_of_corpus() -> PreTrainedTokenizerFast:
    words = dict.fromkeys(word for text in CORPUS for word in text.split())
    return word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *words])


COARSE, FINE, WORDS = byte_tokenizer(340), byte_tokenizer(280, eos="</s>"), words_of_corpus()
TOKENIZERS = {"coarse": COARSE, "fine": FINE, "words": WORDS}


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8), st.data())
def test_spans_have_each_token_once_and_end_where_both_end(
    lengths: list[int], others: list[int], data: st.DataObject
) -> None:
    student, teacher = (
        [None if data.draw(st.booleans()) and data.draw(st.booleans()) else end for end in accumulate(sizes)]
        for sizes in (lengths, others)
    )
    spans = aligned_spans(student, teacher)
    assert [place for span in spans for place in span.student] == list(range(len(student)))
    assert [place for span in spans for place in span.teacher] == list(range(len(teacher)))
    for span in spans[:-1]:
        if span.student and span.teacher:
            assert student[span.student[-1]] == teacher[span.teacher[-1]] is not None
    shared = {*student} & {*teacher} - {None}
    assert len(shared) <= len(spans) <= len(shared) + 1
    for span in spans:  # no span could be cut further
        inner = [
            {ends[place] for place in part[:-1]} for ends, part in ((student, span.student), (teacher, span.teacher))
        ]
        last = {ends[part[-1]] for ends, part in ((student, span.student), (teacher, span.teacher)) if part}
        assert not (inner[0] & inner[1]) - {None} - last


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
def test_a_tokenizer_aligned_with_itself_pairs_every_token_with_itself(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = ids_of(tokenizer, text)
    ends = token_ends(tokenizer, ids)
    assert all(span.student == span.teacher for span in aligned_spans(ends, ends))
    if name != "words":
        theirs, pairs = ALIGNMENTS[name, name].teacher_tokens(ids)
        assert theirs == ids
        # A token within a character stands for no text of its own.
        expected = [(place, place) for place, end in enumerate(ends) if end is not None]
        assert set(pairs) <= set(expected)
        if text.isascii():
            assert pairs == [(place, place) for place in range(len(ids))]


@pytest.mark.parametrize("name", ["coarse", "fine"])
@given(ids=st.lists(st.integers(1, 279), max_size=20))
def test_ends_are_where_the_text_of_the_first_tokens_ends(name: str, ids: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    whole, ends = decoded(tokenizer, ids), token_ends(tokenizer, ids)
    for place, end in enumerate(ends):
        if end is not None and "\ufffd" not in whole[:end]:
            assert decoded(tokenizer, ids[: place + 1]).rstrip("\ufffd") == whole[:end]
    if "\ufffd" not in whole and ids:
        assert ends[-1] == len(whole)


@pytest.mark.parametrize("names", [("coarse", "fine"), ("fine", "coarse"), ("words", "coarse"), ("coarse", "words")])
@given(text=TEXTS)
def test_a_pair_stands_for_the_same_piece_of_the_same_text(names: tuple[str, str], text: str) -> None:
    student, teacher = (TOKENIZERS[name] for name in names)
    ids = ids_of(student, text)
    theirs, pairs = ALIGNMENTS[names].teacher_tokens(ids)
    assert pairs == sorted(set(pairs))
    for own, other in pairs:
        for cut in (0, 1):
            assert decoded(student, ids[: own + cut]) == decoded(teacher, theirs[: other + cut])


def test_words_that_are_whole_in_both_are_paired_and_parts_of_words_are_not() -> None:
    ids = ids_of(COARSE, "the cat sat on 12 cakes")
    theirs, pairs = ALIGNMENTS["coarse", "fine"].teacher_tokens([*ids, COARSE.eos_token_id])
    texts = [
        (decoded(COARSE, [[*ids, COARSE.eos_token_id][own]]), decoded(FINE, [theirs[other]])) for own, other in pairs
    ]
    assert texts[-1] == ("<|end|>", "</s>")
    assert all(own == other for own, other in texts[:-1])
    assert 3 <= len(pairs) < len(ids) + 1 < len(theirs)


def test_responses_need_not_be_what_the_tokenizer_would_have_made() -> None:
    ids = [token for letter in "the" for token in ids_of(COARSE, letter)]
    theirs, pairs = ALIGNMENTS["coarse", "fine"].teacher_tokens(ids)
    assert len(ids) == 3
    assert decoded(FINE, theirs) == "the"
    assert len(pairs) < 3
    assert ALIGNMENTS["coarse", "fine"].teacher_tokens([]) == ([], [])
    assert ALIGNMENTS["coarse", "fine"].teacher_tokens([COARSE.eos_token_id]) == ([FINE.eos_token_id], [(0, 0)])


def test_the_map_joins_tokens_of_the_same_text_only() -> None:
    alignment = ALIGNMENTS["coarse", "words"]
    for word in ("cat", "and"):
        own, other = ids_of(COARSE, f" {word}"), ids_of(WORDS, word)
        if len(own) == 1:
            assert alignment.student_ids[other[0]] == own[0]
    assert alignment.student_ids[WORDS.eos_token_id] == COARSE.eos_token_id
    assert alignment.student_ids[WORDS.unk_token_id] == -1
    backends = (Tokenizer(models.WordLevel({word: 0}, unk_token=word)) for word in ("cat", "dog"))
    with pytest.raises(ValueError, match="shares no token with the student's"):
        TokenAlignment(*(PreTrainedTokenizerFast(tokenizer_object=backend) for backend in backends))


def test_a_token_for_a_byte_does_not_hide_the_one_with_its_text() -> None:
    vocabulary = {"<0x61>": 0, "a": 1, "b": 2, "ab": 3}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert token_texts(tokenizer) == ["", "a", "b", "ab"]
    assert TokenAlignment(tokenizer, tokenizer).student_ids.tolist() == [-1, 1, 2, 3]


def _alignments() -> Iterator[tuple[tuple[str, str], TokenAlignment]]:
    for student in TOKENIZERS:
        for teacher in TOKENIZERS:
            yield (student, teacher), TokenAlignment(TOKENIZERS[student], TOKENIZERS[teacher])


ALIGNMENTS = dict(_alignments())
