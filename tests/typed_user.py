"""A user's program in which a strict type checker finds no error. It is checked, not run."""

import numpy as np
from PIL import Image

import m2f

model: m2f.Model = m2f.load("runs/demo", device="cpu", settings={"evaluation.shortest_edge": 640})
one: m2f.Result = model.predict(np.zeros((4, 5, 3), np.uint8), channels="bgr")
also: m2f.Result = model.predict(Image.new("RGB", (4, 5)), task="semantic", min_score=0.5)
several: list[m2f.Result] = model.predict(["a.jpg", Image.new("RGB", (4, 5))], batch=2)
model.predict("photo.jpg").overlay().save("found.png")
boxes: np.ndarray = one.boxes
names: tuple[str, ...] = one.names
entries = one.to_coco(3)
run: m2f.Run = m2f.train({"name": "x"}, launcher="local")
value: float = run.metrics["val/PQ"]
table: str = m2f.evaluate(run.folder)["val"].table()
m2f.Dataset([np.zeros((4, 5, 3), np.uint8)], [np.zeros((4, 5), np.uint8)], ["road"]).write("shards")
