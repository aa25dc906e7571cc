"""Files of which there is never half."""

import contextlib
import os
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def replace_file(path: str, mode: str = "w") -> Iterator[IO]:
    """
    Open a temporary file beside `path` for writing, which takes its place, on the disk too, when
    the block ends; if the block raises, `path` stays as it was.
    """
    part = f"{path}.part"
    try:
        with open(part, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise
    # The new name is in the directory, which is written later otherwise.
    directory = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
