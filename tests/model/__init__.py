"""Small models of the protocols, and an explorer that walks through all of their interleavings."""
