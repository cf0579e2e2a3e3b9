"""One script a claim: each measures this package and a peer in the same run and prints their ratio."""
