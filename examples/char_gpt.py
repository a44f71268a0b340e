"""A small GPT over bytes, trained data-parallel on the source of Python's standard library.

Written as anybody would write it for ``torchrun``: the process group, DistributedDataParallel, an
optimizer, a loader. What makes it survive the loss of a card or a node is the decorator, ``run.track`` and
``run.steps``. It is deterministic to the bit, so a run that failed five times ends with the SHA-256 of a run
that never failed. Start it with ``python examples/char_gpt.py``.
"""

import glob
import hashlib
import os
import sysconfig

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - as everybody imports it
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import resilience


def read_text(limit: int = 1_000_000) -> torch.Tensor:
    """The first ``limit`` bytes of the standard library's own source, as a uint8 tensor."""
    text = bytearray()
    for path in sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "*.py"))):
        with open(path, "rb") as file:
            text += file.read(limit - len(text))
        if len(text) >= limit:
            break
    return torch.frombuffer(text, dtype=torch.uint8)


class Loader:
    """Shuffled windows of the text, each for one rank once an epoch; resumes at its exact place."""

    def __init__(
        self, text: torch.Tensor, *, block: int, batch: int, rank: int, world: int, seed: int
    ) -> None:
        self.text, self.block, self.batch, self.rank, self.world = text, block, batch, rank, world
        self.seed = seed
        self.samples = (len(text) - 1) // block
        self.epoch, self.position, self.order = 0, 0, self._shuffle(0)
        self.seen = 0  # sum of SHA-256 over the ids seen: the same for the same multiset, in whatever order
        self.ids: list[int] = []  # of the newest batch

    def _shuffle(self, epoch: int) -> torch.Tensor:
        return torch.randperm(self.samples, generator=torch.Generator().manual_seed(self.seed * 7919 + epoch))

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch of this rank: inputs and targets, both (batch, block) int64."""
        if self.position + self.batch * self.world > self.samples:
            self.epoch, self.position, self.order = self.epoch + 1, 0, self._shuffle(self.epoch + 1)
        mine = self.position + self.rank * self.batch
        picked = self.order[mine : mine + self.batch].tolist()
        self.position += self.batch * self.world
        self.ids = [self.epoch * self.samples + i for i in picked]
        for i in self.ids:
            self.seen = (self.seen + int(hashlib.sha256(str(i).encode()).hexdigest(), 16)) % 2**256
        windows = torch.stack([self.text[i * self.block : (i + 1) * self.block + 1] for i in picked]).long()
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self) -> dict[str, int | str]:
        return {"epoch": self.epoch, "position": self.position, "seen": f"{self.seen:064x}"}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self.seen = int(str(state["seen"]), 16)
        self.order = self._shuffle(self.epoch)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c)
        x = x + F.dropout(self.out(y), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class GPT(nn.Module):
    def __init__(self, block: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(block, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        h = self.tokens(x) + self.places.weight[: x.shape[1]]
        logits = self.norm(self.blocks(h)) @ self.tokens.weight.T  # the head is the embedding
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """SHA-256 over the names and bytes of all parameters and optimizer state, sorted by name."""
    names = {p: name for name, p in model.named_parameters()}
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for p, state in optimizer.state.items():
        tensors |= {f"optimizer/{names[p]}/{key}": value for key, value in state.items()}
    sha = hashlib.sha256()
    for name in sorted(tensors):
        data = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8)
        sha.update(name.encode() + data.numpy().tobytes())
    return sha.hexdigest()


@resilience.job(workers=4, spares=2)
def train(
    run: resilience.Run,
    *,
    steps: int = 200,
    lr: float = 3e-3,
    batch: int = 8,
    block: int = 64,
    width: int = 64,
    layers: int = 4,
    heads: int = 4,
    dropout: float = 0.1,
    seed: int = 0,
) -> dict[str, object]:
    """Train on ``batch`` windows of ``block`` bytes a rank and step; digests of what came out of it."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo"
    )  # rank, world size and address come from the environment, as under torchrun
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed)
    model = DistributedDataParallel(GPT(block, width, layers, heads, dropout))
    # DDP lays its gradient buckets out anew after its first backward pass, and their layout decides in which
    # order gradients are summed. One empty pass now, and a resumed run sums as the uninterrupted one does.
    model(torch.zeros(1, block, dtype=torch.long), torch.zeros(1, block, dtype=torch.long)).backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    loader = Loader(read_text(), block=block, batch=batch, rank=rank, world=world, seed=seed)
    torch.manual_seed(seed * world + rank)  # from here on every rank draws its own dropout masks
    run.track(model=model, optimizer=optimizer, loader=loader)

    loss = torch.full((), float("nan"))
    for _ in run.steps(steps):
        loss = model(*loader.next())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss.item())

    seen = [loader.seen]
    if world > 1:
        seen *= world
        dist.all_gather_object(seen, loader.seen)
    result: dict[str, object] = {"sha256": digest(model, optimizer), "samples": f"{sum(seen) % 2**256:064x}"}
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    print(train.launch().value)
