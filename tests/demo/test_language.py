"""The language of the demo: its generator and its recogniser agree, and the recogniser rejects what is wrong."""

import random
import re

import pytest

from xeco_convert.demo.language import (
    ANIMALS,
    KIN,
    generate_stories,
    generate_text,
    is_grammatical,
    questions,
    split_sentences,
)

STORIES = generate_stories(400, seed=11)


def test_every_generated_sentence_is_grammatical() -> None:
    wrong = [sentence for story in STORIES for sentence in split_sentences(story) if not is_grammatical(sentence)]
    assert wrong == []


def test_stories_have_four_to_ten_sentences() -> None:
    assert {len(split_sentences(story)) for story in STORIES} == set(range(4, 11))


def test_text_is_the_same_for_the_same_seed_only() -> None:
    assert generate_text(20, seed=5) == generate_text(20, seed=5)
    assert generate_text(20, seed=5) != generate_text(20, seed=6)


def test_blank_lines_separate_the_stories_of_a_text() -> None:
    assert generate_text(7, seed=1).split("\n\n") == generate_stories(7, seed=1)
    assert generate_text(0, seed=1) == ""


def test_vocabulary_has_150_to_300_words() -> None:
    words = set(re.findall(r"[A-Za-z]+", " ".join(generate_stories(5000, seed=2))))
    assert 150 <= len(words) <= 300


def test_shuffled_sentences_are_rejected() -> None:
    rng, shuffled = random.Random(0), []
    for story in STORIES:
        for sentence in split_sentences(story):
            words = sentence[:-1].split()
            rng.shuffle(words)
            if words != sentence[:-1].split():
                shuffled.append(" ".join(words) + sentence[-1])
    accepted = [sentence for sentence in shuffled if is_grammatical(sentence)]
    assert len(shuffled) > 2000
    assert accepted == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("Anna had a red key.", "Anna had an red key."),
        ("Tom had an orange hat.", "Tom had a orange hat."),
        ("Tom was proud of his blue cup.", "Tom was proud of her blue cup."),
        ("Tom was tired, so he slept for an hour.", "Tom was tired, so she slept for an hour."),
        ("Tom was tired, so he slept for an hour.", "Tom was tired, so he ate some bread."),
        ("She saw three white geese there.", "She saw three white goose there."),
        ("Tom met an old owl.", "Tom met old an owl."),
        ("Anna gave the red key to Tom.", "Anna gave the red key to Anna."),
        ("Where was the red key?", "Where was the red key."),
        ("The red key was under the bed.", "The red key was under the table."),
        ("This is a story about Leo and his aunt Mia.", "This is a story about Leo and his aunt Max."),
    ],
)
def test_recogniser_tells_right_from_wrong(right: str, wrong: str) -> None:
    assert is_grammatical(right)
    assert not is_grammatical(wrong)


@pytest.mark.parametrize("text", ["", ".", "Anna", "Anna had a red key", "Anna had a red key. Tom was proud."])
def test_recogniser_rejects_what_is_not_one_whole_sentence(text: str) -> None:
    assert not is_grammatical(text)


def test_spaces_around_a_sentence_do_not_matter() -> None:
    assert is_grammatical("  Anna had a red key.\n")


def test_sentences_are_split_after_their_punctuation() -> None:
    assert split_sentences("It is. Where?  There\n\nNow. the end") == ["It is.", "Where?", "There\n\nNow.", "the end"]
    assert split_sentences("") == []


def test_answers_follow_from_the_story() -> None:
    pairs = questions(200, seed=3)
    assert len(pairs) == 200
    for story, answer in pairs:
        *told, asked = split_sentences(story)
        assert asked.endswith("?") and is_grammatical(answer)
        # The word that the answer adds to its question has been said before.
        new = set(re.findall(r"\w+", answer)) - set(re.findall(r"\w+", asked)) - {"The", "They", "There", "went", "It"}
        said = set(re.findall(r"\w+", " ".join(told)))
        assert new <= said | {"had", "to", "the"}, (story, answer)


def test_word_lists_do_not_overlap() -> None:
    assert not set(ANIMALS) & set(ANIMALS.values())
    assert not set(KIN["f"]) & set(KIN["m"])


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        generate_text(-1, seed=0)
    with pytest.raises(ValueError, match="-2"):
        questions(-2, seed=0)
