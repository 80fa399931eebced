"""hivemind's DHT without the rest of hivemind, which imports torch.

hivemind's own __init__ files pull in averaging, experts and torch: 280 MB and 1.7 s against 40 MB
and 0.1 s. So the three packages on the way are empty shells here, and hivemind.utils offers only
what the DHT takes from it. The version is pinned; a test holds torch out.
Import this in the directory child only: hivemind and libp2p cannot share a process.
"""

import importlib
import importlib.util
import sys
import types
import warnings
from pathlib import Path

_HIVEMIND_UTILS = {
    "logging": ("get_logger",),
    "serializer": ("MSGPackSerializer", "SerializerBase"),
    "timed_storage": ("DHTExpiration", "TimedStorage", "ValueWithExpiration", "get_dht_time"),
}
"""What the DHT takes from the package hivemind.utils, by the module that defines it."""


def _import_hivemind() -> None:
    spec = importlib.util.find_spec("hivemind")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    for name in ("hivemind", "hivemind.dht", "hivemind.utils"):
        shell = types.ModuleType(name)
        shell.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = shell
    for part, names in _HIVEMIND_UTILS.items():
        module = importlib.import_module(f"hivemind.utils.{part}")
        for name in names:
            setattr(sys.modules["hivemind.utils"], name, getattr(module, name))


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of hivemind's own imports
    _import_hivemind()
    from hivemind.dht.node import DHTNode
    from hivemind.dht.protocol import ValidationError
    from hivemind.dht.routing import DHTID
    from hivemind.dht.validation import DHTRecord, RecordValidatorBase
    from hivemind.p2p import P2P, P2PDaemonError, PeerID
    from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
    from hivemind.utils.multiaddr import Multiaddr
# hivemind finds its Go daemon by a deprecated function, on every start
warnings.filterwarnings("ignore", "path is deprecated", DeprecationWarning, r"hivemind\.")

__all__ = [
    "DHTID",
    "P2P",
    "ControlFailure",
    "DHTNode",
    "DHTRecord",
    "Multiaddr",
    "P2PDaemonError",
    "PeerID",
    "RecordValidatorBase",
    "ValidationError",
]
