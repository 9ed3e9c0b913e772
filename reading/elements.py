"""The elements of a DICOM file, walked before GDCM sees them: it allocates whatever length an element claims."""

import struct
import zlib

UNDEFINED = 2**32 - 1
# Of four bytes' length.
LONG = tuple(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
DEEPEST = 32  # sequences in sequences
MOST_INFLATED = 2**30  # bytes of a deflated file
# Values of any compressed picture, since a blank one of 8192 x 8192 has some hundred bytes; for each byte of a larger.
ALWAYS, MOST_SQUEEZED = 2**26, 4096
IMPLICIT, BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
SYNTAX, SAMPLES, FRAMES, ROWS, COLUMNS, BITS, PIXELS = (
    *((2, 0x10), (0x28, 2), (0x28, 8), (0x28, 0x10), (0x28, 0x11), (0x28, 0x100)),
    (0x7FE0, 0x10),
)  # fmt: skip


def check_elements(data: bytes) -> None:
    """Check the lengths that a file's elements claim, in sequences too, and the size of its picture.

    Raises:
        ValueError, struct.error, zlib.error: for a file that ends earlier, or holds less than it claims.
    """
    start = 132 if data[128:132] == b"DICM" else 0
    walk = Walk(data, "<", False)
    place = walk.until(start, len(data), header=True)
    syntax = walk.text(SYNTAX)
    if syntax == DEFLATED:
        data, place = zlib.decompressobj(-15).decompress(data[place:], MOST_INFLATED), 0
    implicit = syntax == IMPLICIT or (not syntax and not data[place + 4 : place + 6].isalpha())
    body = Walk(data, ">" if syntax == BIG_ENDIAN else "<", implicit)
    body.until(place, len(data))
    body.check_picture()


class Walk:
    """A walk over elements, `found` of which at the top: by tag, their places and lengths."""

    def __init__(self, data: bytes, order: str, implicit: bool) -> None:
        self.data, self.order, self.implicit = data, order, implicit
        self.found: dict[tuple[int, int], tuple[int, int]] = {}

    def until(self, place: int, end: int, depth: int = 0, header: bool = False) -> int:
        """Walk from a place to the end, or an end of an item; of a header, to what is not of its group."""
        if depth > DEEPEST:
            raise ValueError("sequences in too many sequences")
        while place + 8 <= end:
            tag = struct.unpack_from(self.order + "HH", self.data, place)
            if header and tag[0] != 2:
                return place
            if tag in ((0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)):
                return place + 8
            start, kind, length = self.head(place)
            if depth == 0:
                self.found[tag] = start, length
            place = self.value(tag, kind, start, length, end, depth)
        return place

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
        place, length = self.found.get(tag, (0, 0))
        return struct.unpack_from(self.order + "H", self.data, place)[0] if length == 2 else otherwise

    def check_picture(self) -> None:
        """Raise ValueError where the picture is larger than its values."""
        if PIXELS not in self.found:
            return
        place, length = self.found[PIXELS]
        frames = int(self.text(FRAMES) or 1)
        count = frames * self.number(SAMPLES, 1) * self.number(ROWS, 0) * self.number(COLUMNS, 0)
        if length == UNDEFINED:
            held = max(ALWAYS, (len(self.data) - place) * MOST_SQUEEZED)
        else:
            held = length * 8 // max(1, self.number(BITS, 8))
        if frames < 0 or count > held:
            raise ValueError(f"claims {count} values, and holds at most {held}")
