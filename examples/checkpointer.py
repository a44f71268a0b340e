"""A training loop that keeps its own launcher: ``python examples/checkpointer.py runs/demo 200``.

Kill it at any step and start it again: it goes on where it was, to the same last bits.
"""

import sys

import torch

from resilience import Checkpointer


def train(url: str, steps: int) -> list[float]:
    """Fit a sum; the last weights."""
    torch.manual_seed(1)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    state = {"model": model, "optimizer": optimizer, "seen": 0}

    with Checkpointer(url) as checkpointer:
        done = checkpointer.restore(into=state) or 0
        for step in range(done + 1, steps + 1):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state["seen"] += len(x)
            if step % 10 == 0:
                checkpointer.save(step, state)  # training waits for a copy in memory, no longer
            print(f"step {step}, loss {loss.item():.4f}, seen {state['seen']}", flush=True)
    return model.weight.flatten().tolist()


if __name__ == "__main__":
    print("weights", train(sys.argv[1], int(sys.argv[2])))
