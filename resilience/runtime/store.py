"""The rendezvous store of one generation: a process of the agent's, so that no rank is the special one.

It serves torch's own TCPStore, which is what ``torch.distributed``'s ``env://`` rendezvous connects to; the ranks
find its address in ``MASTER_ADDR`` and ``MASTER_PORT`` as under torchrun (``TORCHELASTIC_USE_AGENT_STORE``
tells torch that rank 0 is not to open one). Without torch there is nothing to serve.
"""

from __future__ import annotations

import contextlib
import sys

from resilience.runtime.wire import Channel, Closed


def serve(channel: Channel) -> int:
    """Open the store, say where it listens, and serve until the agent goes or kills this process."""
    port = 0
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available():
            store = dist.TCPStore(  # type: ignore[attr-defined]
                "0.0.0.0", 0, is_master=True, wait_for_workers=False
            )
            port = store.port
    channel.send({"t": "store", "port": port})
    with contextlib.suppress(Closed):
        channel.receive()
    return 0
