"""Headers: whatever stands in a file, it is read right or refused."""

import json
import struct
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from v4_ascend.checkpoint.header import read_header
from v4_ascend.errors import CheckpointError

ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.fixture
def write(tmp_path):
    def write(header, data=bytes(16)):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        file = tmp_path / "a.safetensors"
        file.write_bytes(struct.pack("<Q", len(text)) + text + data)
        return file

    return write


def test_tensors_come_in_the_order_of_the_data_empty_ones_too(write):
    empty = {"dtype": "F32", "shape": [0]}
    header = {
        "d": empty | {"data_offsets": [16, 16]},
        "c": ENTRY | {"shape": [2], "data_offsets": [8, 16]},
        "b": ENTRY | {"shape": [2, 1], "data_offsets": [0, 8]},
        "a": empty | {"data_offsets": [0, 0]},
        "__metadata__": {"format": "pt"},
    }
    assert [(h.name, h.nbytes) for h in read_header(write(header))] == [
        ("a", 0),
        ("b", 8),
        ("c", 8),
        ("d", 0),
    ]


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": ENTRY | {"data_offsets": ["0", "16"]}}, "a: sizes must be whole numbers"),
        ({"a": ENTRY | {"data_offsets": [0.0, 16.0]}}, "a: sizes must be whole numbers"),
        ({"a": ENTRY | {"data_offsets": [-16, 0]}}, "a: sizes must be whole numbers"),
        ({"a": ENTRY | {"shape": [-2, -2]}}, "a: sizes must be whole numbers"),
        ({"a": ENTRY | {"shape": [True, 4]}}, "a: sizes must be whole numbers"),
        ({"a": ENTRY | {"data_offsets": [0]}}, "a: header entry is not valid"),
        ({"a": ENTRY | {"shape": "4"}}, "a: header entry is not valid"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, "a: header entry is not valid"),
        ({"a": 3}, "a: header entry is not valid"),
        ({"a": ENTRY | {"dtype": "F16"}}, "a: dtype 'F16' is not one of BF16"),
        ({"a": ENTRY, "b": ENTRY}, "b: starts at byte .*, overlaps the tensor before it"),
        ({"a": ENTRY | {"shape": [3], "data_offsets": [4, 16]}}, "a: .* leaves a gap before it"),
        ({"a": ENTRY | {"shape": [2], "data_offsets": [0, 8]}}, "has bytes behind the last tensor"),
        ([], "header must be a JSON object"),
        (b"[" * 100_000, "header is not valid"),
        (b"\xff", "header is not valid"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_header_that_makes_no_sense_is_refused(write, header, says):
    with pytest.raises(CheckpointError, match=says):
        read_header(write(header))


@given(at=st.integers(0, 85), byte=st.integers(0, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_byte_is_read_or_refused(write, at, byte):
    file = write({"a": ENTRY})
    raw = bytearray(file.read_bytes())
    raw[at] = byte
    file.write_bytes(raw)
    with suppress(CheckpointError):
        read_header(file)
