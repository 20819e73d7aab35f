"""What is different in an adapter's bytes after a step of training: half to two thirds of them, and nothing is rounded.

    old, new ──encode_difference──► bytes ~~► apply_difference(old, bytes) ──► new, to the bit

A step moves a number by little, so its bits as an integer move by little: sign, exponent and the first bits of the
mantissa stay. The differences of these integers are stored byte by byte of their significance: the two low bytes as
they are, the two high ones, mostly zero, deflated. That is about as small as a difference in bf16, which would lose
bits: then what the servers use would depend on which versions they happened to see. Pure.
"""

import zlib

import numpy as np

from swarm.errors import InvalidRequest

Bytes = bytes | bytearray | memoryview
_LEVEL = 1
"""Of deflate: what is to be found are zeros."""


def encode_difference(old: Bytes, new: Bytes) -> bytes | None:
    """What makes `new` of `old`; None where that is not smaller than `new`.

    Numbers of four bytes come out best; all others come out right.
    """
    if len(old) != len(new):
        return None
    num_words = len(new) // 4
    words = np.frombuffer(new, np.int32, num_words) - np.frombuffer(old, np.int32, num_words)
    folded = ((words << 1) ^ (words >> 31)).view(np.uint8).reshape(num_words, 4)  # small ones of either sign have zeros
    low, high = folded[:, :2].T.tobytes(), zlib.compress(folded[:, 2:].T.tobytes(), _LEVEL)
    data = b"".join([low, bytes(new[4 * num_words :]), high])
    return data if len(data) < len(new) else None


def apply_difference(old: Bytes, data: Bytes) -> bytearray:
    """The bytes that `data` makes of `old`.

    Raises:
        InvalidRequest: `data` is no difference to so many bytes; no more memory is taken than they need.
    """
    num_words = len(old) // 4
    num_low = 2 * num_words + len(old) % 4
    if len(data) < num_low:
        raise InvalidRequest(f"a difference of {len(data)} bytes to {len(old)} bytes, at least {num_low} expected")
    inflater = zlib.decompressobj()
    try:
        high = inflater.decompress(data[num_low:], 2 * num_words + 1)
    except zlib.error as error:
        raise InvalidRequest(f"a difference of {len(data)} bytes is damaged: {error}") from error
    if len(high) != 2 * num_words or not inflater.eof or inflater.unused_data:
        raise InvalidRequest(f"a difference to {len(old)} bytes that is one to others")
    folded = np.empty((num_words, 4), np.uint8)
    folded[:, :2] = np.frombuffer(data, np.uint8, 2 * num_words).reshape(2, num_words).T
    folded[:, 2:] = np.frombuffer(high, np.uint8).reshape(2, num_words).T
    bits = folded.view(np.uint32)[:, 0]
    words = (bits >> 1).view(np.int32) ^ -(bits & 1).view(np.int32)
    new = bytearray(len(old))
    np.frombuffer(new, np.int32, num_words)[:] = np.frombuffer(old, np.int32, num_words) + words
    new[4 * num_words :] = data[2 * num_words : num_low]
    return new
