"""The compute service: forward passes through the block tables it is sent."""
