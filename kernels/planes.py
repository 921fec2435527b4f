"""The bytes of one sequence of compressed teacher distributions: planes of small numbers, for `kernels/codec.py`.

Layout, version 1, little endian: magic, version, checksum (CRC-32 of everything after it), mode, resolution,
vocabulary, positions, tokens; then planes of bytes, each a raw deflate stream that marks its own end: tokens of each
position, tail codes, token codes, gaps between the ascending ids of a position (1 to 3 planes, lowest byte first), and
in sampled mode times drawn, 0 being certain. A plane holds one kind of number, which is what Huffman coding wants; ids
in ascending order cost 4 bits a token less than in order of probability, of which the codes give 2 back.

Code c stands for the log-probability −KNEE · (e^(c / resolution) − 1): fine for likely tokens, coarse for others.
Rounding moves a log-probability l by at most (|l| + KNEE) · (e^(1 / (2 · resolution)) − 1).

Shape legend: N positions, T the tokens of all of them, in order of position and id.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VERSION = 1
TOP, SAMPLED = 0, 1
KNEE, DEEPEST = 0.25, 24.0  # nats; nothing is stored as less likely than e^−24
FINEST = 55  # the resolution at which the codes of 0 … −24 just fit a byte; tails are stored at it

_MAGIC = b"SWTD"
_START, _CHECKSUM, _REST = struct.Struct("<4sB"), struct.Struct("<I"), struct.Struct("<BBIII")


@dataclass(frozen=True)
class Sequence:
    """A sequence's stored tokens, flat. Log-probabilities are in nats, ids ascend within a position.

    `times_T` is how often each token was drawn, 0 for one that is certain (all of them in mode TOP).
    """

    mode: int
    resolution: int
    vocabulary: int
    counts_N: NDArray[np.int64]
    log_tail_N: NDArray[np.float64]
    ids_T: NDArray[np.int64]
    logprobs_T: NDArray[np.float64]
    times_T: NDArray[np.int64]


def pack(sequence: Sequence) -> bytes:
    """The bytes of a sequence. Raises ValueError for a resolution out of range."""
    if not 1 <= sequence.resolution <= FINEST:
        raise ValueError(f"resolution is {sequence.resolution}: choose it from 1 to {FINEST}")
    gaps_T = np.diff(sequence.ids_T, prepend=0) - 1
    first_N = (sequence.counts_N.cumsum() - sequence.counts_N)[sequence.counts_N > 0]
    gaps_T[first_N] = sequence.ids_T[first_N]
    planes = [
        sequence.counts_N,
        _codes(sequence.log_tail_N, FINEST),
        _codes(sequence.logprobs_T, sequence.resolution),
        *(gaps_T >> shift & 0xFF for shift in _id_shifts(sequence.vocabulary)),
    ]
    if sequence.mode == SAMPLED:
        planes.append(sequence.times_T)
    sizes = (sequence.vocabulary, len(sequence.counts_N), len(sequence.ids_T))
    rest = _REST.pack(sequence.mode, sequence.resolution, *sizes) + b"".join(map(_deflate, planes))
    return _START.pack(_MAGIC, VERSION) + _CHECKSUM.pack(zlib.crc32(rest)) + rest


def unpack(value: bytes) -> Sequence:
    """The sequence in `value`. Raises ValueError where it is none, of another version, or damaged."""
    if len(value) < _START.size or value[: len(_MAGIC)] != _MAGIC:
        raise ValueError("these bytes hold no teacher distributions: read the column that codec.to_column wrote")
    version = _START.unpack_from(value)[1]
    if version != VERSION:
        raise ValueError(f"teacher distributions of version {version}, this code reads {VERSION}: redo the annotation")
    start = _START.size + _CHECKSUM.size
    if len(value) < start or _CHECKSUM.unpack_from(value, _START.size)[0] != zlib.crc32(value[start:]):
        raise ValueError("teacher distributions are damaged (wrong checksum): restore the part or redo the annotation")
    mode, resolution, vocabulary, positions, tokens = _REST.unpack_from(value, start)
    body = value[start + _REST.size :]

    def plane(length: int) -> NDArray[np.int64]:
        nonlocal body
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        numbers = np.frombuffer(inflater.decompress(body), np.uint8).astype(np.int64)
        body = inflater.unused_data
        assert len(numbers) == length
        return numbers

    counts_N, tail_codes_N, codes_T = plane(positions), plane(positions), plane(tokens)
    steps_T = np.ones(tokens, np.int64)
    for shift in _id_shifts(vocabulary):
        steps_T += plane(tokens) << shift
    # Ids are running sums of steps that start anew at each position.
    sums_T = np.concatenate([np.zeros(1, np.int64), steps_T.cumsum()])
    before_N = sums_T[counts_N.cumsum() - counts_N]
    return Sequence(
        mode,
        resolution,
        vocabulary,
        counts_N,
        _logprobs(tail_codes_N, FINEST),
        sums_T[1:] - np.repeat(before_N, counts_N) - 1,
        _logprobs(codes_T, resolution),
        plane(tokens) if mode == SAMPLED else np.zeros(tokens, np.int64),
    )


def _codes(logprobs: NDArray[np.float64], resolution: int) -> NDArray[np.int64]:
    depth = np.clip(-logprobs, 0.0, DEEPEST)
    return np.rint(resolution * np.log1p(depth / KNEE)).astype(np.int64)


def _logprobs(codes: NDArray[np.int64], resolution: int) -> NDArray[np.float64]:
    return -KNEE * np.expm1(codes / resolution)


def _id_shifts(vocabulary: int) -> range:
    return range(0, max(1, (vocabulary - 1).bit_length()), 8)


def _deflate(numbers: NDArray[np.int64]) -> bytes:
    assert numbers.min(initial=0) >= 0
    assert numbers.max(initial=0) <= 0xFF
    # Huffman codes alone: these numbers repeat no strings worth a search.
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return deflater.compress(numbers.astype(np.uint8).tobytes()) + deflater.flush()
