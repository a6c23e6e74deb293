"""Loads a registered model where nothing else of us is: `load_registered.py ADDRESS IMAGE`, prints JSON.

Neither this program nor ray, deepspeed and their like can be imported, but from the wheel inside the model.
"""

import base64
import json
import sys
import time
import warnings
from pathlib import Path

sys.path[:] = [place for place in sys.path if not Path(place or ".", "m2f").is_dir()]
BLOCKED = ("ray", "deepspeed", "webdataset", "boto3", "botocore", "psutil")


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker())
warnings.simplefilter("ignore")

import mlflow.pyfunc  # noqa: E402
import numpy as np  # noqa: E402
from mlflow.pyfunc import scoring_server  # noqa: E402

address, image = sys.argv[1], Path(sys.argv[2]).read_bytes()
model = mlflow.pyfunc.load_model(address)
seconds, answers = [], []
for _ in range(3):
    began = time.process_time()
    answers.append(model.predict({"image": [image]})[0])
    seconds.append(time.process_time() - began)

import cv2  # noqa: E402

import m2f  # noqa: E402

pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def serve(body):
    answer = scoring_server.invocations(json.dumps(body), "application/json", model, model.metadata.get_input_schema())
    return json.loads(answer.response)["predictions"]


def refusal(value):
    try:
        model.predict({"image": [value]})
    except mlflow.exceptions.MlflowException as error:
        return str(error)
    return ""


text = base64.b64encode(image).decode()
served = serve({"inputs": {"image": [text, text]}, "params": {"task": "panoptic"}})
served += serve({"dataframe_records": [{"image": pixels.tolist()}], "params": {"task": "panoptic"}})
json.dump(
    {
        "program": m2f.__file__,
        "cpu_s": seconds,
        "answer": answers[0],
        "same": answers[0] == answers[1] == answers[2] == model.predict({"image": [pixels]})[0],
        "served": [
            one["panoptic"] == answers[0]["panoptic"] and set(one) == {"height", "width", "panoptic"} for one in served
        ],
        "all_instances": len(model.predict({"image": [image]}, params={"thresholds": False})[0]["instances"]),
        "refused": [
            refusal(one) for one in ("/etc/passwd", "http://127.0.0.1/x.png", b"no image", np.zeros((4, 4), int))
        ],
        "example": sorted(serve(json.loads(Path(sys.argv[3]).read_text()))[0]),
        "metadata": model.metadata.metadata["task"],
    },
    sys.stdout,
)
