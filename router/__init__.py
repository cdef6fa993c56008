"""The router: requests, scheduling policy, text and client streams."""
