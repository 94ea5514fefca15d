"""Event files: read back by TensorBoard's own format, and on a full disk one error at the point that finds it so."""

import errno
import struct
import subprocess
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from epigone.training.events import Events


def records(path):
    """Event records: length (8 bytes), checksum (4), data, checksum (4)."""
    data = path.read_bytes()
    while data:
        length, checksum = struct.unpack("<QI", data[:12])
        assert checksum == masked_crc32c(data[:8])
        assert data[12 + length : 16 + length] == struct.pack("<I", masked_crc32c(data[12 : 12 + length]))
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_events_hold_the_points(tmp_path):
    events = Events(tmp_path, active=True)
    events.write({"step": 10, "loss": 2.5, "tokens": 640})
    events.write({"step": 20, "loss": 2.25, "tokens": 1280})
    events.close()
    (path,) = tmp_path.iterdir()
    version, start, *_ = records(path)
    assert version.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (start.session_log.START, 10)
    read = {(v.tag, e.step): v.simple_value for e in records(path) for v in e.summary.value}
    assert read[("loss", 20)] == 2.25
    assert read[("tokens", 10)] == 640


def test_only_one_process_writes_events(tmp_path):
    events = Events(tmp_path / "events", active=False)
    events.write({"step": 1, "loss": 1.0})
    events.close()
    assert not (tmp_path / "events").exists()


def test_a_full_disk_is_the_error_of_the_point_that_finds_it(tmp_path):
    """/dev/full takes nothing. The file is let go of without a second error."""
    events = Events(tmp_path, active=True)
    events.write({"step": 10, "loss": 2.5})
    (path,) = tmp_path.iterdir()
    written = path.read_bytes()
    kept, events._file = events._file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left") as error:
        events.write({"step": 20, "loss": 2.25})
    assert error.value.errno == errno.ENOSPC
    events.close()
    kept.close()
    assert path.read_bytes() == written


def test_what_is_written_is_there_before_the_end(tmp_path):
    """So a run that is killed has told all that it knew."""
    events = Events(tmp_path, active=True)
    events.write({"step": 10, "loss": 2.5})
    (path,) = tmp_path.iterdir()
    assert [event.step for event in records(path)] == [10, 10, 10]
    events.close()


def test_writing_events_leaves_pytorch_alone(tmp_path):
    """It takes seconds to import, and is there for others, also behind tensorboardX that was not given it."""
    program = f"""
import sys
from pathlib import Path
from epigone.training.events import Events
Events(Path({str(tmp_path)!r}), active=True).write({{"step": 1, "loss": 1.0}})
print("torch" in sys.modules, bool(__import__("importlib").util.find_spec("torch")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
