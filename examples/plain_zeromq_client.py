"""A plain ZeroMQ client that joins a mesh: it subscribes, publishes, serves and makes requests.

Written from the protocol page alone (src/wire/protocol.md). It requires a mesh in open mode:

    peerbus node --trust open --listen 127.0.0.1:4000 --serve echo --publish news.tick
    pip install pyzmq msgpack
    python plain_zeromq_client.py 127.0.0.1:4000

or with the Unix socket of a node that the same user runs on this host:

    python plain_zeromq_client.py ipc://$XDG_RUNTIME_DIR/peerbus/default/k3vq7a2m.sock

It serves `double` and calls `echo`; it publishes the events of `news.>` again as
`heard.python`. It leaves out ordering keys, guaranteed messages, and limits on what it sends
(the peer's windows, 4 MiB by default, are far larger than its traffic).
"""

import os
import struct
import sys
import time

import msgpack
import zmq

HELLO, ACCEPT, BYE, PROBE, PROBE_REPLY = 1, 2, 6, 7, 8
EVENT, ONE_WAY, REPLY, FAILURE, REQUEST = 16, 17, 18, 19, 20
EVENTS, CALLS, REPLIES = range(3)
LANES = {EVENT: EVENTS, ONE_WAY: CALLS, REQUEST: CALLS, REPLY: REPLIES, FAILURE: REPLIES}
MAX_BODY, WINDOW = 1 << 20, 4 << 20
HEARTBEAT = 1.0


def new_id():
    """A UUIDv7 (RFC 9562)."""
    data = bytearray(struct.pack(">Q", int(time.time() * 1000))[2:] + os.urandom(10))
    data[6] = 0x70 | data[6] & 0x0F
    data[8] = 0x80 | data[8] & 0x3F
    return bytes(data)


def cost(body, *texts):
    """The cost of a message in its lane."""
    return 128 + len(body) + sum(len(text) for text in texts if text)


class Client:
    def __init__(self, address, patterns, services):
        self.id = os.urandom(32)
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, self.id + os.urandom(16))
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address if "://" in address else f"tcp://{address}")
        self.patterns, self.services = patterns, services
        self.consumed = [0] * 6
        self.waiting = {}
        self.peer = None
        self.last_sent = 0.0
        hello = [HELLO, "default", self.id, struct.unpack(">Q", os.urandom(8))[0], "python"]
        hello += [MAX_BODY, [WINDOW] * 3, 0, patterns, [[name, 1] for name in services], []]
        self.send(hello)

    def send(self, *records):
        """Sends the consumed counts, then the records. Without records it is a heartbeat."""
        packed = [msgpack.packb(record) for record in records]
        framed = b"".join(struct.pack(">I", len(record)) + record for record in packed)
        self.socket.send_multipart([msgpack.packb([1] + self.consumed), framed])
        self.last_sent = time.monotonic()

    def publish(self, topic, body):
        self.send([EVENT, new_id(), topic, body])

    def request(self, service, body, then):
        request = new_id()
        self.waiting[request] = then
        self.send([REQUEST, request, service, body, None, None, True, 5000])

    def run(self):
        """Handles incoming batches until the peer sends a bye."""
        while True:
            if self.socket.poll(100):
                preamble, *frames = self.socket.recv_multipart()
                version = msgpack.unpackb(preamble)[0]
                if version != 1:
                    sys.exit(f"the peer speaks version {version}")
                self.handle_batch(frames)
            if time.monotonic() - self.last_sent >= HEARTBEAT:
                self.send()

    def handle_batch(self, frames):
        records, bodies = frames[0] if frames else b"", iter(frames[1:])
        last = (None, None)  # the id and destination that later records omit
        while records:
            (size,) = struct.unpack_from(">I", records)
            record = msgpack.unpackb(records[4 : 4 + size])
            records = records[4 + size :]
            if record[0] not in LANES:
                self.handle_control(record)
                continue
            record += [None] * (12 - len(record))
            if isinstance(record[1], int):
                stamp = int.from_bytes(last[0][:6], "big") + record[1]
                tail = (int.from_bytes(last[0][12:], "big") + 1) % (1 << 32)
                record[1] = stamp.to_bytes(6, "big") + last[0][6:12] + tail.to_bytes(4, "big")
            if record[2] is None and record[0] not in (REPLY, FAILURE):
                record[2] = last[1]
            last = (record[1], record[2] if isinstance(record[2], str) else last[1])
            if isinstance(record[3], int):
                record[3] = next(bodies)
            self.handle_message(record)

    def handle_control(self, record):
        record += [None] * (11 - len(record))  # trailing fields may be left out
        if record[0] == HELLO:
            self.peer, name, services = record[2], record[4], [name for name, _ in record[9] or []]
            print(f"met {name}, which serves {services}", flush=True)
            if self.id < self.peer:  # the smaller id chooses the link; there is only one
                self.send([ACCEPT])
                self.handle_link()
        elif record[0] == ACCEPT:
            self.handle_link()
        elif record[0] == PROBE:
            self.send([PROBE_REPLY, record[1]])
        elif record[0] == BYE:
            sys.exit(f"goodbye: {record[2]}")

    def handle_link(self):
        print("linked", flush=True)
        self.request("echo", b"hello from Python", lambda text: print(f"echo: {text}", flush=True))

    def handle_message(self, record):
        kind, message, destination, body, _, correlation = record[:6]
        if kind == EVENT:
            print(f"{destination}: {body.decode()}", flush=True)
            self.publish("heard.python", b"I heard " + body)
        elif kind == REQUEST and destination == "double":
            self.send([REPLY, new_id(), None, b"%d" % (2 * int(body)), None, message])
        elif kind == REQUEST:
            failure = msgpack.packb(["no_service", "not served here"])
            self.send([FAILURE, new_id(), None, failure, None, message])
        elif kind == REPLY and correlation in self.waiting:
            self.waiting.pop(correlation)(body.decode())
        elif kind == FAILURE and correlation in self.waiting:
            self.waiting.pop(correlation)(": ".join(msgpack.unpackb(body)))
        lane = LANES[kind]
        headers = record[11] or []
        texts = (record[8], record[9], record[10], *headers)
        self.consumed[2 * lane] += 1
        self.consumed[2 * lane + 1] += cost(body, *texts) + 16 * len(headers)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        Client(sys.argv[1], ["news.>"], ["double"]).run()
    except KeyboardInterrupt:
        pass
