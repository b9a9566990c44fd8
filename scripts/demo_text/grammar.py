"""Sentence patterns: reads patterns/*.txt and compiles them into functions of a document's world.

A pattern file is a genre: `plan:` lines say which sections follow each other (`event*1-3`: one to three sentences,
`money?`: in half of the texts), `lines:` names the sections that start a new line, and `[section]` opens a list of
patterns, one a line. In a pattern
    [this|that]     is one of the alternatives;
    {thing}         is drawn anew each time;
    {thing1}        ends in a digit: drawn once a document and remembered, so that facts recur;
    {thing1.s}      is a form: s (plural); ed, en, ing, es (verbs);
    {A} {A.his}     is a person of the document and what belongs to that person;
    {np}            may be a macro (macros.txt), which is a random pattern.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from .lexicon import HERE, content_lines

Part = str | Callable  # a literal, or a function of the world that returns text


def compile_pattern(source: str) -> Callable:
    """A function of the world that writes the pattern."""
    parts, end = _parse(source, 0, "")
    if end != len(source):
        raise ValueError(f"unbalanced brackets in the pattern {source!r}")
    return _joiner(parts)


def _joiner(parts: list[Part]) -> Callable:
    if all(isinstance(part, str) for part in parts):
        text = "".join(parts)
        return lambda world: text
    return lambda world: "".join([part if type(part) is str else part(world) for part in parts])


def _parse(source: str, position: int, stops: str) -> tuple[list[Part], int]:
    parts: list[Part] = []
    while position < len(source) and source[position] not in stops:
        char = source[position]
        if char == "[":
            options = []
            while source[position] != "]":
                option, position = _parse(source, position + 1, "|]")
                options.append(_joiner(option))
            parts.append(lambda world, options=options: world.pick(options)(world))
            position += 1
        elif char == "{":
            end = source.index("}", position)
            name, _, form = source[position + 1 : end].partition(".")
            parts.append(lambda world, name=name, form=form: world.slot(name, form))
            position = end + 1
        else:
            end = position
            while end < len(source) and source[end] not in "[{" + stops:
                end += 1
            parts.append(source[position:end])
            position = end
    return parts, position


@dataclass
class Genre:
    """Plans, and for each section its patterns: (source, compiled)."""

    plans: list[list[tuple[str, int, int]]] = field(default_factory=list)  # (section, fewest, most)
    own_line: set[str] = field(default_factory=set)
    sections: dict[str, list[tuple[str, Callable]]] = field(default_factory=dict)


def read_step(step: str) -> tuple[str, int, int]:
    if step.endswith("?"):
        return step[:-1], 0, 1
    section, _, counts = step.partition("*")
    fewest, _, most = (counts or "1-1").partition("-")
    return section, int(fewest), int(most)


def read_genre(name: str) -> Genre:
    genre, section = Genre(), ""
    for line in content_lines(HERE / "patterns" / f"{name}.txt"):
        if line.startswith("plan: "):
            genre.plans.append([read_step(step) for step in line.split()[1:]])
        elif line.startswith("lines: "):
            genre.own_line.update(line.split()[1:])
        elif re.fullmatch(r"\[\w+\]", line):
            section = line.strip("[]")
        else:
            genre.sections.setdefault(section, []).append((line, compile_pattern(line)))
    missing = {step[0] for plan in genre.plans for step in plan} - set(genre.sections)
    if missing:
        raise ValueError(f"{name}: the plans name sections without patterns: {sorted(missing)}")
    return genre


# "a" becomes "an" where the next word sounds like a vowel; "a unit", "a useful", "a one" do not.
AN = re.compile(r"\b([Aa]) (?=(?!uni[^nm]|us[eu]|eu|one\b|once\b|ewe)[aeiouAEIOU]|hour|honest|honou?r|heir|8|11\b|18\b)")
# A capital opens each line, sentence and quotation, but not what follows `," said Ann, "`.
CAPITAL = re.compile(r"(^\"?|[.!?:] \"|[.!?] )([a-z])", re.MULTILINE)


def polish(text: str) -> str:
    """Articles and capitals, once a document."""
    text = AN.sub(r"\1n ", text)
    return CAPITAL.sub(lambda match: match[1] + match[2].upper(), text)
