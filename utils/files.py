"""Small files that are written whole or not at all, and hashes of large ones."""

import hashlib
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a text under a temporary name, then give it its name; nothing is left of one that failed.

    What UTF-8 cannot hold, which a file's name may, is written as on a console: ``\\udcff``.

    Raises:
        OSError: it cannot be written; what was at ``path`` before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's contents, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
