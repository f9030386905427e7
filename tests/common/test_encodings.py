"""Encodings are recognised by their mark or named in the error, the same way for every command that takes a text."""

from __future__ import annotations

import codecs

import pytest

from proteus_playground.common import encodings
from proteus_playground.common.encodings import decoded
from proteus_playground.common.texts import load_text

TEXT = "Key: a humble token waited on page five, für alle, naïve café crème.\r\nIt was cold; the soup too.\n" * 40
CYRILLIC = "Скромный токен ждал на пятой странице, пока его не прочтут.\n" * 40


def readers():
    from proteus_playground.experiments.duel.settings import pick_text

    from proteus_playground.streaming.sources import open_document

    def stream(path):
        encode = {"encode": lambda text: list(map(ord, text)), "fingerprint": "characters"}
        rows = open_document(path, **encode, cache=path.parent)
        return "".join(map(chr, rows.read(0, len(rows))))

    return {
        "stream": stream,
        "load_text": lambda path: load_text(str(path)).body,
        "duel": lambda path: pick_text(str(path)).body,
    }


READERS = ("stream", "load_text", "duel")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", [TEXT, CYRILLIC, "Tea 😀", "語" * 5000], ids=["Latin", "Cyrillic", "short", "Han"])
@pytest.mark.parametrize(
    ("mark", "codec"),
    [(b"", "utf-8"), (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
     (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be")],
)  # fmt: skip
def test_a_mark_names_the_encoding(mark, codec, text, reader, tmp_path):
    (tmp_path / "a.txt").write_bytes(mark + text.encode(codec))
    assert readers()[reader](tmp_path / "a.txt") == text


@pytest.mark.parametrize("size", [1, 2, 3, 5, 4096])
@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32"])
def test_blocks_may_end_anywhere(codec, size):
    data = (TEXT + "😀 語").encode(codec)
    blocks = (data[at : at + size] for at in range(0, len(data), size))
    assert "".join(decoded(blocks, "a.txt", "a.txt")) == TEXT + "😀 語"


BAD = {
    "UTF-16 little-endian": (TEXT.encode("utf-16-le"), r"byte 1 is 0x00.*looks like UTF-16 without.*iconv -f UTF-16LE"),
    "UTF-16 big-endian": (TEXT.encode("utf-16-be"), r"byte 0 is 0x00.*looks like UTF-16 without.*iconv -f UTF-16BE"),
    "Cyrillic UTF-16": (CYRILLIC.encode("utf-16-le"), r"byte 1 is 0x04.*iconv -f UTF-16LE"),
    "Greek UTF-16": ("ένα ταπεινό σύμβολο".encode("utf-16-be"), r"byte 0 is 0x03.*iconv -f UTF-16BE"),
    "short UTF-16": ("key tea".encode("utf-16-le"), r"byte 1 is 0x00.*iconv -f UTF-16LE"),
    "Hindi UTF-16": ("यह एक विनम्र टोकन है ".encode("utf-16-le") * 9, r"looks like UTF-16 without.*iconv -f UTF-16LE"),
    "Thai UTF-16": ("โทเค็นผู้ถ่อมตน".encode("utf-16-be") * 9, r"looks like UTF-16 without.*iconv -f UTF-16BE"),
    "Telugu UTF-16": ("వినయపూర్వక టోకెన్ ".encode("utf-16-le") * 9, r"looks like UTF-16 without.*iconv -f UTF-16LE"),
    "Japanese mail": ("Tea: 漢字かな".encode("iso2022_jp"), r"byte 5 is 0x1b.*looks like ISO-2022-JP.*-f ISO-2022-JP"),
    "Korean mail": ("겸손한 토큰".encode("iso2022_kr"), r"byte 0 is 0x1b.*looks like ISO-2022-KR.*-f ISO-2022-KR"),
    "Thai UTF-32": ("โทเค็นผู้ถ่อมตน".encode("utf-32-le") * 9, r"is binary, or text in an encoding without a byte order"),
    "UTF-32": (TEXT.encode("utf-32-le"), r"is binary, or text in an encoding without a byte order mark"),
    "Latin-1": (TEXT.encode("latin-1"), r"byte 42 is 0xfc.*Latin-1 or Windows-1252.*iconv -f WINDOWS-1252 -t UTF-8"),
    "Windows-1252": ("“Tea”, she said – for 5 €.".encode("cp1252"), r"byte 0 is 0x93.*iconv -f WINDOWS-1252"),
    "KOI8-R": (CYRILLIC.encode("koi8-r"), r"older encoding, such as KOI8-R.*iconv -f ENCODING"),
    "Shift-JIS": ("漢字かな交じり文です".encode("shift-jis") * 9, r"older encoding.*Shift-JIS"),
    "late Latin-1": (b"tea and soup\n" * 5000 + b"caf\xe9\n", r"byte 65003 is 0xe9.*iconv -f WINDOWS-1252"),
    "damaged UTF-8": (CYRILLIC.encode()[:100] + b"\xff" + CYRILLIC.encode(), r"byte 100 is 0xff.*damaged or cut off"),
    "cut off": (CYRILLIC.encode()[:101], r"byte 100 is 0xd.*damaged or cut off"),
    "surrogate": ("é tea ".encode() + b"\xed\xa0\x80", r"byte 7 is 0xed.*damaged"),
    "overlong": ("é tea ".encode() + b"\xc0\x80", r"byte 7 is 0xc0.*damaged"),
    "zeros": (bytes(5000), r"byte 0 is 0x00.*is binary"),
    "random bytes": (bytes(range(256)) * 20, r"is not UTF-8 text.*is binary"),
    "numbers": (b"".join(i.to_bytes(4, "little") for i in range(2000)), r"is binary"),
    "damaged UTF-16": (codecs.BOM_UTF16_LE + "tea".encode("utf-16-le") + b"\x00\xd8a\x00", r"is not UTF-16 text"),
    "cut-off UTF-16": (codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le") + b"a", r"is not UTF-16 text .*damaged"),
    "cut-off UTF-32": (codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be") + b"\0\0", r"is not UTF-32 text .*damaged"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", r"is a PDF: allowed is plain text"),
    "Word": (b"PK\x03\x04\x14\x00\x06\x00", r"is a ZIP archive, such as .docx"),
    "gzip": (b"\x1f\x8b\x08\x00", r"is a gzip archive"),
    "RTF": (b"{\\rtf1\\ansi tea}", r"Rich Text Format"),
    "picture": (b"\x89PNG\r\n\x1a\n", r"is a picture"),
    "old Word": (b"\xd0\xcf\x11\xe0\xa1\xb1", r"is an old Office document"),
    "database": (b"SQLite format 3\x00 ", r"is an SQLite database"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_text_is_named_with_what_to_do(kind, reader, tmp_path):
    data, problem = BAD[kind]
    (tmp_path / "it's.txt").write_bytes(data)
    with pytest.raises(ValueError, match=rf"(?s)it's\.txt.*{problem}") as caught:
        readers()[reader](tmp_path / "it's.txt")
    assert "'it'\"'\"'s.txt'" in str(caught.value) or "iconv" not in str(caught.value) or '"\'"' in str(caught.value)


def test_the_proposed_command_converts_the_file(tmp_path):
    import shutil
    import subprocess

    if shutil.which("iconv") is None:
        pytest.skip("no iconv here")
    for codec, text in (
        ("utf-16-le", TEXT), ("utf-16-be", TEXT), ("cp1252", "“Tea” for 5 €, naïve café"),
        ("utf-16-le", "यह एक विनम्र टोकन है"), ("iso2022_jp", "漢字かな"),
    ):  # fmt: skip
        (tmp_path / "it's a.txt").write_bytes(text.encode(codec))
        with pytest.raises(ValueError) as caught:
            load_text(str(tmp_path / "it's a.txt"))
        subprocess.run(str(caught.value).split("convert it: ")[1], shell=True, check=True, cwd=tmp_path)
        assert load_text(str(tmp_path / "utf8.txt")).body == text


def test_a_few_nuls_are_text(tmp_path):
    """They are signs of UTF-8, and logs hold some."""
    assert "".join(decoded([b"\0"], "a", "a")) == "\0"
    assert "".join(decoded([b"tea\0soup, bread\0"], "a", "a")) == "tea\0soup, bread\0"
    assert encodings.encoding_of(b"") == ("utf-8", 0)


CONTROLS = {
    "lines": "a\nb\nc\n", "tabs": "a\tb\tc\t", "overstruck": "NN\bAA\bMM\bEE\b text\n", "records": "a\x1eb\x1ec\x1f",
    "terminal": "\x1b[1mbold\x1b(B\x1b[0m\n", "bells": "\x07ding\n", "pages": "a\fb\f",
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTROLS)
def test_text_with_control_characters_is_text(kind):
    text = CONTROLS[kind] * 30
    assert "".join(decoded([text.encode()], "a", "a")) == text
