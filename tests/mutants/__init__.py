"""Each defence switched off in turn, to see that a test misses it."""
