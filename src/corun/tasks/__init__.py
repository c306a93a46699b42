"""The control plane: a registry of tasks, the model chosen for each, and the processes or containers that serve them.

task        what is registered: kind of input, priority, rate, SLO, quality, allowed models
store       the registry on disk: one SQLite file, safe with several processes and across crashes
quality     documented accuracy of released weights, or the user's own table
profiles    measured latency, memory and interference of a model on this hardware
choice      the model for one task, and why each other one lost
priorities  the models of all tasks together, when not everything fits
runtime     what a replica is; processes and containers that run one
"""
