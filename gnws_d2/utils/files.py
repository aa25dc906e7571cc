"""Atomic file writes."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import IO

from .errors import UserError


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO]:
    """
    Open a temporary file in the directory of `path`, in `mode` "w" or "wb", and rename it to `path`
    when the block ends. If the block raises, `path` stays as it was. After a crash a file
    ``PATH.*.part`` may be left.

    Raises:
        UserError: if the file cannot be written, as on a full disk.
    """
    # Unique, so that two writers never share a temporary file.
    part = f"{path}.{uuid.uuid4().hex[:8]}.part"
    try:
        with open(part, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise UserError(f"Cannot write {path}: {e.strerror or e}.") from e
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)
