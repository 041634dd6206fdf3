"""Batches of tokens for one rank: the order of `Order` over token shards, read ahead by a thread."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from vqvae_core.order import Order, OrderConfig, lanes_of
from vqvae_core.token_shards import TokenShards, TokenTable


class TokenLoader:
    """The training tokens of one rank. Raises `InputError` where the ranks cannot share the lanes."""

    def __init__(self, tokens: TokenShards, config: OrderConfig, *, rank: int = 0, world_size: int = 1) -> None:
        files = [(path, tokens.artifact.files[path].rows) for path in tokens.shards("train")]
        self.order = Order(files, config)
        self.lanes = lanes_of(rank, world_size, config)
        self._tokens = tokens

    def batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens, int64 (B / world_size, H, W, G), and labels, int64 (B / world_size,), -1 where there is none, of
        steps start to stop - 1. Raises `ArtifactError` for a file that is not what the manifest says."""
        tables: dict[int, Future[TokenTable]] = {}
        config, window = self.order.config, (-1, -1)
        share = config.batch_size // config.num_lanes
        with ThreadPoolExecutor(2, thread_name_prefix="tokens") as pool:
            try:
                for step in range(start, stop):
                    epoch, index = divmod(step, self.order.steps_per_epoch)
                    if window != (window := (epoch, index * share // config.shuffle_window)):
                        wanted = self.order.near(step, self.lanes)
                        kept = {number: table for number, table in tables.items() if number in set(wanted)}
                        for number in wanted:
                            if number not in kept:
                                kept[number] = pool.submit(self._tokens.read, self.order.files[number][0])
                        tables = kept
                    yield self._batch(step, tables)
            finally:
                pool.shutdown(cancel_futures=True)

    def _batch(self, step: int, tables: dict[int, "Future[TokenTable]"]) -> tuple[Tensor, Tensor]:
        places, shape = self.order.batch(step, self.lanes), self._tokens.shape
        tokens = np.empty((len(places.rows), shape.height, shape.width, shape.num_groups), np.int64)
        labels = np.empty(len(places.rows), np.int64)
        for number in np.unique(places.files).tolist():
            mine, table = places.files == number, tables[number].result()
            tokens[mine] = table.tokens[places.rows[mine]]
            labels[mine] = table.labels[places.rows[mine]]
        return torch.from_numpy(tokens), torch.from_numpy(labels)
