"""The world of one document: its topic, persons, places, dates and sums, and what has been said so far.

Everything is drawn from the document's own random stream; what a name that ends in a digit (or a person, a place)
once stood for, it stands for until the document ends.
"""

from .lexicon import Lexicon

PRONOUNS = {"f": ("she", "her", "her", "woman"), "m": ("he", "him", "his", "man")}
RELATIVES = {"f": ["Aunt", "Cousin", "Grandmother"], "m": ["Uncle", "Cousin", "Grandfather"]}
PERSON_WORDS = ("trait", "look", "wear", "hobby", "habit", "feeling")
NAMED = {"T", "U", "R", "G", "O"}  # remembered although they do not end in a digit


class World:
    def __init__(self, lexicon: Lexicon, macros: dict, rng) -> None:
        self.lexicon, self.macros, self.random = lexicon, macros, rng.random
        self.topic = lexicon.topics[self.pick(list(lexicon.topics))]
        self.memory: dict = {}
        self.last: dict[str, str] = {}
        self.used_names: set[str] = set()

    # Drawing ------------------------------------------------------------------------------------------------------
    def pick(self, items: list):
        return items[int(self.random() * len(items))]

    def between(self, low: int, high: int) -> int:
        return low + int(self.random() * (high - low + 1))

    def draw(self, key: str) -> str:
        """A word of the topic or of the general lists, other than the last one drawn under the same key."""
        items = self.topic.get(key) or self.lexicon.general[key]
        word = self.pick(items)
        if word == self.last.get(key) and len(items) > 1:
            word = self.pick(items)
        self.last[key] = word
        return word.replace("{U}", self.slot("U", "")).replace("{hour}", hour(self)) if "{" in word else word

    def slot(self, name: str, form: str) -> str:
        """What a slot of a pattern stands for; `form` is what follows its dot, or empty."""
        if name in "ABC":
            return self.person(name, form)
        if name in self.macros:
            return self.pick(self.macros[name])(self)
        value = self.fact(name) if name[-1].isdigit() or name in NAMED else self.fresh(name)
        if not form:
            return str(value)
        return self.lexicon.plurals[value] if form == "s" else self.lexicon.verb_phrase(value, form)

    def fresh(self, key: str):
        return FACTS[key](self) if key in FACTS else self.draw(key)

    def fact(self, name: str):
        """A remembered value, drawn on its first use, different from its sisters (thing1, thing2)."""
        if name not in self.memory:
            key = name.rstrip("0123456789")
            if name in FACTS:
                self.memory[name] = FACTS[name](self)
            elif key in CHAIN:
                self.memory[name] = self.fact("chain" + name[len(key) :])[CHAIN[key]]
            else:
                sisters = {self.memory.get(key + digit) for digit in "123"}
                value = self.fresh(key)
                while value in sisters and key != "chain":
                    value = self.fresh(key)
                self.memory[name] = value
        return self.memory[name]

    # Persons ------------------------------------------------------------------------------------------------------
    def new_person(self) -> dict[str, str]:
        gender = "f" if self.random() < 0.5 else "m"
        he, him, his, man = PRONOUNS[gender]
        first = self.unused("female" if gender == "f" else "male")
        last = self.unused("last")
        age = self.between(22, 78)
        return {
            "": first,
            "last": last,
            "full": f"{first} {last}",
            "mr": ("Mrs " if gender == "f" else "Mr ") + last,
            "he": he,
            "him": him,
            "his": his,
            "man": man,
            "age": str(age),
            "years": str(self.between(3, age - 18)),
            "rel": self.draw(gender + "relation"),
            "rel2": self.pick(RELATIVES[gender]),
            "job": self.draw("job"),
        }

    def unused(self, key: str) -> str:
        word = self.draw(key)
        while word in self.used_names:
            word = self.draw(key)
        self.used_names.add(word)
        return word

    def person(self, letter: str, form: str) -> str:
        person = self.memory.get(letter)
        if person is None:
            person = self.memory[letter] = self.new_person()
        if form == "job.s":
            return self.lexicon.plurals[person["job"]]
        if form in PERSON_WORDS and form not in person:
            person[form] = self.draw(form)
        return person[form]


def place_name(world: World) -> str:
    return world.unused("placehead") + world.draw("placetail")


def hour(world: World) -> str:
    number = world.draw("few")
    return world.pick(
        [
            f"half past {number}",
            f"a quarter to {number}",
            f"a quarter past {number}",
            f"{number} o'clock",
            f"ten to {number}",
            f"twenty past {number}",
            "noon",
            "midnight",
            f"{number} o'clock",
        ]
    )


def organisation(world: World) -> str:
    town = world.slot("T", "")
    return world.pick(
        [
            f"the {town} {world.draw('society')}",
            f"{world.draw('last')} and {world.pick(['Sons', 'Daughters'])}",
            f"the {world.draw('society')} of {town}",
        ]
    )


def clock(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02d}"


def day_after(world: World, name: str) -> str:
    days = world.lexicon.general["weekday"]
    return days[(days.index(world.fact(name)) + 1) % 7]


# How a computed slot follows from others: sums, dates and years stay consistent within a document.
CHAIN = {"cause": 0, "effect": 1, "fix": 2, "result": 3}
FACTS = {
    "T": place_name,
    "U": place_name,
    "R": lambda w: w.draw("river"),
    "G": lambda w: w.draw("region"),
    "O": organisation,
    "hour": hour,
    "chain": lambda w: w.pick(w.topic["chain"]),
    "date": lambda w: f"{w.between(1, 28)} {w.draw('month')}",
    "q1": lambda w: w.between(2, 12),
    "p1": lambda w: w.between(2, 25),
    "sum1": lambda w: w.fact("q1") * w.fact("p1"),
    "q2": lambda w: w.between(2, 9),
    "p2": lambda w: w.between(2, 20),
    "sum2": lambda w: w.fact("q2") * w.fact("p2"),
    "both1": lambda w: w.fact("sum1") + w.fact("sum2"),
    "paid1": lambda w: (w.fact("sum1") // 10 + 1) * 10,
    "change1": lambda w: w.fact("paid1") - w.fact("sum1"),
    "q1plus1": lambda w: w.fact("q1") + 1,
    "sum1plus1": lambda w: w.fact("sum1") + w.fact("p1"),
    "weekday2": lambda w: day_after(w, "weekday1"),
    "weekday3": lambda w: day_after(w, "weekday2"),
    "year": lambda w: w.between(1880, 1960),
    "year1": lambda w: w.between(1720, 1930),
    "span1": lambda w: w.between(44, 88),
    "year2": lambda w: w.fact("year1") + w.fact("span1"),
    "agem1": lambda w: w.between(20, w.fact("span1") - 2),
    "yearm1": lambda w: w.fact("year1") + w.fact("agem1"),
    "teen": lambda w: w.between(11, 19),
    "start1": lambda w: 5 * w.between(84, 220),
    "mins": lambda w: 5 * w.between(1, 12),
    "time1": lambda w: clock(w.fact("start1")),
    "time2": lambda w: clock(w.fact("start1") + int(w.fact("mins1"))),
    "dozen": lambda w: w.between(13, 98),
    "diff1": lambda w: w.between(2, 30),
    "more1": lambda w: int(w.fact("dozen1")) + w.fact("diff1"),
    "hundred": lambda w: 10 * w.between(11, 98),
    "thousand": lambda w: 100 * w.between(8, 240),
    "deg": lambda w: w.between(3, 31),
    "grams": lambda w: 50 * w.between(2, 16),
    "twice1": lambda w: 2 * int(w.fact("grams1")),
    "ml": lambda w: 50 * w.between(2, 15),
    "oven": lambda w: 10 * w.between(15, 23),
}
