"""What `--help` shows of a script's docstring: text in lines of 100 columns, its commands as examples at the end."""

import re
import textwrap

WIDTH = 100
COMMANDS = ("python ", "torchrun ")


def arrange(doc: str) -> tuple[str, str]:
    """A docstring as description and epilog of a parser.

    Paragraphs are filled. Of indented ones, lines that are too long continue below their text; those that begin with a
    command are the examples, each with what stands in brackets behind it as a comment.
    """
    texts, examples = [], []
    for paragraph in filter(None, re.split(r"\n\s*\n", textwrap.dedent(doc).strip("\n"))):
        lines = paragraph.splitlines()
        if lines[0].lstrip().startswith(COMMANDS):
            examples += commands(lines)
        elif lines[0].startswith(" "):
            texts.append("\n".join(items(lines)))
        else:
            texts.append(textwrap.fill(" ".join(lines), WIDTH, break_long_words=False, break_on_hyphens=False))
    return "\n\n".join(texts), "\n".join(["examples:", *examples]) if examples else ""


def commands(lines: list[str]) -> list[str]:
    """Commands, with a comment above those that have one, broken so that a shell takes them as they are."""
    indent = len(lines[0]) - len(lines[0].lstrip())
    joined: list[str] = []
    for line in lines:
        if len(line) - len(line.lstrip()) > indent:
            joined[-1] += " " + line.strip()
        else:
            joined.append(line.strip())
    out = []
    for line in joined:
        command, comment = re.fullmatch(r"(.*?)(?:\s+\(([^()]*)\))?(?:,\s+or.*)?", line).groups()
        out += [f"  # {comment}"] if comment else []
        # An option stays beside its values.
        groups = re.findall(r'(?:^|-)(?:"[^"]*"|[^\s"]+|\s+(?!-))*', command)
        words = [group.strip().replace(" ", "\0") for group in groups]
        broken = textwrap.wrap(
            " ".join(words), WIDTH - 4, break_long_words=False, break_on_hyphens=False, subsequent_indent="    "
        )
        out.append(" \\\n".join("  " + part.replace("\0", " ") for part in broken))
    return out


def items(lines: list[str]) -> list[str]:
    """Lines of a list or table; a name and its text whose lines are too long are filled beside the name."""
    indent = len(lines[0]) - len(lines[0].lstrip())
    out: list[list[str]] = []
    for line in lines:
        if out and len(line) - len(line.lstrip()) > indent:
            out[-1].append(line)
        else:
            out.append([line])
    filled = []
    for item in out:
        if max(map(len, item)) <= WIDTH:
            filled += item
            continue
        name = re.match(r"\s*\S+(?: \S+)*\s{2,}", item[0]) or re.match(r"\s*", item[0])
        text = " ".join([item[0][name.end() :], *(line.strip() for line in item[1:])])
        below = " " * name.end()
        filled.append(textwrap.fill(
            text, WIDTH, initial_indent=name[0], subsequent_indent=below, break_long_words=False, break_on_hyphens=False
        ))  # fmt: skip
    return filled
