"""How many services fit beside a training job: profile, predict, search. Starts nothing itself; see src/plan.py.

question      what is asked                      measured       what was measured, kept per machine
interference  slowdown beside others             tail           percentiles of a queue
estimate      both, with their uncertainty       memory         what fits at all
sequential    when a measurement may stop        search         bisection
planner       profile -> fit -> search           table          the answer for people and programs
bulk          a queue served in batches          batching       which batch bound a service gets
"""
