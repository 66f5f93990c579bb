"""Speed, side by side with what a user would otherwise write. Above the steps.

Each benchmark runs a plain script's way and this package's on the same cells, in turn, several
times, and reports medians and ratios with the machine and the commit they belong to. `networks`
needs torch alone.
"""
