"""Sharing policies: how a trainer and services share the hardware, what is really in force, and proof that it bites.

sharing      what a launcher uses: prepare a spec, start processes under it, enter arms, describe, close
policies     one file per policy; policy: their protocol; spec: `idle+slo` as objects
page         the shared page; announce: the service's side; gates: the trainer's side
brakes, controllers, forecast, slack, steering    pure rules of the cooperative policies
host, borders, start, observed, selftest          what the machine allows, does and really did
simulation, simulated                             a device in virtual time under the same rules
in_process                                        stream priorities and green contexts inside one process
"""
