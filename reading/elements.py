"""The elements of a DICOM file, walked before GDCM sees them: it allocates whatever length an element claims."""

import struct
import zlib

from medssl.reading.arrays import most_inflated

UNDEFINED = 2**32 - 1
# Of four bytes' length.
LONG = tuple(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
DEEPEST = 32  # sequences in sequences
MOST_ELEMENTS = 2**20  # of a file, with its sequences' items: the eight bytes of one become a kilobyte where it is read
# Values of any compressed picture, since a blank one of 8192 x 8192 has some hundred bytes; for each byte of a larger.
ALWAYS, MOST_SQUEEZED = 2**26, 4096
IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
SYNTAX, SAMPLES, COLOURS, FRAMES, ROWS, COLUMNS, BITS, PIXELS = (
    *((2, 0x10), (0x28, 2), (0x28, 4), (0x28, 8), (0x28, 0x10), (0x28, 0x11), (0x28, 0x100)),
    (0x7FE0, 0x10),
)  # fmt: skip
USED = (SYNTAX, SAMPLES, COLOURS, FRAMES, ROWS, COLUMNS, BITS, PIXELS)


def check_elements(data: bytes, subsampled: bool = False) -> int:
    """Check the lengths that a file's elements claim, in sequences too, and the size of its picture. What readers take
    differently (the first of two sizes, or the last) is refused: one of them reads beyond the values.

    Args:
        subsampled: whether the reader knows of colours that two pixels share, as pydicom does.

    Returns:
        the pixels of all its frames, 0 where it has no picture.

    Raises:
        ValueError, struct.error, zlib.error: for a file that ends earlier, or holds less than it claims.
    """
    data = inflated(data)
    syntax, place = _syntax(data)
    implicit, order = syntax == IMPLICIT, ">" if syntax == BIG_ENDIAN else "<"
    if not syntax:  # a file without a header: its first element's group tells, as pydicom knows it too
        implicit = not data[place + 4 : place + 6].isalpha()
        order = ">" if not implicit and int.from_bytes(data[place : place + 2], "little") >= 1024 else "<"
    body = Walk(data, order, implicit)
    body.until(place, len(data))
    return body.check_picture(subsampled)


def inflated(data: bytes, most: int | None = None) -> bytes:
    """A deflated file as one that is not; others as they are.

    Args:
        most: bytes of the elements to begin with, where the rest does not matter; the file may be cut then.

    Raises:
        ValueError, struct.error, zlib.error: for a damaged file, and one that inflates beyond what is read.
    """
    syntax, place = _syntax(data)
    if syntax != DEFLATED:
        return data
    unpacker, bound = zlib.decompressobj(-15), most_inflated(len(data))
    elements = unpacker.decompress(data[place:], bound + 1 if most is None else most)
    if most is None and len(elements) > bound:
        raise ValueError(f"its {len(data)} bytes inflate to more than {bound}")
    if most is None and not unpacker.eof:
        raise ValueError("its deflated elements are cut short")
    named = DEFLATED.encode()
    return data[:place].replace(named, EXPLICIT.encode().ljust(len(named), b"\0")) + elements


def _syntax(data: bytes) -> tuple[str, int]:
    """A file's transfer syntax, "" where it says none, and the place where its header ends."""
    header = Walk(data, "<", False)
    place = header.until(132 if data[128:132] == b"DICM" else 0, len(data), header=True)
    return header.text(SYNTAX), place


class Walk:
    """A walk over elements, `found` of which at the top: by tag, places and lengths of those that are used."""

    def __init__(self, data: bytes, order: str, implicit: bool) -> None:
        self.data, self.order, self.implicit = data, order, implicit
        self.found: dict[tuple[int, int], tuple[int, int]] = {}
        self.met = 0

    def until(self, place: int, end: int, depth: int = 0, header: bool = False) -> int:
        """Walk from a place to the end, or an end of an item; of a header, to what is not of its group."""
        if depth > DEEPEST:
            raise ValueError("sequences in too many sequences")
        while place + 8 <= end:
            tag = struct.unpack_from(self.order + "HH", self.data, place)
            if header and tag[0] != 2:
                return place
            if tag in ((0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)):
                if depth == 0:  # where pydicom ends, and GDCM goes on
                    raise ValueError("an end of an item that never began")
                return place + 8
            self.count()
            start, kind, length = self.head(place)
            if depth == 0 and tag in USED:
                if tag in self.found:
                    raise ValueError(f"has the element ({tag[0]:04x},{tag[1]:04x}) twice")
                self.found[tag] = start, length
            place = self.value(tag, kind, start, length, end, depth)
        return place

    def count(self) -> None:
        """One more element, or item."""
        self.met += 1
        if self.met > MOST_ELEMENTS:
            raise ValueError(f"has more than {MOST_ELEMENTS} elements")

    def head(self, place: int) -> tuple[int, bytes, int]:
        """Where an element's value starts, its kind, and its length."""
        kind = self.data[place + 4 : place + 6]
        if self.implicit or not kind.isalpha():
            return place + 8, b"", struct.unpack_from(self.order + "I", self.data, place + 4)[0]
        if kind in LONG:
            return place + 12, kind, struct.unpack_from(self.order + "I", self.data, place + 8)[0]
        return place + 8, kind, struct.unpack_from(self.order + "H", self.data, place + 6)[0]

    def value(self, tag: tuple[int, int], kind: bytes, start: int, length: int, end: int, depth: int) -> int:
        """Walk a value, which is one of a sequence, or raw; returns where it ends."""
        if length == UNDEFINED:
            return self.items(start, end, depth, raw=tag == PIXELS)
        if length > end - start:
            raise ValueError(
                f"an element ({tag[0]:04x},{tag[1]:04x}) claims {length} bytes, {max(0, end - start)} are left"
            )
        if kind == b"SQ":
            self.items(start, start + length, depth, raw=False)
        return start + length

    def items(self, place: int, end: int, depth: int, raw: bool) -> int:
        """Walk a sequence's items, or the fragments of a compressed picture."""
        while place + 8 <= end:
            group, element, length = struct.unpack_from(self.order + "HHI", self.data, place)
            place += 8
            if (group, element) == (0xFFFE, 0xE0DD):
                return place
            if (group, element) != (0xFFFE, 0xE000):
                raise ValueError("a sequence of something else than items")
            self.count()
            if length == UNDEFINED:
                place = self.until(place, end, depth + 1)
            elif length > end - place:
                raise ValueError(f"an item claims {length} bytes, {end - place} are left")
            else:
                if not raw:
                    self.until(place, place + length, depth + 1)
                place += length
        return place

    def text(self, tag: tuple[int, int]) -> str:
        place, length = self.found.get(tag, (0, 0))
        return self.data[place : place + length].decode("latin-1").strip("\0 ")

    def number(self, tag: tuple[int, int], otherwise: int) -> int:
        """The one number of an element, of which some readers take the first of several, and others none."""
        place, length = self.found.get(tag, (0, 0))
        if tag in self.found and length != 2:
            raise ValueError(f"({tag[0]:04x},{tag[1]:04x}) has {length} bytes, where a number has two")
        return struct.unpack_from(self.order + "H", self.data, place)[0] if length else otherwise

    def check_picture(self, subsampled: bool) -> int:
        """How many pixels all frames have; raises ValueError where the picture is larger than its values."""
        if PIXELS not in self.found:
            return 0
        place, length = self.found[PIXELS]
        frames = int(self.text(FRAMES) or 1)
        if frames < 1:
            raise ValueError(f"claims {frames} frames")
        pixels = frames * self.number(ROWS, 0) * self.number(COLUMNS, 0)
        count, bits = pixels * self.number(SAMPLES, 1), self.number(BITS, 8)
        if length == UNDEFINED:
            held = max(ALWAYS, (len(self.data) - place) * MOST_SQUEEZED)
        else:
            held = length * 8 // max(1, bits)
            if subsampled and self.text(COLOURS) == "YBR_FULL_422":
                held = held * 3 // 2
        if count > held:
            raise ValueError(f"claims {count} values, and holds at most {held}")
        return pixels
