"""A process of a loader: it decodes images of mapped shards into mapped batches, until its loader is gone.

python -m vqvae_core.loader_worker SOCKET_NUMBER     # started by vqvae_core.loader only
"""

import json
import mmap
import os
import signal
import socket
import sys
import time
from typing import Any

import numpy as np

from vqvae_core.augment import AugmentConfig
from vqvae_core.decoder import Decoder, batch_memory
from vqvae_core.errors import InputError
from vqvae_core.image_shards import TarIndex
from vqvae_core.loader_channel import Channel, ChannelClosedError


def serve(channel: Channel) -> None:
    """Answer what a loader asks for. The first message has the batches' file; an error is an answer too."""
    start, file = channel.receive()
    size = start["size"]
    decoder = Decoder(AugmentConfig(**start["augment"]), size, start["seed"])
    mapped = _mapped(file, mmap.PROT_READ | mmap.PROT_WRITE)
    batches = batch_memory(len(mapped) - 64, mapped).reshape(-1, size, size, 3)
    maps: dict[int, mmap.mmap] = {}
    rate = 0.0  # images in a second, of the step before
    while True:
        message, file = channel.receive()
        begin = time.perf_counter()
        kind, number = message["do"], message.get("shard", -1)
        if kind == "open":
            maps[number] = _mapped(file, mmap.PROT_READ)
            decoder.open(number, maps[number], TarIndex(**json.loads(message["index"])), message["where"])
        elif kind == "close":
            decoder.close(number)
            maps.pop(number).close()
        else:
            channel.send({**_decode(decoder, batches, message), "rate": rate})
            rate = len(message["rows"]) / (time.perf_counter() - begin)


def _decode(decoder: Decoder, batches: np.ndarray, message: dict[str, Any]) -> dict[str, Any]:
    first, rows, broken = message["first"], message["rows"], ""
    try:
        decoder.decode(message["epoch"], message["shards"], rows, batches[first : first + len(rows)])
    except InputError as error:
        broken = str(error)
    return {"error": broken}


def _mapped(file: int | None, access: int) -> mmap.mmap:
    assert file is not None
    try:
        return mmap.mmap(file, 0, prot=access)
    finally:
        os.close(file)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the loader, whose end ends this
    try:
        serve(Channel(socket.socket(fileno=int(sys.argv[1]))))
    except ChannelClosedError:
        os._exit(0)
