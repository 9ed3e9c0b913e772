"""Text that users chose, as text of a table, a figure or a shell: names of files, folders and classes, a failed run's
last words. One function a language, called where text becomes markup. HTML has MarkupSafe's.

A file's name may hold any byte but "/" and NUL: a tag, a formula, an escape code of a terminal, half a letter.
"""

import re
import shlex
import unicodedata
from collections.abc import Iterable

# Scripts of Persian and of India join letters by these two, and emoji by the second.
_KEPT = "\n\u200c\u200d"


def printable(text: str) -> str:
    """Text in which what cannot be seen is written as Python writes it ("\\x1b"): control characters, bytes of a name
    that are not UTF-8, marks that turn the direction of writing. Line breaks stay."""
    if text.isprintable():
        return text
    return "".join(c if _is_seen(c) else c.encode("unicode_escape").decode() for c in text)


def _is_seen(character: str) -> bool:
    return character.isprintable() or character in _KEPT or unicodedata.category(character) == "Zs"


def one_line(text: str) -> str:
    """`printable` text, line breaks as "\\n"."""
    return printable(text).replace("\n", r"\n")


# Only what would act is replaced, so that a table reads well as it is: "a_b" and "p < 0.001" stay. Entities, because
# not every Markdown takes a backslash before every sign, and none takes an entity for markup.
_MARKDOWN = re.compile(
    r"[\\`*\[\]|~$@]|<(?=[a-z/!?])|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE
)


def markdown_text(text: str) -> str:
    """Text in a cell of a Markdown table, or within a line."""
    return _MARKDOWN.sub(lambda found: f"&#{ord(found[0])};", one_line(text))


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}", '"': r"{\char34}", "|": r"\textbar{}", "<": "$<$", ">": "$>$",
    "±": r"$\pm$", "–": "--", "−": "$-$",
}  # fmt: skip


def latex_text(text: str) -> str:
    """Text in a cell of a LaTeX table. Signs that LaTeX would join ("--", ",,") stay apart."""
    cell = "".join(_LATEX.get(c, c) for c in re.sub(r"([-,])(?=\1)", "\\1\0", one_line(text)))
    return cell.replace("\0", "{}")


def figure_text(text: str) -> str:
    """Text of a matplotlib figure, which takes what is between two "$" for a formula, and leaves names that begin with
    "_" out of legends."""
    shown = one_line(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def shell_words(words: Iterable[str]) -> str:
    """Words as one line for bash, and, where all of it can be seen, for every shell."""
    return " ".join(shlex.quote(word) if one_line(word) == word else _escaped_word(word) for word in words)


def _escaped_word(word: str) -> str:
    """bash's `$'…'`: in a here-document, a line break within quotes could end it."""

    def escape(c: str) -> str:
        if c in "\\'":
            return f"\\{c}"
        if one_line(c) == c:
            return c
        return "".join(f"\\x{byte:02x}" for byte in c.encode(errors="surrogateescape"))

    return f"$'{''.join(map(escape, word))}'"


# Programs for tables run a cell that begins so, also behind blanks and with the wide signs of East Asian keyboards.
_FORMULA = re.compile(r"'*\s*[=+\-@＝＋－＠]")
_NUMBER = re.compile(r"\s*[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf|nan)\s*", re.ASCII | re.IGNORECASE)


def csv_cell(value: object) -> object:
    """A value as a cell of CSV: with an apostrophe before a text that a program for tables would run. Numbers stay."""
    if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def csv_value(cell: str) -> str:
    """The text that `csv_cell` was given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
