"""The files of a source: listed once by name and size, opened by name, local or on S3."""

from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from pipelines.sources.base import SourceError
from vqvae_core.storage import Folder


def list_files(location: str | None, extension: str, what: str) -> list[tuple[str, int]]:
    """(name relative to the location, bytes) of its files with an extension, by name. Raises `SourceError`."""
    if location is None:
        raise SourceError(f"expected the place of {what}, none was given; name it with --source PATH")
    folder = Folder.of(location)
    try:
        if folder.is_local:
            root = Path(folder.uri)
            if not root.is_dir():
                raise SourceError(f"expected {what} at {folder.uri}, found no such folder; name it with --source PATH")
            found = sorted(path for path in root.rglob(f"*{extension}") if path.is_file())
            files = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in found]
        else:
            system, root_path = fs.FileSystem.from_uri(folder.uri)
            selector = fs.FileSelector(root_path, recursive=True, allow_not_found=True)
            found = [info for info in system.get_file_info(selector) if info.path.endswith(extension)]
            files = sorted((info.path[len(root_path) + 1 :], info.size) for info in found)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(f"expected to read {what} at {folder.uri}, but: {reason}; check its permissions") from error
    if not files:
        raise SourceError(f"expected {what} at {folder.uri}, found no *{extension} there; name it with --source PATH")
    return files


def open_source(location: str | None, name: str) -> pa.NativeFile:
    """A random-access file of a source. Raises `SourceError`."""
    folder = Folder.of(location or "")
    try:
        return folder.open(name)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(
            f"expected to read {folder.uri}/{name}, but: {str(error).splitlines()[0]}; check its permissions"
        ) from error
