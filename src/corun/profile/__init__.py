"""The profiler: once a second, hosts, processes and GPUs as raw counters on the clock of the requests."""
