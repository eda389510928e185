"""What holds for every picture of the examples and the benchmarks."""

import struct


def assert_picture(file):
    """A PNG file, twice as wide as a page shows it, that does not take long to load."""
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">I", content[16:20]) == (1600,)
    assert len(content) < 200e3
