"""Who is here, as the directory says it: adverts are renewed while a daemon runs, and expire."""

from swarmnode.domain import Advert, DeviceSpec, Limits, PeerId
from swarmnode.simulation.world import World


class Directory:
    """All adverts. Who dies or freezes is listed until the lease ends."""

    def __init__(self, world: World, lease_s: float) -> None:
        self._world = world
        self._lease_s = lease_s
        self._adverts: dict[str, Advert] = {}
        self._lives: dict[str, bool] = {}
        self._listed: tuple[Advert, ...] = ()
        self._listed_s = -1.0

    def publish(self, name: str, *, flops: float, memory_bytes: int, incarnation: int) -> None:
        """A daemon has started."""
        peer = PeerId(name)
        device = DeviceSpec("cpu", name, {"float32": flops}, 1e10, memory_bytes, memory_bytes, 1)
        until_s = self._world.now_s + self._lease_s
        self._adverts[name] = Advert(
            peer, (name,), device, Limits(memory_bytes, 1), "0", incarnation, until_s
        )
        self._lives[name] = True
        self._listed_s = -1.0

    def pause(self, name: str) -> None:
        """The daemon does not renew any more, for now or for ever."""
        self._renew(name)
        self._lives[name] = False

    def resume(self, name: str) -> None:
        self._lives[name] = True

    def peers(self) -> tuple[Advert, ...]:
        """Everybody whose advert has not expired, by name."""
        now_s = self._world.now_s
        if now_s - self._listed_s > self._lease_s / 8 or self._listed_s < 0:
            for name in self._adverts:
                self._renew(name)
            alive = (a for _, a in sorted(self._adverts.items()) if a.expires_at_s > now_s)
            self._listed, self._listed_s = tuple(alive), now_s
        return self._listed

    def _renew(self, name: str) -> None:
        advert, now_s = self._adverts[name], self._world.now_s
        late_s = now_s + self._lease_s - advert.expires_at_s
        if not self._lives[name] or late_s < self._lease_s / 3:
            return
        renewed_s = advert.expires_at_s + late_s // (self._lease_s / 3) * (self._lease_s / 3)
        self._adverts[name] = Advert(
            advert.peer, advert.addresses, advert.device, advert.limits, advert.version,
            advert.incarnation, renewed_s, advert.reach,
        )  # fmt: skip
