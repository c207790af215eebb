"""Netpbm pictures, as mammogram archives keep them: PGM (grey) and PPM (colour), binary or plain, 8 or 16 bits."""

import re

import numpy as np

_HEADER = re.compile(rb"P([2356])((?:\s+|#[^\n]*\n)+)(\d+)((?:\s+|#[^\n]*\n)+)(\d+)((?:\s+|#[^\n]*\n)+)(\d+)\s")
MAGICS = (b"P2", b"P3", b"P5", b"P6")


def decode_pnm(data: bytes) -> np.ndarray:
    """(rows, cols) or (rows, cols, 3), uint8 or uint16, values as stored.

    Raises:
        ValueError: No such picture, or not all of it.
    """
    head = _HEADER.match(data[:65536])
    if head is None:
        raise ValueError("its header is damaged")
    kind, width, height, most = (int(head[k]) for k in (1, 3, 5, 7))
    if not 0 < most < 65536 or width < 1 or height < 1:
        raise ValueError(f"its header announces {width} × {height} values up to {most}")
    count = width * height * (3 if kind in (3, 6) else 1)
    deep = most > 255
    if kind in (5, 6):
        body = data[head.end() : head.end() + count * (2 if deep else 1)]
        values = np.frombuffer(body[: len(body) // 2 * 2] if deep else body, ">u2" if deep else np.uint8)
    else:
        values = np.array(data[head.end() :].split()[:count], np.int64)
    if len(values) < count:
        raise ValueError(f"it announces {count:,} values and has {len(values):,}")
    shape = (height, width, 3) if kind in (3, 6) else (height, width)
    return values.reshape(shape).astype(np.uint16 if deep else np.uint8)
