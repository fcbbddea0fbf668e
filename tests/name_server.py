"""A name server that a test can silence."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest


class NameServer:
    """Resolves every name to 127.0.0.1, unless `silent`.

    A process that is started with `command` knows no other name server.
    """

    def __init__(self, folder: Path) -> None:
        self.silent, self.asked = False, 0
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        address = f"127.77.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
        try:
            self._sock.bind((address, 53))
        except OSError as error:
            pytest.skip(f"needs the right to listen on port 53: {error}")
        resolv = folder / "resolv.conf"
        resolv.write_text(f"nameserver {address}\n")
        # In the service's mount namespace, the file replaces the machine's resolv.conf.
        mount = f'mount --bind {resolv} "$(readlink -f /etc/resolv.conf)" && exec "$@"'
        self.command = ("unshare", "--mount", "sh", "-c", mount, "sh")
        try:
            subprocess.run([*self.command, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs a mount namespace: {error}")
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._sock.sendto(b"", self._sock.getsockname())  # wakes the thread
        self._thread.join()
        self._sock.close()

    def _serve(self) -> None:
        while question := self._sock.recvfrom(512):
            query, client = question
            if not query:
                return
            self.asked += 1
            if self.silent:
                continue
            end = query.index(b"\0", 12) + 5
            is_ipv4 = query[end - 4 : end - 2] == b"\0\1"
            head = query[:2] + b"\x81\x80\0\1" + (b"\0\1" if is_ipv4 else b"\0\0") + b"\0\0\0\0"
            record = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4\x7f\0\0\1" if is_ipv4 else b""
            self._sock.sendto(head + query[12:end] + record, client)
