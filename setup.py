"""What pyproject.toml cannot say: a wheel has the compiled core if it can, and names the commit it was built from."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
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
        """Build, then write the commit. What an earlier build has compiled does not stay."""
        shutil.rmtree(Path(self.build_lib) / "fastserve/_compiled", ignore_errors=True)
        super().run()
        if not self.editable_mode:
            write_commit(Path(self.build_lib) / "harness")


class WheelWithCore(bdist_wheel):
    """Compiles the core for a wheel; if that fails, or FASTSERVE_PURE=1 forbids it, the wheel is pure Python."""

    def run(self) -> None:
        """Compile, then build. A wheel with the core is for this Python and platform."""
        spec = importlib.util.spec_from_file_location("compile_core", Path(__file__).parent / "tools/compile_core.py")
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        said = tool.compile_core()
        print(said, file=sys.stderr)
        if said == tool.COMPILED:
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True
        super().run()


class ArchiveWithCommit(sdist):
    """Makes the source archive."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy the files, then write the commit."""
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir) / "workflows/harness")


setup(cmdclass={"bdist_wheel": WheelWithCore, "build_py": BuildWithCommit, "sdist": ArchiveWithCommit})
