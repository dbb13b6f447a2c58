"""Files that are either complete or absent: written beside their target, then renamed."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hmar_cli.console import console
from hmar_cli.errors import UserError, from_os_error


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; it becomes `target` if the block ends well, else it is removed."""
    if target.is_dir():  # else the message would be of the temporary file
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; it replaces `target` if the block ends well, else it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.replace(old)
            temporary.replace(target)
            shutil.rmtree(old)
        else:
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_writable(target: Path) -> None:
    """See that a file can be written, before the work of hours that it is to hold.

    Raises:
        UserError: a folder lies there, or a part of its path is a file or may not be written in.
    """
    if target.is_dir():
        raise UserError(f"{target} is a folder", "give the name of a file in it")
    parent = next(each for each in target.absolute().parents if each.exists())
    if not parent.is_dir():
        raise UserError(f"cannot write {target}: {parent} is a file", "choose another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {target}: no permission in {parent}", "choose another path")


def cache_folder() -> Path:
    """Where the program keeps what it can make or fetch again: $XDG_CACHE_HOME/hmar, else ~/.cache/hmar."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hmar"


def fetch(
    address: str, target: Path, hint: str, *, sha256: str = "", whole: Callable[[Path], bool] = Path.is_file
) -> Path:
    """Download a published file once, and keep it.

    Args:
        address: of the file.
        target: where it is kept, and fetched only if it is not there.
        hint: how else to pass the file.
        sha256: the first digits of its SHA-256, where they are known.
        whole: whether a file is what it should be.

    Returns:
        The target.

    Raises:
        UserError: it cannot be downloaded, or something else came.
    """
    if target.is_file():
        return target
    import torch

    console.print(f"downloading {address}", highlight=False)
    try:
        with atomic_file(target) as temporary:
            torch.hub.download_url_to_file(
                address, str(temporary), hash_prefix=sha256 or None, progress=sys.stderr.isatty()
            )
            if not whole(temporary):
                raise ValueError("what came is torn, or something else")
    except (OSError, RuntimeError, ValueError) as error:  # no network, no such address, or another file
        raise UserError(f"{target} is not there and cannot be downloaded: {error}", hint) from error
    return target


def write_json(target: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(target) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}", from_os_error(error).hint
        ) from error
    except ValueError as error:
        raise UserError(f"cannot read {path}: not JSON ({error})") from error


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
