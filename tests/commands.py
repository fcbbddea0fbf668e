"""Help for tests that run commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path


def environment(*folders: Path, **more: str) -> dict[str, str]:
    """The environment of the tests, with folders in front of its PATH, and more variables."""
    path = os.pathsep.join([*map(str, folders), os.environ["PATH"]])
    return {**os.environ, "PATH": path, **more}


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, "utf-8")
    path.chmod(0o755)
    return path


def only(folder: Path, *commands: str) -> str:
    """A PATH with these commands only."""
    folder.mkdir()
    for command in commands:
        found = shutil.which(command)
        assert found, command
        (folder / command).symlink_to(found)
    return str(folder)


def assert_one_line(
    result: subprocess.CompletedProcess[str], *parts: str, status: int = 1, name: str = ""
) -> None:
    """The command failed, with one line on standard error."""
    assert result.returncode == status, result
    assert re.fullmatch(re.escape(name) + r"[^\n]+\n", result.stderr), result.stderr
    for part in parts:
        assert part in result.stderr
