"""The training that every system of this benchmark runs: a tiny causal transformer, DDP over gloo.

It imports none of the systems, so that none pays for another's imports when its workers start. Each rank says
in one shared file which step it has completed, when and in which process: that is all the harness looks at.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody imports it
from torch import nn

BLOCK, WIDTH, LAYERS, BATCH = 64, 64, 4, 8


@dataclass(frozen=True)
class Settings:
    """One measured run. ``lines``: file of completed steps; ``stop``: file that names the step to stop at."""

    directory: str
    lines: str
    stop: str
    ranks: int
    every: int
    steps: int
    kills: int

    @classmethod
    def load(cls, path: str) -> Settings:
        return cls(**json.loads(Path(path).read_text()))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.embed = nn.Embedding(256, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        # Not a buffer: DDP would broadcast it before every step.
        self.mask = nn.Transformer.generate_square_subsequent_mask(BLOCK)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.encoder(self.embed(x[:, :-1]), mask=self.mask, is_causal=True)
        return F.cross_entropy((h @ self.embed.weight.T).flatten(0, 1), x[:, 1:].flatten())


class Loader:
    """An endless stream of batches with a position, the same in every system."""

    def __init__(self, rank: int) -> None:
        self.rank, self.position = rank, 0

    def next(self) -> torch.Tensor:
        self.position += 1
        seed = self.position * 1000 + self.rank
        return torch.randint(0, 256, (BATCH, BLOCK + 1), generator=torch.Generator().manual_seed(seed))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def build(rank: int, wrap: Any) -> tuple[Any, torch.optim.Optimizer, Loader]:
    """Model (made data-parallel by ``wrap``), optimizer, loader."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = wrap(Model())
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3), Loader(rank)


def train_step(model: Any, optimizer: torch.optim.Optimizer, loader: Loader) -> float:
    loss = model(loader.next())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.item())


class Lines:
    """Appends ``monotonic-time rank pid completed-steps``, one line a step, and says when to stop."""

    def __init__(self, settings: Settings, rank: int) -> None:
        self._fd = os.open(settings.lines, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._stop = settings.stop
        self._rank = rank

    def done(self, steps: int) -> bool:
        """``steps`` are completed. True: leave the loop here (all ranks at the same step)."""
        os.write(self._fd, f"{time.monotonic():.6f} {self._rank} {os.getpid()} {steps}\n".encode())
        try:
            return steps >= int(Path(self._stop).read_text() or sys_maxsize)
        except FileNotFoundError:
            return False


sys_maxsize = 2**62  # an empty stop file is one that is being written


def save_file(path: str, state: dict[str, Any]) -> None:
    """``torch.save``, durable and whole: what a careful user writes."""
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
