"""The deterministic simulation: whole clusters in one process, on simulated time, from a seed.

`world` builds a cluster and runs it, `loop` is the event loop it runs on, `network` stands
between the nodes and the log, `leases` between them and the buckets of sessions and locks,
`machine` stands for the machine they run on, `faults` does the harm, `check` judges what came
of it. `bugs` lists the defences that can be switched off to show that `check` would notice.
"""
