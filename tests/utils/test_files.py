import errno
import os
import stat

import pytest

from gnws_d2.utils.errors import UserError
from gnws_d2.utils.files import atomic_write


def test_atomic_write_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(str(path)) as f:
        f.write("half")
        raise ZeroDivisionError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]
    with atomic_write(str(path)) as f:
        f.write("new")
        assert path.read_text() == "old"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "new")]


@pytest.mark.parametrize("code, is_error", [("EINVAL", False), ("ENOTSUP", False), ("EIO", True)])
def test_directory_that_cannot_be_synchronized_is_no_error(tmp_path, monkeypatch, code, is_error):
    """Some network disks synchronize files alone."""
    fsync = os.fsync

    def fsync_files(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(getattr(errno, code), code)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fsync_files)
    path = tmp_path / "file"
    if is_error:
        with pytest.raises(UserError, match=f"Cannot write .*file: {code}"):
            with atomic_write(str(path)) as f:
                f.write("new")
    else:
        with atomic_write(str(path)) as f:
            f.write("new")
    assert path.read_text() == "new"
