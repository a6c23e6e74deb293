"""One optimizer step: module, DeepSpeed engine, parameter groups, schedule and moving average."""
