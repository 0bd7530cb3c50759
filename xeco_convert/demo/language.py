"""A small English-like language of stories that ask questions about themselves.

The stories are drawn at random from a grammar written for this project. What is said early (who owns which thing, where
it was put, how many animals there were, who went where) is needed again several sentences later, so a model of the
language has to look back over a distance. One set of sentence templates serves both the generator and the recogniser.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache

NAMES: dict[str, tuple[str, ...]] = {
    "f": ("Anna", "Mia", "Rosa", "Lena", "Clara", "Nora", "Ida", "Ella", "Julia", "Vera"),
    "m": ("Tom", "Ben", "Max", "Paul", "Otto", "Leo", "Finn", "Hugo", "Karl", "Sam"),
}
PRONOUNS: dict[str, dict[str, str]] = {
    "f": {"he": "she", "him": "her", "his": "her"},
    "m": {"he": "he", "him": "him", "his": "his"},
}
KIN: dict[str, tuple[str, ...]] = {"f": ("sister", "aunt", "niece"), "m": ("brother", "uncle", "nephew")}
FOLK: dict[str, tuple[str, ...]] = {"f": ("girl", "woman", "queen"), "m": ("boy", "man", "king")}
ANIMALS: dict[str, str] = {
    "fox": "foxes", "bird": "birds", "cat": "cats", "dog": "dogs", "mouse": "mice", "goose": "geese",
    "horse": "horses", "owl": "owls", "rabbit": "rabbits", "duck": "ducks", "bear": "bears", "goat": "goats",
    "frog": "frogs", "wolf": "wolves", "cow": "cows", "pony": "ponies",
}  # fmt: skip
THINGS = (
    "key", "lamp", "book", "ball", "hat", "coat", "ring", "cup", "bell", "drum", "kite", "letter", "map", "rope",
    "coin", "spoon",
)  # fmt: skip
SPOTS: dict[str, tuple[str, ...]] = {
    "in": ("box", "basket", "drawer", "bag"),
    "on": ("table", "shelf", "chair", "roof"),
    "under": ("bed", "bench", "tree", "stone"),
    "behind": ("door", "curtain", "wall", "clock"),
}
PLACES = (
    "forest", "village", "river", "hill", "garden", "market", "mill", "harbour", "castle", "farm", "school", "bridge",
    "lake", "meadow",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "orange", "grey")
TRAITS = ("small", "big", "old", "young", "brave", "clever", "angry", "quiet")
COUNTS = ("two", "three", "four", "five", "six", "seven")
NEEDS: dict[str, str] = {
    "tired": "slept for an hour",
    "hungry": "ate some bread",
    "thirsty": "drank some water",
    "cold": "sat by the fire",
    "sad": "sang a long song",
    "happy": "laughed and danced",
    "afraid": "ran away",
}
FOODS: dict[str, str] = {"hungry": "bread", "thirsty": "water", "weak": "milk", "sick": "soup"}
TIMES = ("One morning", "That evening", "The next day", "Later", "Then", "At night", "Soon", "After that")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "intro": (
        "{name} lived near the {place} with {his} {kin} {other}.",
        "There once was {a_folk} called {name}, and {his} {kin} was called {other}.",
        "{name} was {a_folk}, and {other} was {his} best friend.",
        "This is a story about {name} and {his} {kin} {other}.",
    ),
    "travel": ("They went to the {place} together.", "{When} they walked to the {place}."),
    "return": ("They came back from the {place} and went home.", "It was late when they left the {place}."),
    "own": (
        "{Who} had {a_thing}.",
        "{Who} carried {a_thing} with {him_self}.",
        "{When} {who} bought {a_thing}.",
        "{Who} was proud of {his} {thing}.",
    ),
    "love": ("{Who} loved {his} {thing}.", "{Who} showed {his} {thing} to {other}.", "{Who} cleaned the {thing}."),
    "put": ("{Who} put the {thing} {spot}.", "{When} {who} hid the {thing} {spot}.", "{Who} left the {thing} {spot}."),
    "find": ("{Who} looked for the {thing} and found it {spot}.", "{When} {who} found the {thing} {spot}."),
    "give": ("{Who} gave the {thing} to {other}.", "{When} {who} lent the {thing} to {other}."),
    "give_pronoun": ("{Who} gave {him} the {thing}.", "{When} {who} sold {him} the {thing}."),
    "see_many": (
        "{Who} saw {count} {animals} there.",
        "{When} {who} heard {count} {animals}.",
        "{Who} counted {count} {animals} near the water.",
    ),
    "many": (
        "The {count} {animals} were {weak}, so {who} gave them some {food}.",
        "The {animals} were not afraid of {name}.",
        "All the {animals} followed {name}.",
    ),
    "meet_one": ("{Who} met {a_animal}.", "{When} {who} saw {a_animal}.", "{Who} helped {a_animal}."),
    "one": (
        "The {trait_animal} was {weak}, so {who} gave it some {food}.",
        "The {trait_animal} was not afraid of {name}.",
        "The {trait_animal} was the friend of {name}.",
    ),
    "need": ("{Who} was {need}, so {he} {act}.", "{When} {who} was {need}, and {he} {act}."),
    "weather": (
        "It was a cold day and the wind was strong.",
        "{When} it began to rain.",
        "{When} it began to snow.",
        "The sun was warm and the sky was clear.",
    ),
    "end": (
        "In the end {name} and {other} were happy.",
        "{name} thanked {other} and went home.",
        "{name} and {other} never forgot that day.",
    ),
    "ask_spot": ("Where was the {thing}?",),
    "answer_spot": ("The {thing} was {spot}.",),
    "ask_owner": ("Who had the {thing}?",),
    "answer_owner": ("{name} had the {thing}.",),
    "ask_colour": ("What colour was the {noun}?",),
    "answer_colour": ("The {noun} was {colour}.",),
    "ask_count": ("How many {plural} were there?",),
    "answer_count": ("There were {count} {plural}.",),
    "ask_place": ("Where did they go?",),
    "answer_place": ("They went to the {place}.",),
    "ask_trait": ("Which animal was {trait}?",),
    "answer_trait": ("It was the {trait} {animal}.",),
}

_SLOT = re.compile(r"\{(\w+)\}")
_GENDERS = ("f", "m")


@dataclass(frozen=True)
class Person:
    """A character of a story: a name and a grammatical gender, ``"f"`` or ``"m"``."""

    name: str
    gender: str


@dataclass
class Thing:
    """An object of a story; ``owner`` has it, or else it lies at ``spot`` (one of the two is None)."""

    colour: str
    noun: str
    owner: Person | None
    spot: str | None = None


@dataclass
class Story:
    """What has been told so far, and what is true in the story at this point."""

    rng: random.Random
    hero: Person
    friend: Person
    sentences: list[str] = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)
    herd: tuple[str, str, str] | None = None  # count, colour, kind
    beast: tuple[str, str] | None = None  # trait, kind
    place: str | None = None
    subject: Person | None = None

    def other(self, person: Person) -> Person:
        """The one of the two characters who is not ``person``."""
        return self.friend if person is self.hero else self.hero

    def anyone(self) -> Person:
        """One of the two characters, the subject of the last sentence more often."""
        if self.subject is not None and self.rng.random() < 0.5:
            return self.subject
        return self.rng.choice((self.hero, self.friend))

    def mention(self, person: Person) -> str:
        """The name of ``person``, or a pronoun (he, she) where it can mean nobody else."""
        clear = self.hero.gender != self.friend.gender or person is self.subject
        if clear and self.rng.random() < 0.5:
            return PRONOUNS[person.gender]["he"]
        return person.name

    def tell(self, kind: str, person: Person | None = None, **slots: str) -> None:
        """Append a sentence of ``kind`` whose subject is ``person``; ``slots`` fill what the characters do not."""
        if person is not None:
            slots |= _person_slots(person, self.other(person), self.mention(person))
        slots.setdefault("When", self.rng.choice(TIMES[1:]))
        self.sentences.append(self.rng.choice(TEMPLATES[kind]).format(**slots))
        self.subject = person if person is not None else self.subject


def _person_slots(person: Person, other: Person, mention: str) -> dict[str, str]:
    """The slots of a template that two characters fill."""
    own, its = PRONOUNS[person.gender], PRONOUNS[other.gender]
    return {
        "name": person.name,
        "who": mention,
        "Who": mention[0].upper() + mention[1:],
        "he": own["he"],
        "his": own["his"],
        "him_self": own["him"],
        "other": other.name,
        "him": its["him"],
    }


def _with_article(words: str) -> str:
    """``words`` after a or an."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def _introduce(story: Story) -> None:
    rng = story.rng
    folk = _with_article(f"{rng.choice(TRAITS)} {rng.choice(FOLK[story.hero.gender])}")
    kin = rng.choice(KIN[story.friend.gender])
    story.tell("intro", story.hero, a_folk=folk, kin=kin, place=rng.choice(PLACES))
    # The opening names both characters, so that a pronoun right after it could mean either of two of one gender.
    story.subject = None


def _travel(story: Story) -> bool:
    if story.place is not None:
        return False
    story.place = story.rng.choice(PLACES)
    story.tell("travel", place=story.place)
    return True


def _own(story: Story) -> bool:
    if len(story.things) == 2:
        return False
    nouns = [noun for noun in THINGS if all(noun != thing.noun for thing in story.things)]
    owner = story.anyone()
    thing = Thing(story.rng.choice(COLOURS), story.rng.choice(nouns), owner)
    words = f"{thing.colour} {thing.noun}"
    story.things.append(thing)
    story.tell("own", owner, thing=words, a_thing=_with_article(words))
    return True


def _handle(story: Story) -> bool:
    """Something happens to one of the things: it is put away, found, given away or admired."""
    if not story.things:
        return False
    thing = story.rng.choice(story.things)
    words = f"{thing.colour} {thing.noun}"
    if thing.owner is None:
        finder = story.anyone()
        story.tell("find", finder, thing=words, spot=str(thing.spot))
        thing.owner, thing.spot = finder, None
        return True
    kind = story.rng.choice(("put", "put", "put", "give", "love"))
    if kind == "put":
        prep = story.rng.choice(tuple(SPOTS))
        spot = f"{prep} the {story.rng.choice(SPOTS[prep])}"
        story.tell("put", thing.owner, thing=words, spot=spot)
        thing.owner, thing.spot = None, spot
    elif kind == "give":
        _give(story, thing, thing.owner)
    else:
        story.tell("love", thing.owner, thing=words)
    return True


def _give(story: Story, thing: Thing, giver: Person) -> None:
    receiver = story.other(giver)
    by_pronoun = receiver.gender != giver.gender and story.rng.random() < 0.4
    story.tell("give_pronoun" if by_pronoun else "give", giver, thing=f"{thing.colour} {thing.noun}")
    thing.owner = receiver


def _see_herd(story: Story) -> bool:
    """Several animals of one kind and colour appear, or are met again."""
    rng, person = story.rng, story.anyone()
    if story.herd is None:
        story.herd = (rng.choice(COUNTS), rng.choice(COLOURS), _new_kind(story))
        count, colour, kind = story.herd
        story.tell("see_many", person, count=count, animals=f"{colour} {ANIMALS[kind]}")
    else:
        count, colour, kind = story.herd
        weak = rng.choice(tuple(FOODS))
        story.tell("many", person, count=count, animals=f"{colour} {ANIMALS[kind]}", weak=weak, food=FOODS[weak])
    return True


def _meet_beast(story: Story) -> bool:
    """A single animal appears, or is met again."""
    rng, person = story.rng, story.anyone()
    if story.beast is None:
        story.beast = (rng.choice(TRAITS), _new_kind(story))
        story.tell("meet_one", person, a_animal=_with_article(" ".join(story.beast)))
    else:
        weak = rng.choice(tuple(FOODS))
        story.tell("one", person, trait_animal=" ".join(story.beast), weak=weak, food=FOODS[weak])
    return True


def _new_kind(story: Story) -> str:
    """A kind of animal that the story does not have yet."""
    used = {story.herd[2] if story.herd else "", story.beast[1] if story.beast else ""}
    return story.rng.choice([kind for kind in ANIMALS if kind not in used])


def _feel(story: Story) -> bool:
    need = story.rng.choice(tuple(NEEDS))
    story.tell("need", story.anyone(), need=need, act=NEEDS[need])
    return True


def _weather(story: Story) -> bool:
    story.tell("weather")
    return True


_EVENTS: tuple[Callable[[Story], bool], ...] = (
    _travel, _own, _own, _handle, _handle, _handle, _handle, _see_herd, _see_herd, _meet_beast, _meet_beast, _feel,
    _weather,
)  # fmt: skip


def _questions(story: Story) -> list[tuple[str, dict[str, str]]]:
    """The questions that the story has answered: the kind, and the slots of question and answer."""
    found: list[tuple[str, dict[str, str]]] = []
    for thing in story.things:
        words = f"{thing.colour} {thing.noun}"
        found.append(("colour", {"noun": thing.noun, "colour": thing.colour}))
        if thing.owner is not None:
            found.append(("owner", {"thing": words, "name": thing.owner.name}))
        else:
            found.append(("spot", {"thing": words, "spot": str(thing.spot)}))
    if story.herd is not None:
        found.append(("count", {"count": story.herd[0], "plural": ANIMALS[story.herd[2]]}))
    if story.beast is not None:
        found.append(("trait", {"trait": story.beast[0], "animal": story.beast[1]}))
    if story.place is not None:
        found.append(("place", {"place": story.place}))
    return found


def _ask(story: Story, limit: int) -> None:
    """Append up to ``limit`` questions, each followed by its answer."""
    questions = _questions(story)
    for kind, slots in story.rng.sample(questions, min(limit, len(questions))):
        story.tell(f"ask_{kind}", None, **slots)
        story.tell(f"answer_{kind}", None, **slots)


def _finish(story: Story) -> None:
    """Append a sentence that closes the story."""
    if story.place is not None and story.rng.random() < 0.5:
        story.tell("return", place=story.place)
    else:
        story.tell("end", story.hero)


def _cast(rng: random.Random) -> tuple[Person, Person]:
    """Two characters with different names, mostly one of each gender."""
    first = rng.choice(_GENDERS)
    second = rng.choice(_GENDERS) if rng.random() < 0.4 else ("m" if first == "f" else "f")
    name = rng.choice(NAMES[first])
    return Person(name, first), Person(rng.choice([other for other in NAMES[second] if other != name]), second)


def _tell_story(rng: random.Random) -> list[str]:
    """The sentences of one story: an opening, two to five events, then an ending or questions and answers."""
    story = Story(rng, *_cast(rng))
    _introduce(story)
    wanted = len(story.sentences) + rng.randint(2, 5)
    while len(story.sentences) < wanted:
        rng.choice(_EVENTS)(story)
    asked = rng.choice((0, 1, 2, 2, 2)) if _questions(story) else 0
    crowded = asked == 2 and len(story.sentences) == 6
    if asked == 0 or (not crowded and rng.random() < 0.4):
        _finish(story)
    _ask(story, asked)
    return story.sentences


def generate_stories(num_stories: int, seed: int) -> list[str]:
    """``num_stories`` stories of 4 to 10 sentences, each one line of text; the same for the same ``seed``.

    Raises:
        ValueError: ``num_stories`` is negative.
    """
    if num_stories < 0:
        raise ValueError(f"num_stories must not be negative, got {num_stories}")
    rng = random.Random(seed)
    return [" ".join(_tell_story(rng)) for _ in range(num_stories)]


def generate_text(num_stories: int, seed: int) -> str:
    """``num_stories`` stories separated by a blank line; the same for the same ``seed``.

    Raises:
        ValueError: ``num_stories`` is negative.
    """
    return "\n\n".join(generate_stories(num_stories, seed))


def split_sentences(text: str) -> list[str]:
    """The sentences of ``text``, each with its final full stop or question mark; a tail without one is kept."""
    return [part.strip() for part in re.findall(r"[^.?]+[.?]?", text) if part.strip()]


def questions(num_questions: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of a story up to and including a question mark, and the one correct answer sentence.

    Only the first question of a story is used, so that no earlier answer gives it away.

    Raises:
        ValueError: ``num_questions`` is negative.
    """
    if num_questions < 0:
        raise ValueError(f"num_questions must not be negative, got {num_questions}")
    rng, pairs = random.Random(seed), list[tuple[str, str]]()
    while len(pairs) < num_questions:
        sentences = _tell_story(rng)
        asked = next((i for i, sentence in enumerate(sentences) if sentence.endswith("?")), None)
        if asked is not None:
            pairs.append((" ".join(sentences[: asked + 1]), sentences[asked + 1]))
    return pairs


def is_grammatical(sentence: str) -> bool:
    """Whether ``sentence``, with its final punctuation, is one sentence of the language (spaces around it are ignored).

    Checks words and their order, a and an, number, the gender of pronouns and kin words within the sentence, and that
    two names in it differ. It does not check what the sentence says against the rest of a story.
    """
    text = sentence.strip()
    return any(pattern.fullmatch(text) for pattern in _patterns())


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    """One regular expression for each template and pair of genders."""
    found: dict[str, None] = {}
    pairs = list(itertools.product(_GENDERS, repeat=2))
    for template in itertools.chain.from_iterable(TEMPLATES.values()):
        for variant in _spell_out(template):
            for own, its in pairs:
                found[_expression(variant, _slot_expressions(own, its))] = None
    return tuple(re.compile(expression) for expression in found)


def _spell_out(template: str) -> list[str]:
    """``template`` with the slots that belong together (a need and its act, a weakness and its food) filled in."""
    if "{need}" in template:
        return [template.replace("{need}", need).replace("{act}", act) for need, act in NEEDS.items()]
    if "{weak}" in template:
        return [template.replace("{weak}", weak).replace("{food}", food) for weak, food in FOODS.items()]
    return [template]


def _expression(template: str, slots: dict[str, str]) -> str:
    """``template`` as a regular expression, its slots replaced."""
    # re.split with one group alternates literal text and slot names.
    parts = _SLOT.split(template)
    return "".join(slots[part] if i % 2 else re.escape(part) for i, part in enumerate(parts))


def _any(words: Iterable[str]) -> str:
    return "(?:" + "|".join(words) + ")"


def _after_article(words: Iterable[str]) -> str:
    return _any(_with_article(word) for word in words)


def _slot_expressions(own: str, its: str) -> dict[str, str]:
    """A regular expression for each slot, for a subject of gender ``own`` and another character of gender ``its``."""
    names, mine, other = _any(NAMES[own]), PRONOUNS[own], PRONOUNS[its]
    pronoun = mine["he"]
    people = {
        "name": f"(?P<name>{names})",
        "Who": f"(?P<name>{names}|{pronoun.capitalize()})",
        "who": f"(?P<name>{names}|{pronoun})",
        "he": pronoun,
        "his": mine["his"],
        "him_self": mine["him"],
        "him": other["him"],
        "other": f"(?!(?P=name)\\b){_any(NAMES[its])}",
        "kin": _any(KIN[its]),
        "a_folk": f"{_after_article(TRAITS)} {_any(FOLK[own])}",
    }
    return people | _world_expressions()


@cache
def _world_expressions() -> dict[str, str]:
    """A regular expression for each slot that no character fills."""
    colour, trait, thing, kind = _any(COLOURS), _any(TRAITS), _any(THINGS), _any(ANIMALS)
    plural = _any(ANIMALS.values())
    return {
        "place": _any(PLACES),
        "thing": f"{colour} {thing}",
        "a_thing": f"{_after_article(COLOURS)} {thing}",
        "noun": thing,
        "colour": colour,
        "spot": _any(f"{prep} the {_any(nouns)}" for prep, nouns in SPOTS.items()),
        "count": _any(COUNTS),
        "animals": f"{colour} {plural}",
        "plural": plural,
        "a_animal": f"{_after_article(TRAITS)} {kind}",
        "trait_animal": f"{trait} {kind}",
        "animal": kind,
        "trait": trait,
        "When": _any(TIMES[1:]),
    }
