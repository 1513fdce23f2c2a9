"""Memory, FLOPs and communication of a training run, estimated before it is launched."""
