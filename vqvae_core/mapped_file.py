"""Files of an artifact in memory: mapped where they are local, else fetched once into a file without a name."""

import contextlib
import mmap
import os
import tempfile
from pathlib import Path

from vqvae_core.artifacts import Artifact, ArtifactError


class MappedFile:
    """A whole file, mapped, and its number, by which other processes can map it too."""

    def __init__(self, file: int, num_bytes: int, access: int = mmap.PROT_READ) -> None:
        self.file, self.num_bytes = file, num_bytes
        self.data = mmap.mmap(file, num_bytes, prot=access)

    @classmethod
    def nameless(cls, num_bytes: int) -> "MappedFile":
        """A writable one that is gone with the last process that has it, however that ends."""
        if hasattr(os, "memfd_create"):
            file = os.memfd_create("vqvae")
        else:
            with tempfile.TemporaryFile() as temporary:
                file = os.dup(temporary.fileno())
        os.ftruncate(file, num_bytes)
        return cls(file, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE)

    @classmethod
    def open(cls, artifact: Artifact, path: str, known: dict[str, tuple[int, ...]]) -> "MappedFile":
        """A file of an artifact, its hash checked. known: what files were whole before, by path, which is added to; a
        local one that has not been touched since is not hashed again. Raises `ArtifactError`."""
        if not artifact.folder.is_local:
            data = artifact.read(path)
            made = cls.nameless(len(data))
            made.data[:] = data
            return made
        entry = artifact.files[path]
        try:
            file = os.open(Path(artifact.folder.path(path)), os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise artifact.broken(path, f"{entry.bytes} bytes", "nothing") from None
        try:
            facts = os.fstat(file)
            if facts.st_size != entry.bytes:
                raise artifact.broken(path, f"{entry.bytes} bytes", f"{facts.st_size} bytes")
            found = cls(file, entry.bytes)
            now = facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns
            if known.get(path) != now:
                artifact.check(path, found.data)
                known[path] = now
        except ArtifactError:
            os.close(file)
            raise
        return found

    def close(self) -> None:
        os.close(self.file)
        with contextlib.suppress(BufferError):  # somebody still looks at it: it goes with the last view
            self.data.close()
