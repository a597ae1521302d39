"""wan.py - the "internet" under tailnet.sh: a UDP relay with delay, jitter, loss and bandwidth limits per host.

Not every kernel has netem; WireGuard rides on UDP, so a relay between the tunnel ends does the same work: what
passes it sees a real round-trip time, real loss and a real bottleneck queue, under an otherwise untouched TCP stack.
It also stands in for Tailscale's DERP relays: traffic that cannot go direct and passes a third machine instead.

Run by tailnet.sh as: wan.py N SETTINGS.json (read again whenever it changes).
Settings per host: delay_ms (one way, at this host's end), jitter_ms, loss_pct, up_mbit, down_mbit; absent or 0 = off.
Host a sends to port 30000 + 256*a + b to reach host b; the packet leaves from port 30000 + 256*b + a.
"""

import contextlib
import heapq
import json
import random
import selectors
import socket
import sys
import time
from pathlib import Path

WG_PORT = 41641
QUEUE_SECONDS = 0.25  # the longest a packet waits at a bottleneck before it is dropped, as in a home router's buffer


def main() -> None:
    n, settings_path = int(sys.argv[1]), Path(sys.argv[2])
    rng = random.Random(0)
    sel = selectors.DefaultSelector()
    socks: dict[tuple[int, int], socket.socket] = {}
    for a in range(n):
        for b in range(n):
            if a != b:
                s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)
                s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
                s.bind(("198.18.0.254", 30000 + 256 * a + b))
                s.setblocking(False)
                socks[a, b] = s
                sel.register(s, selectors.EVENT_READ, (a, b))

    settings: dict[str, dict[str, float]] = {}
    stamp, next_look = None, 0.0
    free_at: dict[tuple[int, str], float] = {}  # when the host's up or down link has sent what it already took
    held: list[tuple[float, int, int, int, bytes]] = []  # (due, order, from, to, packet)
    order = 0
    while True:
        now = time.monotonic()
        if now >= next_look:
            next_look = now + 0.1
            try:
                st = settings_path.stat()
                if (st.st_mtime_ns, st.st_ino) != stamp:
                    with settings_path.open() as f:
                        settings = json.load(f)
                    stamp = (st.st_mtime_ns, st.st_ino)
            except (OSError, ValueError):
                pass
        while held and held[0][0] <= now:
            _, _, a, b, packet = heapq.heappop(held)
            # A full buffer or an unplugged host: the packet is lost, as on a real path.
            with contextlib.suppress(OSError):
                socks[b, a].sendto(packet, (f"198.18.0.{b + 1}", WG_PORT))
        wait = 0.1 if not held else max(0.0, min(0.1, held[0][0] - now))
        for key, _ in sel.select(wait):
            a, b = key.data
            for _ in range(128):
                try:
                    packet = socks[a, b].recv(65535)
                except OSError:
                    break
                now = due = time.monotonic()
                for host, way in ((a, "up"), (b, "down")):
                    conf = settings.get(str(host), {})
                    if rng.random() * 100 < conf.get("loss_pct", 0):
                        due = -1.0
                        break
                    if mbit := conf.get(f"{way}_mbit", 0):
                        start = max(due, free_at.get((host, way), 0.0))
                        if start - due > QUEUE_SECONDS:
                            due = -1.0
                            break
                        due = free_at[host, way] = start + (len(packet) + 28) * 8 / (mbit * 1e6)
                    due += (conf.get("delay_ms", 0) + rng.random() * conf.get("jitter_ms", 0)) / 1e3
                if due >= 0:
                    order += 1
                    heapq.heappush(held, (due, order, a, b, packet))


if __name__ == "__main__":
    main()
