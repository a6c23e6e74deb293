"""A user's program in which a strict type checker finds no error. It is checked, not run."""

import numpy as np
import torch
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
found: list[np.ndarray] = [result.masks for result in model.predict("folder")]
tensor = torch.zeros(4, 5, dtype=torch.int64)
segments = [m2f.PanopticImage(tensor, {1: 0}), m2f.PanopticImage([[0, 1]], {1: 0}, areas={1: 2.0})]
ids: np.ndarray = segments[0].id_map
m2f.Dataset([np.zeros((4, 5, 3), np.uint8)] * 2, [tensor, tensor.tolist()], {0: "road"}).write("shards")
m2f.evaluate_panoptic(segments, segments, class_names={0: "road"}, is_thing={0: False})
m2f.evaluate_semantic([tensor], [tensor.tolist()], class_names={0: "road"})
detected = [m2f.Instances(np.zeros((1, 4, 5), bool), [0], scores=[0.5])]
m2f.evaluate_instances(detected, detected, class_names={0: "road"})
