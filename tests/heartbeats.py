"""A plain ZeroMQ client that also sends ZMTP PINGs: heartbeats.py node|broker ADDRESS

`alive` means that its connection lasted for many PINGs, of which libzmq had each answered in time:
the other side sends nothing else that often.
"""

import os
import sys
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "examples"))
import plain_zeromq_client as plain

EVERY, WITHIN, LONG = 20, 900, 2  # ms, ms, s

context = zmq.Context.instance()
context.setsockopt(zmq.HEARTBEAT_IVL, EVERY)
context.setsockopt(zmq.HEARTBEAT_TIMEOUT, WITHIN)


def stays_connected(socket):
    monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        if monitor.poll(10):
            sys.exit(f"disconnected: {recv_monitor_message(monitor)}")
        yield
    print("alive", flush=True)


kind, address = sys.argv[1:]
if kind == "node":
    client = plain.Client(address, ["news.>"], [])
    for _ in stays_connected(client.socket):
        if client.socket.poll(0):
            client.handle_batch(client.socket.recv_multipart()[1:])
else:
    client = context.socket(zmq.DEALER)
    client.setsockopt(zmq.LINGER, 0)
    client.connect(address)
    client.send_multipart([b"H", b"default", os.urandom(32)])
    print(client.recv_multipart()[1].decode(), flush=True)
    for _ in stays_connected(client):
        pass
