"""What pyproject.toml cannot say: a wheel and a source archive carry the commit they were built from."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist


def write_commit(harness: Path) -> None:
    """Write the checkout's commit into the copy of the package `harness`, for harness.run.meta; nothing without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        # A folder that git ignores or does not know is part of another repository, whose commit says nothing of it.
        subprocess.run(["git", "ls-files", "--error-unmatch", "setup.py"], capture_output=True, check=True)
        described = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return
    (harness / "COMMIT").write_text(described.stdout, encoding="utf-8")


class BuildWithCommit(build_py):
    """Builds the packages; an editable install has none of its own."""

    def run(self) -> None:
        """Build, then write the commit."""
        super().run()
        if not self.editable_mode:
            write_commit(Path(self.build_lib) / "harness")


class ArchiveWithCommit(sdist):
    """Makes the source archive."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy the files, then write the commit."""
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir) / "workflows/harness")


setup(cmdclass={"build_py": BuildWithCommit, "sdist": ArchiveWithCommit})
