"""Bytes of a file into text: UTF-8, or UTF-16 and UTF-32 with a byte order mark. Everything else is named and refused.

Without a mark no encoding but UTF-8 can be told for sure, so the error says which one it looks like and how to convert.
"""

from __future__ import annotations

import codecs
import re
import shlex
from collections.abc import Iterable, Iterator
from itertools import chain

MARKS = (  # of UTF-32 first, because its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"), (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
KINDS = (
    (b"%PDF-", "a PDF"), (b"PK\x03\x04", "a ZIP archive, such as .docx or .epub"), (b"\x1f\x8b", "a gzip archive"),
    (b"{\\rtf", "a document in Rich Text Format"), (b"\xd0\xcf\x11\xe0", "an old Office document"),
    (b"\x89PNG", "a picture"), (b"\xff\xd8\xff", "a picture"), (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x7fELF", "a program"),
)  # fmt: skip
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
ISO_2022 = re.compile(rb"\x1b(\$[@AB]|\$\)[AC]|\([IJ])")  # what switches to an Asian alphabet
HEAD = 4096  # bytes at the beginning that are looked at before any is decoded
SAMPLE = 1 << 16  # bytes on either side of a wrong one that a guess is made from


def encoding_of(head: bytes) -> tuple[str, int]:
    """The codec that the first bytes of a file name, and the length of their byte order mark; UTF-8 without one."""
    return next(((codec, len(mark)) for mark, codec in MARKS if head.startswith(mark)), ("utf-8", 0))


def decoded(blocks: Iterable[bytes], name: str, path: object) -> Iterator[str]:
    """The text of a file in parts. Raises `ValueError`, which begins with `name`, for bytes that are not text."""
    blocks, head = iter(blocks), b""
    while len(head) < HEAD and (block := next(blocks, b"")):
        head += block
    kind = next((kind for start, kind in KINDS if head.startswith(start)), None)
    if kind is not None:
        raise ValueError(f"{name} is {kind}: allowed is plain text, so save or export it as UTF-8 text first")
    (codec, at), before = encoding_of(head), b""  # bytes before the block, and the block before
    if codec == "utf-8" and (wrong := _no_utf_8(head)) is not None:
        raise ValueError(_problem(name, path, codec, 0, head, wrong))
    decoder = codecs.getincrementaldecoder(codec)()
    for block, last in chain([(head[at:], False)], ((block, False) for block in blocks), [(b"", True)]):
        waiting = len(decoder.getstate()[0])  # bytes of a character that the block before began
        try:
            yield decoder.decode(block, last)
        except UnicodeDecodeError as err:
            before = before[: len(before) - waiting]
            data, wrong = before + err.object, len(before) + err.start
            raise ValueError(_problem(name, path, codec, at - waiting - len(before), data, wrong)) from err
        at, before = at + len(block), block


def _no_utf_8(head: bytes) -> int | None:
    """Where it shows that these are other data, although they can be decoded as UTF-8; None where it does not.

    In UTF-8 a NUL is a character too.
    """
    if (switch := ISO_2022.search(head)) is not None:
        return switch.start()
    other = _utf_16(head) is not None or 8 <= head.count(0) > len(head) // 10
    return CONTROL.search(head).start() if other else None


def _utf_16(sample: bytes) -> str | None:
    """The byte order in which every second byte is that of an alphabet of UTF-16: from Latin to Arabic below 8; many
    later ones, such as Devanagari and Thai, have one of their own, and beside it what are control characters elsewhere.
    """
    for order, high, low in (("LE", sample[1::2], sample[::2]), ("BE", sample[::2], sample[1::2])):
        size = max(3, len(high), len(low))
        if sum(map(high.count, range(8))) > 0.4 * size and sum(map(low.count, range(8))) < 0.1 * size:
            return order
        own = max(range(8, 24), key=high.count)
        apart = high.count(own) > 0.4 * size and low.count(own) < 0.1 * size
        if apart and len(CONTROL.findall(low)) > 0.05 * size and low.count(0) < 0.3 * size:  # not UTF-32
            return order
    return None


def _problem(name: str, path: object, codec: str, at: int, data: bytes, wrong: int) -> str:
    """What is wrong with `data[wrong]`; `at` bytes of the file come before `data`."""
    found = f"byte {at + wrong} is {data[wrong]:#04x}"
    if codec != "utf-8":
        return f"{name} is not {codec[:-3].upper()} text ({found}), although its byte order mark says so: it is damaged"
    advice = _advice(data[max(0, wrong - SAMPLE) : wrong + SAMPLE], str(path))
    return f"{name} is not UTF-8 text ({found}): allowed is a UTF-8 file; {advice}"


def _advice(sample: bytes, path: str) -> str:
    """What bytes that are not UTF-8 look like, and what to do about it."""
    if (switch := ISO_2022.search(sample)) is not None:
        codec = "ISO-2022-KR" if switch[1] == b"$)C" else "ISO-2022-JP"
        return _convert(codec, codec, path)
    if (order := _utf_16(sample)) is not None:
        return _convert(f"UTF-16{order}", "UTF-16 without a byte order mark", path)
    if b"\0" in sample or len(CONTROL.findall(sample)) > len(sample) // 50:
        return "this one is binary, or text in an encoding without a byte order mark"
    foreign = sum(byte > 127 for byte in sample)
    if sum(len(sign.encode()) for sign in sample.decode("utf-8", "ignore") if ord(sign) > 127) >= max(1, foreign // 2):
        return "this one is UTF-8 elsewhere, so it is damaged or cut off there"
    if foreign > len(sample) // 3:
        return _convert("ENCODING", "text in an older encoding, such as KOI8-R or Shift-JIS", path)
    return _convert("WINDOWS-1252", "Latin-1 or Windows-1252", path)


def _convert(codec: str, words: str, path: str) -> str:
    return f"this one looks like {words}, so convert it: iconv -f {codec} -t UTF-8 {shlex.quote(path)} > utf8.txt"
