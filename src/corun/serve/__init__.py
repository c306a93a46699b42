"""One service: a queue policy, a batcher and an engine behind a socket."""

from corun.serve.batcher import Batcher, Decision
from corun.serve.engine import Engine, ServableEngine, load_engine
from corun.serve.options import ServerOptions
from corun.serve.policies import Fifo, QueuePolicy, make_policy, policy_names, register
from corun.serve.queue import Request, RequestQueue
from corun.serve.server import Server
from corun.serve.statistics import Counts, Segment, Statistics

__all__ = [
    "Batcher",
    "Counts",
    "Decision",
    "Engine",
    "Fifo",
    "QueuePolicy",
    "Request",
    "RequestQueue",
    "Segment",
    "ServableEngine",
    "Server",
    "ServerOptions",
    "Statistics",
    "load_engine",
    "make_policy",
    "policy_names",
    "register",
]
