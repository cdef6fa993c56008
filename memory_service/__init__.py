"""The memory service: owner of the KV pool's blocks and bytes."""
