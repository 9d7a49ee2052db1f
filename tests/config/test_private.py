"""Files that hold keys are the user's alone, whatever was there before."""

import os
import stat

import pytest

from v4_ascend.config.private import open_private, private_folder, write_private
from v4_ascend.errors import ConfigError


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def _open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_folder_is_closed_to_others_also_one_that_was_open(tmp_path):
    private_folder(tmp_path / "a" / "b")
    assert mode(tmp_path / "a" / "b") == 0o700
    (tmp_path / "open").mkdir(mode=0o777)
    private_folder(tmp_path / "open")
    assert mode(tmp_path / "open") == 0o700


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match=f"is of user {owner}, we are {owner + 1}; remove it"):
        private_folder(tmp_path)


def test_a_file_in_the_way_of_a_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/x: cannot be made: Not a directory"):
        private_folder(tmp_path / "file" / "x")


def test_a_file_others_could_read_is_replaced(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text("old")
    file.chmod(0o666)
    with file.open() as reader:
        write_private(file, "key")
        assert reader.read() == "old"
    assert (mode(file), file.read_text()) == (0o600, "key")
    file.chmod(0o666)
    with file.open() as reader, open_private(file) as out:
        out.write(b"log")
        assert reader.read() == "key"
    assert (mode(file), file.read_text()) == (0o600, "log")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_link_planted_for_us_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "supervisor.log").symlink_to(victim)
    with open_private(tmp_path / "supervisor.log") as out:
        out.write(b"log")
    (tmp_path / f".plan.json.{os.getpid()}").symlink_to(victim)
    write_private(tmp_path / "plan.json", "key")
    assert victim.read_text() == "precious"
