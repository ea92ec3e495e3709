"""Locks by tickets.

Each contender creates a key of its own in the bucket of locks, by compare-and-set and with a
time to live: his ticket. The revision of that write is his place in line, and his fencing
token. He holds the lock once every earlier ticket that conflicts with his is gone: removed by
its owner, or taken away by a contender after a full time to live of silence. Nobody polls: a
contender reads the line once, then watches what changes, beside one timer for the next
ticket that may fall silent.

What holders do is said in the log, in the order in which it happened: `lock.acquired` before
anything is done under the lock, `lock.released` before the ticket is removed, `lock.lost` by
whoever took the ticket of a possible holder away, before he goes on.

A lock keeps well-behaved holders apart as long as clocks run at about the same speed. Against
one who was paused and does not know it yet there is the token: a resource that refuses tokens
below the highest it has seen is safe whatever happens.
"""
