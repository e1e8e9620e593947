"""Writing PNG files, with what they were made of in their metadata."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping


def png(pixels: bytes, width: int, height: int, texts: Mapping[str, str] | None = None) -> bytes:
    """Return a PNG file of RGB bytes, row by row; `texts` become iTXt chunks (UTF-8), by their keywords."""
    assert len(pixels) == 3 * width * height, "three bytes a pixel"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    stride = 3 * width
    rows = b"".join(b"\0" + pixels[y * stride : (y + 1) * stride] for y in range(height))
    chunks = [_chunk(b"IHDR", header)]
    chunks += [
        _chunk(b"iTXt", key.encode("latin-1") + b"\0\0\0\0\0" + text.encode()) for key, text in (texts or {}).items()
    ]
    chunks += [_chunk(b"IDAT", zlib.compress(rows, 6)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
