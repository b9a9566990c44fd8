"""Words of the demo text: reads words/*.txt and topics/*.txt, and inflects nouns and verbs.

A list line is `key: item, item` (or `item; item`). A noun with an irregular plural is written `loaf/loaves`.
A topic is a section `[name]` with these keys:
    jobs, spots ("in the bakery"), things (countable), stuff (uncountable), tools, adjs (fit its things),
    does (verbs that take any of its things), acts (whole verb phrases), say (sayings; those that are no
    commands are also "fact", which can follow "that"), and several lines
    `chain: cause | effect | fix | result`: what went wrong, what followed, what helps, how it ended.
"""

from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
TOPIC_KEYS = {
    "jobs": "job",
    "spots": "spot",
    "things": "thing",
    "stuff": "stuff",
    "tools": "tool",
    "adjs": "adj",
    "does": "do",
    "acts": "act",
    "say": "say",
}
VOWELS = "aeiou"


def content_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def split_items(text: str) -> list[str]:
    return [item.strip() for item in text.split(";" if ";" in text else ",") if item.strip()]


def regular_plural(noun: str) -> str:
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in VOWELS:
        return noun[:-1] + "ies"
    return noun + "s"


def read_noun(item: str, plurals: dict[str, str]) -> str:
    """Records the plural of `item` ("loaf/loaves", "pair of boots") and returns its singular."""
    singular, _, plural = item.partition("/")
    if not plural:
        first, of, rest = singular.partition(" of ")
        plural = regular_plural(first) + of + rest
    plurals[singular] = plural
    return singular


class Lexicon:
    """`general[key]` and `topics[name][key]` are lists of strings; `plurals` maps a noun to its plural."""

    def __init__(self) -> None:
        self.general: dict[str, list[str]] = {}
        self.topics: dict[str, dict[str, list]] = {}
        self.plurals: dict[str, str] = {}
        for name in ("names", "general"):
            for line in content_lines(HERE / "words" / f"{name}.txt"):
                key, _, items = line.partition(": ")
                self.general[key] = split_items(items)
        for key in ("animal", "container"):
            self.general[key] = [read_noun(item, self.plurals) for item in self.general[key]]
        for path in sorted((HERE / "topics").glob("*.txt")):
            self._read_topics(path)
        self._read_verbs()
        for topic in self.topics.values():  # "said that a good crust sings", but not "said that measure twice"
            topic["fact"] = [say for say in topic["say"] if say.split()[0] not in self.verbs | IMPERATIVES]

    def _read_topics(self, path: Path) -> None:
        for line in content_lines(path):
            if line.startswith("["):
                topic = self.topics.setdefault(line.strip("[]"), {"chain": []})
                continue
            key, _, items = line.partition(": ")
            if key == "chain":
                topic["chain"].append(tuple(part.strip() for part in items.split("|")))
            elif key in ("jobs", "things", "tools"):
                topic[TOPIC_KEYS[key]] = [read_noun(item, self.plurals) for item in split_items(items)]
            else:
                topic[TOPIC_KEYS[key]] = split_items(items)

    def _read_verbs(self) -> None:
        self.irregular: dict[str, tuple[str, str]] = {}
        self.doubling: set[str] = set()
        for line in content_lines(HERE / "words" / "verbs.txt"):
            if line.startswith("double: "):
                self.doubling.update(line.split()[1:])
            else:
                base, past, participle = line.split()
                self.irregular[base] = (past, participle)
        phrases = [phrase for topic in self.topics.values() for key in ("act", "do") for phrase in topic[key]]
        phrases += [chain[2] for topic in self.topics.values() for chain in topic["chain"]]
        self.verbs = {phrase.split()[0] for phrase in phrases} | set(self.irregular)
        self.verbs |= {"apologise", "oil", "tighten"}

    def past(self, base: str, form: str) -> str:
        if base in self.irregular:
            return self.irregular[base][form == "en"]
        if base.endswith("e"):
            return base + "d"
        if base.endswith("y") and base[-2] not in VOWELS:
            return base[:-1] + "ied"
        return base + base[-1] + "ed" if base in self.doubling else base + "ed"

    def verb(self, base: str, form: str) -> str:
        """`form` is "ed" (past), "en" (past participle), "ing" or "es" (he ...)."""
        if form in ("ed", "en"):
            return self.past(base, form)
        if form == "es":
            return {"have": "has", "go": "goes"}.get(base) or regular_plural(base)
        if base.endswith("ie"):
            return base[:-2] + "ying"
        if base.endswith("e") and not base.endswith(("ee", "ye")):
            return base[:-1] + "ing"
        return base + base[-1] + "ing" if base in self.doubling | DOUBLE_ING else base + "ing"

    @cache  # noqa: B019 (one lexicon lives as long as the program)
    def verb_phrase(self, phrase: str, form: str) -> str:
        """Inflects the first verb and any verb after " and ": "stop and look" -> "stopped and looked"."""
        words = phrase.split()
        return " ".join(
            self.verb(word, form) if i == 0 or (words[i - 1] == "and" and word in self.verbs) else word
            for i, word in enumerate(words)
        )


# Words that open a saying which is a command and whose verb is not among the verbs of the topics.
IMPERATIVES = {"never", "first", "breathe", "trust"}
# Irregular verbs, which double their last letter only before "-ing".
DOUBLE_ING = {"begin", "cut", "dig", "fit", "forget", "get", "let", "put", "run", "set", "shut", "sit", "spin", "swim", "win"}
