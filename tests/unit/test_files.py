"""What a file is written to: replaced whole if it is a regular one, never if it is not."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastserve.core.errors import OutputError
from fastserve.core.files import atomic_write, check_writable
from harness.run.config import RunConfig
from harness.run.runner import run
from support.processes import ENVIRONMENT

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a device")


def write(path: Path, text: str = "new") -> None:
    with atomic_write(path) as staging:
        staging.write_text(text)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as staging:  # noqa: PT012
        staging.write_text("half")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old"
    write(path)
    assert path.read_text() == "new"
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link, chain = tmp_path / "elsewhere" / "file", tmp_path / "link", tmp_path / "chain"
    link.symlink_to(target)
    chain.symlink_to("link")
    if exists:
        target.write_text("old")
    check_writable(chain)
    write(chain)
    assert target.read_text() == "new"
    assert not target.is_symlink()
    assert link.is_symlink()
    assert chain.is_symlink()
    assert names(tmp_path / "elsewhere") == {"file"}


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for use in (check_writable, write):
        with pytest.raises(OutputError, match=r"cannot write .*a: Too many levels"):
            use(tmp_path / "a")
    assert names(tmp_path) == {"a", "b"}


def test_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "link"):
        for use in (check_writable, write):
            with pytest.raises(OutputError, match="it is a folder"):
                use(path)


def test_a_fifo_is_written_to(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_text()))
    reader.start()
    check_writable(fifo)
    write(fifo)
    reader.join()
    assert read == ["new"]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert names(tmp_path) == {"fifo"}


def test_a_fifo_gets_nothing_of_what_fails(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(ZeroDivisionError), atomic_write(fifo) as staging:  # noqa: PT012
        staging.write_text("half")
        raise ZeroDivisionError
    assert stat.S_ISFIFO(fifo.stat().st_mode)


@pytest.fixture
def null(tmp_path: Path) -> Path:
    """A device of our own that takes everything, as /dev/null does."""
    path = tmp_path / "null"
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        path.write_text("")
    except OSError as error:
        pytest.skip(f"no device can be made here: {error}")
    return path


@AS_ROOT
def test_a_device_is_written_to(null: Path) -> None:
    link = null.with_name("link")
    link.symlink_to("null")
    for path in (null, link):
        check_writable(path)
        write(path)
    assert stat.S_ISCHR(null.stat().st_mode)
    assert names(null.parent) == {"null", "link"}


@AS_ROOT
def test_a_timeline_and_results_leave_devices_and_links_in_place(null: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.json").symlink_to("elsewhere.json")
    run(RunConfig(profile="a100-80g/opt-13b-tp1-swifttransformer", rate=1.0, num_requests=3), out, null)
    assert stat.S_ISCHR(null.stat().st_mode)
    assert (out / "summary.json").is_symlink()
    assert (out / "elsewhere.json").read_text().startswith("{")
    assert not any(name.startswith(".writing") for name in names(out))


def test_standard_output_goes_where_it_was_sent(tmp_path: Path) -> None:
    if not Path("/dev/stdout").is_symlink():
        pytest.skip("this system has no link to standard output")
    code = (
        "from pathlib import Path; from fastserve.core.files import atomic_write\n"
        "with atomic_write(Path('/dev/stdout')) as staging: staging.write_text('new')"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, check=True).stdout == b"new"
    with (tmp_path / "file").open("w") as file:
        subprocess.run(command, env=ENVIRONMENT, stdout=file, check=True)
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_what_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for use in (check_writable, write):
        with pytest.raises(OutputError, match="Permission denied"):
            use(tmp_path / "file")
