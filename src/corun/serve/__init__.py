"""One service: a queue policy, a batcher and an engine behind a socket."""

from corun.serve.batcher import Batcher, Decision
from corun.serve.engine import Engine, ServableEngine, load_engine
from corun.serve.options import ServerOptions
from corun.serve.policies import (
    Edf,
    Fifo,
    Hrrn,
    HrrnStale,
    QueuePolicy,
    Ranking,
    Sjf,
    make_policy,
    policy_names,
    register,
)
from corun.serve.queue import Request, RequestQueue
from corun.serve.server import Server
from corun.serve.statistics import Counts, Segment, Statistics

__all__ = [
    "Batcher",
    "Counts",
    "Decision",
    "Edf",
    "Engine",
    "Fifo",
    "Hrrn",
    "HrrnStale",
    "QueuePolicy",
    "Ranking",
    "Request",
    "RequestQueue",
    "Segment",
    "ServableEngine",
    "Server",
    "ServerOptions",
    "Sjf",
    "Statistics",
    "load_engine",
    "make_policy",
    "policy_names",
    "register",
]
