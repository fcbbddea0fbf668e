"""A name server that a test can silence."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest

AN_IPV4_ADDRESS = b"\0\1"  # the type of a question


class NameServer:
    """`with NameServer(folder) as server`: resolves every name to 127.0.0.1, unless `silent`.

    A process that is started with `command` knows no other name server.
    """

    def __init__(self, folder: Path) -> None:
        self.silent = False
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        address = f"127.77.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
        resolv = folder / "resolv.conf"
        resolv.write_text(f"nameserver {address}\n")
        # In the service's mount namespace, the file replaces the machine's resolv.conf.
        mount = f'mount --bind {resolv} "$(readlink -f /etc/resolv.conf)" && exec "$@"'
        self.command = ("unshare", "--mount", "sh", "-c", mount, "sh")
        try:
            self._sock.bind((address, 53))
            subprocess.run([*self.command, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self._sock.close()
            pytest.skip(f"needs port 53 and a mount namespace: {error}")

    def __enter__(self) -> NameServer:
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.sendto(b"", self._sock.getsockname())  # ends the thread
        self._thread.join()
        self._sock.close()

    def _serve(self) -> None:
        while (question := self._sock.recvfrom(512))[0]:
            query, client = question
            end = query.index(b"\0", 12) + 5
            is_ipv4 = query[end - 4 : end - 2] == AN_IPV4_ADDRESS
            head = query[:2] + b"\x81\x80\0\1\0%c\0\0\0\0" % is_ipv4
            record = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4\x7f\0\0\1" if is_ipv4 else b""
            if not self.silent:
                self._sock.sendto(head + query[12:end] + record, client)
