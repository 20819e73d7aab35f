"""Tests of the delaying proxies."""

import socket
import threading
import time

from tests.wan import DelayProxies


def test_a_proxy_delays_both_directions_and_passes_the_end_on():
    """An echo through the proxy takes two delays, and closing one side closes the other."""
    with DelayProxies(1, delay_s=0.05) as network:
        arguments = network.listen_args(0)
        port = int(arguments[arguments.index("--data-port") + 1])
        assert arguments[-1] == network.address(0)
        with socket.create_server(("127.0.0.1", port)) as server:
            thread = threading.Thread(target=echo, args=(server,))
            thread.start()
            with socket.create_connection((network.address(0), port)) as connection:
                started = time.monotonic()
                connection.sendall(b"hello")
                assert connection.recv(5, socket.MSG_WAITALL) == b"hello"
                assert time.monotonic() - started >= 0.1
                network.set_delay(0.0)
                connection.sendall(b"again")
                assert connection.recv(5, socket.MSG_WAITALL) == b"again"
            thread.join(10)
            assert not thread.is_alive()


def echo(server: socket.socket) -> None:
    """Send everything of one connection back."""
    connection, _ = server.accept()
    with connection:
        while data := connection.recv(100):
            connection.sendall(data)
