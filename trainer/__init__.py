"""One rank of training: engine, loop, schedule, checkpoint. Knows neither Ray nor MLflow."""
