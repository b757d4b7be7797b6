"""Files that appear whole or not at all, and YAML that says where it is wrong."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from polyhead.errors import UserError, causes


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name, after fsync, when the block ends without error.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; results follow the person's umask like any other file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        made.clear()
    except Exception as error:
        # Libraries wrap what the system says in errors of their own
        found = next((e for e in causes(error) if isinstance(e, OSError)), None)
        if found is None or isinstance(error, UserError):
            raise
        why = f"{path.parent} is a file" if isinstance(found, FileExistsError) else found.strerror or found
        raise UserError(f"cannot write {path}: {why}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def read_yaml(path: str | Path) -> Any:
    """The plain values in a YAML file. Raises UserError with the line where it is none."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line} is not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: it is not text in UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
