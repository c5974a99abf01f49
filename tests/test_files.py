"""A file is whole or not there: errors and leftovers of a kill change nothing."""

import pytest

from longalign_lib.files import whole


def test_an_error_leaves_the_old_file(tmp_path):
    file = tmp_path / "new folder" / "a.txt"
    with whole(file) as half:
        half.write_text("first")
        assert not file.exists()
    assert file.read_text() == "first"
    with pytest.raises(ZeroDivisionError), whole(file) as half:
        half.write_text("sec")
        raise ZeroDivisionError
    assert file.read_text() == "first"
    with whole(file) as half:  # a leftover is written over
        half.write_text("second")
    assert file.read_text() == "second" and [f.name for f in file.parent.iterdir()] == ["a.txt"]
