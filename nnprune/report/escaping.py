"""Names from records as text that cannot break a line, a Markdown table or a LaTeX document, and that differs where they do."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable

UNNAMED = "(no name)"
LATEX_COMMANDS = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def visible(text: str) -> str:
    """`text` on one line: each run of whitespace as one space, other unprintable characters as escapes such as `\\x1b`."""
    line = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def shorten(text: str, length: int) -> str:
    """At most `length` characters of `text`, with `...` in place of the rest."""
    return text if len(text) <= length else text[: length - 3] + "..."


def distinct_names(
    labels: Iterable[str], pretty: Callable[[str], str], plain: Callable[[str], str] = str, reserved: Iterable[str] = ()
) -> dict[str, str]:
    """Label -> `pretty(label)`, visible and unique, in the order of `labels`.

    Labels with the same pretty name, or with a `reserved` one, are shown as `plain(label)`; those that still look alike are
    numbered in sorted order.
    """
    names = {label: visible(pretty(label)) for label in labels}
    uses = Counter(map(_appearance, [*names.values(), *reserved]))
    used, unique = set(map(_appearance, reserved)), {}
    for label, name in sorted(names.items()):
        first = (name if uses[_appearance(name)] == 1 else visible(plain(label))) or UNNAMED
        name, number = first, 1
        while _appearance(name) in used:
            number += 1
            name = f"{first} ({number})"
        used.add(_appearance(name))
        unique[label] = name
    return {label: unique[label] for label in names}


def _appearance(name: str) -> str:
    """Equal for names that no reader can tell apart, such as a letter with an accent and the same as two characters."""
    return unicodedata.normalize("NFKC", name)


def escape_markdown(text: str) -> str:
    """`text` as literal content of a cell of a GitHub table. Underscores within words stay: they mean nothing there."""
    text = re.sub(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", visible(text))
    # An entity and not a backslash: a comment must not begin for those that search the text for markers either.
    return re.sub(r"&(?=#|\w)", "&amp;", text).replace("<", "&lt;")


def escape_latex(text: str) -> str:
    """`text` as literal content of a cell or caption."""
    text = re.sub(r"[\\~^&%$#_{}]", lambda match: LATEX_COMMANDS.get(match[0], "\\" + match[0]), visible(text))
    # Behind the line end of the row above, [ would begin its optional argument and * its starred form.
    return re.sub(r"^[\[*]", r"{\g<0>}", text)
