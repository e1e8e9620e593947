"""`titan bench`: kernels beside their peers, each checked before it is timed, against what this very device can do."""
