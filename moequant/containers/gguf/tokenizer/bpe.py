"""Byte-pair encoding of one word on its own: what a token's own text merges to."""

import heapq
from collections.abc import Callable, Sequence
from typing import AnyStr

Pair = tuple[str, str]


def merge_alone(
    text: AnyStr, rank: Callable[[AnyStr, AnyStr], int | None]
) -> tuple[list[AnyStr], tuple[AnyStr, AnyStr] | None]:
    """BPE of `text` from its characters (or bytes): (symbols, the last pair merged).

    `rank` tells how early two neighbours merge, None for never. The lowest rank goes first, the leftmost of
    equals first. The time is that of a sort, so a token of a million characters takes seconds.
    """
    size: int = len(text)
    # A symbol is text[start:stop[start]]; begin finds the start of the symbol that ends at an offset.
    stop, begin = [*range(1, size + 1)], [*range(-1, size)]
    waiting: list[tuple[int, int, int, int]] = []

    def offer(left: int, middle: int) -> None:
        end = stop[middle]
        if (found := rank(text[left:middle], text[middle:end])) is not None:
            heapq.heappush(waiting, (found, left, middle, end))

    for i in range(size - 1):
        offer(i, i + 1)
    last = None
    while waiting:
        _, left, middle, end = heapq.heappop(waiting)
        if stop[left] != middle or stop[middle] != end:
            continue  # One of the two has merged with another neighbour since.
        last = (text[left:middle], text[middle:end])
        stop[left], stop[middle], begin[end] = end, 0, left
        if left > 0:
            offer(begin[left], left)
        if end < size:
            offer(left, end)
    symbols, i = [], 0
    while i < size:
        symbols.append(text[i : stop[i]])
        i = stop[i]
    return symbols, last


def byte_letters() -> list[str]:
    """The letter that byte-level vocabularies write for each byte: itself if it is printable in Latin-1."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in plain}
    rest = (byte for byte in range(256) if byte not in letters)
    letters |= {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return [letters[byte] for byte in range(256)]


def unreachable(tokens: Sequence[str], merges: Sequence[Pair]) -> list[str]:
    """The tokens that their own text does not merge to."""
    ranks = {pair: i for i, pair in enumerate(merges)}
    return [token for token in tokens if len(merge_alone(token, lambda *pair: ranks.get(pair))[0]) > 1]
