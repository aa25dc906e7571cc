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


def test_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"Cannot write .*gone/file: No such file"):
        with atomic_write(str(tmp_path / "gone" / "file")):
            pass
