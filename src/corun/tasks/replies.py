"""An answer in words, for a person who asked once."""

from __future__ import annotations

import struct
from typing import Final

TOP5: Final = struct.Struct("<" + "if" * 5)
SHOWN: Final = 300


def readable(kind: str, reply: bytes) -> str:
    """`class 207 at 91.2 %, class 208 at 3.1 %, ...`; text where it is text; else how many bytes there are."""
    if kind == "classification" and len(reply) == TOP5.size:
        values = TOP5.unpack(reply)
        return ", ".join(f"class {values[at]} at {100 * values[at + 1]:.1f} %" for at in range(0, 10, 2))
    try:
        text = reply.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if text and text.isprintable():
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return f"{len(reply)} bytes"
