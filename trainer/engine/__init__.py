"""One optimizer step: module, DeepSpeed engine, parameter groups, schedule, moving average."""
