"""A seeded generator of short English prose: the text of the embedded demo.

    document(seed, index)    one text of 5 to 20 sentences, the same for ever
    corpus(seed, num_bytes)  documents 0, 1, ... joined by blank lines

Seeds of the parts are in SEEDS: no part ever draws from another's stream. The words are in words/ and topics/, the
sentence patterns in patterns/; all of it was written for this project.
"""

import random
from collections.abc import Iterator

from .grammar import Genre, polish, read_genre
from .lexicon import Lexicon
from .world import World

SEEDS = {"train": 1, "calibration": 2, "test": 3}
SEPARATOR = "\n\n"
GENRES = ("story", "letter", "news", "instructions", "place", "entry", "dialogue", "diary")
SHARES = (5, 3, 3, 3, 2, 3, 3, 3)  # of each genre among the documents

_lexicon = Lexicon()
_genres: dict[str, Genre] = {name: read_genre(name) for name in GENRES}
_macros = {name: [pattern for _, pattern in patterns] for name, patterns in read_genre("macros").sections.items()}
_lottery = [name for name, share in zip(GENRES, SHARES, strict=True) for _ in range(share)]


def patterns() -> list[str]:
    """The source of every sentence pattern, macros not counted."""
    return [source for genre in _genres.values() for section in genre.sections.values() for source, _ in section]


def document(seed: int, index: int) -> str:
    """Text number `index` of the stream `seed`: no blank line in it, no newline at its end."""
    world = World(_lexicon, _macros, random.Random(f"{seed}:{index}"))
    genre = _genres[world.pick(_lottery)]
    lines, used, paragraph_open = [], set(), False
    for section, fewest, most in world.pick(genre.plans):
        for _ in range(world.between(fewest, most)):
            unused = [item for item in genre.sections[section] if item[0] not in used]
            if not unused:  # a text does not say the same thing twice
                continue
            source, pattern = world.pick(unused)
            used.add(source)
            own_line = section in genre.own_line
            if paragraph_open and not own_line:
                lines[-1] += " " + pattern(world)
            else:
                lines.append(pattern(world))
            paragraph_open = not own_line
    return polish("\n".join(lines))


def documents(seed: int) -> Iterator[str]:
    index = 0
    while True:
        yield document(seed, index)
        index += 1


def corpus(seed: int, num_bytes: int) -> str:
    """The first documents of a stream, as many as it takes to reach `num_bytes` (counted in UTF-8)."""
    texts, size = [], 0
    for text in documents(seed):
        texts.append(text)
        size += len(text.encode()) + len(SEPARATOR)
        if size >= num_bytes:
            return SEPARATOR.join(texts) + "\n"
    raise AssertionError("a stream never ends")
