"""How deep tuples lie in one another in a pickle of torch's, told by its opcodes: nothing of it is made.

A tuple in a hundred thousand others ends the process where it is hashed: as a key, in a set, in a Counter. Tuples do
not change once they are made, so one that is not made is hashed nowhere, whatever else a file says.
"""

import mmap
import pickle
import re

DEEPEST = 100  # tuples in tuples that are made; weights have three
TOO_DEEP = f"tuples more than {DEEPEST} deep in one another"
BEHIND = 2  # tuples at most in what a tensor's opcodes leave in the memo, besides its storage's name


def _one_of(*codes: bytes) -> frozenset[int]:
    return frozenset(code[0] for code in codes)


# The opcodes that torch's own unpickler reads, by what they do with the stack of what is made.
PUSHES = {  # what is no tuple: opcode → bytes with its argument
    **dict.fromkeys(_one_of(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.EMPTY_TUPLE), 1),
    **dict.fromkeys(_one_of(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET), 1),
    **dict(zip((pickle.BININT1[0], pickle.BININT2[0], pickle.BININT[0], pickle.BINFLOAT[0]), (2, 3, 5, 9))),
}
LONG_PUSHES = {pickle.BINUNICODE[0]: 4, pickle.SHORT_BINSTRING[0]: 1, pickle.LONG1[0]: 1}  # → bytes of its length
PUTS = {pickle.BINPUT[0]: 2, pickle.LONG_BINPUT[0]: 5}
GETS = {pickle.BINGET[0]: 2, pickle.LONG_BINGET[0]: 5}
TUPLES = {pickle.TUPLE1[0]: 1, pickle.TUPLE2[0]: 2, pickle.TUPLE3[0]: 3}
CALLS = _one_of(pickle.REDUCE, pickle.NEWOBJ)
DROPS_ONE, DROPS_MARKED = _one_of(pickle.APPEND, pickle.BUILD), _one_of(pickle.APPENDS, pickle.SETITEMS)

# A tensor as torch.save writes it, all but the first. Files have thousands, so that they are passed over at once.
_GET, _KEPT, _INT = rb"(?:h.|j.{4})", rb"(?:q.|r.{4})", rb"(?:K.|M..|J.{4})"
_PUT = _KEPT + b"?"
_NUMBER = b"X(?:%b)" % b"|".join(rb"\x%02x\0\0\0[0-9]{%d}" % (n, n) for n in range(1, 21))
_INTS = rb"(?:\)|%b\x85|%b\x86|%b\x87|\(%b*t)%b" % (_INT, _INT * 2, _INT * 3, _INT, _PUT)
TENSOR = re.compile(
    rb"%b\(\((%b)(%b)%b%b(%b)%bN?t(%b)Q" % (_GET, _GET, _GET, _NUMBER, _PUT, _GET, _INT, _KEPT)  # its storage
    + rb"%b%b%b[\x88\x89]%b\)R%bt%bR" % (_INT, _INTS, _INTS, _GET, _PUT, _PUT),  # offset, size, stride, hooks
    re.DOTALL,
)


def end_of_pickle(data: bytes | mmap.mmap, start: int = 0) -> int:
    """Where a pickle ends that is not refused.

    Raises:
        pickle.UnpicklingError: for tuples deeper than `DEEPEST`, and for an opcode that torch's unpickler has not.
        IndexError, ValueError: where it is damaged.
    """
    at, stack, marks = start, [], []  # how deep what is on the stack is; where marked parts of it begin
    memo: dict[bytes, int] = {}  # the same of what is kept, by the number's bytes, where it is more than nothing
    while (code := data[at]) != pickle.STOP[0]:
        length = 1
        if code in GETS:
            length = GETS[code]
            tensor = TENSOR.match(data, at)
            if tensor:
                length = tensor.end() - at
                name, kind, device, place = tensor.groups()  # the tuple of a storage's name, and where it is kept
                deep = max(memo.get(_key(name), BEHIND), memo.get(_key(kind), BEHIND), memo.get(_key(device), BEHIND))
                memo[_key(place)] = _deeper(deep)
            stack.append(0 if tensor else memo.get(_key(data[at : at + length]), BEHIND))
        elif code in PUTS:
            length = PUTS[code]
            if stack[-1]:
                memo[_key(data[at : at + length])] = stack[-1]
        elif code in LONG_PUSHES:
            length = 1 + LONG_PUSHES[code]
            length += int.from_bytes(data[at + 1 : at + length], "little")
            stack.append(0)
        elif code in PUSHES:
            length = PUSHES[code]
            stack.append(0)
        elif code == pickle.MARK[0]:
            marks.append(len(stack))
        elif code in TUPLES or code == pickle.TUPLE[0]:
            first = len(stack) - TUPLES[code] if code in TUPLES else marks.pop()
            stack[first:] = [_deeper(max(stack[first:], default=0))]
        elif code in CALLS:  # none of what torch's unpickler calls gives its arguments back
            stack[-2:] = [0]
        elif code == pickle.BINPERSID[0]:
            stack[-1] = 0
        elif code == pickle.GLOBAL[0]:
            length = _behind_line(data, _behind_line(data, at)) - at
            stack.append(0)
        elif code in DROPS_ONE:
            stack.pop()
        elif code == pickle.SETITEM[0]:
            del stack[-2:]
        elif code in DROPS_MARKED:
            del stack[marks.pop() :]
        elif code == pickle.PROTO[0]:
            length = 2
        else:
            raise pickle.UnpicklingError(f"Unsupported operand {code}")  # torch's words
        at += length
    return at + 1


def _behind_line(data: bytes | mmap.mmap, at: int) -> int:
    """Where the next line begins; a ValueError where there is none."""
    end = data.find(b"\n", at)
    if end < 0:
        raise ValueError("a line without an end")
    return end + 1


def _key(operation: bytes) -> bytes:
    """What it keeps or gets: a number, in one byte or in four."""
    return operation[1:].rstrip(b"\0")


def _deeper(inside: int) -> int:
    """The depth of a tuple of others."""
    if inside >= DEEPEST:
        raise pickle.UnpicklingError(TOO_DEEP)
    return inside + 1
